"""Which way each layer of a model goes: sparse decoding, dense attention, or refused; and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from hsr_attention.arguments import MAX_HEAD_DIM
from hsr_attention.integrations.answering import prompt_path
from hsr_attention.integrations.layer import DenseSlidingLayer, HSRLayer
from hsr_attention.integrations.transformers import HSRCache, enable
from hsr_attention.kv_cache import KVCache
from hsr_attention.policies import Policy

SPARSE, DENSE, REFUSED = "sparse decode", "dense", "refused"


@dataclass(frozen=True)
class LayerPath:
    """How one layer decodes under a policy.

    Attributes
    ----------
    layer : int
    path : "sparse decode", "dense" or "refused"
        Of a new token.
    prompt : str
        Of a prompt, in words.
    why : str
    heads, kv_heads, head_dim : int, optional
        Of the config; None where it does not say.
    row_bytes, code_bytes : float, optional
        What one token of this layer takes, all key heads together: keys and values at full
        precision, and their codes (of which every 16 tokens make a block).
    """

    layer: int
    path: str
    prompt: str
    why: str
    heads: int | None
    kv_heads: int | None
    head_dim: int | None
    row_bytes: float | None = None
    code_bytes: float | None = None


def layer_paths(model: PreTrainedModel, policy: Policy, dtype: torch.dtype) -> list[LayerPath]:
    """Say for every layer which way it goes; no weights are read, ``model`` may be on "meta"."""
    decoder = model.config.get_text_config(decoder=True)
    shape = _shape(decoder)
    count = len(DynamicCache(config=model.config).layers)
    try:
        with enable(model, policy):
            layers = HSRCache(model.config, policy).layers
        refused = _refused(model, shape)
    except ValueError as error:
        layers, refused = [None] * count, str(error)
    if refused:
        return [LayerPath(i, REFUSED, REFUSED, refused, *shape) for i in range(len(layers))]
    bytes_of_token = _bytes(policy, shape, dtype)
    found = []
    for i, layer in enumerate(layers):
        if isinstance(layer, HSRLayer):
            why = "full attention: keys are chosen by half-space reporting"
            found.append(LayerPath(i, SPARSE, prompt_path(policy), why, *shape, *bytes_of_token))
        elif isinstance(layer, DenseSlidingLayer):
            why = f"a window of {layer.sliding_window} keys: few enough to read all"
            found.append(LayerPath(i, DENSE, DENSE, why, *shape))
        else:
            why = f"{type(layer).__name__} holds no keys to choose from"
            found.append(LayerPath(i, DENSE, DENSE, why, None, None, None))
    return found


def _shape(decoder: Any) -> tuple[int | None, int | None, int | None]:
    heads = getattr(decoder, "num_attention_heads", None)
    kv_heads = getattr(decoder, "num_key_value_heads", None) or heads
    head_dim = getattr(decoder, "head_dim", None)
    if head_dim is None and heads:
        head_dim = decoder.hidden_size // heads
    return heads, kv_heads, head_dim


def _refused(model: PreTrainedModel, shape: tuple[int | None, ...]) -> str | None:
    """Return why the attention function would refuse a decoding step, if it would."""
    for name, module in model.named_modules():
        if getattr(module, "sinks", None) is not None:
            return f"hsr attention does not support attention sinks, got {name}.sinks"
    if shape[2] is not None and shape[2] > MAX_HEAD_DIM:
        return f"head_dim must be in [1, {MAX_HEAD_DIM}], got {shape[2]}"
    return None


def _bytes(
    policy: Policy, shape: tuple[int | None, ...], dtype: torch.dtype
) -> tuple[float | None, float | None]:
    _, kv_heads, head_dim = shape
    if not kv_heads or not head_dim:
        return None, None
    block = torch.zeros(1, kv_heads, 16, head_dim, dtype=dtype)
    cache = KVCache(policy)
    cache.append(block, block)
    return cache.row_nbytes / 16, cache.code_nbytes / 16
