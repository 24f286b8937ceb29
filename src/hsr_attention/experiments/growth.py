"""Growth ~ n^exponent, fitted to measurements."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def exponent(sizes: ArrayLike, values: ArrayLike) -> dict[str, float]:
    """Fit log value = a + e log n by least squares; return e, its standard error, and a.

    Needs two sizes; with two the standard error is zero.
    """
    x, y = np.log(np.asarray(sizes, float)), np.log(np.maximum(np.asarray(values, float), 1e-12))
    centred = x - x.mean()
    slope = float(centred @ y / (centred @ centred))
    offset = float(y.mean() - slope * x.mean())
    rest = y - offset - slope * x
    freedom = max(len(x) - 2, 1)
    error = float(np.sqrt(rest @ rest / freedom / (centred @ centred)))
    return {"exponent": slope, "error": error, "offset": offset}


def interval(sizes: ArrayLike, values: ArrayLike) -> tuple[float, float, float] | None:
    """Return the exponent and its 95 % confidence interval (Student's t); None below three sizes."""
    from scipy.stats import t

    x = np.asarray(sizes, float)
    if len(np.unique(x)) < 3:
        return None
    fit = exponent(x, values)
    half = float(t.ppf(0.975, len(x) - 2)) * fit["error"]
    return fit["exponent"], fit["exponent"] - half, fit["exponent"] + half


def crossing(sizes: ArrayLike, gains: ArrayLike) -> float | None:
    """Return the n from which gain > 1 for good, interpolated on logarithmic scales; None if never."""
    order = np.argsort(np.asarray(sizes))
    x, y = np.log(np.asarray(sizes, float))[order], np.log(np.asarray(gains, float))[order]
    below = np.flatnonzero(y <= 0)
    if not below.size:
        return float(np.exp(x[0]))
    last = int(below[-1])
    if last == len(y) - 1:
        return None
    share = -y[last] / (y[last + 1] - y[last])
    return float(np.exp(x[last] + share * (x[last + 1] - x[last])))


def table(columns: list[str], rows: list[list[Any]], title: str = "") -> dict[str, Any]:
    """Return a table as the report shows it."""
    return {"title": title, "columns": columns, "rows": rows}
