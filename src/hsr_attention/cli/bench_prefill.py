"""``hsr bench prefill``: prompts, attention alone or the whole model, against n."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hsr_attention.cli import console, options
from hsr_attention.evaluation.errors import InputError


def bench_prefill(
    keys: Annotated[
        Path | None,
        typer.Option(
            "--keys",
            help="Heads captured with the queries of all positions (hsr capture --queries N); "
            "without --keys and --model, heads are made up.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="Time to first token of this model (a directory, a .gguf file, or smollm2).",
            show_default=False,
        ),
    ] = None,
    n: Annotated[
        str | None,
        typer.Option(
            "--n", help="Tokens of the prompt: 2048,8192.", show_default="all captured, or 8192"
        ),
    ] = None,
    layers: Annotated[
        str | None, typer.Option("--layers", help="Numbers with commas.", show_default="all")
    ] = None,
    shape: options.Shape = "9/3x64",
    prompt_file: options.PromptFile = None,
    dtype: options.DtypeOption = options.Dtype.float32,
    policy: options.PolicyWords = None,
    max_context: options.MaxContext = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Alternations.")] = 3,
    threads: options.Threads = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the synthetic heads.")] = 0,
    plot: options.Plot = None,
    json: options.Json = False,
) -> None:
    """Time causal attention over whole prompts against torch's fastest, or a model's first token.

    Examples: hsr bench prefill --keys heads.safetensors --n 8192 --dtype bfloat16 --json;
    hsr bench prefill --model smollm2 --n 2048,8192
    """
    wanted = options.policy(policy)
    options.picture(plot, "--plot")
    lengths = None if n is None else options.numbers(n, "--n")
    if lengths and lengths[0] < 1:
        raise InputError(f"--n must be at least 1, got {lengths[0]}")
    if keys is not None and model is not None:
        raise InputError("give one of --keys and --model")
    if model is not None:
        result = _whole_model(
            model, lengths or [8192], prompt_file, str(dtype), wanted, max_context, rounds, threads
        )
        show, draw = _print_model, "first_token"
    else:
        chosen, made = (
            None if layers is None else options.numbers(layers, "--layers"),
            options.shape(shape),
        )
        result = _attention(keys, lengths, chosen, made, str(dtype), wanted, rounds, threads, seed)
        show, draw = _print_attention, "prefill_speed"
    result |= {"rounds": rounds, "machine": options.machine()}
    title = f"{result['source']}; {dtype}, {result['machine']['num_threads']} threads"
    if plot is not None:
        from hsr_attention.evaluation import pictures

        getattr(pictures, draw)(plot, f"{title}\n{wanted}", result)
    if json:
        console.print_json(result)
    else:
        show(title, result)


def _attention(
    keys: Path | None,
    lengths: list[int] | None,
    layers: list[int] | None,
    shape: tuple[int, int, int],
    dtype: str,
    policy: Any,
    rounds: int,
    threads: int | None,
    seed: int,
) -> dict[str, Any]:
    from hsr_attention.evaluation import capture, prefill_speed

    if keys is None:
        lengths = lengths or [8192]
        source = f"synthetic heads (made up, seed {seed})"
        sets = [prefill_speed.synthetic_heads(*shape, n, dtype, seed=seed) for n in lengths]
        count = 2
    else:
        file = capture.open_heads(keys)
        lengths = lengths or [file.n]
        source = f"real heads captured from {file.metadata.get('model', 'a model')}"
        sets = [prefill_speed.captured_heads(file, n, dtype, layers) for n in lengths]
        count = len(layers or file.layers)
    options.set_threads(threads)
    rows = []
    with console.progress("steps") as bar:
        task = bar.add_task("check", total=len(lengths) * count * (rounds + 2))
        for heads in sets:
            for one in heads:
                rows.append(
                    prefill_speed.measure(
                        one, policy, rounds, lambda x: bar.update(task, description=x, advance=1)
                    )
                )
    totals = [prefill_speed.total([row for row in rows if row["n"] == n]) for n in lengths]
    return {
        "source": source,
        "synthetic": keys is None,
        "dtype": dtype,
        "policy": repr(policy),
        "layers": rows,
        "totals": totals,
    }


def _whole_model(
    name: str,
    lengths: list[int],
    prompt_file: Path | None,
    dtype: str,
    policy: Any,
    max_context: int | None,
    rounds: int,
    threads: int | None,
) -> dict[str, Any]:
    from hsr_attention.evaluation import first_token

    longest = lengths[-1]
    loaded, ids = options.load_with_text(
        name,
        dtype,
        prompt_file,
        longest if prompt_file is None else None,
        longest,
        0,
        max_context,
        threads,
        shorten="--n",
    )
    options.softmax_model(loaded, "hsr bench prefill")
    if ids.shape[1] < longest:
        raise InputError(f"the text has {ids.shape[1]} tokens, --n needs {longest}")
    rows = []
    with console.progress("prompts") as bar:
        task = bar.add_task("dense", total=2 * rounds * len(lengths))
        for n in lengths:
            rows.append(
                first_token.measure(
                    loaded.model,
                    ids[:, :n],
                    policy,
                    rounds,
                    lambda x, n=n: bar.update(task, description=f"{n:,} tokens, {x}", advance=1),
                )
            )
    return {
        "source": f"{loaded.source.name}, whole model",
        "model": loaded.source.name,
        "context": loaded.context,
        "context_before_yarn": loaded.scaled_from,
        "dtype": dtype,
        "policy": repr(policy),
        "prompts": rows,
    }


def _print_attention(title: str, result: dict[str, Any]) -> None:
    columns = ["n", "layer", "hsr", "dense", "speed-up", "density", "skipped", "error"]
    columns += ["append", "scores", "of int8 peak: all / scores"]
    rows = [
        [
            f"{row['n']:,}",
            row["layer"],
            f"{row['hsr_ms']:.0f} ms",
            f"{row['dense_ms'][row['fastest_dense']]:.0f} ms",
            f"{row['speedup']:.2f} x",
            console.percent(row["density"]),
            console.percent(row["skipped_share"]),
            console.percent(row["relative_error_mean"]),
            f"{row['append_ms']:.0f} ms",
            f"{row['scores_ms']:.0f} ms",
            _peak(row),
        ]
        for row in result["layers"]
    ]
    console.print_table(title, columns, rows)
    facts = [
        [
            f"{total['n']:,}",
            f"{total['hsr_ms']:.0f} ms",
            f"{total['fastest_dense_ms']:.0f} ms",
            f"{total['speedup']:.2f} x",
            f"{total['speedup_smallest']:.2f} x",
            f"{console.percent(total['relative_error_mean'])} / "
            f"{console.percent(total['dense_relative_error_mean'])}",
            "no certificate"
            if total["violations"] is None
            else f"{total['violations']} of {total['rows_checked']}",
            _peak(total),
        ]
        for total in result["totals"]
    ]
    columns = ["n", "hsr", "fastest dense", "speed-up", "least layer"]
    columns += ["error: hsr / dense", "certificate broken, rows", "of int8 peak: all / scores"]
    fastest = ", ".join(sorted({row["fastest_dense"] for row in result["layers"]}))
    console.print_table(
        f"All layers; {result['policy']}; fastest dense path: {fastest}", columns, facts
    )


def _peak(row: dict[str, Any]) -> str:
    shares = row["integer_peak_share"], row["integer_peak_share_of_scores"]
    return " / ".join(console.percent(x, 2) for x in shares)


def _print_model(title: str, result: dict[str, Any]) -> None:
    columns = ["n", "hsr", "dense", "speed-up", "memory: hsr", "dense", "codes"]
    columns += ["besides dense and codes", "same token", "divergence"]
    rows = [
        [
            f"{row['n']:,}",
            f"{row['hsr_seconds']:.2f} s",
            f"{row['dense_seconds']:.2f} s",
            f"{row['speedup']:.2f} x",
            console.megabytes(row["hsr_peak_bytes"]),
            console.megabytes(row["dense_peak_bytes"]),
            console.megabytes(row["code_bytes"]),
            console.NONE
            if row["working_bytes"] is None
            else f"{row['working_bytes'] / 1e6:+,.0f} MB",
            "yes" if row["same_first_token"] else "no",
            console.number(row["divergence_nats"], 2, " nats"),
        ]
        for row in result["prompts"]
    ]
    what = "time to first token, and peak memory above the model; dense is sdpa"
    console.print_table(f"{title}: {what}\n{result['policy']}", columns, rows)
