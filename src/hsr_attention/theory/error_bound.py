"""Bounds of the error of softmax attention over the r largest logits, before and after the fact.

All are shares: multiply by |V|_inf for a bound of |out - exact|_inf. Two is the trivial bound.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hsr_attention.theory.massive_activation import MassiveActivation

Array = NDArray[np.float64]
TRIVIAL = 2.0  # |out - exact|_inf <= |out|_inf + |exact|_inf <= 2 |V|_inf


def theorem(activation: MassiveActivation) -> Array:
    """Return 2 / n^(gamma + (beta1 - beta2) |q| - 1) of each row (paper, Theorem 4.3).

    The same as 2 (n / r) exp(largest of the rest - mean of the top): the omitted mass is at most
    n exp(rest), the kept mass by Jensen at least r exp(mean). Above 2 it says nothing.
    """
    with np.errstate(over="ignore"):
        return TRIVIAL * np.exp(-activation.exponent * np.log(activation.n))


def vacuous(activation: MassiveActivation) -> NDArray[np.bool_]:
    """Say of each row whether Theorem 4.3 is worse than knowing nothing.

    That is unless mean(top) - max(rest) > ln(n / r).
    """
    return activation.exponent <= 0


def after_the_fact(logits: ArrayLike, r: int) -> Array:
    """Return 2 T / (Z + T), Z the kept mass and T = (n - r) exp(smallest kept), of logits [m, n].

    What a report proves about itself: every key outside it has a smaller logit than all inside.
    """
    s = _checked(logits, r)
    n = s.shape[1]
    top = np.partition(s, n - r, axis=1)[:, n - r :]
    least = top.min(axis=1, keepdims=True)
    with np.errstate(over="ignore"):
        kept = np.exp(top - least).sum(axis=1)  # Z / exp(smallest kept)
    return TRIVIAL * (n - r) / (kept + (n - r))


def omitted_mass(logits: ArrayLike, r: int) -> Array:
    """Return the true share of the softmax mass outside the r largest logits, of logits [m, n]."""
    s = _checked(logits, r)
    n = s.shape[1]
    parts = np.partition(s, n - r, axis=1)
    weights = np.exp(parts - parts[:, n - r :].max(axis=1, keepdims=True))
    return weights[:, : n - r].sum(axis=1) / weights.sum(axis=1)


def _checked(logits: ArrayLike, r: int) -> Array:
    s = np.asarray(logits, np.float64)
    if s.ndim != 2:
        raise ValueError(f"logits must have shape [m, n], got {s.shape}")
    if not 1 <= r <= s.shape[1]:
        raise ValueError(f"r must lie in [1, n] = [1, {s.shape[1]}], got {r}")
    return s
