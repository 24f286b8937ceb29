"""Draw the pictures of the pages on concepts: ``make pictures``.

The keys are real: heads that ``hsr capture`` has kept from SmolLM2 over essays. Only the plane of the first
picture is made up.

    python docs/pictures.py --heads heads.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

import hsr_attention as hsr
from hsr_attention.attention import reference
from hsr_attention.experiments import figures
from hsr_attention.experiments.figures import BLUE, GREEN, GREY, INK, ORANGE, PINK

Array = NDArray[np.float64]
QUERIES = 8  # the newest positions of each head
LAYER, HEAD = 4, 7  # the head that is looked at closely
WIDTH, HEIGHT = 6.4, 4.0


class Heads:
    """Captured heads: queries [heads, m, d], keys and values [kv_heads, n, d] by layer."""

    def __init__(self, path: Path) -> None:
        self._tensors = load_file(path)
        self.layers = sorted(int(name[1:]) for name in self._tensors if name[0] == "k")

    def layer(self, number: int) -> tuple[Any, Any, Any]:
        """Return q, k, v of a layer, [1, heads or kv_heads, ..., d]."""
        q, k, v = (self._tensors[f"{name}{number}"] for name in "qkv")
        return q[None, :, -QUERIES:], k[None], v[None]

    def logits(self, number: int) -> Array:
        """Return the logits of the newest query, [heads, n]."""
        q, k, _ = self.layer(number)
        group = q.shape[1] // k.shape[1]
        return np.stack(
            [reference.logits(q[0, h, -1:], k[0, h // group])[0] for h in range(q.shape[1])]
        )


def half_space() -> Any:
    """Draw keys in the plane, a query, its boundary, and what an index reports."""
    rng = np.random.default_rng(3)
    keys = rng.standard_normal((300, 2)).astype(np.float32)
    q, b = np.array([0.72, 0.54], np.float32), 1.0
    found = hsr.ConvexLayersIndex(keys).report(q[None], b).row(0)[0]
    others = np.setdiff1d(np.arange(len(keys)), found)
    made, axes = figures.panel(
        f"{len(found)} of {len(keys)} keys are reported", "", "", width=5.4, height=4.6
    )
    with matplotlib.rc_context({"text.color": INK}):
        axes.scatter(*keys[others].T, s=14, color=GREY, label="⟨q, k⟩ < b: not reported")
        axes.scatter(*keys[found].T, s=22, color=BLUE, label="⟨q, k⟩ ≥ b: reported")
        along = np.array([-q[1], q[0]]) / np.linalg.norm(q)
        foot = b * q / (q @ q)
        line = foot + np.outer([-6, 6], along)
        axes.plot(*line.T, color=ORANGE, label="⟨q, k⟩ = b")
        far = line[::-1] + 6 * q
        axes.fill(*np.concatenate([line, far]).T, color=BLUE, alpha=0.08, linewidth=0)
        axes.annotate("", q, (0, 0), arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 2})
        axes.annotate(
            "q", q / 2, xytext=(-14, 6), textcoords="offset points", fontsize=14,
            bbox={"boxstyle": "circle,pad=0.1", "facecolor": "white", "edgecolor": "none"},
        )  # fmt: skip
        axes.set(xlim=(-3.2, 3.2), ylim=(-3.2, 3.2), aspect="equal")
    figures.legend(axes, below=True, ncols=3, handletextpad=0.4, columnspacing=1.2)
    return made


def few_keys(heads: Heads) -> Any:
    """Draw the share of the softmax mass on the largest keys, for every head."""
    curves = []
    for number in heads.layers:
        for s in heads.logits(number):
            weights = np.sort(np.exp(s - s.max()))[::-1]
            curves.append(np.cumsum(weights) / weights.sum())
    mass = np.array(curves)
    n = mass.shape[1]
    need = 1 + (mass < 0.96).sum(axis=1)
    order = np.argsort(need)
    made, axes = figures.panel(
        f"{len(mass)} heads, one query each, {n:,} keys",
        "keys, the largest first",
        "share of the softmax mass, %",
        width=WIDTH,
        height=HEIGHT,
        log="x",
    )
    x = np.arange(1, n + 1)
    for curve in mass:
        axes.plot(x, 100 * curve, color=GREY, alpha=0.22, linewidth=0.8)
    for place, colour, word in ((0, GREEN, "least"), (0.5, BLUE, "median"), (1, ORANGE, "most")):
        i = order[round(place * (len(order) - 1))]
        label = f"{word}: {need[i]:,} {'key' if need[i] == 1 else 'keys'} for 96 %"
        axes.plot(x, 100 * mass[i], color=colour, label=label)
    axes.axhline(96, color=INK, linestyle=":", linewidth=1)
    axes.annotate("96 %", (1, 96), xytext=(2, 3), textcoords="offset points", color=INK)
    figures.legend(axes, loc="lower right")
    return made


def threshold(heads: Heads) -> Any:
    """Draw the logits of one query, and a threshold."""
    s = heads.logits(LAYER)[HEAD]
    b = np.sort(s)[-round(len(s) ** 0.8)]
    weights = np.exp(s - s.max())
    mass = weights[s >= b].sum() / weights.sum()
    made, axes = figures.panel(
        f"Layer {LAYER}, head {HEAD}: {(s >= b).mean():.0%} of the keys hold {mass:.0%} of the mass",
        "logit, scale · ⟨q, k⟩",
        "keys",
        width=WIDTH,
        height=HEIGHT,
        log="y",
    )
    edges = np.concatenate(
        [np.arange(b, s.min() - 0.3, -0.3)[::-1], np.arange(b, s.max(), 0.3)[1:]]
    )
    edges = np.append(edges, edges[-1] + 0.3)
    axes.hist(s[s < b], edges, color=GREY, label=f"below b: {(s < b).sum():,} keys")
    axes.hist(s[s >= b], edges, color=BLUE, label=f"reported: {(s >= b).sum():,} keys")
    axes.axvline(b, color=ORANGE, label=f"b = {b:.1f}, for n^(4/5) keys")
    axes.set_ylim(bottom=0.7)
    figures.legend(axes, loc="upper right")
    return made


def codes(keys: Array) -> list[tuple[str, Array]]:
    """Return keys as 4 and as 8 bits a coordinate give them back, without the rotation."""
    step = np.abs(keys).max(axis=1, keepdims=True) / 127.5
    code = np.clip(np.round(keys / step + 127.5), 0, 255)
    first = (
        16 * np.floor(code / 16) + 7.5
    )  # the high 4 bits, in the middle of what the low may add
    return [("4 bits", step * (first - 127.5)), ("8 bits", step * (code - 127.5))]


def bands(heads: Heads) -> Any:
    """Draw how far the logit of a coded key may be from the true one, and how far it is."""
    from scipy.fft import dct

    q, k, _ = heads.layer(LAYER)
    d = q.shape[-1]
    keys = k[0, HEAD // (q.shape[1] // k.shape[1])].astype(np.float64)
    keys -= keys.mean(axis=0)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], d)
    rotated, query = (dct(x * signs, norm="ortho") for x in (keys, q[0, HEAD, -1].astype(float)))
    s = rotated @ query / np.sqrt(d)
    made, axes = figures.panel(
        f"Layer {LAYER}, head {HEAD}: every true logit lies inside its band",
        "true logit (keys centred)",
        "logit from the codes − true logit",
        width=WIDTH,
        height=HEIGHT,
    )
    shown = np.argsort(s)[:: len(s) // 180]
    for (name, coded), colour in zip(codes(rotated), (ORANGE, BLUE), strict=True):
        off = coded @ query / np.sqrt(d) - s
        band = np.linalg.norm(query) * np.linalg.norm(rotated - coded, axis=1) / np.sqrt(d)
        assert (np.abs(off) <= band).all()
        axes.vlines(s[shown], -band[shown], band[shown], color=colour, alpha=0.4, linewidth=1.2)
        label = f"{name}: band ± {np.median(band):.2f}, error {np.abs(off).mean():.3f} on average"
        axes.scatter(s[shown], off[shown], s=7, color=colour, label=label)
    figures.legend(axes, below=True, markerscale=2)
    return made


def tiers(heads: Heads, epsilon: float = 0.04, exact_share: float = 1e-3) -> Any:
    """Draw what each key weighs, and in which tier it falls."""
    s = np.sort(heads.logits(LAYER)[HEAD])[::-1]
    weights = np.exp(s - s.max())
    weights /= weights.sum()
    exact = int((weights >= exact_share).sum())
    kept = int((1 - np.cumsum(weights) > 0.7 * epsilon).sum()) + 1
    made, axes = figures.panel(
        f"Layer {LAYER}, head {HEAD}, one query, {len(s):,} keys",
        "keys, the largest first",
        "weight after softmax",
        width=WIDTH,
        height=HEIGHT,
        log="xy",
    )
    x = np.arange(1, len(s) + 1)
    parts = (
        ("exact", slice(0, exact), BLUE),
        ("from the codes", slice(exact, kept), GREEN),
        ("left out", slice(kept, None), GREY),
    )
    for name, part, colour in parts:
        label = f"{name}: {len(x[part]):,} keys, {weights[part].sum():.1%} of the mass"
        axes.fill_between(
            x[part], weights[part], 1e-9, color=colour, alpha=0.55, lw=0, label=label
        )
    for place, word in ((exact, r"$b_{hi}$"), (kept, r"$b_{lo}$")):
        axes.axvline(place + 0.5, color=ORANGE, linewidth=1.4)
        axes.annotate(
            word, (place + 0.5, 0.97), xycoords=("data", "axes fraction"), xytext=(5, -9),
            textcoords="offset points", color=INK, fontsize=12,
        )  # fmt: skip
    axes.set_ylim(bottom=max(weights.min() / 2, 1e-8))
    figures.legend(axes, below=True, ncols=2)
    return made


def bytes_read(heads: Heads) -> Any:
    """Draw what a decoding step reads of a layer, beside dense attention."""
    parts = {
        "keys, first plane": 0.0,
        "keys, second plane": 0.0,
        "value codes": 0.0,
        "full rows": 0.0,
    }
    dense = 0.0
    for number in heads.layers:
        q, k, v = heads.layer(number)
        d, group = q.shape[-1], q.shape[1] // k.shape[1]
        dense += k.nbytes + v.nbytes
        layer = hsr.KVCache()
        layer.append(k, v)
        work = layer.attend(q[:, :, -1:], return_certificate=True)[1].work
        # The formulas of `hsr bench decode`, docs/command.md.
        parts["keys, first plane"] += work["sketch_scored"] / group * (d / 2 + 4)
        parts["keys, second plane"] += work["refined"] / group * (d / 2 + 2)
        parts["value codes"] += work["sketched"] * d * 5 / 8
        parts["full rows"] += work["full_scored"] * 2 * d * 4
    mega = 1e6 * len(heads.layers)
    made, axes = figures.panel(
        f"One token, {k.shape[2]:,} keys: read in a layer, mean of {len(heads.layers)}",
        "megabytes",
        "",
        width=WIDTH,
        height=2.7,
    )
    axes.barh("dense, float32", dense / mega, color=GREY)
    left = 0.0
    for (name, size), colour in zip(parts.items(), (BLUE, GREEN, ORANGE, PINK), strict=True):
        label = f"{name}: {size / mega:.2f}"
        axes.barh("half-space reporting", size / mega, left=left, color=colour, label=label)
        left += size / mega
    axes.text(left, 1, f"  {left:.1f} of {dense / mega:.1f} MB", va="center", color=INK)
    axes.tick_params(axis="y", length=0)
    figures.legend(axes, below=True, ncols=2)
    return made


def certificates(heads: Heads) -> Any:
    """Draw true error and certificate of every query, for three values of epsilon."""
    made, axes = figures.panel(
        " ", "true error, share of the largest value", "certificate, same unit",
        width=WIDTH, height=4.6, log="xy",
    )  # fmt: skip
    rows = 0
    for epsilon, colour in ((0.1, ORANGE), (0.04, BLUE), (0.01, GREEN)):
        errors, bounds = [], []
        for number in heads.layers:
            q, k, v = heads.layer(number)
            layer = hsr.KVCache(hsr.SoftmaxPolicy(epsilon=epsilon))
            layer.append(k, v)
            out, found = layer.attend(q, return_certificate=True)
            group, n = q.shape[1] // k.shape[1], k.shape[2]
            visible = reference.causal(QUERIES, n)
            for h in range(q.shape[1]):
                truth = reference.softmax_attention(
                    q[0, h], k[0, h // group], v[0, h // group], visible=visible
                )
                largest = np.abs(v[0, h // group]).max()
                errors.append(np.abs(out[0, h] - truth).max(axis=1) / largest)
                bounds.append(found.error_bound[0, h] / largest)
        error, bound = np.concatenate(errors), np.concatenate(bounds)
        assert (error <= bound).all()
        rows += len(error)
        label = (
            f"ε = {epsilon:g}: medians {100 * np.median(error):.2f} % and "
            f"{100 * np.median(bound):.1f} %"
        )
        axes.scatter(error, bound, s=7, color=colour, alpha=0.7, label=label)
    ends = np.array(axes.get_xlim())
    axes.plot(ends, ends, color=INK, linestyle=":", linewidth=1.2, label="error = certificate")
    axes.set_xlim(ends)
    title = f"{rows:,} answers, none below the dotted line"
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
    figures.legend(axes, below=True, ncols=2, markerscale=2)
    return made


def main() -> None:
    """Draw all pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=Path, required=True, help="written by hsr capture")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "pictures")
    options = parser.parse_args()
    heads = Heads(options.heads)
    drawn = {
        "half_space": half_space(),
        "few_keys": few_keys(heads),
        "threshold": threshold(heads),
        "bands": bands(heads),
        "tiers": tiers(heads),
        "bytes_read": bytes_read(heads),
        "certificates": certificates(heads),
    }
    for name, figure in drawn.items():
        figure.savefig(options.out / f"{name}.png", dpi=130, facecolor="white")
        print(options.out / f"{name}.png")


if __name__ == "__main__":
    main()
