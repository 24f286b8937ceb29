"""The main job, measured: continue one prompt by half-space reporting, and once more dense."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hsr_attention.evaluation import generation, memory
from hsr_attention.evaluation.generation import Agreement, Decoded, Storage
from hsr_attention.policies import Policy


@dataclass(frozen=True)
class Watch:
    """What to call while a run goes on: tokens prefilled so far, and each new token."""

    prefilled: Callable[[int], None] = lambda done: None
    token: Callable[[int], None] = lambda token: None


@dataclass
class Run:
    """One prompt, one way of attention.

    Attributes
    ----------
    path
        Which attention and cache.
    prompt_tokens
    prefill_seconds
        Up to the logits of the first new token: time to first token.
    decoded
    peak_bytes
        Most memory resident during the run, the model included.
    statistics
        What ``HSRCache.statistics`` collected (densities, certificates); None for dense.
    by_position
        Median seconds of a token behind each number of cached tokens, if it was measured.
    cache_bytes
        Of an ``HSRCache``: "rows" (full precision) and "codes".
    agreement
        With the run it is compared to, if any.
    """

    path: str
    prompt_tokens: int
    prefill_seconds: float
    decoded: Decoded
    peak_bytes: int | None
    statistics: Any = None
    by_position: dict[int, float] = field(default_factory=dict)
    cache_bytes: dict[str, int] = field(default_factory=dict)
    agreement: Agreement | None = None


def sweep(n: int) -> list[int]:
    """Return the lengths at which the time of a token is measured: 1/16, 1/8 ... 1 of ``n``."""
    return sorted({max(1, n >> shift) for shift in range(5)} | {max(1, 3 * n // 4)})


def run_hsr(
    model: Any,
    ids: Any,
    policy: Policy,
    count: int,
    *,
    chunk: int | None = None,
    stop: set[int] | None = None,
    positions: list[int] | None = None,
    watch: Watch | None = None,
    storage: Storage | None = None,
) -> Run:
    """Generate ``count`` tokens after ``ids`` through ``HSRCache``."""
    watch = watch or Watch()
    generation.warm_up(model, ids)
    memory.reset_peak()
    cache = generation.hsr_cache(model, policy, storage=storage)
    start = time.perf_counter()
    logits = generation.prefill(model, ids, cache, chunk, watch.prefilled)
    seconds = time.perf_counter() - start
    decoded = generation.decode(model, cache, logits, count, stop=stop or (), on_token=watch.token)
    peak = memory.peak_bytes()
    run = Run("hsr", ids.shape[1], seconds, decoded, peak, cache.statistics())
    run.cache_bytes = {"rows": cache.row_nbytes, "codes": cache.code_nbytes}
    if positions and generation.croppable(cache):
        token = decoded.tokens[-1]
        run.by_position = generation.time_by_position(model, cache, token, positions)
    return run


def run_dense(
    model: Any,
    ids: Any,
    count: int,
    *,
    compared_to: Decoded | None = None,
    stop: set[int] | None = None,
    positions: list[int] | None = None,
    watch: Watch | None = None,
) -> Run:
    """Generate ``count`` tokens with the fastest dense path of transformers.

    The prompt runs in one piece, the fastest way for dense attention; decoding uses
    ``DynamicCache`` or ``StaticCache``, whichever a few tokens show to be faster. The tokens of
    ``compared_to`` are forced afterwards, so that log-probabilities are comparable.
    """
    watch = watch or Watch()
    gc.collect()
    memory.reset_peak()
    cache = generation.dense_cache(model)
    n = ids.shape[1]
    start = time.perf_counter()
    logits = generation.prefill(model, ids, cache, None, watch.prefilled)
    seconds = time.perf_counter() - start
    path, decoding = generation.fastest_dense(model, cache, int(logits.argmax()), count)
    decoded = generation.decode(
        model, decoding, logits, count, stop=stop or (), on_token=watch.token
    )
    run = Run(path, n, seconds, decoded, memory.peak_bytes())
    static = decoding is not cache
    del decoding
    if compared_to is not None:
        forced = _forced(model, ids, cache, logits, compared_to.tokens)
        run.agreement = generation.agreement(compared_to, decoded, forced)
    if positions and generation.croppable(cache):
        token = decoded.tokens[-1]
        run.by_position = generation.time_by_position(model, cache, token, positions, static)
    return run


def _forced(model: Any, ids: Any, cache: Any, logits: Any, tokens: list[int]) -> Decoded:
    if generation.croppable(cache):
        generation.crop(cache, ids.shape[1])
    else:
        cache = generation.dense_cache(model)
        logits = generation.prefill(model, ids, cache)
    return generation.decode(model, cache, logits, len(tokens), forced=tokens)
