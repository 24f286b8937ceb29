"""The attention function "hsr" of transformers: dense prompts, sparse decoding."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from hsr_attention.integrations.layer import CachedRows, HSRLayer
from hsr_attention.integrations.relu_model import ReLULMConfig, relu_attention_forward
from hsr_attention.policies import ReLUPolicy

NAME = "hsr"

# Several new positions at once (speculative decoding, chunks of a prompt) share one dense pass
# over the keys, which is exact, and faster unless there are this many keys for each of them.
# Measured with 9/3 heads, d = 64, one thread, 8,192 keys: a report costs 0.32 ms a position, the
# dense pass 2.5 ms (float32) or 1.5 to 2.4 ms (bfloat16), and little more for eight positions.
KEYS_PER_POSITION = 1024

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
    AttentionMaskInterface.register(NAME, sdpa_mask)


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
    mask = _mask(attention_mask, query.shape[0], query.shape[2], key.shape[2])
    if isinstance(key, CachedRows):
        out = _cached(module, query, key, value, mask, scaling, causal)
    else:
        _check_uncached(module, query, key, causal)
        if isinstance(getattr(module, "config", None), ReLULMConfig):
            return relu_attention_forward(module, query, key, value, mask, scaling)
        out = _dense(query, key, value, mask, scaling, causal)
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
    for name, what in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"hsr attention does not support {what}, got the argument {name!r}")
    for name, argument in kwargs.items():
        if isinstance(argument, torch.Tensor) and name not in _HARMLESS:
            raise ValueError(f"hsr attention does not know the argument {name!r}, got a tensor")


def _mask(mask: Any, batch: int, m: int, n: int) -> torch.Tensor | None:
    """Check a mask as ``sdpa_mask`` makes it: bool [batch or 1, 1, m, n], true where seen."""
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
    if len(shape) != 4 or shape[0] not in (1, batch) or shape[2:] != (m, n):
        raise ValueError(
            f"attention_mask must have shape [{batch} or 1, 1, {m}, {n}], got {shape}"
        )
    return mask


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
    n, m = len(layer.rows), query.shape[2]
    if key.shape[2] != n or not isinstance(value, CachedRows) or value.layer is not layer:
        raise ValueError(
            "keys and values must come from the newest update of one HSRCache, got keys of "
            f"{key.shape[2]} tokens where the cache holds {n}"
        )
    try:
        layer.model.check(getattr(module, "config", None))
    except ValueError:
        layer.forget_newest(key)
        raise
    sees_newer = m > 1 and (not causal if mask is None else _sees_newer(mask, m))
    if isinstance(layer.policy, ReLUPolicy):
        if sees_newer:
            raise ValueError(
                "a ReLUPolicy needs causal attention, got a mask that shows newer keys"
            )
        return _sparse(layer, query, scaling, mask)
    if key.fresh is not None and value.fresh is not None:
        return _dense(query, key.fresh, value.fresh, mask, scaling, causal)
    if sees_newer or (m > 1 and m * KEYS_PER_POSITION > n):
        return _dense(query, *layer.tensors(), mask, scaling, causal)
    return _sparse(layer, query, scaling, mask)


def _sees_newer(mask: torch.Tensor, m: int) -> bool:
    return bool(mask[:, 0, :, -m:].triu(1).any())


def _sparse(
    layer: HSRLayer, query: torch.Tensor, scaling: float | None, mask: torch.Tensor | None
) -> torch.Tensor:
    if query.requires_grad and torch.is_grad_enabled():
        return _NoGradient.apply(query, layer, scaling, mask)  # type: ignore[return-value]
    return layer.attend(query, scaling, None if mask is None else mask[:, 0])


class _NoGradient(torch.autograd.Function):
    """Sparse attention outside ``torch.no_grad``: going forward is fine, going back is refused."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        query: torch.Tensor,
        layer: HSRLayer,
        scaling: float | None,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        return layer.attend(query, scaling, None if mask is None else mask[:, 0])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(
            "hsr attention over a cache has no gradient; train with attn_implementation='sdpa'"
        )


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
            f"{n} keys for {m} new positions; pass past_key_values=hsr_attention.HSRCache("
            "model.config, policy) or run inside hsr_attention.enable(model, policy)"
        )


def _dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    causal: bool,
) -> torch.Tensor:
    """Exact attention by torch; keys may be strided views, which its CPU kernels read in place."""
    m, n = query.shape[2], key.shape[2]
    causal = causal and mask is None and m > 1
    if causal and m != n:  # torch aligns is_causal with the first key, a cache with the last
        mask, causal = torch.ones(m, n, dtype=torch.bool).tril(n - m), False
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=causal,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
