"""``hsr bench relu``: ReLU attention at the Gaussian threshold against dense ReLU."""

from __future__ import annotations

from typing import Annotated

import typer

from hsr_attention.cli import console, options
from hsr_attention.evaluation.errors import InputError


def bench_relu(
    n: Annotated[int, typer.Option("--n", min=16, help="Keys.")] = 131_072,
    shape: options.Shape = "9/3x64",
    dtype: options.DtypeOption = options.Dtype.float32,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Alternations.")] = 15,
    exponent: Annotated[
        float,
        typer.Option("--exponent", help="The threshold is reached by at most about n^this keys."),
    ] = 0.8,
    threads: options.Threads = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the Gaussian keys.")] = 0,
    json: options.Json = False,
) -> None:
    """Time ReLU attention over the keys above the Gaussian threshold against torch over all."""
    from hsr_attention.evaluation import relu_speed

    heads = options.shape(shape)
    if not 0 < exponent < 1:
        raise InputError(f"--exponent must lie in (0, 1), got {exponent}")
    options.set_threads(threads)
    with console.progress("rounds") as bar:
        task = bar.add_task("time", total=rounds + 1)
        found = relu_speed.measure(
            *heads, n, str(dtype), rounds, seed, exponent, lambda: bar.update(task, advance=1)
        )
    if json:
        facts = {"shape": shape, "dtype": str(dtype), "rounds": rounds, "seed": seed}
        console.print_json(facts | found | {"machine": options.machine()})
        return
    rows = [
        ["hsr / dense", f"{found['hsr_ms']:.3f} / {found['dense_ms']:.3f} ms"],
        ["speed-up", f"{found['speedup']:.2f} x"],
        ["keys kept (expected)", f"{found['keys_kept']:,.0f} ({found['keys_expected']:,.0f})"],
        [
            "error against float64: hsr / dense",
            f"{found['relative_error']:.1e} / {found['dense_relative_error']:.1e}",
        ],
    ]
    title = f"ReLU attention, Gaussian threshold, {n:,} keys, {shape}, {dtype}"
    console.print_table(title, ["", "found"], rows)
