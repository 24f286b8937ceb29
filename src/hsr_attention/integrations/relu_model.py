"""A language model whose attention is ReLU^alpha: its config, its class, and dense attention for it.

The architecture is Qwen3's (rotary positions, grouped queries, norms on queries and keys) with
Definition 1.2 of the paper in place of softmax. Everything is differentiable, so that it trains as
any model of transformers does; ``HSRCache`` decodes it by half-space reporting.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.masking_utils import sdpa_mask

from hsr_attention.policies import ReLUPolicy
from hsr_attention.thresholds import SqrtLog

NAME = "relu"  # of the dense attention function
_SOFTMAX = ("eager", "sdpa", "flash", "flex", "paged")  # in the names of transformers' own
# A row whose weights sum to t has gradients of order 1/t. Below this t they are scaled down to order 1
# in training, or a few rows with one key just above the threshold drown all others.
_GRADIENT_FLOOR = 1.0
_BLOCK = (
    256  # queries at a time: half of a causal square is never computed, and memory stays small
)


class ReLULMConfig(Qwen3Config):
    """Qwen3's config with ReLU^alpha attention.

    Attributes
    ----------
    relu_power : int in [1, 16]
        alpha: weight = ReLU(logit - b)^alpha.
    relu_sigma : float, or one for each head
        b = sigma sqrt(0.4 ln n) for a query that sees n keys; see ``thresholds.SqrtLog``.
    """

    model_type = "relu_lm"

    relu_power: int = 1
    relu_sigma: float | list[float] = 1.0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.relu_policy()  # refuses what cannot be
        heads = self.num_attention_heads
        if isinstance(self.relu_sigma, list) and len(self.relu_sigma) != heads:
            raise ValueError(
                f"relu_sigma must be a number or one for each of {heads} heads, got "
                f"{self.relu_sigma!r}"
            )

    def relu_policy(self) -> ReLUPolicy:
        """Return what ``HSRCache`` decodes by."""
        sigma = self.relu_sigma
        rule = SqrtLog(tuple(sigma) if isinstance(sigma, list) else sigma)
        return ReLUPolicy(rule, self.relu_power)


class ReLULMForCausalLM(Qwen3ForCausalLM):
    """Qwen3 for causal language modelling with the attention of ``ReLULMConfig``.

    Attention is "relu" (dense, by torch), "hsr" (the same by half-space reporting), or a function of
    the user's own; those of transformers would compute softmax and are refused.
    """

    config_class = ReLULMConfig

    def get_correct_attn_implementation(
        self, requested_attention: str | None, *args: Any, **kwargs: Any
    ) -> str:
        """Return "relu" when nothing is asked for; refuse the functions of transformers."""
        if requested_attention is None:
            return NAME
        if any(part in requested_attention for part in _SOFTMAX):
            raise ValueError(
                f"attn_implementation of a {ReLULMConfig.model_type} model must be 'relu' or "
                f"'hsr', got {requested_attention!r}, which computes softmax"
            )
        return super().get_correct_attn_implementation(requested_attention, *args, **kwargs)


def register() -> None:
    """Make the model and the attention function "relu" known to transformers."""
    AttentionInterface.register(NAME, relu_attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    AutoConfig.register(ReLULMConfig.model_type, ReLULMConfig, exist_ok=True)
    AutoModelForCausalLM.register(ReLULMConfig, ReLULMForCausalLM, exist_ok=True)


def relu_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend densely as the model's config says; the attention function "relu" of transformers.

    query [batch, heads, m, head_dim]; returns ([batch, m, heads, value_dim], None).
    """
    config: Any = module.config
    floor = _GRADIENT_FLOOR if module.training else 0.0
    out = dense_relu_attention(
        query, key, value, config.relu_sigma, config.relu_power, scaling, attention_mask, floor
    )
    return out.transpose(1, 2).contiguous(), None


def dense_relu_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sigma: float | list[float] = 1.0,
    power: int = 1,
    scale: float | None = None,
    mask: torch.Tensor | None = None,
    gradient_floor: float = 0.0,
) -> torch.Tensor:
    """ReLU^power attention of the newest m positions, causal among themselves, every key scored.

    out_i = sum_j w_ij v_j / sum_j w_ij, w_ij = max(scale <q_i, k_j> - b_i, 0)^power with
    b_i = sigma sqrt(0.4 ln n_i) and n_i the number of keys query i may see; a row without a weight is
    zero (paper, Definition 1.2). bfloat16 and float16 are computed in float32: a logit that is rounded
    to 8 bits falls on either side of b.

    Parameters
    ----------
    query : [batch, heads, m, head_dim]
    key, value : [batch, kv_heads, n, head_dim], [batch, kv_heads, n, value_dim]
    sigma : float, or one for each head
    scale : float, optional
        1 / sqrt(head_dim) by default.
    mask : bool [batch or 1, 1, m, n], optional
        True where a key may be seen, causality included.
    gradient_floor : float
        The gradient of a row whose weights sum to t is multiplied by min(t / gradient_floor, 1).
    """
    if query.dtype in (torch.bfloat16, torch.float16):
        q, k, v = (x.float() for x in (query, key, value))
        out = dense_relu_attention(q, k, v, sigma, power, scale, mask, gradient_floor)
        return out.to(query.dtype)
    batch, heads, m, dim = query.shape
    kv_heads, n = key.shape[1:3]
    factor = 1 / math.sqrt(dim) if scale is None else scale
    grouped = (query * factor).view(batch, kv_heads, heads // kv_heads, m, dim)
    sigmas = torch.tensor(sigma, dtype=query.dtype).expand(heads)
    sigmas = sigmas.view(kv_heads, heads // kv_heads, 1, 1)
    out = []
    for start in range(0, m, _BLOCK):
        stop = min(start + _BLOCK, m)
        end = n - m + stop  # keys the block's last query sees
        part = grouped[:, :, :, start:stop]
        seen = None if mask is None else mask[:, :, None, start:stop, :end]
        if seen is None:
            count = torch.arange(end - stop + start, end)[:, None] + 1
        else:
            count = seen.sum(-1, keepdim=True).clamp_min(1)
        b = sigmas * (0.4 * count.to(query.dtype).log()).sqrt()
        logits = (part.flatten(2, 3) @ key[:, :, :end].transpose(2, 3)).view(*part.shape[:-1], end)
        weights = logits - b
        if seen is not None:
            weights.masked_fill_(~seen, 0.0)
        elif stop - start > 1:  # newer keys are among the block's own
            newer = torch.ones(stop - start, stop - start, dtype=torch.bool).triu(1)
            weights[..., end - stop + start :].masked_fill_(newer, 0.0)
        weights = weights.relu_()
        if power > 1:
            weights = weights**power
        total = weights.sum(-1, keepdim=True)
        mixed = (weights.flatten(2, 3) @ value[:, :, :end]).view(*part.shape[:-1], -1)
        rows = mixed / torch.where(total > 0, total, 1.0)
        if gradient_floor > 0:
            share = (total.detach() / gradient_floor).clamp(max=1.0)
            rows = rows * share + (rows * (1 - share)).detach()
        out.append(rows)
    return torch.cat(out, dim=3).view(batch, heads, m, value.shape[-1])
