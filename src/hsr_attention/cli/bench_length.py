"""``hsr bench length``: time of one decoding call against the number of keys."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from hsr_attention.cli import console, options
from hsr_attention.evaluation.errors import InputError
from hsr_attention.policies import SoftmaxPolicy


def bench_length(
    keys: options.Keys = None,
    layer: Annotated[
        int | None,
        typer.Option("--layer", help="Of the captured heads.", show_default="the middle one"),
    ] = None,
    shape: options.Shape = "9/3x64",
    largest: Annotated[int, typer.Option("--largest", min=1024, help="Keys.")] = 2**20,
    dtype: options.DtypeOption = options.Dtype.float32,
    policy: options.PolicyWords = None,
    dense: Annotated[
        bool, typer.Option("--dense/--no-dense", help="Time the dense ways as well.")
    ] = True,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Alternations.")] = 15,
    threads: options.Threads = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the synthetic heads.")] = 0,
    plot: options.Plot = None,
    json: options.Json = False,
) -> None:
    """Time one layer's decoding call, and its scan alone, from 1,024 keys up, doubling.

    Captured keys are repeated where there are too few. Bytes over time are shown as a share of the
    memory bandwidth, which is measured.

    Example: hsr bench length --keys heads.safetensors --plot length.png
    """
    wanted = options.policy(policy)
    if not isinstance(wanted, SoftmaxPolicy):
        raise InputError("hsr bench length times softmax; --policy must not be relu")
    options.picture(plot, "--plot")
    heads_shape = options.shape(shape)
    from hsr_attention.evaluation import capture, decode_speed, length_speed

    if keys:
        files = [capture.open_heads(path) for path in keys]
        options.set_threads(threads)
        known = files[0].layers
        chosen = known[len(known) // 2] if layer is None else layer
        heads = decode_speed.captured_heads(files, largest, str(dtype), True, [chosen])[0]
        real = sum(file.n for file in files)
        source = f"layer {chosen} of {files[0].metadata.get('model', 'a model')}, {real:,} keys"
        source += f" repeated to {largest:,}" if largest > real else ""
    else:
        options.set_threads(threads)
        heads = decode_speed.synthetic_heads(*heads_shape, largest, str(dtype), 1, seed)[0]
        source = f"synthetic heads (made up, seed {seed})"
    ns = length_speed.lengths(largest)
    with console.progress("lengths") as bar:
        task = bar.add_task("keys", total=len(ns))
        result = length_speed.measure(
            heads,
            ns,
            wanted,
            rounds,
            dense,
            lambda what: bar.update(task, description=what, advance=1),
        )
    result = {
        "source": source,
        "dtype": str(dtype),
        "policy": repr(wanted),
        "rounds": rounds,
        **result,
        "machine": options.machine(),
    }
    title = f"{source}; {dtype}, {result['machine']['num_threads']} threads"
    if plot is not None:
        from hsr_attention.evaluation import pictures

        pictures.length_speed(plot, title, result["lengths"])
    if json:
        console.print_json(result)
    else:
        _print(title, result)


def _print(title: str, result: dict[str, Any]) -> None:
    columns = ["keys", "decode", "scan alone", "fastest dense", "speed-up", "density", "error"]
    columns += ["scan, of bandwidth", "decode, of bandwidth"]
    rows = []
    for row in result["lengths"]:
        dense = row["dense_ms"]
        rows.append(
            [
                f"{row['n']:,}",
                console.number(row["decode_ms"], 3, " ms"),
                console.number(row["scan_ms"], 3, " ms"),
                console.number(dense, 3, " ms"),
                console.NONE if dense is None else f"{dense / row['decode_ms']:.1f} x",
                console.percent(row["density"]),
                console.percent(row["relative_error"]),
                console.percent(row["scan_bandwidth_share"], 2),
                console.percent(row["decode_bandwidth_share"], 2),
            ]
        )
    console.print_table(title, columns, rows)
    console.out().print(
        f"memory bandwidth {result['memory_bandwidth_gb_s']:.1f} GB/s; largest step between "
        f"neighbours {console.number(result['largest_step'])} (1: in proportion)"
    )
