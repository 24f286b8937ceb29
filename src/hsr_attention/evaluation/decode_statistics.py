"""What ``HSRCache.statistics`` collected, put into the few numbers a reader wants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Spread:
    """Median and worst (largest) of a quantity."""

    median: float
    worst: float


@dataclass(frozen=True)
class Summary:
    """Decoding in numbers, over all layers, heads and tokens.

    Attributes
    ----------
    layers
        Index of each reporting layer.
    density : float [layers, heads]
        Mean over the tokens: keys that entered the answer, as a share of those visible.
    omitted_mass
        Certified bound of the share of the softmax mass left out.
    relative_bound
        Certified bound of |out - exact|_inf, as a share of the largest value of the layer.
    relative_estimate
        *Estimate* of the same error, not a bound.
    work
        Counters, summed.
    """

    layers: list[int]
    density: NDArray[np.float64]
    omitted_mass: Spread | None
    relative_bound: Spread | None
    relative_estimate: Spread | None
    work: dict[str, int]


def summary(layers: list[Any]) -> Summary | None:
    """Sum up a list of ``LayerStatistics``; None if nothing was decoded."""
    layers = [layer for layer in layers if layer.density.size]
    if not layers:
        return None
    work: dict[str, int] = {}
    for layer in layers:
        for name, count in layer.work.items():
            work[name] = work.get(name, 0) + count
    return Summary(
        [layer.layer for layer in layers],
        np.stack([layer.density.mean(axis=1, dtype=np.float64) for layer in layers]),
        _spread([layer.omitted_mass for layer in layers]),
        _spread([_relative(layer.error_bound, layer) for layer in layers]),
        _spread([_relative(layer.estimated_error, layer) for layer in layers]),
        work,
    )


def _relative(error: NDArray[np.float32], layer: Any) -> NDArray[np.float32]:
    return error / max(layer.value_max, np.finfo(np.float32).tiny)


def _spread(parts: list[NDArray[np.float32]]) -> Spread | None:
    values = np.concatenate([part.ravel() for part in parts])
    if not np.isfinite(values).all():
        return None
    return Spread(float(np.median(values)), float(values.max()))
