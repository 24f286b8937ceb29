"""Perplexity through the real paths: token by token over the cache, or a whole prompt at once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hsr_attention.evaluation import generation
from hsr_attention.evaluation.errors import InputError
from hsr_attention.integrations.cache_argument import with_cache
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


SCORED_AT_ONCE = 512  # positions whose logits over the vocabulary are held


def prompt_perplexity(
    model: Any,
    ids: Any,
    policy: Policy | None = None,
    on_layer: Callable[[], None] = lambda: None,
) -> Perplexity:
    """Read the prompt ``ids`` [1, n] in one piece and score each of its tokens but the first.

    Attention is that of a prompt: ``HSRCache`` with this policy, or dense without one. The logits
    are made a few positions at a time from the last hidden states, which is refused where a model
    does more to its logits than its output embedding. ``on_layer`` is called after each attention
    layer. ``seconds`` is the time of the pass, the scoring aside.
    """
    import torch

    n = ids.shape[1]
    if n < 2:
        raise InputError(f"the prompt must have at least 2 tokens, got {n}")
    head = model.get_output_embeddings()
    before = model.config._attn_implementation
    hooks = [
        module.register_forward_hook(lambda *_: on_layer()) for module in attention_layers(model)
    ]
    try:
        with torch.no_grad():
            _check_head(model, head, ids)
            cache = (
                generation.dense_cache(model)
                if policy is None
                else generation.hsr_cache(model, policy, collect=False)
            )
            start = time.perf_counter()
            base = model.base_model
            hidden = base(ids, **with_cache(base, cache), use_cache=True).last_hidden_state[0]
            seconds = time.perf_counter() - start
            nats: list[float] = []
            for first in range(0, n - 1, SCORED_AT_ONCE):
                last = min(first + SCORED_AT_ONCE, n - 1)
                logprobs = head(hidden[first:last]).float().log_softmax(-1)
                found = logprobs.gather(1, ids[0, first + 1 : last + 1, None])
                nats += (-found[:, 0]).tolist()
    finally:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(before)
    return Perplexity(math.exp(sum(nats) / len(nats)), nats, 1, seconds)


def attention_layers(model: Any) -> list[Any]:
    """Return the attention modules of a model, as transformers marks them."""
    return [x for x in model.modules() if hasattr(x, "layer_idx") and hasattr(x, "is_causal")]


def _check_head(model: Any, head: Any, ids: Any) -> None:
    import torch

    part = ids[:, :4]
    expected = model(part, use_cache=False).logits[0]
    found = head(model.base_model(part, use_cache=False).last_hidden_state[0])
    if not torch.allclose(found.float(), expected.float(), rtol=1e-2, atol=1e-2):
        raise InputError(
            f"a {model.config.model_type} model scales or caps its logits: whole prompts of it "
            "cannot be scored, only tokens by --prefix and --tokens"
        )
