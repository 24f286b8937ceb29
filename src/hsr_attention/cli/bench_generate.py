"""``hsr bench generate``: tokens a second of a whole model against the length of its context."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from hsr_attention.cli import console, options
from hsr_attention.evaluation.errors import InputError


def bench_generate(
    model: options.Model,
    prompt_file: options.PromptFile = None,
    essays: Annotated[
        bool, typer.Option("--essays", help="Use the PaulGrahamEssays as text.")
    ] = False,
    lengths: Annotated[
        str, typer.Option("--lengths", help="Tokens of context, with commas.")
    ] = "1024,2048,4096,8000",
    policy: options.PolicyWords = None,
    dtype: options.DtypeOption = options.Dtype.float32,
    max_context: options.MaxContext = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Alternations.")] = 5,
    threads: options.Threads = None,
    parallel_linear: options.ParallelLinear = True,
    plot: options.Plot = None,
    json: options.Json = False,
) -> None:
    """Time one token of a whole model behind contexts of several lengths, and every dense way.

    Example: hsr bench generate --model smollm2 --essays --lengths 2048,8000 --plot speed.png
    """
    from hsr_attention.evaluation import generation_speed

    wanted = options.policy(policy)
    options.picture(plot, "--plot")
    chosen = options.numbers(lengths, "--lengths")
    if min(chosen) < 1:
        raise InputError(f"--lengths must be >= 1, got {min(chosen)}")
    longest = max(chosen)
    loaded, ids = options.load_with_text(
        model, dtype, prompt_file, longest if essays else None, longest, 1, max_context, threads
    )
    options.softmax_model(loaded, "hsr bench generate")
    if ids.shape[1] < longest:
        raise InputError(f"the text has {ids.shape[1]} tokens, got --lengths {longest}")
    linear = options.linear_layers(loaded.model, parallel_linear)
    with linear as split, console.progress() as bar:
        task = bar.add_task("prefill", total=longest)
        rows = generation_speed.measure(
            loaded.model,
            ids,
            chosen,
            wanted,
            rounds,
            on_tokens=lambda done: bar.update(task, completed=done),
            on_step=lambda what: bar.update(task, description=what),
        )
    result: dict[str, Any] = {
        "model": loaded.source.name,
        "dtype": str(dtype),
        "policy": repr(wanted),
        "rounds": rounds,
        "linear_parts": split,
        "context_before_yarn": loaded.scaled_from,
        "lengths": rows,
        "machine": options.machine(),
    }
    title = f"{loaded.source.name}, {dtype}, {result['machine']['num_threads']} threads"
    if plot is not None:
        from hsr_attention.evaluation import pictures

        pictures.generation_speed(plot, title, rows)
    if json:
        console.print_json(result)
        return
    default = generation_speed.DEFAULT
    columns = ["tokens of context", "hsr", "fastest dense", "which", "speed-up"]
    columns += [f"over the default ({default})", "log-probability, mean |difference|"]
    cells = [
        [
            f"{row['n']:,}",
            console.number(row["hsr_tokens_per_second"], 3, " tokens/s"),
            console.number(row["dense_tokens_per_second"][row["fastest_dense"]], 3, " tokens/s"),
            row["fastest_dense"],
            f"{row['speedup']:.2f} x",
            f"{row['speedup_over_default']:.2f} x",
            f"{row['logprob_difference_mean']:.4f} nats",
        ]
        for row in rows
    ]
    console.print_table(f"{title}\n{wanted}", columns, cells)
    console.out().print(options.linear_line(split))
