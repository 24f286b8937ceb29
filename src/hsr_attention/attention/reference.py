"""The paper in float64 numpy: slow, readable, and the oracle of everything else.

One head at a time: queries [m, d], keys [n, d], values [n, d_v]. ``visible`` is a boolean mask
[m, n], true where a query may see a key. Nothing of this package is imported here.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def logits(queries: ArrayLike, keys: ArrayLike, scale: float | None = None) -> Array:
    """Return scale <q_i, k_j>, float64 [m, n]; scale defaults to 1 / sqrt(d)."""
    q, k = np.asarray(queries, np.float64), np.asarray(keys, np.float64)
    return (q @ k.T) * (1.0 / np.sqrt(q.shape[1]) if scale is None else scale)


def causal(m: int, n: int) -> NDArray[np.bool_]:
    """Return the mask of the newest m positions of n: query i sees keys 0 .. n - m + i."""
    return np.arange(n)[None, :] <= np.arange(n - m, n)[:, None]


def half_space(queries: ArrayLike, keys: ArrayLike, thresholds: ArrayLike) -> NDArray[np.bool_]:
    """Return [m, n]: true where <q_i, k_j> >= b_i (paper, half-space reporting)."""
    scores = logits(queries, keys, 1.0)
    return scores >= np.broadcast_to(np.asarray(thresholds, np.float64), scores.shape[:1])[:, None]


def top_r(scores: Array, r: int) -> NDArray[np.bool_]:
    """Return [m, n]: true at the r largest of each row, NN(r, q, K); ties go to the smaller index."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :r]
    kept = np.zeros(scores.shape, bool)
    np.put_along_axis(kept, order, True, axis=1)
    return kept & (scores > -np.inf)


def softmax_attention(
    queries: ArrayLike,
    keys: ArrayLike,
    values: ArrayLike,
    scale: float | None = None,
    visible: NDArray[np.bool_] | None = None,
    kept: NDArray[np.bool_] | None = None,
) -> Array:
    """Softmax attention over the visible keys, or over those also in ``kept`` (Definition 1.1).

    out_i = sum_j exp(s_ij) v_j / sum_j exp(s_ij). Rows without a key are zero.
    """
    s = logits(queries, keys, scale)
    for mask in (visible, kept):
        if mask is not None:
            s = np.where(mask, s, -np.inf)
    top = s.max(axis=1, keepdims=True, initial=-np.inf)
    weights = np.exp(s - np.where(np.isfinite(top), top, 0.0))
    return _normalised(weights, values)


def relu_attention(
    queries: ArrayLike,
    keys: ArrayLike,
    values: ArrayLike,
    threshold: ArrayLike,
    power: int = 1,
    scale: float | None = None,
    visible: NDArray[np.bool_] | None = None,
) -> Array:
    """ReLU^power attention with threshold b, scalar or [m] (Definition 1.2); empty rows are zero."""
    s = logits(queries, keys, scale)
    b = np.broadcast_to(np.asarray(threshold, np.float64), s.shape[:1])[:, None]
    weights = np.maximum(s - b, 0.0) ** power
    if visible is not None:
        weights = np.where(visible, weights, 0.0)
    return _normalised(weights, values)


def omitted_mass(
    queries: ArrayLike,
    keys: ArrayLike,
    kept: NDArray[np.bool_],
    scale: float | None = None,
    visible: NDArray[np.bool_] | None = None,
) -> Array:
    """Return the softmax mass on visible keys outside ``kept``, as a share, float64 [m]."""
    s = logits(queries, keys, scale)
    if visible is not None:
        s = np.where(visible, s, -np.inf)
    weights = np.exp(s - s.max(axis=1, keepdims=True))
    return np.where(kept, 0.0, weights).sum(axis=1) / weights.sum(axis=1)


def _normalised(weights: Array, values: ArrayLike) -> Array:
    total = weights.sum(axis=1, keepdims=True)
    return (weights @ np.asarray(values, np.float64)) / np.where(total > 0, total, 1.0)
