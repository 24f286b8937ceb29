"""``hsr bench index``: the low-dimensional indexes against n and against the scan."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from hsr_attention.cli import console, options
from hsr_attention.experiments import index_scaling


def bench_index(
    dim: options.Dims = "2..4",
    n: Annotated[str, typer.Option(help="Numbers of keys: 1e3,1e4,1e5.")] = "1e3,1e4,1e5",
    kind: options.IndexKinds = "all",
    data: options.IndexData = "gaussian",
    output: Annotated[
        str, typer.Option(help="Keys reported: fixed (100, or 1000 from d = 4) or power (n^0.8).")
    ] = "fixed",
    queries: Annotated[int, typer.Option(min=1, help="In a call.")] = 50,
    threads: options.IndexThreads = 1,
    seed: options.Seed = 0,
    json: options.Json = False,
    plot: options.Plot = None,
) -> None:
    """Time, work, growth and crossovers of convex layers, partition trees and shallow cuttings."""
    options.picture(plot, "--plot")
    result = index_scaling.run(
        dims=options.sizes(dim, "--dim"),
        sizes=options.sizes(n, "--n"),
        kinds=options.index_kinds(kind),
        data=options.index_data(data),
        output=options.words(output, "--output", ("fixed", "power"))[0],
        queries=queries,
        threads=threads,
        seed=seed,
    )
    if plot is not None:
        index_scaling.plot(result, plot)
    if json:
        console.print_json(result)
    else:
        _print_tables(result)


def _print_tables(result: dict[str, Any]) -> None:
    machine = result["machine"]
    typer.echo(f"{machine['processor']}, {machine['isa']}, {machine['threads']} thread(s)")
    typer.echo(
        "exactness checked against FlatIndex; microseconds a query, batch (one call each)\n"
    )
    typer.echo(f"{'kind':16}{'data':10}{'d':>2}{'n':>9}{'k':>8}{'index':>18}{'scan':>20}"
               f"{'speed-up':>9}{'nodes':>8}{'scored':>9}{'build s':>8}{'B/key':>6}")  # fmt: skip
    for r in result["rows"]:
        index = f"{r['batch']:.1f} ({r['single']:.1f})"
        scan = f"{r['flat_batch']:.0f} ({r['flat_single']:.0f})"
        typer.echo(f"{r['kind']:16}{r['data']:10}{r['d']:2}{r['n']:9}{r['k']:8.0f}{index:>18}{scan:>20}"
                   f"{r['speedup']:9.1f}{r['nodes']:8.0f}{r['scored']:9.0f}{r['build']:8.2f}"
                   f"{r['bytes_per_key']:6.0f}")  # fmt: skip
    if result["exponents"]:
        typer.echo("\ngrowth ~ n^e, 95 % confidence")
    for f in result["exponents"]:
        typer.echo(f"{f['kind']:16}{f['data']:10}{f['d']:2}  {f['quantity']:6}{f['exponent']:.2f} "
                   f"[{f['low']:.2f}, {f['high']:.2f}]  theory {f['theory']}")  # fmt: skip
    typer.echo("\nfaster than the scan from n =")
    for c in result["crossovers"]:
        start = "never" if c["from_n"] is None else f"{c['from_n']:.0f}"
        typer.echo(f"{c['kind']:16}{c['data']:10}{c['d']:2}  {start:>9}  "
                   f"({c['speedup_at_largest']:.1f}x at the largest n)")  # fmt: skip
