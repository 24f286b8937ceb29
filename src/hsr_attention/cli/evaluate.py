"""``hsr evaluate``: quality of a model under a policy."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from hsr_attention.cli import console, options
from hsr_attention.evaluation.errors import InputError

app = typer.Typer(help="Quality of a model under a policy.", no_args_is_help=True)


@app.callback()
def _root() -> None:
    pass


@app.command()
def perplexity(
    model: options.Model,
    prompt_file: options.PromptFile = None,
    essays: Annotated[
        bool, typer.Option("--essays", help="Use the PaulGrahamEssays as text.")
    ] = False,
    prefix: Annotated[
        int, typer.Option("--prefix", min=1, help="Tokens that are prefilled.")
    ] = 7680,
    tokens: Annotated[
        int, typer.Option("--tokens", min=1, help="Tokens that are scored after them.")
    ] = 512,
    policy: options.PolicyWords = None,
    dtype: options.DtypeOption = options.Dtype.float32,
    max_context: options.MaxContext = None,
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Score the next tokens of a text one by one through the real decoding path, and dense.

    Example: hsr evaluate perplexity --model smollm2 --essays
    """
    from hsr_attention.evaluation.decode_statistics import summary
    from hsr_attention.evaluation.perplexity import perplexity as measure

    wanted = options.policy(policy) if policy else None
    n = prefix + tokens
    loaded, ids = options.load_with_text(
        model, dtype, prompt_file, n if essays else None, n, 0, max_context, threads
    )
    if ids.shape[1] < n:
        raise InputError(f"the text has {ids.shape[1]} tokens, --prefix and --tokens need {n}")
    wanted = options.fitting(wanted, loaded)
    results: dict[str, Any] = {}
    with console.progress() as bar:
        for name, chosen in (("hsr", wanted), ("dense", None)):
            task = bar.add_task(name, total=n)
            results[name] = measure(
                loaded.model,
                ids,
                prefix,
                chosen,
                tokens,
                chunk=1024,
                on_tokens=lambda done, task=task: bar.update(task, completed=done),
            )
    dense, hsr = results["dense"], results["hsr"]
    change = hsr.perplexity / dense.perplexity - 1
    gaps = [abs(a - b) for a, b in zip(hsr.nats, dense.nats, strict=True)]
    found = summary(hsr.statistics)
    density = None if found is None else float(found.density.mean())
    if json:
        console.print_json(
            {
                "model": loaded.source.name,
                "policy": repr(wanted),
                "prefix": prefix,
                "tokens": tokens,
                "dense": dense.perplexity,
                "hsr": hsr.perplexity,
                "relative_change": change,
                "logprob_difference_mean": sum(gaps) / len(gaps),
                "logprob_difference_max": max(gaps),
                "density": density,
                "seconds": {"dense": dense.seconds, "hsr": hsr.seconds},
                "machine": options.machine(),
            }
        )
        return
    rows = [
        ["perplexity, dense", f"{dense.perplexity:.4f}"],
        ["perplexity, half-space reporting", f"{hsr.perplexity:.4f}"],
        ["change", f"{100 * change:+.3f} %"],
        ["log-probability, |difference|: mean", f"{sum(gaps) / len(gaps):.4f} nats"],
        ["log-probability, |difference|: max", f"{max(gaps):.4f} nats"],
        ["density, mean", console.percent(density)],
    ]
    title = f"{loaded.source.name}: {tokens:,} tokens behind {prefix:,}; {wanted}"
    console.print_table(title, ["", "found"], rows)


@app.command()
def prompt(
    model: options.Model,
    prompt_file: options.PromptFile = None,
    essays: options.Essays = None,
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", min=2, help="Tokens of the text.", show_default="all"),
    ] = None,
    policy: options.PolicyWords = None,
    dtype: options.DtypeOption = options.Dtype.float32,
    max_context: options.MaxContext = None,
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Score every token of a prompt that is read in one piece, by half-space reporting and dense.

    Example: hsr evaluate prompt --model smollm2 --essays 8192
    """
    from hsr_attention.evaluation.perplexity import attention_layers, prompt_perplexity

    wanted = options.policy(policy) if policy else None
    loaded, ids = options.load_with_text(
        model, dtype, prompt_file, essays, tokens, 0, max_context, threads, shorten="--tokens"
    )
    wanted = options.fitting(wanted, loaded)
    results: dict[str, Any] = {}
    with console.progress("layers") as bar:
        for name, chosen in (("hsr", wanted), ("dense", None)):
            # The first pass over all layers checks the output embedding.
            task = bar.add_task(name, total=2 * len(attention_layers(loaded.model)))
            results[name] = prompt_perplexity(
                loaded.model, ids, chosen, lambda task=task: bar.advance(task)
            )
    dense, hsr = results["dense"], results["hsr"]
    change = hsr.perplexity / dense.perplexity - 1
    gaps = [abs(a - b) for a, b in zip(hsr.nats, dense.nats, strict=True)]
    found = {
        "model": loaded.source.name,
        "dtype": str(dtype),
        "context_before_yarn": loaded.scaled_from,
        "policy": repr(wanted),
        "tokens": ids.shape[1],
        "scored": hsr.tokens,
        "dense": dense.perplexity,
        "hsr": hsr.perplexity,
        "relative_change": change,
        "logprob_difference_mean": sum(gaps) / len(gaps),
        "logprob_difference_max": max(gaps),
        "seconds": {"dense": dense.seconds, "hsr": hsr.seconds},
        "machine": options.machine(),
    }
    if json:
        console.print_json(found)
        return
    rows = [
        ["perplexity, dense", f"{dense.perplexity:.4f}"],
        ["perplexity, half-space reporting", f"{hsr.perplexity:.4f}"],
        ["change", f"{100 * change:+.3f} %"],
        ["log-probability, |difference|: mean", f"{found['logprob_difference_mean']:.4f} nats"],
        ["log-probability, |difference|: max", f"{found['logprob_difference_max']:.4f} nats"],
        ["reading the prompt, dense", f"{dense.seconds:.1f} s"],
        ["reading the prompt, half-space reporting", f"{hsr.seconds:.1f} s"],
    ]
    title = f"{loaded.source.name}: all {hsr.tokens:,} tokens of a prompt; {wanted}"
    console.print_table(title, ["", "found"], rows)
