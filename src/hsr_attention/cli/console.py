"""What commands print: text and tables on stdout, progress on stderr, JSON for machines."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

NONE = "-"


def out() -> Console:
    """Return the console of stdout; wide where it is not a screen."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=120)


def note(text: str) -> None:
    """Say on stderr what the user should know, one line."""
    print(f"hsr: note: {text}", file=sys.stderr)


def progress(unit: str = "tokens") -> Progress:
    """Return a progress bar on stderr that goes away when it is done."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )


class Status:
    """One line on stderr that says what is being done."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=None)

    def update(self, what: str) -> None:
        """Say what is being done now."""
        self._bar.update(self._task, description=escape(what))


@contextmanager
def status() -> Iterator[Status]:
    """Show a line on stderr that says what is being done, and for how long."""
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        yield Status(bar)


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table under its title; every column but the first is aligned to the right."""
    table = Table()
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console = out()
    console.print(f"[bold]{escape(title)}[/bold]")
    console.print(table)


def print_json(value: Any) -> None:
    """Print one JSON document on stdout; numbers that are not finite become null."""
    print(json.dumps(_plain(value), indent=2, ensure_ascii=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "tolist"):  # numpy
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def number(value: float | None, digits: int = 3, unit: str = "") -> str:
    """Return ``value`` with this many significant digits, or a dash."""
    if value is None or not math.isfinite(value):
        return NONE
    if value == 0:
        return f"0{unit}"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}{unit}" if places <= 6 else f"{value:.{digits - 1}e}{unit}"


def percent(value: float | None, digits: int = 3) -> str:
    """Return a share as per cent, or a dash."""
    return number(None if value is None else 100 * value, digits, " %")


def megabytes(value: float | None) -> str:
    """Return bytes as MB, or a dash."""
    return number(None if value is None else value / 1e6, 4, " MB")
