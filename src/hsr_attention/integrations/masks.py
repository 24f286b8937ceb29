"""Masks of the attention function "hsr": the padding of a long prompt, without a matrix over it.

transformers describes which keys each new position sees by a boolean matrix [batch, 1, m, n]. For a
long padded prompt that takes more memory than the model; where the mask is padding and causality,
the padding alone, [batch, 1, 1, n], says the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.masking_utils import causal_mask_function, prepare_padding_mask, sdpa_mask

# Below, a matrix is small, and torch's dense attention wants it.
LONG = 1024


def hsr_mask(
    *,
    q_length: int,
    kv_length: int,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Return what ``sdpa_mask`` returns, or only the padding of a long causal prompt.

    The padding is bool [batch, 1, 1, n], true where a key is a token, and known by its attribute
    ``hsr_causal_padding``: position i sees the tokens among the keys up to its own.
    """
    only_padding = mask_function is causal_mask_function and attention_mask is not None
    if only_padding and q_length > 1 and kv_length >= LONG and not torch.compiler.is_compiling():
        padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
        if padding is not None and not padding.all():
            causal_padding = padding[:, None, None, kv_offset : kv_offset + kv_length].bool()
            causal_padding.hsr_causal_padding = True  # type: ignore[attr-defined]
            return causal_padding
    return sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **kwargs,
    )


def is_causal_padding(mask: torch.Tensor | None) -> bool:
    """Say whether a mask is the padding that ``hsr_mask`` made of it."""
    return mask is not None and getattr(mask, "hsr_causal_padding", False)


def matrix(mask: torch.Tensor | None, m: int, n: int) -> torch.Tensor | None:
    """Return a mask as a matrix [batch or 1, 1, m, n]."""
    if mask is None or not is_causal_padding(mask):
        return mask
    return mask & torch.ones(m, n, dtype=torch.bool).tril(n - m)
