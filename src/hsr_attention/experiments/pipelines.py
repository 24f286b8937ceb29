"""Figure 2 of the paper, of our own architecture: the two pipelines, decoding and prefill."""

from __future__ import annotations

from typing import Any

from hsr_attention.experiments import figures
from hsr_attention.experiments.workbench import Workbench

NAME = "pipelines"
TITLE = "Two pipelines"
USES_MODEL = False
EXPLANATION = """
The paper has two algorithms that differ in one line: *where the index is built*. While a model
generates (its Algorithm 2), keys arrive one at a time and stay, so the index lives in the
key-value cache, grows with it, and every new token asks it once. While a prompt is read (its
Algorithm 3) all keys are new, so the index is built inside the call and asked by every position,
each of which may only see the keys before it.

The picture shows what happens here. The index is a pair of 4-bit planes of every key, with a
proved bound of their error beside them; a scan of the first plane already tells which keys cannot
matter. Whatever is left out is added up as it is passed by, and that sum is the certificate that
comes with each answer.
"""
DECODE = [
    ("new token", "query, key, value of each head"),
    ("append", "key and value to full-precision rows;\nevery 16th closes a block of codes"),
    ("scan", "4-bit codes of all keys:\nan upper bound of every logit"),
    ("choose", "two thresholds from the mass that was seen"),
    ("select", "8-bit codes where the bound\nis above the lower threshold"),
    ("finish", "few keys exactly, some from codes,\nthe rest only counted"),
    ("answer + certificate", "|out − dense| ≤ bound"),
]
PREFILL = [
    ("prompt", "queries, keys, values of all positions"),
    ("build", "codes of all keys, once, inside the call"),
    (
        "for each position i",
        "the index is read up to key i: causality\ncosts nothing, codes stand in key order",
    ),
    ("scan, choose, select", "as in decoding, many queries at a time"),
    ("finish", "exact, from codes, or left out"),
    ("answers + certificates", "one of each for every position"),
    ("forget", "or keep the rows and codes as the cache"),
]


def run(quick: bool, bench: Workbench) -> dict[str, Any]:
    """Return the stages of both pipelines."""
    return {"decode": DECODE, "prefill": PREFILL}


def plot(data: dict[str, Any]) -> dict[str, Any]:
    """Draw each pipeline from top to bottom."""
    return {
        "figure-2-decode": _draw(
            "Generating: the index lives in the cache", data["decode"], "append"
        ),
        "figure-2-prefill": _draw(
            "Reading a prompt: the index lives in the call", data["prefill"], "build"
        ),
    }


def _draw(title: str, stages: list[list[str]], index: str) -> Any:
    made, axes = figures.panel(title, "", "", height=6.2)
    axes.axis("off")
    axes.set_xlim(0, 10)
    axes.set_ylim(-len(stages) + 0.45, 0.55)
    for i, (name, what) in enumerate(stages):
        first, last = i == 0, i == len(stages) - 1
        colour = (
            figures.ORANGE if name == index else figures.GREY if first or last else figures.BLUE
        )
        box = {
            "boxstyle": "round,pad=0.45",
            "facecolor": colour,
            "alpha": 0.22,
            "edgecolor": colour,
        }
        axes.text(
            2.2, -i, name, ha="center", va="center", weight="bold", color=figures.INK, bbox=box
        )
        axes.text(4.75, -i, what, ha="left", va="center", fontsize=8.4, color=figures.INK)
        if not last:
            arrow = {"arrowstyle": "-|>", "color": figures.GREY, "linewidth": 1.4}
            axes.annotate("", (2.2, -i - 0.72), (2.2, -i - 0.28), arrowprops=arrow)
    return made


def findings(data: dict[str, Any]) -> list[str]:
    """Say the difference."""
    return [
        "Decoding pays for the index once a token (a few microseconds a layer), prefill once a "
        "prompt; after "
        "that both ask the same question."
    ]
