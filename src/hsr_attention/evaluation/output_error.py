"""How far an output of attention is from exact, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def exact_attention(q: Any, k: Any, v: Any, scale: float) -> NDArray[np.float64]:
    """Dense softmax attention in float64: q [heads, m, d], k and v [kv_heads, n, d].

    Returns [heads, m, d_v].
    """
    heads, m, d = q.shape
    kv_heads = k.shape[0]
    rows = q.astype(np.float64).reshape(kv_heads, heads // kv_heads * m, d)
    outputs = [
        _softmax(rows[h] @ k[h].astype(np.float64).T * scale) @ v[h].astype(np.float64)
        for h in range(kv_heads)
    ]
    return np.stack(outputs).reshape(heads, m, v.shape[2])


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def relative_error(out: NDArray[Any], exact: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return |out - exact|_2 / |exact|_2 of every row, [...]."""
    norm = np.linalg.norm(exact, axis=-1)
    return np.linalg.norm(out - exact, axis=-1) / np.where(norm > 0, norm, 1.0)


def largest_error(out: NDArray[Any], exact: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return |out - exact|_inf of every row: what a certificate bounds."""
    return np.abs(out - exact).max(axis=-1, initial=0.0)
