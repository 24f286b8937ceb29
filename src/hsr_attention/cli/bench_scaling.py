"""``hsr bench scaling``: growth of the time of a ReLU prompt, beside the theory's exponents."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from hsr_attention.cli import console, options
from hsr_attention.evaluation.errors import InputError
from hsr_attention.experiments import prefill_scaling


def bench_scaling(
    dim: Annotated[str, typer.Option("--dim", help="Dimensions of a head.")] = "2,3,4,8,64",
    n: Annotated[
        str, typer.Option("--n", help="Tokens of the prompts; exponents need three.")
    ] = "1000,2000,4000,8000,16000",
    index: Annotated[
        str,
        typer.Option(
            "--index",
            help="Up to d = 8: structure (convex layers at d = 2, a partition tree above), or auto "
            "(where it beats a scan). From d = 9 on codes are scanned.",
        ),
    ] = "structure",
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Alternations.")] = 3,
    threads: Annotated[int, typer.Option("--threads", min=1)] = 1,
    seed: Annotated[int, typer.Option("--seed", help="Of keys, queries and values.")] = 0,
    plot: options.Plot = None,
    json: options.Json = False,
) -> None:
    """Fit exponents to the time of a causal ReLU prompt at the threshold of n^(4/5) keys.

    Keys and queries are Gaussian; the index is built inside the call; dense is torch, causal by
    chunks.

    Example: hsr bench scaling --dim 2,3,4 --plot scaling.png
    """
    options.picture(plot, "--plot")
    dims, sizes = options.numbers(dim, "--dim"), options.numbers(n, "--n")
    if not 1 <= dims[0] <= dims[-1] <= 512:
        raise InputError(f"--dim must lie in [1, 512], got {dim}")
    if sizes[0] < 1:
        raise InputError(f"--n must be at least 1, got {sizes[0]}")
    if index not in prefill_scaling.INDEXES:
        words = " or ".join(prefill_scaling.INDEXES)
        raise InputError(f"--index must be {words}, got {index!r}")
    with console.progress("prompts") as bar:
        task = bar.add_task("d", total=len(dims) * len(sizes))
        result = prefill_scaling.run(
            dims=dims,
            sizes=sizes,
            index=index,
            repeats=repeats,
            threads=threads,
            seed=seed,
            on_row=lambda what: bar.update(task, description=what, advance=1),
        )
    if plot is not None:
        prefill_scaling.plot(result, plot)
    if json:
        console.print_json(result)
    else:
        _print(result)


def _print(result: dict[str, Any]) -> None:
    machine = result["machine"]
    rows = [
        [
            str(r["d"]),
            f"{r['n']:,}",
            r["index"].replace("_", " "),
            f"{r['kept']:,.0f}",
            console.percent(r["density"]),
            console.number(r["seconds"], 3, " s"),
            console.number(r["dense_seconds"], 3, " s"),
            f"{r['speedup']:.2f} x",
            f"{r['error']:.0e}",
        ]
        for r in result["rows"]
    ]
    columns = ["d", "n", "inside", "keys kept a query", "density", "hsr", "dense", "speed-up"]
    title = f"One head; {machine['processor']}, {machine['isa']}, {machine['threads']} thread(s)"
    console.print_table(title, [*columns, "error"], rows)
    fits = [
        [
            str(f["d"]),
            f["index"].replace("_", " "),
            {"seconds": "time", "kept": "keys kept", "dense_seconds": "time, dense"}[
                f["quantity"]
            ],
            f"{f['exponent']:.2f}  [{f['low']:.2f}, {f['high']:.2f}]",
            f"{f['last']:.2f}",
            f"{f['theory']:.2f}",
        ]
        for f in result["exponents"]
    ]
    if fits:
        columns = ["d", "inside", "what", "exponent, 95 % confidence", "two largest n", "theory"]
        console.print_table("Growth ~ n^e", columns, fits)
