"""Pages that stand beside ``docs/`` join the site, with links that hold in both places.

On GitHub ``docs/limits.md`` links to ``../DESIGN.md`` and ``DESIGN.md`` to ``docs/limits.md``. In the
site all of them are neighbours. Links to other files of the repository (an example, a folder of
sources) have no page here: only their text is kept.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

PAGES = ("DESIGN.md", "CONTRIBUTING.md", "CHANGELOG.md")
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from the root of the repository."""
    root = Path(config.config_file_path).parent
    for name in PAGES:
        files.append(File.generated(config, name, abs_src_path=str(root / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrite links between the root and ``docs/``."""
    root = Path(config.config_file_path).parent
    source = page.file.src_uri
    here = "" if source in PAGES else posixpath.join("docs", posixpath.dirname(source))

    def rewrite(found: re.Match[str]) -> str:
        text, target = found["text"], found["target"]
        path, mark, anchor = target.partition("#")
        if not path or "://" in target:
            return found[0]
        repository = posixpath.normpath(posixpath.join(here, path))
        if repository in PAGES or repository.startswith("docs/"):
            inside = repository.removeprefix("docs/")
            relative = posixpath.relpath(inside, posixpath.dirname(source) or ".")
            return f"[{text}]({relative}{mark}{anchor})"
        return text if (root / repository).exists() else found[0]

    return LINK.sub(rewrite, markdown)
