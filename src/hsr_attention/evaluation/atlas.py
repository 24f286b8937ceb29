"""Where the attention of a head lies: keys needed, sinks, recent tokens, and what policies do there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hsr_attention.evaluation import capture, output_error
from hsr_attention.kv_cache import KVCache
from hsr_attention.policies import DEFAULT_EPSILON, SoftmaxPolicy

SHARES = (0.9, 0.99, 0.999)
SINKS, RECENT = 4, 64
QUERIES = 32
DEFAULT = f"epsilon={DEFAULT_EPSILON}"
POLICIES: dict[str, SoftmaxPolicy] = {
    "epsilon=0.1": SoftmaxPolicy(epsilon=0.1),
    DEFAULT: SoftmaxPolicy(),
    "epsilon=0.01": SoftmaxPolicy(epsilon=0.01),
    "top_r=64": SoftmaxPolicy(top_r=64),
    "top_r=64, drop": SoftmaxPolicy(top_r=64, tail="drop"),
}


def analyse_layer(
    layer: int,
    q: Any,
    k: Any,
    v: Any,
    scale: float,
    policies: dict[str, SoftmaxPolicy] = POLICIES,
) -> dict[str, Any]:
    """Return what each head of a layer does at its last positions, as plain lists over heads.

    Parameters
    ----------
    q : torch [heads, m, d]
        Of the newest m positions, causal among themselves.
    k, v : torch [kv_heads, n, d]

    Returns
    -------
    dict
        ``keys_needed``: for each share of the mass the mean number of keys that hold it, largest
        first; ``sinks`` and ``recent``: mean mass on the first 4 and the newest 64 keys; ``policies``:
        density, median certificate and mean error as shares of the largest value, rows and
        violations.
    """
    n, m = k.shape[1], q.shape[1]
    group = q.shape[0] // k.shape[0]
    arrays = [x.double().numpy() for x in (q, k, v)]
    needed: dict[str, list[float]] = {f"{share:g}": [] for share in SHARES}
    sinks, recent, exact = [], [], []
    for head in range(q.shape[0]):
        weights = _weights(arrays[0][head], arrays[1][head // group], scale)
        exact.append(weights @ arrays[2][head // group])
        for share, count in zip(SHARES, _needed(weights, SHARES), strict=True):
            needed[f"{share:g}"].append(float(count.mean()))
        sinks.append(float(weights[:, :SINKS].sum(axis=1).mean()))
        newest = [
            weights[i, max(0, n - m + i + 1 - RECENT) : n - m + i + 1].sum() for i in range(m)
        ]
        recent.append(float(np.mean(newest)))
    biggest = np.abs(arrays[2]).max(axis=(1, 2)).repeat(group)
    return {
        "layer": layer,
        "n": n,
        "queries": m,
        "keys_needed": needed,
        "sinks": sinks,
        "recent": recent,
        "policies": _policies(q, k, v, scale, np.stack(exact), biggest, policies),
    }


def keys_needed(
    q: Any, k: Any, scale: float, shares: Sequence[float] = SHARES
) -> list[list[float]]:
    """Return, for each share of the mass and each head, the mean number of keys that hold it."""
    group = q.shape[0] // k.shape[0]
    queries, keys = q.double().numpy(), k.double().numpy()
    counts = [
        [c.mean() for c in _needed(_weights(queries[h], keys[h // group], scale), shares)]
        for h in range(len(queries))
    ]
    return np.array(counts).T.tolist()


def _weights(q: NDArray[Any], k: NDArray[Any], scale: float) -> NDArray[np.float64]:
    """Softmax weights [m, n] of the newest m positions, causal among themselves."""
    m, n = len(q), len(k)
    logits = scale * (q @ k.T)
    logits[np.arange(n)[None, :] > np.arange(n - m, n)[:, None]] = -np.inf
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def _needed(weights: NDArray[Any], shares: Sequence[float]) -> list[NDArray[np.int64]]:
    held = np.cumsum(-np.sort(-weights, axis=1), axis=1)
    return [(held < share - 1e-12).sum(axis=1) + 1 for share in shares]


def _policies(
    q: Any,
    k: Any,
    v: Any,
    scale: float,
    exact: NDArray[Any],
    biggest: NDArray[Any],
    policies: dict[str, SoftmaxPolicy],
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    n, m = k.shape[1], q.shape[1]
    cache = KVCache(SoftmaxPolicy())  # a policy that codes values, so that it can serve all
    cache.append(k[None], v[None])
    for name, policy in policies.items():
        cache.use_policy(policy)
        answers = [
            cache.attend(
                q[None, :, i : i + 1], scale, tokens=n - m + i + 1, return_certificate=True
            )
            for i in range(m)
        ]  # one position after another, as decoding does: many at once are answered as a prompt
        out = np.concatenate([x[0].double().numpy() for x, _ in answers], axis=1)
        error = output_error.largest_error(out, exact)
        bound = np.concatenate([c.error_bound[0] for _, c in answers], axis=1).astype(np.float64)
        density = np.concatenate([c.density[0] for _, c in answers], axis=1)
        found[name] = {
            "density": density.mean(axis=1).tolist(),
            "bound": (np.median(bound, axis=1) / biggest).tolist(),
            "error": (error.mean(axis=1) / biggest).tolist(),
            "rows": int(bound.size),
            "violations": int((error > bound).sum()),
        }
    return found


def analyse_model(
    model: Any,
    ids: Any,
    layers: Sequence[int] | None = None,
    queries: int = QUERIES,
    policies: dict[str, SoftmaxPolicy] = POLICIES,
    on_layer: Callable[[int], None] = lambda layer: None,
) -> list[dict[str, Any]]:
    """Run a prompt through a model once, dense, and analyse each layer as it is reached."""
    found = []

    def visit(layer: int, q: Any, k: Any, v: Any, scale: float) -> None:
        on_layer(layer)
        if layers is None or layer in layers:
            found.append(analyse_layer(layer, q[:, -queries:], k, v, scale, policies))

    capture.stream(model, ids, visit)
    return found
