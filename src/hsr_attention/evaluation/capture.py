"""Queries, keys and values of real heads, written to a safetensors file.

For every layer ``l`` the file holds ``q{l}`` [heads, positions, d] of the last positions, and
``k{l}``, ``v{l}`` [kv_heads, n, d] of all, after the rotary embedding: what attention is given.
The metadata name the model, the text, tokens, scale and layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hsr_attention.evaluation.errors import InputError

_IMPLEMENTATION = "hsr_capture"


@dataclass
class Heads:
    """Captured tensors by name (torch), and the scale of the logits."""

    tensors: dict[str, Any] = field(default_factory=dict)
    scale: float | None = None


def layer_count(config: Any) -> int:
    """Return the number of layers of a model."""
    return config.get_text_config().num_hidden_layers


def stream(model: Any, ids: Any, visit: Callable[[int, Any, Any, Any, float], None]) -> Any:
    """Run ``ids`` [1, n] through a transformers model once, dense, and show q, k and v of each layer.

    ``visit(layer, q, k, v, scale)`` is called as each layer is reached, with q [heads, n, d] and k, v
    [kv_heads, n, d] after the rotary embedding: what attention is given, and a cache would hold.
    Returns the logits after the last token, [vocab].
    """
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    from hsr_attention.integrations.relu_model import ReLULMConfig, relu_attention_forward

    relu = isinstance(model.config, ReLULMConfig)
    attend: Any = relu_attention_forward if relu else sdpa_attention_forward

    def show(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: Any = None, **rest: Any):
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        visit(module.layer_idx, q[0], k[0], v[0], scale)
        return attend(module, q, k, v, mask, scaling=scaling, **rest)

    AttentionInterface.register(_IMPLEMENTATION, show)
    AttentionMaskInterface.register(_IMPLEMENTATION, sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(_IMPLEMENTATION)
    try:
        with torch.no_grad():
            return model(ids, use_cache=False, logits_to_keep=1).logits[0, -1]
    finally:
        model.set_attn_implementation(before)


def capture(
    model: Any,
    ids: Any,
    layers: list[int],
    queries: int = 256,
    on_layer: Callable[[int], None] = lambda layer: None,
) -> Heads:
    """Run ``ids`` [1, n] through a transformers model once and keep q, k and v of ``layers``."""
    heads = Heads()

    def keep(layer: int, q: Any, k: Any, v: Any, scale: float) -> None:
        on_layer(layer)
        if layer in layers:
            heads.scale = scale
            for name, tensor in (("q", q[:, -queries:]), ("k", k), ("v", v)):
                heads.tensors[f"{name}{layer}"] = tensor.clone().contiguous()

    stream(model, ids, keep)
    missing = sorted(set(layers) - {int(name[1:]) for name in heads.tensors})
    if missing:
        raise InputError(f"layers {missing} of this model have no attention to capture")
    return heads


def save(heads: Heads, path: Path, metadata: dict[str, str]) -> None:
    """Write captured heads."""
    from safetensors.torch import save_file

    save_file(heads.tensors, str(path), metadata | {"scale": repr(heads.scale)})


@dataclass(frozen=True)
class CapturedFile:
    """A file of captured heads, read layer by layer."""

    path: Path
    layers: list[int]
    n: int
    positions: int
    metadata: dict[str, str]

    def layer(self, layer: int) -> tuple[Any, Any, Any]:
        """Return q, k and v of one layer, torch."""
        with _open(self.path) as file:
            q, k, v = (file.get_tensor(f"{name}{layer}") for name in "qkv")
        return q, k, v

    def scale(self, head_dim: int) -> float:
        """Return the scale of the logits, 1 / sqrt(head_dim) if the file does not say."""
        value = self.metadata.get("scale", "None")
        return 1.0 / float(np.sqrt(head_dim)) if value == "None" else float(value)


def open_heads(path: Path) -> CapturedFile:
    """Open a file that ``hsr capture`` wrote."""
    if not path.is_file():
        raise InputError(f"keys file {path} does not exist")
    with _open(path) as file:
        names = set(file.keys())
        layers = sorted(int(name[1:]) for name in names if name[0] == "k" and name[1:].isdigit())
        if not layers or any(f"{x}{layer}" not in names for layer in layers for x in "qv"):
            raise InputError(
                f"keys file {path} must hold q, k and v of layers, as hsr capture writes"
            )
        n = min(file.get_slice(f"k{layer}").get_shape()[1] for layer in layers)
        positions = min(file.get_slice(f"q{layer}").get_shape()[1] for layer in layers)
        metadata = file.metadata() or {}
    return CapturedFile(path, layers, n, positions, metadata)


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(str(path), "pt")
    except SafetensorError as error:
        raise InputError(f"keys file {path} is broken: {error}") from None
