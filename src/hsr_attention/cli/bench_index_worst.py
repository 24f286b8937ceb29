"""``hsr bench index-worst``: the low-dimensional indexes where they lose most against the scan."""

from __future__ import annotations

from typing import Annotated

import typer

from hsr_attention.cli import console, options
from hsr_attention.experiments import index_worst_case


def bench_index_worst(
    dim: options.Dims = "4,6,8",
    n: options.Size = "1e6",
    kind: options.IndexKinds = "partition_tree",
    data: options.IndexData = "all",
    queries: Annotated[int, typer.Option(min=1, help="In a call.")] = 12,
    repeats: options.Repeats = 5,
    threads: options.IndexThreads = 1,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> None:
    """Look for the worst ratio to the scan: adversarial keys, outputs from 1 to n."""
    with console.status() as status:
        found = index_worst_case.run(
            dims=options.sizes(dim, "--dim"),
            n=options.size(n, "--n"),
            kinds=options.index_kinds(kind),
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
    columns = ["index", "keys", "d", "k", "us a query", "scan", "index / scan"]
    worst = sorted(found["rows"], key=lambda row: -row["slowdown"])[:12]
    rows = [
        [r["kind"], r["data"], str(r["d"]), f"{r['k']:,}", console.number(r["index"]),
         console.number(r["scan"]), f"{r['slowdown']:.2f}"]
        for r in worst
    ]  # fmt: skip
    title = f"The worst of {len(found['rows'])} cases, {n} keys"
    console.print_table(title, columns, rows)
    if found["rows"]:
        console.out().print(f"median of all: {found['median_slowdown']:.2f}")
