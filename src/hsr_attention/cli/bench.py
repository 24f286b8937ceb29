"""``hsr bench``: time of attention alone, checked before it is timed."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from hsr_attention.cli import console, options
from hsr_attention.cli.bench_generate import bench_generate
from hsr_attention.cli.bench_index import bench_index
from hsr_attention.cli.bench_index_append import bench_index_append
from hsr_attention.cli.bench_index_libraries import bench_index_libraries
from hsr_attention.cli.bench_index_worst import bench_index_worst
from hsr_attention.cli.bench_length import bench_length
from hsr_attention.cli.bench_prefill import bench_prefill
from hsr_attention.cli.bench_relu import bench_relu
from hsr_attention.cli.bench_scaling import bench_scaling
from hsr_attention.cli.bench_threads import bench_threads
from hsr_attention.evaluation.errors import InputError
from hsr_attention.policies import SoftmaxPolicy

app = typer.Typer(
    help="Time of attention alone, checked before it is timed.", no_args_is_help=True
)


@app.callback()
def _root() -> None:
    pass


app.command("generate")(bench_generate)
app.command("length")(bench_length)
app.command("relu")(bench_relu)
app.command("threads")(bench_threads)
app.command("index")(bench_index)
app.command("index-append")(bench_index_append)
app.command("index-libraries")(bench_index_libraries)
app.command("index-worst")(bench_index_worst)
app.command("prefill")(bench_prefill)
app.command("scaling")(bench_scaling)


@app.command()
def decode(
    keys: options.Keys = None,
    n: Annotated[
        int | None,
        typer.Option("--n", min=1, help="Keys.", show_default="all captured, or 32768"),
    ] = None,
    tile: Annotated[
        bool, typer.Option("--tile", help="Repeat the captured keys where --n is larger.")
    ] = False,
    layers: Annotated[
        str | None, typer.Option("--layers", help="Numbers with commas.", show_default="all")
    ] = None,
    shape: options.Shape = "9/3x64",
    dtype: options.DtypeOption = options.Dtype.float32,
    policy: options.PolicyWords = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Alternations.")] = 15,
    threads: options.Threads = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the synthetic heads.")] = 0,
    plot: options.Plot = None,
    json: options.Json = False,
) -> None:
    """Time decoding attention by layer against every dense path of torch.

    Example: hsr bench decode --keys heads.safetensors --n 32768 --dtype bfloat16 --json
    """
    wanted = options.policy(policy)
    if not isinstance(wanted, SoftmaxPolicy):
        raise InputError("hsr bench decode compares with softmax; --policy must not be relu")
    options.picture(plot, "--plot")
    chosen = None if layers is None else options.numbers(layers, "--layers")
    heads_shape = options.shape(shape)
    from hsr_attention.evaluation import capture, decode_speed

    if not keys:
        options.set_threads(threads)
        n = n or 32768
        source = f"synthetic heads (made up, seed {seed})"
        heads = decode_speed.synthetic_heads(*heads_shape, n, str(dtype), seed=seed)
    else:
        files = [capture.open_heads(path) for path in keys]
        options.set_threads(threads)
        have = sum(file.n for file in files)
        n = n or have
        source = f"real heads captured from {files[-1].metadata.get('model', 'a model')}"
        source += f", {have:,} keys" + (f" repeated to {n:,}" if n > have else "")
        source += f" of {len(files)} documents" if len(files) > 1 else ""
        heads = decode_speed.captured_heads(files, n, str(dtype), tile, chosen)
    with console.progress("steps") as bar:
        task = bar.add_task("check", total=len(heads) + rounds + 1)
        result = decode_speed.measure(
            heads, wanted, rounds, lambda what: bar.update(task, description=what, advance=1)
        )
    result = {
        "source": source,
        "synthetic": not keys,
        "n": n,
        "dtype": str(dtype),
        "policy": repr(wanted),
        "rounds": rounds,
        "queries": decode_speed.QUERIES,
        **result,
        "machine": options.machine(),
    }
    title = f"{source}; n = {n:,}, {dtype}, {result['machine']['num_threads']} threads"
    if plot is not None:
        from hsr_attention.evaluation import pictures

        pictures.decode_speed(plot, title.replace("; ", "\n"), result["layers"])
    if json:
        console.print_json(result)
    else:
        _print(title, result)


@app.command()
def append(
    shape: options.Shape = "9/3x64",
    dtype: options.DtypeOption = options.Dtype.float32,
    small: Annotated[int, typer.Option("--small", min=1, help="Keys cached.")] = 1_000,
    large: Annotated[int, typer.Option("--large", min=1, help="Keys cached.")] = 100_000,
    seed: Annotated[int, typer.Option("--seed", help="Of the random keys.")] = 0,
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Time appending one token to the cache of a layer that is short, and to a long one."""
    _, kv_heads, head_dim = options.shape(shape)
    from hsr_attention.evaluation import decode_speed

    options.set_threads(threads)
    seconds = decode_speed.append_by_length(
        [small, large], kv_heads, head_dim, str(dtype), seed=seed
    )
    ratio = seconds[large] / seconds[small]
    if json:
        console.print_json(
            {
                "append_us": {n: 1e6 * s for n, s in seconds.items()},
                "ratio": ratio,
                "kv_heads": kv_heads,
                "head_dim": head_dim,
                "dtype": str(dtype),
                "machine": options.machine(),
            }
        )
        return
    rows = [[f"{n:,}", f"{1e6 * s:.1f} µs"] for n, s in seconds.items()]
    title = f"One token, one layer, {kv_heads} key heads x {head_dim}, {dtype}"
    console.print_table(title, ["keys cached", "append"], rows)
    console.out().print(f"ratio {ratio:.2f}")


