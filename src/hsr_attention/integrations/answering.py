"""How the positions of a layer are answered: by its policy, or densely where that is faster."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from hsr_attention import _native
from hsr_attention.integrations.masks import is_causal_padding, matrix
from hsr_attention.policies import Policy, ReLUPolicy

if TYPE_CHECKING:
    from hsr_attention.integrations.layer import HSRLayer

# A prompt is answered by its policy from this many keys on, by instruction set. Below, torch's dense
# attention is exact and as fast; so it is at any length where an instruction set is not listed
# (measured with 9/3 heads, d = 64, two threads, float32: docs/limits.md).
PROMPT_KEYS = {"avx512": 1024, "avxvnni": 1024, "avx2": 4096}
# The kernel for prompts takes this many rows, positions times the query heads of a key head.
PROMPT_ROWS = 24
# Fewer new positions (speculative decoding) share one dense pass over the keys, which is exact, and
# faster unless there are this many keys for each of them. Measured with 9/3 heads, d = 64, one thread,
# 8,192 keys: a report costs 0.32 ms a position, the dense pass 2.5 ms (float32) or 1.5 to 2.4 ms
# (bfloat16), and little more for eight positions.
KEYS_PER_POSITION = 1024


def reports_prompts(policy: Policy) -> bool:
    """Say whether prompts are answered by ``policy``; under ``top_r`` they are read densely.

    The r largest of every position need a second look at all its keys, which a dense pass beats.
    """
    return isinstance(policy, ReLUPolicy) or policy.top_r is None


def prompt_keys() -> float:
    """Return how many keys a prompt must see to be answered by its policy; infinite: never."""
    return PROMPT_KEYS.get(_native.isa_in_use(), math.inf)


def prompt_path(policy: Policy) -> str:
    """Say in words which way prompts go."""
    if isinstance(policy, ReLUPolicy):
        return "sparse"
    if not reports_prompts(policy):
        return "dense (top_r)"
    keys = prompt_keys()
    return (
        f"sparse from {keys:,} keys on" if keys < math.inf else f"dense ({_native.isa_in_use()})"
    )


def _dense_is_better(policy: Policy, m: int, rows: int, n: int) -> bool:
    """Say whether m new positions over n keys are answered densely; ``rows`` a key head."""
    if m == 1:
        return False
    if rows >= PROMPT_ROWS and reports_prompts(policy):
        return n < prompt_keys()
    return m * KEYS_PER_POSITION > n


def attend_cached(
    layer: HSRLayer,
    query: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    causal: bool,
    fresh: tuple[torch.Tensor, torch.Tensor] | None = None,
    tokens: int | None = None,
) -> torch.Tensor:
    """Attend over the rows of a layer by its policy, or densely where that is as fast.

    ``fresh`` are the keys and values of all tokens, if they have just come in one piece; with
    ``tokens`` the layer is read as if it held only that many.
    """
    n, m = layer.get_seq_length() if tokens is None else tokens, query.shape[2]
    sees_newer = m > 1 and (not causal if mask is None else _sees_newer(mask, m))
    if isinstance(layer.policy, ReLUPolicy):
        if sees_newer:
            raise ValueError(
                "a ReLUPolicy needs causal attention, got a mask that shows newer keys"
            )
        return _sparse(layer, query, scaling, mask, tokens)
    rows = m * query.shape[1] // layer.rows.kv_heads
    trains = m > 1 and query.requires_grad and torch.is_grad_enabled()  # only dense has a gradient
    if not (sees_newer or trains or _dense_is_better(layer.policy, m, rows, n)):
        return _sparse(layer, query, scaling, mask, tokens, record=rows < PROMPT_ROWS)
    keys, values = fresh or (rows[:, :, :n] for rows in layer.tensors())
    return dense_attention(query, keys, values, mask, scaling, causal)


def _sees_newer(mask: torch.Tensor, m: int) -> bool:
    return not is_causal_padding(mask) and bool(mask[:, 0, :, -m:].triu(1).any())


def _sparse(
    layer: HSRLayer,
    query: torch.Tensor,
    scaling: float | None,
    mask: torch.Tensor | None,
    tokens: int | None,
    record: bool = True,
) -> torch.Tensor:
    seen = None if mask is None else mask[:, 0]
    if query.requires_grad and torch.is_grad_enabled():
        return _NoGradient.apply(  # type: ignore[return-value]
            query, layer, scaling, seen, tokens, record
        )
    return layer.attend(query, scaling, seen, tokens, record)


class _NoGradient(torch.autograd.Function):
    """Sparse attention outside ``torch.no_grad``: going forward is fine, going back is refused."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        query: torch.Tensor,
        layer: HSRLayer,
        scaling: float | None,
        mask: torch.Tensor | None,
        tokens: int | None,
        record: bool,
    ) -> torch.Tensor:
        return layer.attend(query, scaling, mask, tokens, record)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(
            "hsr attention over a cache has no gradient; train with attn_implementation='sdpa'"
        )


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    causal: bool,
) -> torch.Tensor:
    """Exact attention by torch; keys may be strided views, which its CPU kernels read in place."""
    m, n = query.shape[2], key.shape[2]
    mask = matrix(mask, m, n)
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
