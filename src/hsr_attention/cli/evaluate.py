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
    from hsr_attention.evaluation import generation, models, texts
    from hsr_attention.evaluation.decode_statistics import summary
    from hsr_attention.evaluation.perplexity import perplexity as measure

    wanted = options.policy(policy) if policy else None
    text = options.text(prompt_file, prefix + tokens if essays else None)
    source = models.find(model)
    options.quiet_libraries()
    options.set_threads(threads)
    tokenizer = models.load_tokenizer(source)
    n = prefix + tokens
    ids = texts.token_ids(tokenizer, text, n)
    if ids.shape[1] < n:
        raise InputError(f"the text has {ids.shape[1]} tokens, --prefix and --tokens need {n}")
    config = models.load_config(source)
    wanted = wanted or generation.default_policy(config)
    context = models.context_length(config)
    if context is not None and n > max(context, max_context or 0):
        raise InputError(
            f"--prefix and --tokens need {n} tokens, but the model's context is {context}: use "
            f"fewer, or --max-context {n} to extend the model by YaRN"
        )
    loaded = models.load(model, dtype, max_context, tokenizer)
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
