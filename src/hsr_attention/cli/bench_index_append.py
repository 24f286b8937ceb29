"""``hsr bench index-append``: what keeping a low-dimensional index up to date costs."""

from __future__ import annotations

from typing import Annotated

import typer

from hsr_attention.cli import console, options
from hsr_attention.experiments import index_appends


def bench_index_append(
    dim: options.Dims = "2,3,4",
    n: options.Size = "1e5",
    kind: options.IndexKinds = "all",
    block: Annotated[str, typer.Option(help="Keys in a call: 64,1.")] = "64,1",
    data: options.IndexData = "gaussian",
    threads: options.IndexThreads = 1,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> None:
    """Time appending keys to an empty index and deleting three quarters of them, amortised."""
    with console.status() as status:
        found = index_appends.run(
            dims=options.sizes(dim, "--dim"),
            n=options.size(n, "--n"),
            kinds=options.index_kinds(kind),
            blocks=options.sizes(block, "--block"),
            data=options.index_data(data),
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
