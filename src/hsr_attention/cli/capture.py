"""``hsr capture``: keep queries, keys and values of real heads for benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hsr_attention.cli import console, options
from hsr_attention.evaluation.errors import InputError


def run(
    model: options.Model,
    out: Annotated[Path, typer.Option("--out", help="The .safetensors file to write.")],
    prompt_file: options.PromptFile = None,
    essays: options.Essays = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens", min=1, help="Tokens of the text.", show_default="all, or --essays"
        ),
    ] = None,
    skip: Annotated[
        int,
        typer.Option("--skip", min=0, help="Tokens of the text to leave out first: another part."),
    ] = 0,
    layers: Annotated[
        str, typer.Option("--layers", help="Numbers with commas, such as 0,7,15, or 'all'.")
    ] = "all",
    queries: Annotated[
        int, typer.Option("--queries", min=1, help="Last positions whose queries are kept.")
    ] = 256,
    dtype: options.DtypeOption = options.Dtype.float32,
    max_context: options.MaxContext = None,
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Write q (last positions), k and v of real heads to a safetensors file.

    Example: hsr capture --model smollm2 --essays 8192 --layers 0,7,15,29 --out heads.safetensors
    """
    from hsr_attention.evaluation import capture, models

    options.writable(out, "--out")
    count = capture.layer_count(models.load_config(models.find(model)))
    chosen = chosen_layers(layers, count)
    loaded, ids = options.load_with_text(
        model,
        dtype,
        prompt_file,
        essays,
        tokens,
        0,
        max_context,
        threads,
        shorten="--tokens",
        skip=skip,
    )
    n = ids.shape[1]
    wanted = tokens if essays is None else min(essays, tokens or essays)
    if wanted is not None and n < wanted:
        raise InputError(f"the text has {n} tokens, got --tokens {wanted}")
    with console.progress("layers") as bar:
        task = bar.add_task("capture", total=count)
        heads = capture.capture(
            loaded.model, ids, chosen, queries, lambda layer: bar.update(task, completed=layer)
        )
    facts: dict[str, Any] = {
        "model": loaded.source.name,
        "text": "essays" if prompt_file is None else prompt_file.name,
        "tokens": n,
        "skipped": skip,
        "queries": min(queries, n),
        "layers": chosen,
        "dtype": str(dtype),
        "context_before_yarn": loaded.scaled_from,
    }
    try:
        capture.save(heads, out, {name: str(value) for name, value in facts.items()})
    except OSError as error:
        raise InputError(f"--out: {out} cannot be written: {error}") from None
    facts |= {"scale": heads.scale, "out": str(out), "bytes": out.stat().st_size}
    if json:
        console.print_json(facts)
    else:
        console.out().print(
            f"{out}: q, k and v of {len(chosen)} layers, {n:,} tokens, "
            f"{console.megabytes(facts['bytes'])}"
        )


def chosen_layers(text: str, count: int) -> list[int]:
    """Read ``--layers``."""
    if text.strip() == "all":
        return list(range(count))
    try:
        chosen = sorted({int(word) for word in text.split(",")})
    except ValueError:
        raise InputError(f"--layers must be numbers with commas, or 'all', got {text!r}") from None
    if chosen[0] < 0 or chosen[-1] >= count:
        raise InputError(f"--layers must lie in [0, {count}), got {text}")
    return chosen
