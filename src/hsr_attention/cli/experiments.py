"""``hsr experiments``: the theory and the library measured, drawn, and explained in one page."""

from __future__ import annotations

import enum
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hsr_attention.cli import console, options
from hsr_attention.evaluation.errors import InputError

app = typer.Typer(
    help="Every claim of the theory measured, drawn and explained in one page.",
    no_args_is_help=True,
)

FULL, QUICK = [8192, 32768], [2048]
SCORED, QUICK_SCORED = 512, 64


class Scaling(enum.StrEnum):
    """What to do about prompts beyond a model's context."""

    yarn = "yarn"
    none = "none"


@app.callback()
def _root() -> None:
    pass


@app.command("list")
def list_experiments(json: options.Json = False) -> None:
    """List the experiments."""
    from hsr_attention.experiments.registry import EXPERIMENTS

    rows = [
        {"name": x.NAME, "title": x.TITLE, "uses_model": x.USES_MODEL}
        for x in EXPERIMENTS.values()
    ]
    if json:
        console.print_json(rows)
        return
    lines = [[r["name"], r["title"], "yes" if r["uses_model"] else "no"] for r in rows]
    console.print_table("hsr experiments run NAMES", ["name", "about", "needs a model"], lines)


@app.command()
def run(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Experiments by name; without, all.", show_default=False),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Fewer and smaller measurements: minutes instead of hours."),
    ] = False,
    out: Annotated[
        Path, typer.Option("--out", help="Directory of the data, the figures and report.html.")
    ] = Path("experiments"),
    model: options.Model = "smollm2",
    second_model: Annotated[
        str | None,
        typer.Option(
            "--second-model",
            help="A model beside the first in the figures of perplexity.",
            show_default=False,
        ),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            "--prompt-file", help="A text file (UTF-8).", show_default="the PaulGrahamEssays"
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            "--lengths",
            help="Tokens of the prompts, with commas.",
            show_default="8192,32768; quick: 2048",
        ),
    ] = None,
    scored: Annotated[
        int | None,
        typer.Option(
            "--scored",
            min=2,
            help="Tokens at the end of a prompt that are scored.",
            show_default="512; quick: 64",
        ),
    ] = None,
    rope_scaling: Annotated[
        Scaling,
        typer.Option("--rope-scaling", help="How to read prompts beyond the model's context."),
    ] = Scaling.yarn,
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="Measure these experiments again, whatever is finished."),
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of made-up data.")] = 0,
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Run experiments; what an earlier run in the same directory finished is kept.

    Example: hsr experiments run --quick --out /tmp/quick
    """
    from hsr_attention.evaluation import models, texts
    from hsr_attention.experiments import runner
    from hsr_attention.experiments.workbench import Settings

    experiments = runner.chosen(names or [])
    needs_model = any(x.USES_MODEL for x in experiments)
    text = ""
    if needs_model:
        text = texts.essays() if prompt_file is None else texts.read_prompt(prompt_file)
        for name in filter(None, (model, second_model)):
            models.find(name)
    options.quiet_libraries()
    options.set_threads(threads)
    settings = Settings(
        quick=quick,
        model=model,
        second_model=second_model,
        text="the PaulGrahamEssays" if prompt_file is None else prompt_file.name,
        digest=runner.text_digest(text) if needs_model else "",
        lengths=_lengths(lengths) or (QUICK if quick else FULL),
        scored=scored or (QUICK_SCORED if quick else SCORED),
        seed=seed,
    )
    if needs_model and rope_scaling is Scaling.none:
        _refuse_long(settings)
    runner.check(experiments, settings, text, out)
    command = shlex.join(["hsr", *sys.argv[1:]])
    with console.status() as status:
        outcomes = runner.run(
            experiments,
            settings,
            text,
            out,
            command,
            fresh,
            lambda name, what: status.update(f"{name}: {what}"),
        )
    _print(outcomes, out, json)
    asked = {x.NAME for x in experiments}
    if any(o.status == "failed" and o.name in asked for o in outcomes):
        raise typer.Exit(1)


def _lengths(text: str | None) -> list[int]:
    if text is None:
        return []
    try:
        return sorted({int(word) for word in text.split(",")})
    except ValueError:
        raise InputError(f"--lengths must be numbers with commas, got {text!r}") from None


def _refuse_long(settings: Any) -> None:
    from hsr_attention.evaluation import models

    for name in filter(None, (settings.model, settings.second_model)):
        context = models.context_length(models.load_config(models.find(name)))
        longest = max(settings.lengths)
        if context is not None and longest > context:
            raise InputError(
                f"--lengths has {longest}, but the context of {name} is {context}: use at most "
                f"{context}, or --rope-scaling yarn"
            )


def _print(outcomes: list[Any], out: Path, json: bool) -> None:
    from hsr_attention.experiments.runner import REPORT

    if json:
        rows = [
            {
                "name": o.name,
                "title": o.title,
                "status": o.status,
                "seconds": o.seconds,
                "error": o.error,
                "data": None if o.data is None else str(out / o.name / "data.json"),
            }
            for o in outcomes
        ]
        console.print_json({"report": str(out / REPORT), "experiments": rows})
        return
    lines = [[o.name, o.status, console.number(o.seconds, 3, " s")] for o in outcomes]
    console.print_table("hsr experiments", ["experiment", "status", "time"], lines)
    for o in outcomes:
        if o.status == "failed" and o.error:
            console.out().print(
                f"{o.name} failed: {o.error.strip().splitlines()[-1]}", markup=False
            )
    states = out / "states"
    size = (
        sum(f.stat().st_size for f in states.rglob("*") if f.is_file()) if states.exists() else 0
    )
    console.out().print(f"{out / REPORT}", markup=False)
    if size:
        console.out().print(
            f"{states} keeps prompts that were read ({console.megabytes(size)}) for the next run",
            markup=False,
        )
