"""The report: one HTML file that needs nothing else, light or dark, on a laptop or a phone."""

from __future__ import annotations

import datetime
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hsr_attention.experiments.workbench import Settings

STYLE = """
:root { color-scheme: light dark; --ink: #23272e; --soft: #5d6570; --page: #fcfbf8; --card: #fff; --line: #e2dfd8;
  --accent: #2f7fc1; --bad: #b3261e; --good: #1f7a55; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6ea; --soft: #a2a9b4; --page: #14171c; --card: #1b1f26;
  --line: #333943; --accent: #6db1ea; --bad: #ff8f85; --good: #5ec79a; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 17px/1.6 Georgia, "Iowan Old Style", "Noto Serif", "DejaVu Serif", serif; }
header, main, footer { max-width: 76rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2.5rem; }
h1 { font-size: clamp(1.7rem, 5vw, 2.6rem); line-height: 1.15; margin: 0 0 .6rem; }
h2 { font-size: clamp(1.35rem, 3.6vw, 1.8rem); line-height: 1.2; margin: 0 0 .7rem; }
p, ul { max-width: 44rem; }
.lead { font-size: 1.12em; }
.facts, nav, table, .status, figcaption, summary { font: 14px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
.facts { color: var(--soft); display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 1.2rem 0; max-width: 60rem; }
.facts dt { color: var(--ink); } .facts dd { margin: 0; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: .4rem; margin: 1.5rem 0; }
nav a { border: 1px solid var(--line); border-radius: 1rem; padding: .2rem .8rem; background: var(--card); text-decoration: none; }
a { color: var(--accent); }
section { border-top: 1px solid var(--line); padding: 2.2rem 0 1.4rem; }
.found { list-style: none; padding: 0; margin: 1.2rem 0; max-width: 50rem; }
.found li { border-left: 3px solid var(--accent); padding: .15rem 0 .15rem .9rem; margin: 0 0 .7rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: 1rem; margin: 1.4rem 0; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem; }
figure svg { width: 100%; height: auto; display: block; }
figcaption { color: var(--soft); text-align: right; }
.scroll { overflow-x: auto; margin: 1.2rem 0; }
table { border-collapse: collapse; min-width: 30rem; }
caption { text-align: left; color: var(--soft); padding-bottom: .3rem; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .9rem .3rem 0; text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
.status { color: var(--soft); }
.bad { color: var(--bad); } .good { color: var(--good); }
.failure { border: 1px solid var(--bad); border-radius: .5rem; padding: .8rem 1rem; max-width: 60rem; }
pre { overflow-x: auto; font: 12.5px/1.45 ui-monospace, Menlo, Consolas, monospace; }
sup { line-height: 0; }
code { font: .88em ui-monospace, Menlo, Consolas, monospace; }
footer { color: var(--soft); padding: 2rem 1.25rem 3rem; font-size: 15px; }
@media print { nav { display: none; } section { break-inside: avoid-page; } }
"""


@dataclass(frozen=True)
class Section:
    """One experiment on the page."""

    name: str
    title: str
    explanation: str
    findings: Sequence[str]
    figures: dict[str, str]
    tables: Sequence[dict[str, Any]]
    status: str
    seconds: float | None
    error: str | None


def render(
    sections: Sequence[Section],
    settings: Settings | None,
    machine: dict[str, Any],
    command: str,
    certificates: Sequence[dict[str, int]],
    title: str = "Attention by half-space reporting, measured",
) -> str:
    """Return the page."""
    body = [_header(title, sections, settings, machine, command, certificates)]
    body += [_section(s) for s in sections]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"{body[0]}<main>\n{''.join(body[1:])}</main>\n"
        "<footer>Theory: <em>HSR-Enhanced Sparse Attention Acceleration</em>, arXiv 2410.10165. "
        "Made by "
        "<code>hsr experiments run</code>; the data of every figure lie beside it as "
        "JSON.</footer>\n"
        "</body>\n</html>\n"
    )