def _print(title: str, result: dict[str, Any]) -> None:
    columns = ["layer", "hsr", "dense", "speed-up", "density", "error", "dense error"]
    columns.append("keys scored: 4 bits / 8 bits / full")
    rows = []
    for row in result["layers"]:
        pairs = (row["work"][name] for name in ("sketch_scored", "refined", "full_scored"))
        rows.append(
            [
                row["layer"],
                f"{row['hsr_ms']:.3f} ms",
                f"{row['dense_ms'][row['fastest_dense']]:.3f} ms",
                f"{row['speedup']:.2f} x",
                console.percent(row["density"]),
                console.percent(row["relative_error_mean"]),
                console.percent(row["dense_relative_error"][row["fastest_dense"]]),
                " / ".join(f"{count:,.0f}" for count in pairs),
            ]
        )
    total = result["total"]
    console.print_table(title, columns, rows)
    fastest = sorted({row["fastest_dense"] for row in result["layers"]})
    violations = total["violations"]
    facts = [
        [
            "all layers: hsr / with certificate / fastest dense",
            f"{total['hsr_ms']:.2f} / {total['certified_ms']:.2f} / "
            f"{total['fastest_dense_ms']:.2f} ms",
        ],
        [
            "speed-up: all layers / least",
            f"{total['speedup']:.2f} x / {total['speedup_smallest']:.2f} x",
        ],
        ["fastest dense path", ", ".join(fastest)],
        ["error of the output, mean: hsr / dense", _pair(total)],
        [
            "certificate broken",
            "no certificate"
            if violations is None
            else f"{violations} of {total['rows_checked']} rows",
        ],
        ["bytes read: hsr (at most) / dense", _bytes(total)],
        ["appending a token, a layer", f"{total['append_us']:.1f} µs"],
        ["memory bandwidth, measured", f"{result['memory_bandwidth_gb_s']:.1f} GB/s"],
    ]
    console.print_table(result["policy"], ["", "found"], facts)


def _pair(total: dict[str, Any]) -> str:
    pair = total["relative_error_mean"], total["dense_relative_error_mean"]
    return " / ".join(map(console.percent, pair))


def _bytes(total: dict[str, Any]) -> str:
    return " / ".join(console.megabytes(total[name]) for name in ("bytes_hsr", "bytes_dense"))
