"""The attention function "hsr" of transformers: what it takes, what it refuses, and where the keys are."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from hsr_attention.integrations import torch_ops
from hsr_attention.integrations.answering import attend_cached, dense_attention
from hsr_attention.integrations.layer import CachedRows
from hsr_attention.integrations.masks import hsr_mask, is_causal_padding, matrix
from hsr_attention.integrations.relu_model import ReLULMConfig, relu_attention_forward

NAME = "hsr"

# Arguments of other attention functions that change the result: ignoring one would be wrong.
_REFUSED = {
    "softcap": "soft-capped logits",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "a position bias",
    "cache": "continuous batching (a paged cache)",
    "indices": "an indexer's choice of keys",
    "block_indices": "an indexer's choice of keys",
    "head_mask": "a head mask",
}
# Tensors some models pass that say nothing the mask does not say.
_HARMLESS = frozenset(
    {
        "position_ids",
        "cache_position",
        "position_embeddings",
        "num_items_in_batch",
        "logits_to_keep",
        "labels",
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "cu_seqlens",
    }
)


def register() -> None:
    """Make ``attn_implementation="hsr"`` known to transformers, with its mask."""
    AttentionInterface.register(NAME, hsr_attention)
    AttentionMaskInterface.register(NAME, hsr_mask)


def hsr_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend over the keys of an ``HSRCache``, or densely where there is no cache.

    query [batch, heads, m, head_dim]; returns ([batch, m, heads, value_dim], None).

    Raises
    ------
    ValueError
        For anything that would have to be ignored; ``docs/transformers.md`` has the list.
    """
    _refuse(dropout, kwargs)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if isinstance(key, CachedRows):
        mask = _mask(attention_mask, query.shape[0], query.shape[2], key.tokens)
        out = _cached(module, query, key, value, mask, scaling, causal)
    elif key.dtype == torch.int64:  # a state of torch_ops: a graph is being made
        return _traced(query, key, value, attention_mask, scaling, causal), None
    else:
        mask = _mask(attention_mask, query.shape[0], query.shape[2], key.shape[2])
        _check_uncached(module, query, key, causal)
        if isinstance(getattr(module, "config", None), ReLULMConfig):
            mask = matrix(mask, query.shape[2], key.shape[2])
            return relu_attention_forward(module, query, key, value, mask, scaling)
        out = dense_attention(query, key, value, mask, scaling, causal)
    return out.transpose(1, 2).contiguous(), None


def _refuse(dropout: float, kwargs: dict[str, Any]) -> None:
    if dropout:
        raise ValueError(
            f"hsr attention does not support dropout, got dropout={dropout}; call model.eval()"
        )
    if kwargs.get("output_attentions"):
        raise ValueError(
            "hsr attention does not compute attention weights, got output_attentions=True; use "
            "attn_implementation='eager'"
        )
    for name, argument in kwargs.items():
        if argument is None or name in _HARMLESS:
            continue
        if what := _REFUSED.get(name):
            raise ValueError(f"hsr attention does not support {what}, got the argument {name!r}")
        if isinstance(argument, torch.Tensor):
            raise ValueError(f"hsr attention does not know the argument {name!r}, got a tensor")


def _mask(mask: Any, batch: int, m: int, n: int | None) -> torch.Tensor | None:
    """Check a mask as ``hsr_mask`` makes it: bool [batch or 1, 1, m, n], true where seen."""
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        found = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask must be boolean (true where a key may be seen), got {found}; hsr "
            "attention does not add masks to logits"
        )
    shape = tuple(mask.shape)
    if len(shape) == 4 and shape[1] != 1:
        raise ValueError(f"attention_mask must be the same for all heads, got shape {shape}")
    rows = 1 if is_causal_padding(mask) else m
    if len(shape) != 4 or shape[0] not in (1, batch) or shape[2:] != (rows, n):
        raise ValueError(
            f"attention_mask must have shape [{batch} or 1, 1, {m}, {n}], got {shape}"
        )
    return mask


def _traced(
    query: torch.Tensor,
    state: torch.Tensor,
    new_values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    causal: bool,
) -> torch.Tensor:
    if not causal and query.shape[2] > 1:
        raise ValueError("hsr attention inside torch.compile must be causal, got is_causal=False")
    mask = _mask(mask, query.shape[0], query.shape[2], None if mask is None else mask.shape[-1])
    seen = None if mask is None else mask[:, 0]
    out = torch_ops.attend(query, state, new_values.shape[3], scaling, seen)
    return out.transpose(1, 2).contiguous()


def _cached(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: CachedRows,
    value: Any,
    mask: torch.Tensor | None,
    scaling: float | None,
    causal: bool,
) -> torch.Tensor:
    layer = key.layer
    n = layer.get_seq_length()
    if key.tokens != n or not isinstance(value, CachedRows) or value.layer is not layer:
        raise ValueError(
            "keys and values must come from the newest update of one HSRCache, got keys of "
            f"{key.tokens} tokens where the cache holds {n}"
        )
    try:
        layer.model.check(getattr(module, "config", None))
    except ValueError:
        layer.forget_newest(key)
        raise
    fresh = None if key.fresh is None or value.fresh is None else (key.fresh, value.fresh)
    return attend_cached(layer, query, mask, scaling, causal, fresh)


def _check_uncached(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, causal: bool
) -> None:
    """Allow keys without an ``HSRCache`` only where no report could be made anyway.

    That is a whole sequence at once, an encoder, cross attention, or a sliding-window layer. Keys
    of another cache mean that the user expects sparse decoding and would get dense.
    """
    m, n = query.shape[2], key.shape[2]
    if m != n and causal and not getattr(key, "hsr_dense", False):
        raise ValueError(
            "attn_implementation='hsr' decodes from an HSRCache, got another cache's "
            f"{n} keys for {m} new positions; give the model an hsr_attention.HSRCache("
            "model.config, policy), or run inside hsr_attention.enable(model, policy)"
        )
