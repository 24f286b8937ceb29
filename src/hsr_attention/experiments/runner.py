"""Run experiments one after another: keep what is finished, show what failed, write the report."""

from __future__ import annotations

import datetime
import json
import shutil
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hsr_attention.evaluation import models
from hsr_attention.evaluation.environment import machine, memory_available
from hsr_attention.evaluation.errors import InputError
from hsr_attention.experiments import figures, page
from hsr_attention.experiments.registry import EXPERIMENTS
from hsr_attention.experiments.workbench import (
    Experiment,
    Settings,
    Workbench,
    text_digest,
    write_json,
)

SETTINGS, DATA, ERROR, REPORT = "run.json", "data.json", "error.txt", "report.html"


@dataclass
class Outcome:
    """One experiment after a run.

    Attributes
    ----------
    name, title
    status
        "done" (in this run), "kept" (by an earlier one), "failed", or "not run".
    seconds
        Of the run that finished it, its parts kept from earlier ones not included.
    error
    data
    """

    name: str
    title: str
    status: str
    seconds: float | None = None
    error: str | None = None
    data: dict[str, Any] | None = field(default=None, repr=False)


def chosen(names: Sequence[str]) -> list[Experiment]:
    """Return the experiments of these names in the order of the report; all without names."""
    for name in names:
        if name not in EXPERIMENTS:
            raise InputError(f"unknown experiment {name!r}; expected {', '.join(EXPERIMENTS)}")
    return [x for x in EXPERIMENTS.values() if not names or x.NAME in names]


def check(experiments: Sequence[Experiment], settings: Settings, text: str, root: Path) -> None:
    """Refuse, before anything is measured, what could not be finished."""
    uses_model = any(x.USES_MODEL for x in experiments)
    _directory(root, settings, uses_model)
    if not uses_model:
        return
    lengths, scored = settings.lengths, settings.scored
    if not lengths or min(lengths) < scored + 128 or scored < 2:
        raise InputError(
            f"--lengths must exceed --scored = {scored} (itself at least 2) by 128 or more, got "
            f"{lengths}"
        )
    bench = Workbench(root, settings, text)
    disk = memory = 0
    for name in bench.models:
        config = models.load_config(models.find(name))
        for n in lengths:
            changed = models.load_config(models.find(name))
            models.extend_context(changed, n)  # raises where YaRN cannot be used
            found = bench.ids(n, name).shape[1]
            if found < n:
                raise InputError(f"the text has {found} tokens for {name}, --lengths needs {n}")
        rows = _cache_bytes(config, max(lengths))
        disk += sum(_cache_bytes(config, n) for n in lengths)
        # A prompt is read layer by layer, but is decoded from dense and coded caches together;
        # weights count twice while they are read. Half again for what is computed in between.
        memory = max(memory, int(1.5 * (2 * _weight_bytes(config) + 2.5 * rows)))
    kept = sum(file.stat().st_size for file in root.rglob("states/*/*") if file.is_file())
    free = shutil.disk_usage(root).free
    if free < (needed := max(int(1.1 * disk) + 10**8 - kept, 10**8)):
        raise InputError(
            f"--out: {_gigabytes(needed)} of disk are needed for prompts that are kept, {root} "
            "has "
            f"{_gigabytes(free)}: use shorter --lengths or another directory"
        )
    available = memory_available()
    if available is not None and available < memory:
        raise InputError(
            f"about {_gigabytes(memory)} of memory are needed, {_gigabytes(available)} are free: "
            "use "
            "shorter --lengths or a smaller model"
        )


def _directory(root: Path, settings: Settings, uses_model: bool) -> None:
    if root.exists() and not root.is_dir():
        raise InputError(f"--out: {root} is not a directory")
    if not root.exists() and not root.parent.is_dir():
        raise InputError(f"--out: directory {root.parent} does not exist")
    try:
        root.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"--out: {root} cannot be written: {error}") from None
    found = _earlier(root)
    if found is None:
        return
    # Without a model only these matter; with one, all, unless no model was used so far.
    some = not uses_model or not found["digest"]
    wanted = json.loads(json.dumps(asdict(settings)))
    names = ("quick", "seed") if some else tuple(wanted)
    differing = [name for name in names if found.get(name) != wanted[name]]
    if differing:
        what = ", ".join(f"{x} {found.get(x)!r}, not {wanted[x]!r}" for x in differing)
        raise InputError(f"--out: {root} holds a run with {what}: use another directory")


def _earlier(root: Path) -> dict[str, Any] | None:
    """Return the settings of an earlier run in a directory."""
    try:
        found = json.loads((root / SETTINGS).read_text())["settings"]
        return dict(found) if "digest" in found else None
    except FileNotFoundError:
        return None
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"--out: {root / SETTINGS} cannot be read: {error}") from None


