"""What it costs: building, appending, asking, memory; where it pays; where the time goes."""

from __future__ import annotations

import statistics
import time
from typing import Any

from hsr_attention.evaluation import decode_speed
from hsr_attention.evaluation.decode_speed import Heads
from hsr_attention.experiments import figures
from hsr_attention.experiments.growth import crossing, exponent, table
from hsr_attention.experiments.workbench import Workbench, some_layers
from hsr_attention.kv_cache import KVCache
from hsr_attention.policies import SoftmaxPolicy

NAME = "cost"
TITLE = "What it costs, and from where on it pays"
USES_MODEL = True
EXPLANATION = """
An index is not free: it must be built, kept up to date, stored and asked. The first picture shows
all of it against the number of keys of one layer (three key heads of 64 dimensions, made-up
keys): *build* codes all keys at once, *append* adds one token, *ask* is one decoding step,
threshold and selection included.

*Where it pays* compares a decoding step of attention with the fastest dense path torch has on
this machine (repeated keys, grouped, packed, plain matrix products: whichever wins at that size),
for the real heads of the model and for made-up heads in the shapes of larger ones. The break-even
point is where the curve crosses one.

*Where the time goes* splits a step by leaving stages out: nothing selected (the scan alone);
values of one number instead of a row (choosing and selecting); no exact rows (codes); everything.
Differences of medians of alternating runs, so small ones are noise.
"""
SHAPES = ((32, 8, 128), (14, 2, 64), (16, 16, 64), (8, 4, 256))
STAGES = ("scan", "select", "codes", "exact")


