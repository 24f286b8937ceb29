"""``hsr bench index-libraries``: the low-dimensional indexes against scikit-learn and scipy."""

from __future__ import annotations

from typing import Annotated

import typer

from hsr_attention.cli import console, options
from hsr_attention.experiments import index_libraries


def bench_index_libraries(
    dim: Annotated[int, typer.Option("--dim", min=1, max=8, help="Dimension.")] = 3,
    n: options.Size = "1e6",
    k: Annotated[int, typer.Option("--k", min=1, help="Keys reported by a query.")] = 100,
    data: options.IndexData = "gaussian,sphere",
    queries: Annotated[int, typer.Option(min=1, help="Slow libraries answer fewer.")] = 100,
    repeats: options.Repeats = 3,
    threads: Annotated[int, typer.Option(min=1, help="Of our builds; theirs use one.")] = 1,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> None:
    """Time builds and queries against BallTree, KDTree and cKDTree over lifted keys.

    Needs scikit-learn and scipy: pip install 'hsr-attention[libraries]'.
    """
    with console.status() as status:
        found = index_libraries.run(
            n=options.size(n, "--n"),
            d=dim,
            k=k,
            data=options.index_data(data),
            queries=queries,
            repeats=repeats,
            threads=threads,
            seed=seed,
            on_row=status.update,
        )
    if json:
        console.print_json(found)
        return
    columns = ["index", "keys", "build, s", "us a query, one call", "a call each", "queries"]
    rows = [
        [r["name"], r["data"], f"{r['build']:.3f}", console.number(r["batch"]),
         console.number(r["single"]), str(r["queries"])]
        for r in found["rows"]
    ]  # fmt: skip
    console.print_table(f"d = {dim}, {n} keys, {k} reported, same answers", columns, rows)
    columns = ["index", "library", "keys", "build", "one call", "a call each"]
    rows = [
        [r["index"], r["library"], r["data"],
         *(f"{r[name]:.2f} x" for name in ("build", "batch", "single"))]
        for r in found["ratios"]
    ]  # fmt: skip
    console.print_table("Faster by", columns, rows)
