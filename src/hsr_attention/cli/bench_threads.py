"""``hsr bench threads``: whether torch's loops and ours slow each other."""

from __future__ import annotations

from typing import Annotated

import typer

from hsr_attention.cli import console, options


def bench_threads(
    n: Annotated[int, typer.Option("--n", min=16, help="Keys.")] = 32_768,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Rounds of ten calls.")] = 30,
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Time torch's matmuls and decoding calls alone and in turn; 1.0 is no slowdown."""
    from hsr_attention.evaluation import thread_contention

    options.set_threads(threads)
    with console.progress("rounds") as bar:
        task = bar.add_task("time", total=rounds + 1)
        found = thread_contention.measure(
            n, rounds=rounds, on_round=lambda: bar.update(task, advance=1)
        )
    if json:
        console.print_json(found | {"rounds": rounds, "machine": options.machine()})
        return
    rows = [
        [name, *(f"{found[name][key]:.3f} ms" for key in ("alone_ms", "in_turn_ms")),
         f"{found[name]['slowdown']:.3f} x"]
        for name in ("matmul", "attend")
    ]  # fmt: skip
    title = f"torch's matmul and a decoding call over {n:,} keys"
    console.print_table(title, ["", "alone", "in turn", "slowdown"], rows)
