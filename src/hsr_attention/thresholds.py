"""Rules for the threshold b, in logit units (b of the paper: ``scale * <q, k> >= b``).

A rule is a function of the queries and of what is known of the keys; ``docs/extend/threshold_rule.md``
shows how to add one. A plain number, or one for each head or query, needs no rule.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


@runtime_checkable
class ThresholdRule(Protocol):
    """Thresholds from queries and from statistics of the keys."""

    def __call__(
        self,
        queries: NDArray[np.float32],
        key_rms: NDArray[np.float64],
        n: NDArray[np.int64],
        scale: float,
    ) -> NDArray[np.float64]:
        """Return thresholds [batch, heads, m].

        Parameters
        ----------
        queries : float32 [batch, heads, m, head_dim]
            Queries of all heads.
        key_rms : float64 [batch, heads]
            Root mean square of the coordinates of the keys each head attends to: sigma_k.
        n : int64 [batch or 1, 1, m]
            Number of keys that each query may see: under a causal mask its position, without padding.
        scale : float
            logit = scale * score.
        """
        ...


@dataclass(frozen=True)
class Gaussian:
    """b = scale |q| sigma_k sqrt(2 (1 - exponent) ln n): about n^exponent keys reach it.

    If the coordinates of the keys are N(0, sigma_k^2), a score <q, k> is N(0, |q|^2 sigma_k^2) given
    q, and P(score >= b) <= exp(-b^2 / (2 |q|^2 sigma_k^2)) = n^(exponent - 1). With the paper's
    exponent 4/5 and scale 1/sqrt(d) this is |q| sigma_k sqrt(0.4 ln n / d): Lemma 6.1 with the
    query's own norm in place of its bound, which is about four times too large.
    """

    exponent: float = 0.8

    def __post_init__(self) -> None:
        if isinstance(self.exponent, bool) or not isinstance(self.exponent, numbers.Real):
            raise TypeError(f"exponent must be a number, got {self.exponent!r}")
        if not 0.0 < self.exponent <= 1.0:
            raise ValueError(f"exponent must lie in (0, 1], got {self.exponent}")

    def __call__(
        self,
        queries: NDArray[np.float32],
        key_rms: NDArray[np.float64],
        n: NDArray[np.int64],
        scale: float,
    ) -> NDArray[np.float64]:
        """Return thresholds [batch, heads, m]; see ``ThresholdRule``."""
        norms = np.linalg.norm(queries.astype(np.float64), axis=-1)
        factor = np.sqrt(2.0 * (1.0 - self.exponent) * np.log(np.maximum(n, 2)))
        return scale * norms * key_rms[:, :, None] * factor


@dataclass(frozen=True)
class SqrtLog:
    """b = sigma sqrt(0.4 ln n): Lemma 6.1 with its sigma_a given, one for all heads or for each.

    If the logits of a head are N(0, sigma^2), at most n^(4/5) of n keys are expected to reach b,
    so that the density falls like n^(-1/5). A model that is trained with this rule keeps to it at
    every length, whatever its queries and keys are: b depends on the number of keys alone.
    """

    sigma: float | Sequence[float] = 1.0

    def __post_init__(self) -> None:
        sigma = np.asarray(self.sigma)
        if sigma.dtype.kind not in "fiu":
            raise TypeError(f"sigma must be a number, or one for each head, got {self.sigma!r}")
        if sigma.ndim > 1 or not (np.isfinite(sigma) & (sigma >= 0)).all():
            raise ValueError(
                f"sigma must be finite and >= 0, one number or one for each head, got {self.sigma!r}"
            )

    def __call__(
        self,
        queries: NDArray[np.float32],
        key_rms: NDArray[np.float64],
        n: NDArray[np.int64],
        scale: float,
    ) -> NDArray[np.float64]:
        """Return thresholds [batch, heads, m]; see ``ThresholdRule``."""
        sigma = np.asarray(self.sigma, np.float64).reshape(-1, 1)
        if len(sigma) not in (1, queries.shape[1]):
            raise ValueError(
                f"sigma must have one entry for each of {queries.shape[1]} heads, got {len(sigma)}"
            )
        b = sigma * np.sqrt(0.4 * np.log(np.maximum(n, 1)))
        return np.broadcast_to(b, queries.shape[:3])


def lemma_threshold(
    n: int, m: int, head_dim: int, query_std: float, key_std: float, delta: float = 0.01
) -> float:
    """Return b of Lemma 6.1: sigma_a sqrt(0.4 ln n).

    sigma_a = 4 sqrt(1 + ln(m / delta) / d) sigma_q sigma_k; with probability 1 - delta every row has
    at most 2 n^(4/5) entries above b. The 4 is a loose norm constant: rows come out all but empty.
    """
    sigma = 4.0 * math.sqrt(1.0 + math.log(m / delta) / head_dim) * query_std * key_std
    return sigma * math.sqrt(0.4 * math.log(n))