def _cache_bytes(config: Any, n: int) -> int:
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * dim * n * 4


def _weight_bytes(config: Any) -> int:
    text = config.get_text_config()
    width, inner = text.hidden_size, getattr(text, "intermediate_size", 4 * text.hidden_size)
    return 4 * (
        text.num_hidden_layers * (4 * width * width + 3 * width * inner) + text.vocab_size * width
    )


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


def run(
    experiments: Sequence[Experiment],
    settings: Settings,
    text: str,
    root: Path,
    command: str,
    fresh: bool = False,
    say: Callable[[str, str], None] = lambda experiment, what: None,
) -> list[Outcome]:
    """Run experiments in a directory and write ``report.html``; one that fails stops no other.

    ``fresh`` forgets what these experiments finished before. Returns what happened to each
    experiment, those that were not asked for included.
    """
    root.mkdir(exist_ok=True)
    earlier = _earlier(root)
    if earlier is not None and not any(x.USES_MODEL for x in experiments):
        settings = Settings(**earlier)  # of the model that other experiments here used
    write_json(root / SETTINGS, {"settings": asdict(settings), "machine": machine()})
    bench = Workbench(root, settings, text)
    kept = set()
    try:
        for experiment in experiments:
            directory = root / experiment.NAME
            if fresh and directory.exists():
                shutil.rmtree(directory)
            if (directory / DATA).exists():
                kept.add(experiment.NAME)
                continue
            bench.say = lambda what, name=experiment.NAME: say(name, what)
            _one(experiment, bench, command)
    finally:
        outcomes = _outcomes(root, {x.NAME for x in experiments}, kept)
        report(root, outcomes, settings, command)
    return outcomes


def _one(experiment: Experiment, bench: Workbench, command: str) -> None:
    directory = bench.root / experiment.NAME
    directory.mkdir(parents=True, exist_ok=True)
    (directory / ERROR).unlink(missing_ok=True)
    bench.begin(experiment.NAME)
    start = time.perf_counter()
    try:
        data = experiment.run(bench.settings.quick, bench)
        seconds = time.perf_counter() - start
        experiment.findings(data)  # what cannot be told is not finished
        facts = {
            "experiment": experiment.NAME,
            "title": experiment.TITLE,
            "command": command,
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "seconds": seconds,
            "settings": asdict(bench.settings),
            "machine": machine(),
        }
        write_json(directory / DATA, facts | {"data": data})
    except Exception:
        (directory / ERROR).write_text(traceback.format_exc(), encoding="utf-8")


def _outcomes(root: Path, asked: set[str], kept: set[str]) -> list[Outcome]:
    found = []
    for experiment in EXPERIMENTS.values():
        one = Outcome(experiment.NAME, experiment.TITLE, "not run")
        directory = root / experiment.NAME
        if (directory / DATA).exists():
            kept_data = json.loads((directory / DATA).read_text(encoding="utf-8"))
            one.data, one.seconds = kept_data, kept_data["seconds"]
            ran = one.name in asked and one.name not in kept
            one.status = "done" if ran else "kept"
        elif (directory / ERROR).exists():
            one.status, one.error = "failed", (directory / ERROR).read_text(encoding="utf-8")
        if one.name in asked or one.status != "not run":
            found.append(one)
    return found


def report(root: Path, outcomes: list[Outcome], settings: Settings, command: str) -> Path:
    """Draw the figures of everything that is done, and write the page."""
    sections = []
    for outcome in outcomes:
        experiment = EXPERIMENTS[outcome.name]
        drawn: dict[str, str] = {}
        found: list[str] = []
        if outcome.data is not None:
            try:
                data = outcome.data["data"]
                found = experiment.findings(data)
                for name, made in experiment.plot(data).items():
                    drawn[name] = figures.write(made, root / outcome.name, name)
            except Exception:
                outcome.status, outcome.error = "failed", traceback.format_exc()
        sections.append(
            page.Section(
                outcome.name,
                outcome.title,
                experiment.EXPLANATION,
                found,
                drawn,
                (outcome.data or {}).get("data", {}).get("tables", []),
                outcome.status,
                outcome.seconds,
                outcome.error,
            )
        )
    path = root / REPORT
    counted = [
        o.data["data"]["certificates"]
        for o in outcomes
        if o.data and "certificates" in o.data["data"]
    ]
    text = page.render(sections, settings, machine(), command, counted)
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
    return path


__all__ = ["Outcome", "check", "chosen", "report", "run", "text_digest"]
