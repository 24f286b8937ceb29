"""Lemma 6.1: how many keys reach the threshold, in theory, on Gaussian data and on real heads."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from hsr_attention.experiments import figures
from hsr_attention.experiments.workbench import Workbench, some_layers
from hsr_attention.indexes.flat import FlatIndex
from hsr_attention.theory import sparsity as theory

NAME = "sparsity"
TITLE = "How sparse? The threshold of Lemma 6.1"
USES_MODEL = True
EXPLANATION = """
If queries and keys were Gaussian noise, how many keys would a query find interesting? Lemma 6.1
sets a threshold b = σₐ √(0.4 ln n) such that a row of ReLU attention keeps at most 2 n^(4/5)
keys, and everything the paper promises about time rests on that number.

The lemma is true, and its constant is wasteful: σₐ bounds the norm of a query by about *four
times* what it is, so b lies so high that rows come out empty, and an empty row is no attention at
all. The *calibrated* threshold uses the query's own norm, b = |q| σₖ √(0.4 ln n / d), and nothing
else changes in the proof.

Both are counted here on Gaussian keys, by an exact index; then the calibrated one on the heads of
a real model, where nothing is Gaussian and the surprise is the spread: the same rule keeps
nothing at all in one head and a large part of the keys in the next. *Centred* means that the mean
key is taken off first, which softmax does not notice.
"""
DELTA = 0.01
QUERIES = 64


def run(quick: bool, bench: Workbench) -> dict[str, Any]:
    """Count on Gaussian data for each n and d, and on the heads of the longest prompt."""
    largest = 1e5 if quick else 1e6
    sizes = [int(n) for n in np.geomspace(1e3, largest, 5 if quick else 7).round()]
    dims = (64,) if quick else (16, 64, 128)
    gaussian = [
        row
        for d in dims
        for row in bench.part(
            f"Gaussian keys, d = {d}", lambda d=d: gaussian_rows(d, sizes, bench.settings.seed)
        )
    ]
    length = bench.settings.lengths[-1]
    state = bench.state(length)
    layers = some_layers(state.layers, 6 if quick else len(state.layers))
    heads = [
        bench.part(
            f"real heads, {length} tokens, layer {layer}",
            lambda layer=layer: real_rows(state, layer),
        )
        for layer in layers
    ]
    return {
        "gaussian": gaussian,
        "delta": DELTA,
        "queries": QUERIES,
        "model": bench.settings.model,
        "layers": layers,
        "real": [row for rows in heads for row in rows],
    }


def gaussian_rows(d: int, sizes: list[int], seed: int, m: int = QUERIES) -> list[dict[str, Any]]:
    """Count entries above both thresholds for standard normal queries and keys."""
    rng = np.random.default_rng([seed, d])
    queries = rng.standard_normal((m, d), dtype=np.float32)
    keys = rng.standard_normal((max(sizes), d), dtype=np.float32)
    scale, norms = d**-0.5, np.linalg.norm(queries, axis=1)
    rows = []
    for n in sizes:
        index = FlatIndex(keys[:n])
        calibrated = theory.calibrated_threshold(queries, 1.0, n)
        lemma = theory.lemma_threshold(n, m, d, 1.0, 1.0, DELTA)
        counts = index.count(queries, calibrated / scale)
        rows.append(
            {
                "d": d,
                "n": n,
                "lemma_threshold": lemma,
                "calibrated_threshold": float(calibrated.mean()),
                "loose_factor": theory.loose_factor(n, m, d, 1.0, 1.0, DELTA),
                "calibrated": _spread(counts),
                "above_bound": int((counts > 2 * n**0.8).sum()),
                "calibrated_expected": float(
                    theory.expected_count(n, calibrated, norms, 1.0, scale).mean()
                ),
                "lemma": _spread(index.count(queries, lemma / scale)),
                "lemma_expected": float(theory.expected_count(n, lemma, norms, 1.0, scale).mean()),
            }
        )
    return rows


def real_rows(state: Any, layer: int) -> list[dict[str, Any]]:
    """Count, for each head and length, the keys that reach the calibrated threshold."""
    _, k, _ = state.layer(layer)
    scale, keys = state.scale[layer], k.float().numpy()
    rows = []
    for n in state.lengths:
        queries = state.queries(layer, n).float().numpy()
        group = len(queries) // len(keys)
        for head, q in enumerate(queries):
            seen = keys[head // group, :n].astype(np.float64)
            mean = seen.mean(axis=0)
            logits = scale * (q.astype(np.float64) @ seen.T)
            centred = logits - scale * (q @ mean)[:, None]
            plain = theory.calibrated_threshold(q, _rms(seen), n, scale)
            moved = theory.calibrated_threshold(q, _rms(seen - mean), n, scale)
            rows.append(
                {
                    "layer": layer,
                    "head": head,
                    "n": n,
                    "calibrated": _spread((logits >= plain[:, None]).sum(axis=1)),
                    "centred": _spread((centred >= moved[:, None]).sum(axis=1)),
                }
            )
    return rows


def _rms(x: Any) -> float:
    return float(math.sqrt((x**2).mean()))


def _spread(counts: Any) -> dict[str, float]:
    return {
        "mean": float(np.mean(counts)),
        "low": float(np.quantile(counts, 0.1)),
        "high": float(np.quantile(counts, 0.9)),
        "empty": float(np.mean(np.asarray(counts) == 0)),
    }


def plot(data: dict[str, Any]) -> dict[str, Any]:
    """Draw counts against n, Gaussian and real, and a map of the real ones."""
    made = {"gaussian": _gaussian(data), "real": _real(data)}
    last = max(row["n"] for row in data["real"])
    rows = [r for r in data["real"] if r["n"] == last]
    share = [
        [r["centred"]["mean"] / last for r in rows if r["layer"] == x] for x in data["layers"]
    ]
    made["real-heads"] = figures.heat(
        share,
        f"Centred: share of {last:,} keys kept",
        "share (logarithmic)",
        data["layers"],
        log=True,
    )
    return made


def _gaussian(data: dict[str, Any]) -> Any:
    made, axes = figures.panel(
        "Gaussian keys: entries in a row", "keys n", "entries above b", log="xy"
    )
    rows = [r for r in data["gaussian"] if r["d"] == 64] or data["gaussian"]
    n = np.array([r["n"] for r in rows], float)
    _power_lines(axes, n)
    mean = [r["calibrated"]["mean"] for r in rows]
    band = [[r["calibrated"][x] for r in rows] for x in ("low", "high")]
    axes.fill_between(n, *band, color=figures.BLUE, alpha=0.2, linewidth=0)
    axes.plot(n, mean, "o", color=figures.BLUE, label="calibrated b, counted (10–90 %)")
    axes.plot(
        n,
        [r["calibrated_expected"] for r in rows],
        color=figures.BLUE,
        label="calibrated b, predicted",
    )
    axes.plot(
        n,
        [r["lemma_expected"] for r in rows],
        color=figures.ORANGE,
        label="the lemma's b, predicted",
    )
    none = [r["n"] for r in rows if r["lemma"]["mean"] == 0]
    axes.plot(
        none, [1e-13] * len(none), "v", color=figures.ORANGE, label="the lemma's b, counted: none"
    )
    axes.set_ylim(3e-14, 3e6)
    figures.legend(axes, below=True, ncols=2, fontsize=8)
    return made


def _real(data: dict[str, Any]) -> Any:
    made, axes = figures.panel(
        "Real heads: keys above the calibrated b", "keys n", "keys kept", log="xy"
    )
    sizes = sorted({r["n"] for r in data["real"]})
    _power_lines(axes, np.array(sizes, float))
    for name, colour in (("calibrated", figures.BLUE), ("centred", figures.GREEN)):
        means = [[r[name]["mean"] for r in data["real"] if r["n"] == n] for n in sizes]
        low, middle, high = (
            np.maximum([np.quantile(m, x) for m in means], 0.3) for x in (0.1, 0.5, 0.9)
        )
        axes.fill_between(sizes, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(sizes, middle, "o-", color=colour, label=f"{name}: median head, 10–90 %")
    figures.powers_of_two(axes, sizes)
    figures.legend(axes, below=True, fontsize=8)
    return made


def _power_lines(axes: Any, n: Any) -> None:
    axes.plot(n, n**0.8, color=figures.GREY, linestyle="--", linewidth=1.2, label="n^(4/5)")
    axes.plot(n, 2 * n**0.8, color=figures.GREY, linestyle=":", linewidth=1.2, label="2 n^(4/5)")


def findings(data: dict[str, Any]) -> list[str]:
    """Say what was predicted and what was found."""
    rows = [r for r in data["gaussian"] if r["d"] == 64] or data["gaussian"]
    last = rows[-1]
    above = sum(r["above_bound"] for r in data["gaussian"])
    total = len(data["gaussian"]) * data["queries"]
    slope = np.polyfit(
        np.log([r["n"] for r in rows]), np.log([r["calibrated"]["mean"] for r in rows]), 1
    )[0]
    n = max(r["n"] for r in data["real"])
    real = [r for r in data["real"] if r["n"] == n]
    kept, raw = (np.array([r[x]["mean"] for r in real]) / n for x in ("centred", "calibrated"))
    over = np.mean(kept > 2 * n**-0.2)
    empty = np.mean([r["calibrated"]["empty"] for r in real])
    return [
        f"The lemma's b is {last['loose_factor']:.1f} times the typical calibrated one; at n = "
        f"{last['n']:,} it predicts "
        f"{last['lemma_expected']:.1e} entries a row, and {last['lemma']['mean']:.0f} were "
        "counted: the row is empty.",
        f"The calibrated b keeps {last['calibrated']['mean']:,.0f} keys of {last['n']:,} "
        f"(predicted {last['calibrated_expected']:,.0f}; "
        f"n^(4/5) = {last['n'] ** 0.8:,.0f}), growing like n^{slope:.2f}. Rows above 2 n^(4/5): "
        f"{above} of {total:,}.",
        f"In {data['model']} at {n:,} keys the rule as it stands keeps between {raw.min():.1%} "
        "and "
        f"{raw.max():.1%} of the keys, and {empty:.0%} of the rows are empty: real keys have a "
        "common "
        "part that moves all logits of a query up or down together.",
        f"Centred, it keeps {np.median(kept):.1%} in the median head, from {kept.min():.2%} to "
        f"{kept.max():.1%}; {over:.0%} of the heads are above 2 n^(4/5) = {2 * n**0.8:,.0f}. A "
        "count says "
        "little about the mass: that is what the next sections ask for.",
    ]
