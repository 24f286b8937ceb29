"""An atlas of a model: every layer and head, how many keys it needs and what policies make of that."""

from __future__ import annotations

from typing import Any

import numpy as np

from hsr_attention.evaluation import atlas
from hsr_attention.experiments import figures
from hsr_attention.experiments.growth import exponent, table
from hsr_attention.experiments.workbench import Workbench, some_layers

NAME = "atlas"
TITLE = "An atlas of attention heads"
USES_MODEL = True
EXPLANATION = """
Heads differ as much as people do. Some look at one word and are done; some read the last line
again and again; some park their attention on the first token of the text, a *sink*, whenever they
have nothing to say; and some spread it so thinly that no selection can help them. A method that
gives every head the same number of keys is too generous to the first and too mean to the last.

Each small square is one head. The maps show how many keys hold 90, 99 and 99.9 per cent of its
attention, how much rests on the first four and on the newest 64 tokens, which share of the keys
the default policy reads, and how tight the certificate is that comes back. A last picture follows
the need for keys as the text grows: that curve, not the length of the text, is what sparse
attention has to pay for. `hsr analyze` draws the same atlas of any model over any text.
"""
EXTRAPOLATED = 131072


def run(quick: bool, bench: Workbench) -> dict[str, Any]:
    """Analyse the layers of the longest prompt, and the need for keys at its earlier lengths."""
    length = bench.settings.lengths[-1]
    state = bench.state(length)
    layers = some_layers(state.layers, 8 if quick else len(state.layers))

    def whole(layer: int) -> dict[str, Any]:
        q, k, v = state.layer(layer)
        return atlas.analyse_layer(layer, q[:, -atlas.QUERIES :], k, v, state.scale[layer])

    def growing(layer: int) -> list[list[list[float]]]:
        _, k, _ = state.layer(layer)
        scale = state.scale[layer]
        return [atlas.keys_needed(state.queries(layer, n), k[:, :n], scale) for n in state.lengths]

    rows = [bench.part(f"{length} tokens, layer {x}", lambda x=x: whole(x)) for x in layers]
    grown = [bench.part(f"growth, layer {x}", lambda x=x: growing(x)) for x in layers]
    return summary(bench.settings.model, rows) | {
        "growth": {"n": state.lengths, "keys_needed": np.concatenate(grown, axis=2).tolist()}
    }


