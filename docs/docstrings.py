"""Docstrings write <q, k> for the scalar product; Markdown would take it for HTML."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Brackets(griffe.Extension):
    """Write ⟨q, k⟩ where a docstring has <q, k>."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Change the text before it is parsed."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"<(\w+, \w+)>", r"⟨\1⟩", obj.docstring.value)
