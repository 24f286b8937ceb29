"""What a user asks for: which keys matter, and what happens to the rest. Frozen settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hsr_attention import arguments
from hsr_attention.thresholds import ThresholdRule

TAILS = ("sketch", "drop")
DEFAULT_EPSILON = 0.04
MAX_POWER = 16  # of a ratio <= 1: the powers of a row stay inside float64

# Numbers of the native code's `Rule`.
RULE_EPSILON, RULE_THRESHOLD, RULE_TOP_R, RULE_RELU = range(4)


@dataclass(frozen=True)
class SoftmaxPolicy:
    """How softmax attention selects keys; give at most one of the three rules.

    Attributes
    ----------
    epsilon : float in (0, 1) or None
        Bound of the omitted share of the softmax mass. The default rule, with 0.04.
    top_r : int >= 1 or None
        The r keys with the largest logits are read at full precision (paper, Theorem 4.2).
    threshold : float, one for each head, one for each query, a rule, or None
        Keys with logit ``scale * <q, k> >= threshold`` are read at full precision.
    tail : "sketch" or "drop"
        Keys outside the exact set: weigh them from their codes, down to an omitted share of at most
        ``tail_epsilon`` of the mass (of ``epsilon`` under that rule); or drop them, as the paper.
        With "drop" the exact set is decided by full-precision logits, with "sketch" by 8-bit ones.
    exact : bool
        Everything that is kept is read at full precision; ``tail`` is then "drop", whatever it was.
    exact_share : float in (0, 1)
        Rule ``epsilon`` with a sketched tail: keys above this share of the mass are read at full
        precision. Smaller is more accurate and slower.
    tail_epsilon : float in (0, 1)
        Omitted share allowed to a sketched tail under the rules ``top_r`` and ``threshold``.
    certify : bool
        Compute the error bound; without, ``error_bound`` and ``omitted_mass`` are NaN.
    """

    epsilon: float | None = None
    top_r: int | None = None
    threshold: float | Sequence[float] | NDArray[np.floating] | ThresholdRule | None = None
    tail: str = "sketch"
    exact: bool = False
    exact_share: float = 1e-3
    tail_epsilon: float = 0.04
    certify: bool = True

    def __post_init__(self) -> None:
        given = [n for n in ("epsilon", "top_r", "threshold") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(
                f"give one of epsilon, top_r and threshold, got {' and '.join(given)}"
            )
        if not given:
            object.__setattr__(self, "epsilon", DEFAULT_EPSILON)
        if self.epsilon is not None:
            arguments.open_unit("epsilon", self.epsilon)
        if self.top_r is not None:
            arguments.positive_integer("top_r", self.top_r)
        if self.threshold is not None:
            arguments.threshold_setting(self.threshold)
        arguments.one_of("tail", self.tail, TAILS)
        arguments.open_unit("exact_share", self.exact_share)
        arguments.open_unit("tail_epsilon", self.tail_epsilon)
        arguments.flag("certify", self.certify)
        if arguments.flag("exact", self.exact):
            object.__setattr__(self, "tail", "drop")

    @property
    def rule(self) -> int:
        """Number of the native rule."""
        if self.top_r is not None:
            return RULE_TOP_R
        return RULE_EPSILON if self.epsilon is not None else RULE_THRESHOLD


@dataclass(frozen=True)
class ReLUPolicy:
    """ReLU^power attention (paper, Definition 1.2): weight ReLU(scale <q, k> - threshold)^power.

    Attributes
    ----------
    threshold : float, one for each head, one for each query, or a rule
        The b of the paper, in logit units; ``thresholds`` has rules.
    power : int in [1, 16]
        The alpha of the paper.
    """

    threshold: float | Sequence[float] | NDArray[np.floating] | ThresholdRule = 0.0
    power: int = 1

    def __post_init__(self) -> None:
        arguments.bounded_integer("power", self.power, MAX_POWER)
        arguments.threshold_setting(self.threshold)
        if not callable(self.threshold) and np.isneginf(np.asarray(self.threshold)).any():
            raise ValueError("threshold must be above -inf for ReLU attention, got -inf")

    @property
    def rule(self) -> int:
        """Number of the native rule."""
        return RULE_RELU


Policy = SoftmaxPolicy | ReLUPolicy