def run(quick: bool, bench: Workbench) -> dict[str, Any]:
    """Measure growth, break-even and stages."""
    top = 15 if quick else 17
    growth = [
        bench.part(f"growth, n = {2**i}", lambda n=2**i: cost_of(n))
        for i in range(10, top + 1, 1 if not quick else 2)
    ]
    length = bench.settings.lengths[-1]
    state = bench.state(length)
    layers = some_layers(state.layers, 3 if quick else 6)
    rounds = 5 if quick else 9
    sizes = [n for n in (2**i for i in range(9, 18)) if n <= state.n] + [state.n]
    even = [
        bench.part(
            f"break-even, real heads, n = {n}",
            lambda n=n: _speed("real heads", real_heads(state, layers, n), rounds),
        )
        for n in sorted(set(sizes))
    ]
    for heads, kv_heads, d in SHAPES[:2] if quick else SHAPES:
        for i in range(9, (14 if quick else 16), 2 if quick else 1):
            word = f"{heads}/{kv_heads}x{d}, made up"
            even.append(
                bench.part(
                    f"break-even, {word}, n = {2**i}",
                    lambda h=heads, k=kv_heads, d=d, n=2**i, word=word: _speed(
                        word, decode_speed.synthetic_heads(h, k, d, n, "float32", layers=2), rounds
                    ),
                )
            )
    shapes = list(dict.fromkeys(row["shape"] for row in even))
    stages = [
        bench.part(
            f"stages, n = {n}", lambda n=n: stages_of(real_heads(state, layers, n), 4 * rounds)
        )
        for n in sorted({state.n // 4, state.n})
    ]
    points = []
    for shape in shapes:
        rows = [r for r in even if r["shape"] == shape]
        n, gains = [r["n"] for r in rows], [r["speedup"] for r in rows]
        points.append(
            {
                "shape": shape,
                "from_n": crossing(n, gains),
                "largest_n": max(n),
                "speedup": gains[n.index(max(n))],
            }
        )
    return {
        "growth": growth,
        "break_even": even,
        "break_even_points": points,
        "stages": stages,
        "layers": layers,
        "fits": {
            name: exponent([r["n"] for r in growth], [r[name] for r in growth])
            for name in ("build_ms", "append_us", "ask_ms")
        },
        "certificates": {
            "rows": sum(r["rows_checked"] for r in even),
            "violations": sum(r["violations"] for r in even),
        },
        "tables": [_table(points)],
    }


def cost_of(n: int, kv_heads: int = 3, group: int = 3, d: int = 64) -> dict[str, Any]:
    """Build, append to and ask one layer of n made-up keys."""
    (heads,) = decode_speed.synthetic_heads(kv_heads * group, kv_heads, d, n, "float32", layers=1)
    build, cache = [], KVCache(SoftmaxPolicy())
    for _ in range(3):
        cache = KVCache(SoftmaxPolicy())
        start = time.perf_counter()
        cache.append(heads.k, heads.v)
        build.append(time.perf_counter() - start)
    queries = [heads.q[:, :, i : i + 1].contiguous() for i in range(heads.q.shape[2])]
    ask = []
    for i in range(25):
        start = time.perf_counter()
        cache.attend(queries[i % len(queries)], heads.scale)
        ask.append(time.perf_counter() - start)
    return {
        "n": n,
        "build_ms": 1e3 * statistics.median(build),
        "ask_ms": 1e3 * statistics.median(ask),
        "append_us": 1e6
        * decode_speed.append_seconds(cache, heads.k, heads.v, tokens=64, repeats=3),
        "row_bytes": cache.row_nbytes,
        "code_bytes": cache.code_nbytes,
        "needed_row_bytes": 2 * kv_heads * n * d * 4,
    }


def real_heads(state: Any, layers: list[int], n: int) -> list[Heads]:
    """Return the newest n keys of some layers of a prompt, and its last queries."""
    made = []
    for layer in layers:
        q, k, v = state.layer(layer)
        q, k, v = q[None, :, -decode_speed.QUERIES :], k[None, :, -n:], v[None, :, -n:]
        made.append(
            Heads(str(layer), q.contiguous(), k.contiguous(), v.contiguous(), state.scale[layer])
        )
    return made


def _speed(shape: str, heads: list[Heads], rounds: int) -> dict[str, Any]:
    found = decode_speed.measure(heads, SoftmaxPolicy(), rounds)
    total = found["total"]
    names = (
        "hsr_ms",
        "certified_ms",
        "fastest_dense_ms",
        "speedup",
        "rows_checked",
        "violations",
        "relative_error_mean",
        "density",
        "bytes_hsr",
        "bytes_dense",
    )
    fastest = sorted({row["fastest_dense"] for row in found["layers"]})
    return {
        "shape": shape,
        "n": heads[0].k.shape[2],
        "layers": len(heads),
        "fastest_dense": fastest,
        "memory_bandwidth_gb_s": found["memory_bandwidth_gb_s"],
        **{x: total[x] for x in names},
    }


def stages_of(heads: list[Heads], rounds: int) -> dict[str, Any]:
    """Time a step with stages left out, in alternation; milliseconds over all layers."""
    import torch

    share = 1 - 1e-6  # no key has that much of the mass: nothing is read exactly
    plans = {
        "scan": (SoftmaxPolicy(threshold=1e30, tail="drop", certify=False), 1),
        "select": (SoftmaxPolicy(exact_share=share), 1),
        "codes": (SoftmaxPolicy(exact_share=share), None),
        "exact": (SoftmaxPolicy(), None),
    }
    caches: dict[str, list[KVCache]] = {}
    for name, (policy, width) in plans.items():
        caches[name] = []
        for layer in heads:
            cache = KVCache(policy)
            cache.append(layer.k, layer.v[..., :width].contiguous())
            caches[name].append(cache)
    seconds: dict[str, list[float]] = {name: [] for name in plans}
    with torch.inference_mode():
        for i in range(rounds + 2):
            for name in plans:
                total = 0.0
                for layer, cache in zip(heads, caches[name], strict=True):
                    at = i % layer.q.shape[2]
                    query = layer.q[:, :, at : at + 1].contiguous()
                    start = time.perf_counter()
                    cache.attend(query, layer.scale)
                    total += time.perf_counter() - start
                if i >= 2:  # two rounds warm up
                    seconds[name].append(total)
    until = {name: 1e3 * statistics.median(s) for name, s in seconds.items()}
    split, before = {}, 0.0
    for name in STAGES:
        split[name] = max(until[name] - before, 0.0)
        before = max(before, until[name])
    return {"n": heads[0].k.shape[2], "layers": len(heads), "until_ms": until, "split_ms": split}


def _table(points: list[dict[str, Any]]) -> dict[str, Any]:
    rows = [
        [
            p["shape"],
            "not up to here" if p["from_n"] is None else f"{p['from_n']:,.0f}",
            f"{p['speedup']:.1f}x at {p['largest_n']:,}",
        ]
        for p in points
    ]
    return table(
        ["query/key heads x d", "faster from n =", "at the most keys"],
        rows,
        "Break-even context length, attention alone, float32",
    )


def plot(data: dict[str, Any]) -> dict[str, Any]:
    """Draw cost, memory, break-even and stages."""
    n = [r["n"] for r in data["growth"]]
    cost, axes = figures.panel("One layer: build, append, ask", "keys n", "milliseconds", log="xy")
    for name, label, factor, colour in (
        ("build_ms", "build all", 1.0, figures.ORANGE),
        ("ask_ms", "ask once", 1.0, figures.BLUE),
        ("append_us", "append one token", 1e-3, figures.GREEN),
    ):
        e = data["fits"][name]["exponent"]
        axes.plot(
            n,
            [factor * r[name] for r in data["growth"]],
            "o-",
            color=colour,
            label=f"{label}: n^{e:.2f}",
        )
    figures.powers_of_two(axes, n)
    figures.legend(axes)
    memory, axes = figures.panel("Memory of one layer", "keys n", "megabytes", log="xy")
    for name, label, colour in (
        ("needed_row_bytes", "keys and values, float32", figures.GREY),
        ("code_bytes", "codes", figures.BLUE),
    ):
        axes.plot(n, [r[name] / 1e6 for r in data["growth"]], "o-", color=colour, label=label)
    figures.powers_of_two(axes, n)
    figures.legend(axes)
    even, axes = figures.panel(
        "Faster than the fastest dense path", "keys n", "times faster", log="xy"
    )
    for colour, p in zip(figures.COLOURS, data["break_even_points"], strict=False):
        rows = [r for r in data["break_even"] if r["shape"] == p["shape"]]
        axes.plot(
            [r["n"] for r in rows],
            [r["speedup"] for r in rows],
            "o-",
            color=colour,
            label=p["shape"],
        )
    axes.axhline(1, color=figures.INK, linewidth=1, linestyle="--")
    ticks = [0.25, 0.5, 1, 2, 4, 8, 16]
    axes.set_yticks(ticks, [f"{t:g}x" for t in ticks])
    axes.minorticks_off()
    figures.powers_of_two(axes, [r["n"] for r in data["break_even"]])
    figures.legend(axes)
    split, axes = figures.panel(
        "Where a decoding step spends its time", "per cent", "", height=2.4
    )
    for y, row in enumerate(data["stages"]):
        total, left = sum(row["split_ms"].values()) or 1.0, 0.0
        for name, colour in zip(STAGES, figures.COLOURS, strict=False):
            share = 100 * row["split_ms"][name] / total
            axes.barh(
                y, share, left=left, color=colour, height=0.6, label=name if y == 0 else None
            )
            if share > 6:
                axes.text(
                    left + share / 2,
                    y,
                    f"{share:.0f}",
                    ha="center",
                    va="center",
                    color="white",
                    fontsize=9,
                )
            left += share
    axes.set_yticks(range(len(data["stages"])), [f"n = {r['n']:,}" for r in data["stages"]])
    axes.set_ylim(-0.6, len(data["stages"]) + 0.3)
    axes.grid(visible=False)
    figures.legend(axes, ncols=4, loc="upper left")
    return {"cost": cost, "memory": memory, "break-even": even, "stages": split}


def findings(data: dict[str, Any]) -> list[str]:
    """Say the prices."""
    last = data["growth"][-1]
    real = data["break_even_points"][0]
    where = (
        "does not yet beat the fastest dense path"
        if real["from_n"] is None
        else f"is faster than the fastest dense path from about {real['from_n']:,.0f} keys on"
    )
    stage = data["stages"][-1]
    total = sum(stage["split_ms"].values()) or 1.0
    split = ", ".join(f"{name} {100 * ms / total:.0f} %" for name, ms in stage["split_ms"].items())
    counted = data["certificates"]
    return [
        f"At {last['n']:,} keys a layer takes {last['build_ms']:.0f} ms to build, "
        f"{last['ask_ms']:.2f} ms to ask, and a token "
        f"{last['append_us']:.0f} µs to append, which does not grow with n "
        f"(n^{data['fits']['append_us']['exponent']:.2f}). The codes take "
        f"{last['code_bytes'] / last['needed_row_bytes']:.1%} of what float32 keys and values do.",
        f"Attention over the real heads {where}; at {real['largest_n']:,} keys it is "
        f"{real['speedup']:.1f} times as fast.",
        f"A step at {stage['n']:,} keys: {split}.",
        f"Certificates broken: {counted['violations']} of {counted['rows']:,} rows.",
    ]