def _header(
    title: str,
    sections: Sequence[Section],
    settings: Settings | None,
    machine: dict[str, Any],
    command: str,
    certificates: Sequence[dict[str, int]],
) -> str:
    packages = machine.get("packages", {})
    versions = [f"hsr-attention {machine['version']}", f"Python {machine['python']}"]
    versions += [f"{p} {packages[p]}" for p in ("torch", "transformers") if packages.get(p)]
    facts = {
        "command": f"<code>{html.escape(command)}</code>",
        "machine": html.escape(
            f"{machine.get('processor', machine['machine'])}, {machine['isa']}, "
            f"{machine['num_threads']} threads"
        ),
        "versions": html.escape(", ".join(versions)),
        "written": datetime.datetime.now(datetime.UTC).strftime("%d %B %Y, %H:%M UTC"),
    }
    if settings is not None:
        named = [m for m in (settings.model, settings.second_model) if m]
        what = f"{', '.join(named)}; text: {settings.text}; prompts of {', '.join(f'{n:,}' for n in settings.lengths)} tokens, "
        facts["over"] = html.escape(
            what
            + f"the last {settings.scored} of them scored"
            + (" (quick run)" if settings.quick else "")
        )
    rows, broken = sum(c["rows"] for c in certificates), sum(c["violations"] for c in certificates)
    if rows:
        kind = "bad" if broken else "good"
        facts["certificates"] = (
            f'<span class="{kind}">{broken} broken of {rows:,} checked against float64</span>'
        )
    failed = [s.title for s in sections if s.status == "failed"]
    if failed:
        facts["failed"] = f'<span class="bad">{html.escape(", ".join(failed))}</span>'
    listed = "".join(f"<dt>{k}</dt><dd>{v}</dd>" for k, v in facts.items())
    links = "".join(f'<a href="#{s.name}">{html.escape(s.title)}</a>' for s in sections)
    return (
        f'<header>\n<h1>{html.escape(title)}</h1>\n<p class="lead">A model reads a long text and asks, for every word it writes, '
        "which of the earlier words matter. An index can answer that question exactly, and only "
        "those words need be read. What that "
        "costs, what it saves, and how wrong it can be: measured here, beside what the theory "
        "says.</p>\n"
        f'<dl class="facts">{listed}</dl>\n<nav aria-label="Experiments">{links}</nav>\n</header>\n'
    )


def _section(s: Section) -> str:
    parts = [f'<section id="{s.name}">\n<h2>{html.escape(s.title)}</h2>\n', _prose(s.explanation)]
    if s.status == "failed":
        error = s.error or ""
        last = html.escape(error.strip().splitlines()[-1] if error.strip() else "unknown")
        parts.append(
            f'<div class="failure"><strong class="bad">This experiment failed.</strong> {last}'
            f"<details><summary>where</summary><pre>{html.escape(error)}</pre></details></div>\n"
        )
    elif s.status == "not run":
        parts.append('<p class="status">Not run yet.</p>\n')
    if s.findings:
        listed = "".join(f"<li>{_inline(x)}</li>\n" for x in s.findings)
        parts.append(f'<ul class="found">\n{listed}</ul>\n')
    if s.figures:
        drawn = "".join(
            f'<figure role="img" aria-label="{html.escape(name)}">{svg}<figcaption>{html.escape(name)}</figcaption></figure>\n'
            for name, svg in s.figures.items()
        )
        parts.append(f'<div class="figures">\n{drawn}</div>\n')
    parts += [_table(t) for t in s.tables]
    if s.seconds is not None:
        parts.append(
            f'<p class="status">Measured in {_duration(s.seconds)}; data in <code>{s.name}/data.json</code>.</p>\n'
        )
    return "".join(parts) + "</section>\n"


def _prose(text: str) -> str:
    return "".join(f"<p>{_inline(' '.join(p.split()))}</p>\n" for p in text.strip().split("\n\n"))


def _inline(text: str) -> str:
    safe = html.escape(text)
    safe = re.sub(r"`([^`]+)`", r"<code>\1</code>", safe)
    safe = re.sub(r"\*([^*]+)\*", r"<em>\1</em>", safe)
    power = r"\^\(((?:[^()]|\([^()]*\))+)\)|\^(-?[0-9.]*[0-9]|[γα])"  # ^(4/5), ^0.8, ^γ
    return re.sub(power, lambda m: f"<sup>{m[1] or m[2]}</sup>", safe)


def _table(table: dict[str, Any]) -> str:
    head = "".join(f"<th>{_inline(str(c))}</th>" for c in table["columns"])
    rows = "".join(
        "<tr>" + "".join(f"<td>{_inline(str(x))}</td>" for x in row) + "</tr>\n"
        for row in table["rows"]
    )
    caption = f"<caption>{_inline(table['title'])}</caption>" if table.get("title") else ""
    return f'<div class="scroll"><table>{caption}<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody></table></div>\n'


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else "under a second"
    return f"{seconds / 60:.0f} min"
