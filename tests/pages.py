"""The Markdown pages of the repository, and the code blocks in them."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md", "csrc/**/*.md")
    for path in ROOT.glob(pattern)
)
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```[ ]*$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: ``line`` is where its code begins."""

    page: str
    line: int
    language: str
    code: str

    def __str__(self):
        return f"{self.page}:{self.line}"


def text(page):
    """Return the source of a page."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page, language=None):
    """Return the fenced blocks of a page in order, of one language or of all."""
    source = text(page)
    found = [
        Block(page, source[: m.start(3)].count("\n") + 1, m[2], m[3].replace("\n" + m[1], "\n"))
        for m in FENCE.finditer(source)
    ]
    return [block for block in found if language in (None, block.language)]


def prose(page):
    """Return a page without its fenced blocks."""
    return FENCE.sub("", text(page))


def anchors(page):
    """Return the anchors of the headings of a page, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    plain = [re.sub(r"[`*]|\]\([^)]*\)|\[", "", heading).strip().lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


def links(page):
    """Return the relative targets of links and pictures in the prose of a page."""
    found = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose(page)))
    return [target for target in found if "://" not in target]
