"""Retrieval: needles in essays and pairs in a list, dense beside policies."""

from __future__ import annotations

from typing import Any

import numpy as np

from hsr_attention.evaluation import retrieval
from hsr_attention.evaluation.atlas import DEFAULT, POLICIES
from hsr_attention.experiments import figures
from hsr_attention.experiments.growth import table
from hsr_attention.experiments.workbench import Workbench
from hsr_attention.policies import SoftmaxPolicy

NAME = "retrieval"
TITLE = "Does it still find the needle?"
USES_MODEL = True
EXPLANATION = """
Perplexity is an average, and averages forgive. Retrieval does not: one fact stands somewhere in a
long text, and either it is found again or it is not. *Needles* are sentences ("The special magic
number for Oslo is: 48213.") hidden at several depths of the essays; *pairs* is a list of names
and numbers and nothing else, a thousand look-alikes of what is sought.

The context is read densely, once. Question and answer then go token by token through each policy,
so whatever is found is found by sparse attention. An answer counts when every one of its tokens
was the model's first choice. Where *dense* attention fails, the model cannot do the task and
nothing can be said about a policy: both are shown, and the difference counts only where dense
succeeds.
"""
CASES: dict[str, SoftmaxPolicy | None] = {
    "dense": None,
    **{name: POLICIES[name] for name in (DEFAULT, "epsilon=0.1", "top_r=64", "top_r=64, drop")},
    "top_r=16, drop": SoftmaxPolicy(top_r=16, tail="drop"),
}


def run(quick: bool, bench: Workbench) -> dict[str, Any]:
    """Ask at every length up to the model's own context (the longest prompt without YaRN)."""
    native = [n for n in bench.settings.lengths if not bench.is_extended(n)]
    top = max(native or bench.settings.lengths[:1])
    lengths = (
        [top // 2, top] if quick else [n for n in (top // 8, top // 4, top // 2, top) if n >= 128]
    )
    depths, seeds = (3, 1) if quick else (6, 2)
    rows = []
    for task in retrieval.TASKS:
        for n in lengths:
            for seed in range(seeds):
                rows += bench.part(
                    f"{task}, {n} tokens, seed {seed}",
                    lambda t=task, n=n, s=seed: _ask(bench, t, n, depths, s),
                )
    return {
        "model": bench.settings.model,
        "rows": rows,
        "lengths": lengths,
        "tables": [_table(rows, lengths)],
    }


def _ask(bench: Workbench, task: str, n: int, depths: int, seed: int) -> list[dict[str, Any]]:
    model = bench.model(n)
    hay = bench.ids(n)[0].tolist()
    made = retrieval.make(task, bench.tokenizer(), hay, n, depths, bench.settings.seed + seed)
    before = model.config._attn_implementation
    try:
        found = retrieval.ask(
            model, made, CASES, lambda what: bench.say(f"{task}, {n} tokens: {what}")
        )
    finally:
        model.set_attn_implementation(before)
    return [{"task": task, "n": n, "seed": seed, **row} for row in found]


def _match(rows: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    return [r for r in rows if all(r[k] == v for k, v in wanted.items())]


def _kept(rows: list[dict[str, Any]], policy: str, **wanted: Any) -> tuple[int, int, float]:
    """Return how many answers dense gets right, how many of these a policy does, and extra nats."""
    dense = _match(rows, policy="dense", **wanted)
    ours = _match(rows, policy=policy, **wanted)
    pairs = list(zip(dense, ours, strict=True))
    right = [b["right"] for a, b in pairs if a["right"]]
    return len(right), sum(right), float(np.mean([b["nats"] - a["nats"] for a, b in pairs]))


def _table(rows: list[dict[str, Any]], lengths: list[int]) -> dict[str, Any]:
    lines = []
    for task in retrieval.TASKS:
        for n in lengths:
            dense = _match(rows, policy="dense", task=task, n=n)
            line: list[Any] = [task, f"{n:,}", f"{sum(r['right'] for r in dense)} of {len(dense)}"]
            for policy in list(CASES)[1:]:
                of, kept, more = _kept(rows, policy, task=task, n=n)
                line.append(f"{kept} of {of} ({more:+.2f})")
            lines.append(line)
    return table(
        ["task", "tokens", "dense", *list(CASES)[1:]],
        lines,
        "Right answers; for policies, of those that dense gets right (and the extra surprise of "
        "a token of the answer, nats)",
    )


def plot(data: dict[str, Any]) -> dict[str, Any]:
    """Draw the answers of each task by length and depth, and the surprise by policy."""
    made = {}
    for task in retrieval.TASKS:
        rows = _match(data["rows"], task=task)
        made[f"{task}-found"] = _found(task, rows, data["lengths"])
        figure, axes = figures.panel(
            f"{task.capitalize()}: surprise of the answer", "tokens of context", "nats a token"
        )
        for colour, policy in zip(figures.COLOURS, CASES, strict=True):
            means = [
                np.mean([r["nats"] for r in _match(rows, policy=policy, n=n)])
                for n in data["lengths"]
            ]
            axes.plot(
                data["lengths"],
                means,
                "o-",
                color=figures.INK if policy == "dense" else colour,
                label=policy,
            )
        figures.powers_of_two(axes, data["lengths"])
        figures.legend(axes)
        made[f"{task}-surprise"] = figure
    return made


def _found(task: str, rows: list[dict[str, Any]], lengths: list[int]) -> Any:
    made, axes = figures.panel(f"{task.capitalize()}: right answers, per cent", "", "")
    share = [
        [100 * np.mean([r["right"] for r in _match(rows, policy=policy, n=n)]) for n in lengths]
        for policy in CASES
    ]
    axes.imshow(share, aspect="auto", cmap=figures.HEAT, vmin=0, vmax=100)
    for y, line in enumerate(share):
        for x, value in enumerate(line):
            axes.text(
                x,
                y,
                f"{value:.0f}",
                ha="center",
                va="center",
                color="white" if value < 60 else "black",
            )
    axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
    axes.set_xlabel("tokens of context")
    axes.set_yticks(range(len(CASES)), list(CASES))
    axes.grid(visible=False)
    return made


def findings(data: dict[str, Any]) -> list[str]:
    """Compare policies where dense succeeds."""
    rows, said = data["rows"], []
    for task in retrieval.TASKS:
        dense = _match(rows, policy="dense", task=task)
        parts = []
        for policy in list(CASES)[1:]:
            of, kept, _ = _kept(rows, policy, task=task)
            parts.append(f"{policy}: {kept}")
        of = sum(r["right"] for r in dense)
        said.append(
            f"{task.capitalize()}: dense answers {of} of {len(dense)}; of these, "
            f"{'; '.join(parts)}."
        )
    return said