def summary(model: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Put layers together; what ``plot`` and ``findings`` read."""
    names = list(rows[0]["policies"])
    lines = []
    for name in names:
        of = [row["policies"][name] for row in rows]
        density = np.concatenate([p["density"] for p in of])
        error = np.concatenate([p["error"] for p in of])
        bound = np.concatenate([p["bound"] for p in of])
        lines.append(
            [
                name,
                f"{density.mean():.1%}",
                f"{np.quantile(density, 0.1):.1%} – {np.quantile(density, 0.9):.1%}",
                f"{error.mean():.3%}",
                f"{np.median(bound):.2%}",
                sum(p["violations"] for p in of),
            ]
        )
    columns = [
        "policy",
        "density, mean",
        "10–90 % of heads",
        "error",
        "certificate, median",
        "broken",
    ]
    return {
        "model": model,
        "n": rows[0]["n"],
        "layers": [row["layer"] for row in rows],
        "rows": rows,
        "sinks": atlas.SINKS,
        "recent": atlas.RECENT,
        "certificates": {
            "rows": sum(p["rows"] for row in rows for p in row["policies"].values()),
            "violations": sum(p["violations"] for row in rows for p in row["policies"].values()),
        },
        "tables": [
            table(columns, lines, "Policies over all heads; errors as shares of the largest value")
        ],
    }


def plot(data: dict[str, Any]) -> dict[str, Any]:
    """Draw the maps, and the growth of the need if it was measured."""
    layers, rows, n = data["layers"], data["rows"], data["n"]
    made = {}
    for share in rows[0]["keys_needed"]:
        values = [row["keys_needed"][share] for row in rows]
        title = f"Keys for {100 * float(share):g} % of the mass"
        made[f"keys-{share}"] = figures.heat(
            values, title, f"of {n:,} keys (logarithmic)", layers, log=True, low=1, high=n
        )
    for name, title in (
        ("sinks", f"Mass on the first {data['sinks']} tokens"),
        ("recent", f"Mass on the newest {data['recent']} tokens"),
    ):
        values = [[100 * x for x in row[name]] for row in rows]
        made[name] = figures.heat(values, title, "per cent", layers, low=0, high=100)
    policy = (
        atlas.DEFAULT if atlas.DEFAULT in rows[0]["policies"] else next(iter(rows[0]["policies"]))
    )
    for name, title in (
        ("density", f"Keys read, {policy}"),
        ("bound", f"Certificate, {policy}"),
        ("error", f"True error, {policy}"),
    ):
        values = [[100 * x for x in row["policies"][policy][name]] for row in rows]
        label = "per cent of the keys" if name == "density" else "per cent of the largest value"
        made[name] = figures.heat(values, title, f"{label} (log.)", layers, log=True)
    if "growth" in data and len(data["growth"]["n"]) > 1:
        made["growth"] = _growth(data["growth"])
    return made


def _growth(growth: dict[str, Any]) -> Any:
    made, axes = figures.panel(
        "Keys a head needs as the text grows", "keys n", "keys needed", log="xy"
    )
    needed = np.array(growth["keys_needed"])  # [lengths, shares, heads]
    for i, (share, colour) in enumerate(zip(atlas.SHARES, figures.COLOURS, strict=False)):
        low, middle, high = np.quantile(needed[:, i], [0.25, 0.5, 0.75], axis=1)
        e = exponent(growth["n"], middle)["exponent"]
        axes.fill_between(growth["n"], low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(
            growth["n"],
            middle,
            "o-",
            color=colour,
            label=f"{100 * share:g} %, median head: n^{e:.2f}",
        )
    n = np.array(growth["n"], float)
    axes.plot(n, n**0.8, "--", color=figures.GREY, linewidth=1.2, label="n^(4/5)")
    figures.powers_of_two(axes, growth["n"])
    figures.legend(axes)
    return made


def findings(data: dict[str, Any]) -> list[str]:
    """Say how heads differ."""
    rows, n = data["rows"], data["n"]
    need = {
        s: np.concatenate([row["keys_needed"][s] for row in rows]) for s in rows[0]["keys_needed"]
    }
    sinks = np.concatenate([row["sinks"] for row in rows])
    recent = np.concatenate([row["recent"] for row in rows])
    nine = need["0.99"]
    said = [
        f"At {n:,} tokens the median head holds 90 % of its attention in "
        f"{np.median(need['0.9']):,.0f} keys, 99 % in {np.median(nine):,.0f}, "
        f"99.9 % in {np.median(need['0.999']):,.0f}. For 99 % the most focused tenth of the "
        f"heads needs {np.quantile(nine, 0.1):,.0f}, "
        f"the most diffuse tenth {np.quantile(nine, 0.9):,.0f} or more.",
        f"The first {data['sinks']} tokens hold {sinks.mean():.0%} of all attention (over half "
        f"in {np.mean(sinks > 0.5):.0%} of the heads), "
        f"the newest {data['recent']} hold {recent.mean():.0%}.",
    ]
    if "growth" in data and len(data["growth"]["n"]) > 1:
        middle = np.median(np.array(data["growth"]["keys_needed"])[:, 1], axis=1)
        fit = exponent(data["growth"]["n"], middle)
        far = np.exp(fit["offset"]) * EXTRAPOLATED ** fit["exponent"]
        said.append(
            f"For 99 % the need of the median head grows like n^{fit['exponent']:.2f}; carried "
            f"on, not measured, to {EXTRAPOLATED:,} tokens it "
            f"would be {far:,.0f} keys, {far / EXTRAPOLATED:.1%}."
        )
    counted = data["certificates"]
    said.append(f"Certificates broken: {counted['violations']} of {counted['rows']:,} rows.")
    return said
