"""Massive activation (paper, Definition of (gamma, beta1, beta2)): how far the top keys stand out.

For a query q and r = n^gamma keys NN(r, q, K) with the largest scores,

    beta1 = mean of the top r scores / (|q| ln n),    beta2 = largest other score / (|q| ln n).

Scores here are logits, scale <q, k>, since that is what softmax sees; the paper writes scale = 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class MassiveActivation:
    """Measured for each row of logits.

    Attributes
    ----------
    n, r
        Keys, and keys that are kept.
    gamma
        ln r / ln n.
    top_mean, rest_max : float64 [m]
        Mean of the r largest logits, and the largest of the rest.
    beta1, beta2 : float64 [m]
        The same over |q| ln n.
    """

    n: int
    r: int
    gamma: float
    top_mean: Array
    rest_max: Array
    beta1: Array
    beta2: Array

    @property
    def exponent(self) -> Array:
        """Return gamma + (beta1 - beta2) |q| - 1: where positive, Theorem 4.3 says something."""
        return self.gamma - 1.0 + (self.top_mean - self.rest_max) / np.log(self.n)


def measure(logits: ArrayLike, query_norms: ArrayLike, r: int) -> MassiveActivation:
    """Return the smallest beta2 and the largest beta1 that hold for each row of logits [m, n].

    Raises
    ------
    ValueError
        If r is not in [1, n) or n < 2.
    """
    s = np.asarray(logits, np.float64)
    norms = np.asarray(query_norms, np.float64)
    if s.ndim != 2 or s.shape[1] < 2:
        raise ValueError(f"logits must have shape [m, n] with n >= 2, got {s.shape}")
    if norms.shape != s.shape[:1]:
        raise ValueError(f"query_norms must have shape [{s.shape[0]}], got {norms.shape}")
    n = s.shape[1]
    if not 1 <= r < n:
        raise ValueError(f"r must lie in [1, n) = [1, {n}), got {r}")
    parts = np.partition(s, n - r - 1, axis=1)
    top, rest = parts[:, n - r :].mean(axis=1), parts[:, n - r - 1]
    unit = np.where(norms > 0, norms, np.inf) * np.log(n)
    return MassiveActivation(
        n, r, float(np.log(r) / np.log(n)), top, rest, top / unit, rest / unit
    )
