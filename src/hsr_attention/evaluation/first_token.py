"""Time to first token of a whole model and its memory: dense (sdpa) beside half-space reporting.

The two take turns in one process. The runs that are timed are those that are compared: the
distributions they give for the first new token stand beside the times.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

from hsr_attention.evaluation import generation, memory
from hsr_attention.policies import Policy

WARM_UP = 512  # tokens of an untimed prompt at the start


def measure(
    model: Any,
    ids: Any,
    policy: Policy,
    rounds: int = 3,
    on_step: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Read the prompt ``ids`` [1, n] ``rounds`` times by each way; ``2 rounds`` steps are announced.

    Peaks of memory count from what was resident when the measurement began, the model included in
    that: they hold the cache, the codes, the activations and what attention needs.
    """
    before = model.config._attn_implementation
    ways = {
        "dense": lambda: generation.dense_cache(model),
        "hsr": lambda: generation.hsr_cache(model, policy, collect=False),
    }
    try:
        for new_cache in ways.values():
            generation.prefill(model, ids[:, :WARM_UP], new_cache())
        memory.reset_peak()
        resident = memory.peak_bytes()
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        peaks: dict[str, list[int]] = {name: [] for name in ways}
        logprobs: dict[str, Any] = {}
        code_bytes = 0
        for i in range(rounds):
            for name in list(ways)[:: 1 if i % 2 == 0 else -1]:
                on_step(name)
                gc.collect()
                cache = ways[name]()
                memory.reset_peak()
                start = time.perf_counter()
                logits = generation.prefill(model, ids, cache)
                logprobs[name] = logits.float().log_softmax(-1)
                seconds[name].append(time.perf_counter() - start)
                peak = memory.peak_bytes()
                if peak is not None and resident is not None:
                    peaks[name].append(peak - resident)
                code_bytes = getattr(cache, "code_nbytes", code_bytes)
                del cache
    finally:
        model.set_attn_implementation(before)
    return _row(ids.shape[1], seconds, peaks, logprobs, code_bytes)


def _row(
    n: int,
    seconds: dict[str, list[float]],
    peaks: dict[str, list[int]],
    logprobs: dict[str, Any],
    code_bytes: int,
) -> dict[str, Any]:
    dense, hsr = (statistics.median(seconds[name]) for name in ("dense", "hsr"))
    peak = {name: max(found) if found else None for name, found in peaks.items()}
    known = peak["dense"] is not None and peak["hsr"] is not None
    a, b = logprobs["dense"], logprobs["hsr"]
    return {
        "n": n,
        "dense_seconds": dense,
        "hsr_seconds": hsr,
        "speedup": dense / hsr,
        "dense_peak_bytes": peak["dense"],
        "hsr_peak_bytes": peak["hsr"],
        "code_bytes": code_bytes,
        # what half-space reporting needs besides what dense needs and the codes
        "working_bytes": peak["hsr"] - peak["dense"] - code_bytes if known else None,  # type: ignore[operator]
        "same_first_token": bool(a.argmax() == b.argmax()),
        "logprob_difference": float((a - b)[a.argmax()].abs()),
        "divergence_nats": float((a.exp() * (a - b)).sum()),
        "seconds": seconds,
    }
