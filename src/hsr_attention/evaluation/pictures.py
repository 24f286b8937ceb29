"""Pictures of what was measured, as PNG."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from hsr_attention.evaluation.comparison import Run
    from hsr_attention.evaluation.decode_statistics import Summary

HSR_COLOUR, DENSE_COLOUR = "#1b6ca8", "#c65d21"


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def generation(path: Path, title: str, hsr: Run, dense: Run | None, found: Summary | None) -> None:
    """Draw density by layer and head, and the time of a token against its position."""
    figure = _figure(12.5, 6.4)
    figure.suptitle(title)
    places = [["density", "length"], ["density", "tokens"]]
    axes = figure.subplot_mosaic(places, width_ratios=[1, 1.15])
    _density(figure, axes["density"], found)
    runs = [(hsr, HSR_COLOUR, "half-space reporting")]
    if dense is not None:
        runs.append((dense, DENSE_COLOUR, "dense"))
    _times_by_length(axes["length"], runs)
    _times_of_tokens(axes["tokens"], runs)
    figure.savefig(path, dpi=130)


def colour_limits(least: float, most: float, log: bool = False) -> tuple[float, float]:
    """Return the limits of a colour scale; one single value stands in the middle of them."""
    if most > least:
        return least, most
    if log:
        return least / 10**0.5, least * 10**0.5
    return least - (abs(least) / 2 or 0.5), least + (abs(least) / 2 or 0.5)


def _density(figure: Any, axes: Any, found: Summary | None) -> None:
    from matplotlib.colors import LogNorm

    axes.set_title("Share of the keys that a token attends to")
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    if found is None:
        axes.text(0.5, 0.5, "nothing was decoded", ha="center", transform=axes.transAxes)
        return
    share = np.maximum(100 * found.density, 0.01)
    low, high = colour_limits(share.min(), share.max(), log=True)
    high = min(high, 100.0)
    image = axes.imshow(share, aspect="auto", cmap="viridis", norm=LogNorm(low, high))
    step = max(1, len(found.layers) // 15)
    axes.set_yticks(range(0, len(found.layers), step), found.layers[::step])
    heads = share.shape[1]
    axes.set_xticks(range(0, heads, max(1, heads // 12)))
    bar = figure.colorbar(image, ax=axes, label="per cent of the keys (logarithmic)")
    ticks = [d * 10.0**e for e in range(-2, 3) for d in (1, 2, 5) if low <= d * 10.0**e <= high]
    bar.set_ticks(ticks or [low, high], labels=[f"{x:g}" for x in ticks or [low, high]])
    bar.minorticks_off()


def _times_by_length(axes: Any, runs: list[tuple[Run, str, str]]) -> None:
    axes.set_title("Time of one token of the whole model, by tokens in the cache")
    for run, colour, label in runs:
        if run.by_position:
            ms = [1e3 * s for s in run.by_position.values()]
            axes.plot(list(run.by_position), ms, "-o", color=colour, markersize=4, label=label)
    axes.set_xlabel("tokens in the cache")
    _time_axis(axes)
    axes.set_xlim(left=0)
    slowest = max((s for run, *_ in runs for s in run.by_position.values()), default=0.0)
    if slowest:
        axes.set_ylim(top=1.1 * 1e3 * slowest)  # markers of the largest value stay whole


def _times_of_tokens(axes: Any, runs: list[tuple[Run, str, str]]) -> None:
    axes.set_title("Time of each generated token")
    shown = 0.0
    for run, colour, label in runs:
        ms = 1e3 * np.array(run.decoded.seconds)
        if not ms.size:
            continue
        shown = max(shown, 2.5 * float(np.median(ms)))
        at = run.prompt_tokens + 1 + np.arange(ms.size)
        label = f"{label} ({run.path}): median {np.median(ms):.1f} ms"
        axes.plot(at, ms, ".-", color=colour, linewidth=0.8, markersize=4, label=label)
    axes.set_xlabel("position of the token")
    _time_axis(axes)
    if shown:
        axes.set_ylim(top=shown)  # a pause of the machine must not flatten everything else


def _time_axis(axes: Any) -> None:
    axes.set_ylabel("milliseconds")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best")


def decode_speed(path: Path, title: str, rows: list[dict[str, Any]]) -> None:
    """Draw the time of decoding attention by layer, dense and half-space reporting."""
    figure = _figure(max(8.0, 0.5 * len(rows) + 3), 4.8)
    axes = figure.subplots()
    at = np.arange(len(rows))
    dense = [row["dense_ms"][row["fastest_dense"]] for row in rows]
    axes.bar(at - 0.2, dense, 0.4, color=DENSE_COLOUR, label="fastest dense path")
    axes.bar(at + 0.2, [r["hsr_ms"] for r in rows], 0.4, color=HSR_COLOUR, label="hsr")
    for x, row, height in zip(at, rows, dense, strict=True):
        top = max(height, row["hsr_ms"])
        axes.annotate(f"{row['speedup']:.1f}x", (x, top), ha="center", va="bottom", fontsize=7)
    axes.set_xticks(at, [row["layer"] for row in rows])
    axes.set_xlabel("layer")
    axes.set_ylabel("milliseconds a token (attention only)")
    axes.set_title(title, fontsize=10)
    axes.legend()
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=130)


def generation_speed(path: Path, title: str, rows: list[dict[str, Any]]) -> None:
    """Draw tokens a second of a whole model against the length of its context."""
    figure = _figure(8.5, 5.2)
    axes = figure.subplots()
    n = [row["n"] for row in rows]
    hsr = [row["hsr_tokens_per_second"] for row in rows]
    axes.plot(n, hsr, "-o", color=HSR_COLOUR, linewidth=2.2, label="half-space reporting")
    names = list(rows[0]["dense_tokens_per_second"])
    for name, style in zip(names, ("-", "--", "-.", ":"), strict=False):
        speed = [row["dense_tokens_per_second"].get(name, np.nan) for row in rows]
        axes.plot(n, speed, style, marker=".", color=DENSE_COLOUR, label=f"dense: {name}")
    for row in rows:
        at = (row["n"], row["hsr_tokens_per_second"])
        text = f"{row['speedup']:.1f}x"
        axes.annotate(text, at, textcoords="offset points", xytext=(0, 6), ha="center", fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(n, [f"{x:,}" for x in n])
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("tokens a second, whole model")
    axes.set_ylim(bottom=0, top=1.12 * max(hsr))
    axes.set_title(f"{title}\n(numbers: times the fastest dense way)", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def length_speed(path: Path, title: str, rows: list[dict[str, Any]]) -> None:
    """Draw the time of one decoding call, and of its scan alone, against the number of keys."""
    figure = _figure(11.5, 4.8)
    figure.suptitle(title, fontsize=10)
    times, shares = figure.subplots(1, 2)
    n = np.array([row["n"] for row in rows])
    lines = [
        ("decode_ms", "half-space reporting", HSR_COLOUR, "-o"),
        ("scan_ms", "its scan alone", HSR_COLOUR, "--."),
    ]
    if rows[0]["dense_ms"] is not None:
        lines.append(("dense_ms", "fastest dense way", DENSE_COLOUR, "-o"))
    for key, label, colour, style in lines:
        ms = [row[key] for row in rows]
        times.plot(n, ms, style, color=colour, markersize=4, label=label)
    last = rows[-1]
    times.plot(n, last["decode_ms"] * n / n[-1], ":", color="grey", label="in proportion")
    times.set_xscale("log")
    times.set_yscale("log")
    times.set_ylabel("milliseconds")
    for key, label in (("scan_bandwidth_share", "scan"), ("decode_bandwidth_share", "whole call")):
        shares.plot(n, [100 * row[key] for row in rows], "-o", markersize=4, label=label)
    shares.set_xscale("log")
    shares.set_ylim(bottom=0)
    shares.set_ylabel("bytes a second, per cent of the memory bandwidth")
    for axes in (times, shares):
        axes.set_xlabel("keys")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def prefill_speed(path: Path, title: str, result: dict[str, Any]) -> None:
    """Draw the time of prompt attention against n, and by layer for the longest prompt."""
    totals, rows = result["totals"], result["layers"]
    longest = totals[-1]["n"]
    figure = _figure(13, 4.8)
    figure.suptitle(title, fontsize=10)
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.3])
    n = [total["n"] for total in totals]
    for name, colour, label in (
        ("fastest_dense_ms", DENSE_COLOUR, "fastest dense path"),
        ("hsr_ms", HSR_COLOUR, "hsr"),
    ):
        left.plot(n, [t[name] / 1e3 for t in totals], "-o", color=colour, label=label)
    _seconds_against_n(left, "seconds, all layers (attention only)", totals)
    last = [row for row in rows if row["n"] == longest]
    at = np.arange(len(last))
    dense = [row["dense_ms"][row["fastest_dense"]] / 1e3 for row in last]
    right.bar(at - 0.2, dense, 0.4, color=DENSE_COLOUR, label="fastest dense path")
    right.bar(at + 0.2, [r["hsr_ms"] / 1e3 for r in last], 0.4, color=HSR_COLOUR, label="hsr")
    for x, row, height in zip(at, last, dense, strict=True):
        text = f"{row['speedup']:.1f}x\n{100 * row['density']:.2g} %"
        top = max(height, row["hsr_ms"] / 1e3)
        right.annotate(text, (x, top), ha="center", va="bottom", fontsize=7)
    right.set_xticks(at, [row["layer"] for row in last])
    right.set_xlabel("layer")
    right.set_ylabel("seconds")
    right.set_title(f"By layer at n = {longest:,}: speed-up, density", fontsize=10)
    right.margins(y=0.3)
    right.legend(ncols=2, loc="upper center")
    figure.savefig(path, dpi=130)


def first_token(path: Path, title: str, result: dict[str, Any]) -> None:
    """Draw time to first token and memory of a whole model against n."""
    rows = result["prompts"]
    figure = _figure(12, 4.8)
    figure.suptitle(title, fontsize=10)
    left, right = figure.subplots(1, 2)
    n = [row["n"] for row in rows]
    for name, colour, label in (
        ("dense", DENSE_COLOUR, "dense (sdpa)"),
        ("hsr", HSR_COLOUR, "half-space reporting"),
    ):
        left.plot(n, [r[f"{name}_seconds"] for r in rows], "-o", color=colour, label=label)
        if all(row[f"{name}_peak_bytes"] is not None for row in rows):
            peaks = [row[f"{name}_peak_bytes"] / 1e6 for row in rows]
            right.plot(n, peaks, "-o", color=colour, label=label)
    _seconds_against_n(left, "seconds to the first token", rows)
    right.set_xlabel("tokens of the prompt")
    right.set_ylabel("peak memory above the model, MB")
    right.grid(alpha=0.3)
    if right.get_legend_handles_labels()[0]:
        right.legend()
    figure.savefig(path, dpi=130)


def _seconds_against_n(axes: Any, label: str, rows: list[dict[str, Any]]) -> None:
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel(label)
    if len(rows) > 1:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks([r["n"] for r in rows], [f"{r['n']:,}" for r in rows])
    axes.set_title(", ".join(f"{r['n']:,}: {r['speedup']:.1f}x" for r in rows), fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
