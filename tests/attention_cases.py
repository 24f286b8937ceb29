"""Inputs of attention, easy and adversarial, and dense attention in float64 over whole batches."""

from dataclasses import dataclass, field

import numpy as np

from halfspace import typed

KINDS = (
    "random",
    "clustered",
    "wide bands",  # first-plane bands too wide to decide: both planes are scanned
    "huge logits",  # second-plane bands too wide as well: everything is scanned at full precision
    "near one-hot",
    "duplicate keys",
    "constant values",
    "constant keys",
    "one dominating key",
    "one loud coordinate",
    "common mean",
    "growing norms",
    "heavy-tailed values",
    "tiny values",
    "keys of all sizes",
    "two opposite groups",
)


@dataclass
class Case:
    """q [batch, heads, m, d], k [batch, kv_heads, n, d], v [batch, kv_heads, n, d_v]."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    scale: float | None = None
    is_causal: bool = False
    mask: np.ndarray | None = None
    logits: np.ndarray = field(init=False)  # float64 [batch, heads, m, n], -inf where hidden

    def __post_init__(self):
        group = self.q.shape[1] // self.k.shape[1]
        q, k = self.q.astype(np.float64), np.repeat(self.k.astype(np.float64), group, axis=1)
        scale = 1.0 / np.sqrt(q.shape[-1]) if self.scale is None else self.scale
        s = scale * (q @ k.swapaxes(-1, -2))
        m, n = s.shape[2:]
        if self.is_causal:
            s = np.where(np.arange(n) <= np.arange(m)[:, None], s, -np.inf)
        if self.mask is not None:
            s = np.where(self.mask[:, None], s, -np.inf)
        self.logits = s

    @property
    def values(self):
        """Values as float64 [batch, heads, n, d_v]."""
        return np.repeat(self.v.astype(np.float64), self.q.shape[1] // self.v.shape[1], axis=1)

    def probabilities(self, kept=None):
        """Softmax weights [batch, heads, m, n], over ``kept`` keys only if given."""
        s = self.logits if kept is None else np.where(kept, self.logits, -np.inf)
        top = s.max(axis=-1, keepdims=True, initial=-np.inf)
        w = np.exp(s - np.where(np.isfinite(top), top, 0.0))
        total = w.sum(axis=-1, keepdims=True)
        return w / np.where(total > 0, total, 1.0)

    def softmax(self, kept=None):
        return self.probabilities(kept) @ self.values

    def relu(self, threshold, power=1):
        w = np.maximum(self.logits - threshold, 0.0) ** power
        total = w.sum(axis=-1, keepdims=True)
        return (w @ self.values) / np.where(total > 0, total, 1.0)

    def largest(self, r):
        """Boolean [batch, heads, m, n]: the r largest visible logits, ties to the smaller index."""
        order = np.argsort(-self.logits, axis=-1, kind="stable")[..., :r]
        kept = np.zeros(self.logits.shape, bool)
        np.put_along_axis(kept, order, True, axis=-1)
        return kept & np.isfinite(self.logits)


def make(
    kind,
    seed=0,
    n=700,
    m=4,
    d=32,
    value_dim=None,
    batch=1,
    heads=3,
    kv_heads=1,
    dtype="float32",
    visibility="all",
):
    """Return a case; ``visibility`` is "all", "causal" or "masked"."""
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    value_dim = value_dim or d
    q = rng.standard_normal((batch, heads, m, d))
    k = rng.standard_normal((batch, kv_heads, n, d))
    v = rng.standard_normal((batch, kv_heads, n, value_dim))
    keys_of_queries = np.repeat(k, heads // kv_heads, axis=1)[:, :, :m]
    if kind == "clustered":
        centres = 3 * rng.standard_normal((8, d))
        k = centres[rng.integers(0, 8, k.shape[:3])] + 0.3 * k
        q = centres[rng.integers(0, 8, q.shape[:3])] + q
    elif kind == "wide bands":
        q *= 20
    elif kind == "huge logits":
        q *= 1e4
    elif kind == "near one-hot" and m <= n:
        q = 6 * keys_of_queries + 0.1 * q
    elif kind == "duplicate keys":
        k = k[:, :, rng.integers(0, max(n // 50, 1), n)]
    elif kind == "constant values":
        v = np.full_like(v, 3.7)
    elif kind == "constant keys":
        k = np.broadcast_to(k[:, :, :1], k.shape)
    elif kind == "one dominating key":
        k[:, :, n // 2] = 10 * q[:, :1, 0]
    elif kind == "one loud coordinate":
        k[..., 0] *= 50
    elif kind == "common mean":
        k += 30 * rng.standard_normal(d)
    elif kind == "growing norms":
        k *= np.geomspace(1e-3, 10, n)[:, None]
    elif kind == "heavy-tailed values":
        v = rng.standard_cauchy(v.shape) * 100
    elif kind == "tiny values":
        v *= 1e-20
    elif kind == "keys of all sizes":
        k *= rng.choice([0.0, 1e-42, 1e-35, 1e-10, 1.0, 3.0], (batch, kv_heads, n, 1))
    elif kind == "two opposite groups":
        k = np.sign(rng.standard_normal((batch, kv_heads, n, 1))) * np.ones(d) + 1e-4 * k
        v = np.where(k[..., :1] > 0, 1000.0, -1000.0) + v
    mask = None
    if visibility == "masked":
        mask = rng.random((batch, m, n)) < 0.5
        mask[:, 0] = False
        mask[:, -1, : n // 2] = False
    return Case(
        typed(q, dtype),
        typed(k, dtype),
        typed(v, dtype),
        is_causal=visibility == "causal",
        mask=mask,
    )


def between(logits, quantile):
    """Return a threshold near a quantile that no logit is near: the middle of a wide gap."""
    ordered = np.sort(logits[np.isfinite(logits)])
    at = int(quantile * (ordered.size - 1))
    window = ordered[max(at - 20, 0) : at + 20]
    gaps = np.diff(window)
    widest = int(np.argmax(gaps)) if gaps.size else 0
    if not gaps.size or gaps[widest] < 1e-9 * max(1.0, np.abs(window).max()):
        return float(ordered[0] - 0.5)
    return float((window[widest] + window[widest + 1]) / 2)
