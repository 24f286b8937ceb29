"""The commands of ``hsr``."""

from __future__ import annotations

from typing import Annotated

import typer

from hsr_attention.cli import analyze, bench, capture, evaluate, experiments, generate, info
from hsr_attention.evaluation.errors import InputError

app = typer.Typer(
    help="Attention by half-space reporting: few keys, bounded error, fast on CPUs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# typer brings its own click, older ones use click's.
UsageError: type[Exception] = typer.BadParameter.__bases__[0]


def _version(value: bool) -> None:
    if value:
        import importlib.metadata

        typer.echo(f"hsr-attention {importlib.metadata.version('hsr-attention')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    import hsr_attention as hsr

    try:
        hsr.info()
    except ValueError as error:  # HSR_ISA or HSR_NUM_THREADS
        raise InputError(str(error)) from None


app.command("info")(info.run)
app.command("generate")(generate.run)
app.command("capture")(capture.run)
app.command("analyze")(analyze.run)
app.add_typer(bench.app, name="bench")
app.add_typer(evaluate.app, name="evaluate")
app.add_typer(experiments.app, name="experiments")
