"""``hsr bench index-append``: what keeping a low-dimensional index up to date costs."""

from __future__ import annotations

from typing import Annotated

import typer

from hsr_attention.cli import console, options
from hsr_attention.experiments import index_appends
from hsr_attention.experiments.index_scaling import DATA, KINDS


def bench_index_append(
    dim: Annotated[str, typer.Option(help="Dimensions: 2..8, or 2,3.")] = "2,3,4",
    n: Annotated[str, typer.Option("--n", help="Keys appended: 100000, 1e5.")] = "1e5",
    kind: Annotated[str, typer.Option(help="Indexes, or all.")] = "all",
    block: Annotated[str, typer.Option(help="Keys in a call: 64,1.")] = "64,1",
    data: Annotated[str, typer.Option(help="Keys, or all.")] = "gaussian",
    threads: Annotated[int, typer.Option(min=1)] = 1,
    seed: int = 0,
    json: options.Json = False,
) -> None:
    """Time appending keys to an empty index and deleting three quarters of them, amortised."""
    with console.status() as status:
        found = index_appends.run(
            dims=options.sizes(dim, "--dim"),
            n=options.sizes(n, "--n")[0],
            kinds=options.words(kind, "--kind", tuple(KINDS)),
            blocks=options.sizes(block, "--block"),
            data=options.words(data, "--data", DATA),
            threads=threads,
            seed=seed,
            on_row=status.update,
        )
    if json:
        console.print_json(found)
        return
    columns = ["index", "keys", "d", "block", "append, us", "slowest call, ms", "delete, us"]
    rows = [
        [r["kind"], r["data"], str(r["d"]), str(r["block"]), f"{r['append']:.2f}",
         f"{r['slowest_append']:.1f}", f"{r['delete']:.2f}"]
        for r in found["rows"]
    ]  # fmt: skip
    console.print_table(f"A key, amortised, over {n} keys", columns, rows)
