"""Figure 1 of the paper: the two activations, exp and ReLU^alpha with b = 1.5."""

from __future__ import annotations

from typing import Any

import numpy as np

from hsr_attention.experiments import figures
from hsr_attention.experiments.workbench import Workbench

NAME = "activations"
TITLE = "Two kinds of attention"
USES_MODEL = False
EXPLANATION = """
An attention head compares a query with every key and turns each comparison, a *logit*, into a
weight. Softmax uses the exponential: every key gets *some* weight, however small, so leaving keys
out is always an approximation, and the question is how good. ReLU attention subtracts a threshold
b first and cuts off below zero: a key whose logit does not reach b weighs exactly nothing, so
leaving it out changes nothing at all.

Either way only keys with a large score matter, and "all keys with ⟨q, k⟩ ≥ b" is a question
geometry knows under the name of *half-space reporting*: the keys on one side of a plane. (Figure
1 of the paper, b = 1.5.)
"""
THRESHOLD = 1.5
POWERS = (1, 2, 3)


def run(quick: bool, bench: Workbench) -> dict[str, Any]:
    """Return the curves on a grid of logits."""
    x = np.linspace(-1.0, 4.0, 101)
    curves = {"exp": np.exp(x)}
    curves |= {f"power {a}": np.maximum(x - THRESHOLD, 0.0) ** a for a in POWERS}
    return {
        "threshold": THRESHOLD,
        "logit": x.tolist(),
        "curves": {k: v.tolist() for k, v in curves.items()},
    }


def plot(data: dict[str, Any]) -> dict[str, Any]:
    """Draw the curves."""
    made, axes = figures.panel("exp against ReLU to a power", "logit", "weight")
    for colour, (name, curve) in zip(figures.COLOURS, data["curves"].items(), strict=False):
        label = (
            "exp(x)"
            if name == "exp"
            else f"ReLU(x − {data['threshold']})" + "¹²³"[int(name[-1]) - 1]
        )
        axes.plot(data["logit"], curve, color=colour, label=label)
    axes.axvline(data["threshold"], color=figures.GREY, linestyle=":", linewidth=1.2)
    axes.annotate(
        "b",
        (data["threshold"], 11.3),
        textcoords="offset points",
        xytext=(4, 0),
        color=figures.INK,
    )
    axes.set_ylim(-0.3, 12)
    figures.legend(axes, loc="upper left")
    return {"figure-1": made}


def findings(data: dict[str, Any]) -> list[str]:
    """Say what the curves have in common."""
    curve = np.array(data["curves"]["power 1"])
    zero = float((curve == 0).mean())
    return [
        f"Below b = {data['threshold']} the ReLU weights are exactly zero: {zero:.0%} of the "
        "axis drawn here "
        "needs no computation at all, while exp only gets small."
    ]
