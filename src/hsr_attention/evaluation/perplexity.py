"""Perplexity through the real decoding path: one token at a time over the cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hsr_attention.evaluation import generation
from hsr_attention.evaluation.errors import InputError
from hsr_attention.policies import Policy


@dataclass(frozen=True)
class Perplexity:
    """exp(mean nats) of ``tokens`` tokens behind ``prefix`` tokens."""

    perplexity: float
    nats: list[float]
    prefix: int
    seconds: float
    statistics: Any = None

    @property
    def tokens(self) -> int:
        """Number of scored tokens."""
        return len(self.nats)


def perplexity(
    model: Any,
    ids: Any,
    prefix: int,
    policy: Policy | None = None,
    tokens: int = 512,
    chunk: int | None = None,
    on_tokens: Callable[[int], None] = lambda done: None,
) -> Perplexity:
    """Prefill ``prefix`` tokens, then force the next ``tokens`` one by one and score them.

    Parameters
    ----------
    model
        A causal language model of transformers.
    ids : int64 [1, n], n >= prefix + tokens
    policy : SoftmaxPolicy or ReLUPolicy, optional
        Attend through ``HSRCache`` with this policy; without one, dense through ``DynamicCache``.
    chunk : int, optional
        Prefill in chunks of this many tokens.
    on_tokens
        Called with the number of tokens done, of ``prefix + tokens``.
    """
    if prefix < 1 or tokens < 1:
        raise InputError(f"prefix and tokens must be >= 1, got {prefix} and {tokens}")
    if ids.shape[1] < prefix + tokens:
        raise InputError(
            f"the text must have prefix + tokens = {prefix + tokens} tokens, got {ids.shape[1]}"
        )
    before = model.config._attn_implementation
    cache = (
        generation.dense_cache(model) if policy is None else generation.hsr_cache(model, policy)
    )
    try:
        logits = generation.prefill(model, ids[:, :prefix], cache, chunk, on_tokens)
        forced = ids[0, prefix : prefix + tokens].tolist()
        return score(model, cache, logits, forced, prefix, on_tokens)
    finally:
        model.set_attn_implementation(before)


def score(
    model: Any,
    cache: Any,
    logits: Any,
    forced: list[int],
    prefix: int,
    on_tokens: Callable[[int], None] = lambda done: None,
) -> Perplexity:
    """Force tokens one by one behind a cache of ``prefix`` tokens; ``logits`` [vocab] come first.

    The cache then holds all of them but the last.
    """
    done = iter(range(prefix + 1, prefix + len(forced) + 1))
    decoded = generation.decode(
        model,
        cache,
        logits,
        len(forced),
        forced=forced,
        on_token=lambda _: on_tokens(next(done)),
    )
    nats = [-logprob for logprob in decoded.logprobs]
    return Perplexity(
        math.exp(sum(nats) / len(nats)),
        nats,
        prefix,
        sum(decoded.seconds),
        cache.statistics() if getattr(cache, "collect", False) else None,
    )
