"""How many keys reach a threshold (paper, Lemma 6.1): the lemma, the calibrated rule, the count.

Under the lemma's assumption, Gaussian queries and keys, a logit <q, k> / sqrt(d) is N(0, s^2) given
the query, with s = |q| sigma_k / sqrt(d): everything below follows from that.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hsr_attention.thresholds import lemma_threshold

EXPONENT = 0.8  # of the paper: rows with about n^(4/5) entries

__all__ = ["EXPONENT", "calibrated_threshold", "expected_count", "lemma_threshold", "loose_factor"]


def calibrated_threshold(
    queries: ArrayLike, key_std: float, n: int, scale: float | None = None
) -> NDArray[np.float64]:
    """Return b = scale |q| sigma_k sqrt(0.4 ln n) of each query, float64 [m], in logit units.

    Lemma 6.1 with the query's own norm in place of the bound 4 sqrt(d + ln(m / delta)) sigma_q. The
    same as ``thresholds.Gaussian`` for one head.

    Parameters
    ----------
    queries : [m, head_dim]
        Queries of one head.
    key_std : float
        sigma_k, of the coordinates of the keys.
    n : int
        Number of keys.
    scale : float, optional
        1 / sqrt(head_dim) by default.
    """
    q = np.asarray(queries, np.float64)
    if q.ndim != 2:
        raise ValueError(f"queries must have shape [m, head_dim], got {q.shape}")
    scale = 1.0 / math.sqrt(q.shape[1]) if scale is None else scale
    factor = math.sqrt(2.0 * (1.0 - EXPONENT) * math.log(max(n, 2)))
    return scale * np.linalg.norm(q, axis=1) * key_std * factor


def expected_count(
    n: int, threshold: ArrayLike, query_norm: ArrayLike, key_std: float, scale: float
) -> NDArray[np.float64]:
    """Return n P(N(0, (scale |q| sigma_k)^2) >= b): entries of a row that reach the threshold.

    At the calibrated threshold this is n (1 - Phi(sqrt(0.4 ln n))), which the proof of Lemma 6.1
    bounds by n^(4/5). Arrays broadcast.
    """
    deviation = scale * np.asarray(query_norm, np.float64) * key_std
    if np.any(deviation <= 0):
        raise ValueError("query_norm, key_std and scale must be > 0: else a logit has no spread")
    ratio = np.asarray(threshold, np.float64) / deviation
    return n * 0.5 * np.vectorize(math.erfc)(ratio / math.sqrt(2.0))


def loose_factor(
    n: int, m: int, head_dim: int, query_std: float, key_std: float, delta: float = 0.01
) -> float:
    """Return b of Lemma 6.1 over the b it would have with E|q| = sqrt(d) sigma_q: about 4.

    b_lemma = 4 sqrt(1 + ln(m / delta) / d) sigma_q sigma_k sqrt(0.4 ln n).
    """
    typical = query_std * key_std * math.sqrt(2.0 * (1.0 - EXPONENT) * math.log(n))
    return lemma_threshold(n, m, head_dim, query_std, key_std, delta) / typical
