"""Figure 3: perplexity against the number of keys that are kept, through the real decoding path."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np

from hsr_attention.evaluation import decode_statistics, generation, masked_attention
from hsr_attention.evaluation.perplexity import Perplexity, score
from hsr_attention.experiments import figures
from hsr_attention.experiments.workbench import Workbench, some_layers
from hsr_attention.policies import DEFAULT_EPSILON, Policy, SoftmaxPolicy

NAME = "perplexity"
TITLE = "What a model loses: perplexity against r"
USES_MODEL = True
EXPLANATION = """
This is the paper's one experiment (its Figure 3), done with the real thing. A model reads essays,
and the last words are forced on it one by one: how surprised is it by each? *Perplexity* is the
exponential of the mean surprise; lower is better. Every one of those words is decoded through the
cache, with attention to r keys only, so that errors feed on each other as they would in earnest.

*Top-r, rest dropped* is the paper's method. It found that perplexity rises notably only for r <
2⁴, in models of several billion parameters. *Top-r, rest from codes* is ours: the r largest are
read exactly, the others are not thrown away but weighed from 4- and 8-bit codes that were scanned
anyway. The *ε policies* let every query choose for itself how many keys it needs for at most a
share ε of the mass to be left out; they stand at the number of keys they chose.

The prompts before the scored words are read densely. Beyond the model's own context positions are
stretched by YaRN.
"""
EPSILONS = (0.3, 0.1, DEFAULT_EPSILON, 0.01)
MASKED = (16, 256)
LAYERS_FOR_MASS = 8


def run(quick: bool, bench: Workbench) -> dict[str, Any]:
    """Score every model at every length under every policy."""
    panels = [
        _panel(quick, bench, model, length)
        for model in bench.models
        for length in bench.settings.lengths
    ]
    counted = [p for panel in panels for p in panel["points"] if p["policy"] != "dense"]
    return {
        "scored": bench.settings.scored,
        "panels": panels,
        "answers_with_certificate": sum(p["certified"] for p in counted),
    }


def policies(n: int, quick: bool) -> dict[str, tuple[str, Policy, float]]:
    """Return every policy for n keys by its name: its curve, itself, and its r or epsilon."""
    step = 2 if quick else 1
    chosen: dict[str, tuple[str, Policy, float]] = {}
    for i in range(2, 16, step):
        r = 2**i
        if r <= n:
            chosen[f"top_r={r}, drop"] = ("drop", SoftmaxPolicy(top_r=r, tail="drop"), r)
            if r <= 2**11:  # above, nothing is left to gain from codes
                chosen[f"top_r={r}, codes"] = ("codes", SoftmaxPolicy(top_r=r), r)
    power = round(n**0.8)
    chosen[f"top_r=n^0.8={power}, drop"] = ("drop", SoftmaxPolicy(top_r=power, tail="drop"), power)
    for epsilon in EPSILONS[1:3] if quick else EPSILONS:
        chosen[f"epsilon={epsilon}"] = ("epsilon", SoftmaxPolicy(epsilon=epsilon), epsilon)
    return chosen


def _panel(quick: bool, bench: Workbench, name: str, length: int) -> dict[str, Any]:
    run = _Scoring(bench, name, length)
    points = [bench.part(f"{run.label}, dense", run.dense)]
    for word, (curve, policy, value) in policies(run.prefix, quick).items():
        points.append(
            bench.part(
                f"{run.label}, {word}", lambda c=curve, p=policy, v=value: run.sparse(c, p, v)
            )
        )
    run.release()
    checks = []
    if length == bench.settings.lengths[0]:
        for r in MASKED[:1] if quick else MASKED:
            checks.append(bench.part(f"{run.label}, top {r} by a mask", lambda r=r: run.masked(r)))
    mass = bench.part(f"{run.label}, mass in the top r", run.mass)
    return {
        "model": name,
        "label": bench.label(name),
        "length": length,
        "prefix": run.prefix,
        "yarn": bench.is_extended(length, name),
        "points": points,
        "masked": checks,
        "mass": mass,
    }


class _Scoring:
    """One model and prompt: the filled cache serves one policy after another."""

    def __init__(self, bench: Workbench, name: str, length: int) -> None:
        self.bench, self.name, self.length = bench, name, length
        self.label = f"{bench.label(name)}, {length} tokens"
        self.prefix = length - bench.settings.scored
        self.forced = bench.ids(length, name)[0, self.prefix :].tolist()
        self._cache: Any = None

    def _score(self, model: Any, cache: Any, what: str) -> Perplexity:
        def told(done: int) -> None:
            if (done - self.prefix) % 32 == 0:
                self.bench.say(f"{what}: {done - self.prefix} of {len(self.forced)}")

        logits = self.bench.state(self.length, self.name).logits
        return score(model, cache, logits, self.forced, self.prefix, told)

    def dense(self) -> dict[str, Any]:
        """Score with torch's dense attention over a static cache."""
        model = self.bench.model(self.length, self.name)
        dynamic = self.bench.state(self.length, self.name).fill(generation.dense_cache(model))
        cache = generation.static_copy(model, dynamic, len(self.forced)) or dynamic
        del dynamic
        found = self._score(model, cache, f"{self.label}, dense")
        return {
            "policy": "dense",
            "curve": "dense",
            "value": None,
            "perplexity": found.perplexity,
            "density": 1.0,
            "nats": found.nats,
            "seconds_a_token": found.seconds / len(self.forced),
        }

    def sparse(self, curve: str, policy: Policy, value: float) -> dict[str, Any]:
        """Score under a policy, from the cache as it was after the prompt."""
        model = self.bench.model(self.length, self.name)
        if self._cache is None:
            self.bench.say(f"{self.label}: fill the cache")
            self._cache = generation.hsr_cache(
                model, SoftmaxPolicy()
            )  # a policy that codes values
            self.bench.state(self.length, self.name).fill(self._cache)
        model.set_attn_implementation("hsr")
        self._cache.use_policy(policy)
        try:
            found = self._score(model, self._cache, f"{self.label}, {curve} {value:g}")
            layers = [x for x in found.statistics if x.density.size]
        finally:
            generation.crop(self._cache, self.prefix)
        summary = decode_statistics.summary(found.statistics)
        density = float(np.mean([x.density.mean(dtype=np.float64) for x in layers]))
        bound = None if summary is None else summary.relative_bound
        return {
            "policy": repr(policy),
            "curve": curve,
            "value": value,
            "perplexity": found.perplexity,
            "density": density,
            "keys": density * self.prefix,
            "nats": found.nats,
            "seconds_a_token": found.seconds / len(self.forced),
            "bound_median": None if bound is None else bound.median,
            "certified": sum(x.error_bound.size for x in layers),
        }

    def release(self) -> None:
        """Let the filled cache go."""
        self._cache = None

    def masked(self, r: int) -> dict[str, Any]:
        """Score top-r once more in one pass with masked dense attention: slow, and independent."""
        model = self.bench.model(self.length, self.name)
        state = self.bench.state(self.length, self.name)
        nats = masked_attention.top_r_nats(model, state, self.forced, r)
        return {"r": r, "perplexity": float(np.exp(statistics.fmean(nats)))}

    def mass(self) -> dict[str, list[float]]:
        """Return the mean share of the softmax mass in the top r of each row, for r = 4, 8, ..."""
        state = self.bench.state(self.length, self.name)
        widths = [2**i for i in range(2, 16) if 2**i <= self.prefix]
        shares = []
        for layer in some_layers(state.layers, LAYERS_FOR_MASS):
            q, k, _ = state.layer(layer)
            group = q.shape[0] // k.shape[0]
            for head in range(q.shape[0]):
                logits = state.scale[layer] * (q[head, -4:].double() @ k[head // group].double().T)
                weights = logits.softmax(dim=-1).sort(descending=True).values.cumsum(dim=-1)
                shares.append(weights[:, [r - 1 for r in widths]].mean(dim=0).tolist())
        return {"r": [float(r) for r in widths], "mass": np.mean(shares, axis=0).tolist()}


CURVES = (
    ("drop", "top-r, rest dropped (the paper)", figures.ORANGE),
    ("codes", "top-r, rest from codes", figures.BLUE),
    ("epsilon", "ε policies, at the keys they chose", figures.GREEN),
)


def plot(data: dict[str, Any]) -> dict[str, Any]:
    """Draw perplexity against r for each model and length, and what explains the knee."""
    made = {}
    for p in data["panels"]:
        name = f"{p['label'].replace(' ', '-')}-{p['length']}"
        made[f"figure-3-{name}"] = _perplexities(p, close=False)
        made[f"figure-3-{name}-close"] = _perplexities(p, close=True)
        made[f"mass-{name}"] = _knee(p)
    return made


def _title(p: dict[str, Any]) -> str:
    return f"{p['label']}, {p['length']:,} tokens" + (" (YaRN)" if p["yarn"] else "")


def _points(p: dict[str, Any], curve: str) -> list[dict[str, Any]]:
    return sorted((x for x in p["points"] if x["curve"] == curve), key=lambda x: x["value"])


def _perplexities(p: dict[str, Any], close: bool) -> Any:
    """Draw perplexity against r; ``close`` shows what lies within a few per cent of dense."""
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    title = f"{'Close to dense' if close else 'Perplexity'}: {_title(p)}"
    made, axes = figures.panel(title, "r keys", "perplexity", log="" if close else "y")
    dense = p["points"][0]["perplexity"]
    axes.axhline(
        dense, color=figures.GREY, linestyle="--", linewidth=1.3, label=f"dense: {dense:.3f}"
    )
    for curve, label, colour in CURVES:
        points = _points(p, curve)
        x = [q["keys"] if curve == "epsilon" else q["value"] for q in points]
        style = "D" if curve == "epsilon" else "o-"
        axes.plot(x, [q["perplexity"] for q in points], style, color=colour, label=label)
    axes.plot(
        [q["r"] for q in p["masked"]],
        [q["perplexity"] for q in p["masked"]],
        "x",
        markersize=9,
        color=figures.INK,
        label="the same by masks, in one pass",
        linestyle="none",
    )
    figures.powers_of_two(axes, [2**i for i in range(2, 16) if 2**i <= p["prefix"]])
    if close:
        axes.set_ylim(0.975 * dense, 1.1 * dense)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.minorticks_off()
    figures.legend(axes, below=True, ncols=2, fontsize=8)
    return made


def _knee(p: dict[str, Any]) -> Any:
    made, axes = figures.panel(
        f"Why the knee: {_title(p)}",
        "softmax mass outside the top r, per cent",
        "perplexity over dense, per cent",
        log="x",
    )
    axes.set_yscale("symlog", linthresh=1)
    dense = p["points"][0]["perplexity"]
    outside = dict(zip(p["mass"]["r"], (1 - m for m in p["mass"]["mass"]), strict=True))
    for curve, label, colour in CURVES[:2]:
        points = [q for q in _points(p, curve) if q["value"] in outside]
        x = [max(100 * outside[q["value"]], 1e-3) for q in points]
        y = [100 * (q["perplexity"] / dense - 1) for q in points]
        axes.plot(x, y, "o-", color=colour, label=label)
        for q, a, b in list(zip(points, x, y, strict=True))[:: 2 if len(points) > 6 else 1]:
            if curve == "drop":
                axes.annotate(
                    f"r = {figures.thousands(int(q['value']))}",
                    (a, b),
                    xytext=(5, -9),
                    fontsize=7,
                    textcoords="offset points",
                    color=figures.INK,
                )
    low, high = (f(100 * x for x in outside.values()) for f in (min, max))
    ticks = [x for x in (0.01, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= x <= high]
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.xaxis.minorticks_off()
    axes.set_yticks([-1, 0, 1, 10, 100], ["−1", "0", "1", "10", "100"])
    axes.yaxis.minorticks_off()
    axes.axhline(0, color=figures.GREY, linestyle="--", linewidth=1)
    figures.legend(axes)
    return made


def findings(data: dict[str, Any]) -> list[str]:
    """Say what each panel shows."""
    said = []
    for p in data["panels"]:
        dense = p["points"][0]["perplexity"]
        drop = {int(q["value"]): q["perplexity"] for q in _points(p, "drop")}
        codes = {int(q["value"]): q["perplexity"] for q in _points(p, "codes")}
        near = [r for r, x in sorted(drop.items()) if x < 1.02 * dense]
        least, outside = min(drop), dict(zip(p["mass"]["r"], p["mass"]["mass"], strict=True))
        said.append(
            f"{_title(p)}: dense {dense:.3f}. Dropping the rest needs r = "
            f"{near[0] if near else '> n'} to stay within 2 %; at r = {least} it costs "
            f"{100 * (drop[least] / dense - 1):+.0f} %, since the top {least} hold only "
            f"{outside[least]:.0%} of the mass. With codes the "
            f"same r = {least} costs {100 * (codes[least] / dense - 1):+.2f} %."
        )
        for q in _points(p, "epsilon"):
            if q["value"] == DEFAULT_EPSILON:
                said.append(
                    f"{_title(p)}, default policy: {q['perplexity']:.3f} "
                    f"({100 * (q['perplexity'] / dense - 1):+.2f} %) at a density "
                    f"of {q['density']:.1%}."
                )
        for m in p["masked"]:
            if m["r"] in drop:
                said.append(
                    f"{_title(p)}, r = {m['r']}: {drop[m['r']]:.4f} through the decoding path, "
                    f"{m['perplexity']:.4f} by masks in one pass."
                )
    return said
