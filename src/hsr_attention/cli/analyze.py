"""``hsr analyze``: the atlas of a model over a text, head by head."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from hsr_attention.cli import console, options
from hsr_attention.cli.capture import chosen_layers
from hsr_attention.evaluation.errors import InputError
from hsr_attention.policies import SoftmaxPolicy


def run(
    model: options.Model,
    text: Annotated[
        Path | None,
        typer.Option("--text", "--prompt-file", help="A text file (UTF-8).", show_default=False),
    ] = None,
    essays: options.Essays = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens", min=1, help="Tokens of the text.", show_default="as the model's context"
        ),
    ] = None,
    layers: Annotated[
        str, typer.Option("--layers", help="Numbers with commas, such as 0,7,15, or 'all'.")
    ] = "all",
    queries: Annotated[
        int, typer.Option("--queries", min=1, max=512, help="Last positions that are looked at.")
    ] = 32,
    policy: options.PolicyWords = None,
    dtype: options.DtypeOption = options.Dtype.float32,
    max_context: options.MaxContext = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Directory for data (JSON), maps (PNG, SVG) and a page.",
            show_default=False,
        ),
    ] = None,
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Say of every head how many keys it needs, where they lie, and what policies make of it.

    Example: hsr analyze --model smollm2 --essays 8192 --out atlas
    """
    from hsr_attention.evaluation import atlas, capture, models, texts
    from hsr_attention.experiments import atlas as experiment

    if out is not None:
        options.writable(out, "--out")
        if out.exists() and not out.is_dir():
            raise InputError(f"--out: {out} is not a directory")
    policies = dict(atlas.POLICIES)
    if policy:
        wanted = options.policy(policy)
        if not isinstance(wanted, SoftmaxPolicy):
            raise InputError("hsr analyze compares with softmax; --policy must not be relu")
        policies = {",".join(policy): wanted}
    contents = options.text(text, essays)
    source = models.find(model)
    options.quiet_libraries()
    options.set_threads(threads)
    config = models.load_config(source)
    count = capture.layer_count(config)
    chosen = chosen_layers(layers, count)
    context = models.context_length(config)
    limit = max(filter(None, (context, max_context)), default=None)
    tokenizer = models.load_tokenizer(source)
    ids = texts.token_ids(tokenizer, contents, tokens or essays or limit)
    n = ids.shape[1]
    if limit is not None and n > limit:
        raise InputError(
            f"{n} tokens were asked for, but the model's context is {limit}: use --tokens "
            f"{limit}, or "
            f"--max-context {n} to extend the model by YaRN"
        )
    if n < 2 or (tokens is not None and n < tokens):
        raise InputError(f"the text has {n} tokens, --tokens needs {max(tokens or 2, 2)}")
    loaded = models.load(model, str(dtype), max_context, tokenizer)
    with console.progress("layers") as bar:
        task = bar.add_task("analyze", total=count)
        rows = atlas.analyse_model(
            loaded.model,
            ids,
            chosen,
            min(queries, n),
            policies,
            lambda layer: bar.update(task, completed=layer),
        )
    if not rows:
        raise InputError(f"layers {chosen} of this model have no attention to analyze")
    data = experiment.summary(loaded.source.name, rows)
    facts = {
        "command": shlex.join(["hsr", *sys.argv[1:]]),
        "text": "essays" if text is None else text.name,
        "dtype": str(dtype),
        "context_before_yarn": loaded.scaled_from,
        "machine": options.machine(),
    }
    if out is not None:
        _write(out, data, facts)
    if json:
        console.print_json(facts | {"data": data})
        return
    table = data["tables"][0]
    console.print_table(
        f"{loaded.source.name}, {n:,} tokens, {len(rows)} layers",
        table["columns"],
        [list(map(str, r)) for r in table["rows"]],
    )
    for line in experiment.findings(data):
        console.out().print(f"- {line}", markup=False)
    if out is not None:
        console.out().print(f"{out / 'report.html'}", markup=False)


def _write(out: Path, data: dict, facts: dict) -> None:
    from hsr_attention.experiments import atlas, figures, page
    from hsr_attention.experiments.workbench import write_json

    out.mkdir(exist_ok=True)
    write_json(out / "data.json", facts | {"data": data})
    drawn = {name: figures.write(made, out, name) for name, made in atlas.plot(data).items()}
    section = page.Section(
        "atlas",
        atlas.TITLE,
        atlas.EXPLANATION,
        atlas.findings(data),
        drawn,
        data["tables"],
        "done",
        None,
        None,
    )
    title = f"The attention of {data['model']} over {data['n']:,} tokens"
    text = page.render(
        [section], None, facts["machine"], facts["command"], [data["certificates"]], title
    )
    (out / "report.html").write_text(text, encoding="utf-8")
