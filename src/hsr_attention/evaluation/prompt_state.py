"""A prompt read once, densely, and kept on disk: what every measurement behind it starts from.

A directory holds, for every layer ``l``, a file with ``k``, ``v`` [kv_heads, n, d] and ``q`` [heads,
positions, d] after the rotary embedding, and ``state.json`` with what they belong to. Queries are
those of the last positions, and of a few in front of each earlier length n/2, n/4, ...
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsr_attention.evaluation.capture import stream
from hsr_attention.evaluation.errors import InputError

LAST, EARLIER, SHORTEST = 64, 16, 256  # queries kept at the end, at each earlier length; the least
_FACTS = "state.json"


@dataclass(frozen=True)
class PromptState:
    """A prompt of n tokens on disk.

    Attributes
    ----------
    directory
    n
    layers
        Layers with attention.
    scale
        Of the logits, for each of them.
    lengths
        Earlier lengths whose last queries were kept, ascending; ``n`` is the last.
    """

    directory: Path
    n: int
    layers: list[int]
    scale: dict[int, float]
    lengths: list[int]

    @property
    def logits(self) -> Any:
        """Logits after the last token, [vocab]."""
        return _load(self.directory / "logits.safetensors")["logits"]

    def layer(self, layer: int) -> tuple[Any, Any, Any]:
        """Return q [heads, positions, d] of the last positions, k and v [kv_heads, n, d], torch."""
        found = _load(self._file(layer))
        return found["q"][:, -self._last :], found["k"], found["v"]

    def queries(self, layer: int, length: int) -> Any:
        """Return queries [heads, positions, d] of the last positions below ``length``."""
        q = _load(self._file(layer), ("q",))["q"]
        start = 0
        for n in self.lengths:
            count = self._last if n == self.n else min(EARLIER, n)
            if n == length:
                return q[:, start : start + count]
            start += count
        raise ValueError(f"length must be one of {self.lengths}, got {length}")

    def fill(self, cache: Any, on_layer: Callable[[int], None] = lambda layer: None) -> Any:
        """Append the keys and values of all layers to a cache of transformers, and return it."""
        for layer in self.layers:
            on_layer(layer)
            found = _load(self._file(layer), ("k", "v"))
            cache.update(found["k"][None], found["v"][None], layer)
        return cache

    @property
    def _last(self) -> int:
        return min(LAST, self.n)

    def _file(self, layer: int) -> Path:
        return self.directory / f"layer-{layer:03d}.safetensors"

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(file.stat().st_size for file in self.directory.iterdir())


def earlier_lengths(n: int) -> list[int]:
    """Return n and its halves down to 256 tokens, ascending."""
    lengths = [n]
    while lengths[-1] // 2 >= SHORTEST:
        lengths.append(lengths[-1] // 2)
    return lengths[::-1]


def create(
    directory: Path, model: Any, ids: Any, on_layer: Callable[[int], None] = lambda layer: None
) -> PromptState:
    """Run ``ids`` [1, n] through a model, dense, and write its state."""
    import torch
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    (directory / _FACTS).unlink(missing_ok=True)  # written last: without it nothing here counts
    n = ids.shape[1]
    lengths = earlier_lengths(n)
    keep = [
        i for x in lengths for i in range(max(0, x - (LAST if x == n else min(EARLIER, x))), x)
    ]
    scales: dict[int, float] = {}

    def visit(layer: int, q: Any, k: Any, v: Any, scale: float) -> None:
        on_layer(layer)
        tensors = {"q": q[:, keep], "k": k, "v": v}
        save_file(
            {name: x.contiguous() for name, x in tensors.items()},
            str(directory / f"layer-{layer:03d}.safetensors"),
        )
        scales[layer] = float(scale)

    logits = stream(model, ids, visit)
    if len(scales) != model.config.get_text_config().num_hidden_layers:
        raise InputError(
            f"every layer must have attention to keep a prompt, got {len(scales)} such layers of "
            f"{model.config.get_text_config().num_hidden_layers} in a {model.config.model_type}"
        )
    save_file({"logits": logits.to(torch.float32)}, str(directory / "logits.safetensors"))
    facts = {
        "n": n,
        "scale": {str(layer): scale for layer, scale in scales.items()},
        "lengths": lengths,
        "tokens": digest(ids),
    }
    partial = directory / f"{_FACTS}.partial"
    partial.write_text(json.dumps(facts))
    os.replace(partial, directory / _FACTS)
    return _state(directory, facts)


def find(directory: Path, ids: Any) -> PromptState | None:
    """Return the state a directory holds for these tokens, None if it holds no such state."""
    try:
        facts = json.loads((directory / _FACTS).read_text())
    except (OSError, json.JSONDecodeError):
        return None
    return _state(directory, facts) if facts.get("tokens") == digest(ids) else None


def digest(ids: Any) -> str:
    """Return a name for a sequence of tokens."""
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()


def _state(directory: Path, facts: dict[str, Any]) -> PromptState:
    scale = {int(layer): value for layer, value in facts["scale"].items()}
    return PromptState(directory, facts["n"], sorted(scale), scale, facts["lengths"])


def _load(path: Path, names: tuple[str, ...] | None = None) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        return {name: file.get_tensor(name) for name in names or file.keys()}
