"""How figures look: one panel each, so that a page can arrange them; and how they are written.

Everything that is not data is drawn in ``INK`` on nothing, so that the report can give it the colour
of the reader's page, light or dark.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hsr_attention.evaluation.pictures import colour_limits

INK = "#2b2f36"
# Told apart by the colour-blind, and visible on white and on black: after Okabe and Ito (2008).
BLUE, ORANGE, GREEN, PINK, SKY, GREY = (
    "#2f7fc1",
    "#d9772b",
    "#1f9e77",
    "#c66aa6",
    "#56b4e9",
    "#8a8f98",
)
COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, GREY)
HEAT = "viridis"
WIDTH, HEIGHT = 4.9, 3.7

_STYLE: Any = {
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "svg.fonttype": "none",
}


def figure(width: float = WIDTH, height: float = HEIGHT) -> Any:
    """Return an empty figure; no window and no global state are involved."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def panel(
    title: str, x: str, y: str, width: float = WIDTH, height: float = HEIGHT, log: str = ""
) -> tuple[Any, Any]:
    """Return a figure with one pair of axes; ``log`` names those that are logarithmic: x, y, xy."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        made = figure(width, height)
        axes = made.subplots()
        axes.set_title(title)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        if "x" in log:
            axes.set_xscale("log")
        if "y" in log:
            axes.set_yscale("log")
        axes.grid(alpha=0.25, color=GREY, linewidth=0.6)
        axes.tick_params(which="both", colors=INK)  # also of ticks that are made later
    return made, axes


def panels(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """Return a figure and its axes [rows, columns], logarithmic, for lines against n."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        made = figure(width, height)
        grid = made.subplots(rows, columns, squeeze=False, sharex=True)
        for axes in grid.flat:
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.grid(alpha=0.25, color=GREY, linewidth=0.6)
    return made, grid


def legend(axes: Any, **options: Any) -> None:
    """Add a legend in the style of the page; ``below=True`` puts it under the axes."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        if options.pop("below", False):
            axes.figure.legend(loc="outside lower center", **options)
        else:
            axes.legend(**options)


def powers_of_two(axes: Any, values: Sequence[float]) -> None:
    """Label a logarithmic x axis with the powers of two among, or between, the values."""
    axes.set_xscale("log", base=2)
    low, high = min(values), max(values)
    ticks = [2**i for i in range(31) if low <= 2**i <= high]
    ticks = ticks[:: max(1, len(ticks) // 8)] or [round(low)]
    axes.set_xticks(ticks, [thousands(v) for v in ticks])
    axes.minorticks_off()


def thousands(n: int) -> str:
    """Return 512, 4k, 32k: counts of tokens as people write them."""
    return f"{n // 1024}k" if n >= 1024 and n % 1024 == 0 else f"{n}"


def heat(
    rows: Sequence[Sequence[float]],
    title: str,
    label: str,
    layers: Sequence[int],
    *,
    log: bool = False,
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """Draw a map of layers and heads; ``rows`` [layers, heads]."""
    import matplotlib
    import numpy as np
    from matplotlib.colors import LogNorm, Normalize

    values = np.asarray(rows, float)
    values = np.where(np.isfinite(values), values, np.nan)
    made, axes = panel(title, "head", "layer", width=4.4, height=4.2)
    finite = values[np.isfinite(values)]
    least = float(finite.min()) if low is None and finite.size else (low or 0.0)
    most = float(finite.max()) if high is None and finite.size else (high or 1.0)
    if log:
        least = max(least, most * 1e-6, 1e-12)
        values = np.maximum(values, least)
    least, most = colour_limits(least, most, log)
    norm: Any = (LogNorm if log else Normalize)(least, most)
    with matplotlib.rc_context(_STYLE):
        image = axes.imshow(values, aspect="auto", cmap=HEAT, norm=norm, interpolation="nearest")
        axes.grid(visible=False)
        step = max(1, len(layers) // 10)
        axes.set_yticks(range(0, len(layers), step), [str(x) for x in layers[::step]])
        heads = values.shape[1]
        axes.set_xticks(range(0, heads, max(1, heads // 9)))
        bar = made.colorbar(image, ax=axes, label=label)
        bar.outline.set_visible(False)
        if log:
            ticks = [d * 10.0**e for e in range(-12, 7) for d in (1, 2, 5)]
            ticks = [x for x in ticks if least <= x <= most][
                :: max(1, round(np.log10(most / least) / 2))
            ]
            if ticks:
                bar.set_ticks(ticks, labels=[f"{x:g}" for x in ticks])
                bar.minorticks_off()
    return made


def write(made: Any, directory: Path, name: str) -> str:
    """Write NAME.png and NAME.svg; return the SVG for the page, in the ink of the page."""
    import matplotlib

    made.savefig(directory / f"{name}.png", dpi=150, facecolor="white")
    settings = _STYLE | {"svg.hashsalt": f"{directory.name}-{name}"}
    with matplotlib.rc_context(settings):
        made.savefig(
            directory / f"{name}.svg", facecolor="white", metadata={"Date": None, "Creator": None}
        )
        page = io.StringIO()
        made.savefig(
            page, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    text = page.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")
