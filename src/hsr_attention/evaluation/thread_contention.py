"""Whether torch's loops and ours, taking turns on the same cores, slow each other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from hsr_attention.evaluation.decode_speed import synthetic_heads
from hsr_attention.kv_cache import KVCache
from hsr_attention.policies import SoftmaxPolicy


def measure(
    n: int = 32768,
    size: int = 576,
    rounds: int = 30,
    burst: int = 10,
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Time matmuls and decoding calls in bursts of one kind, and one after the other.

    The matmul is that of a decoding step: one row times two matrices [size, 4 size], of which many
    stand in memory so that none is in the cache of the processor, as in a model. Each round makes
    ``burst`` calls of one kind, of the other, and of both in turn; medians over all rounds.
    """
    import torch

    heads = synthetic_heads(9, 3, 64, n, "float32", layers=4)
    caches = []
    for layer in heads:
        cache = KVCache(SoftmaxPolicy())
        cache.append(layer.k, layer.v)
        caches.append((cache, layer.q[:, :, :1].contiguous(), layer.scale))
    weights = [torch.randn(size, 4 * size) for _ in range(32)]
    back = [torch.randn(4 * size, size) for _ in range(32)]
    x = torch.randn(1, size)
    turn = iter(range(10**9))

    def matmul() -> None:
        i = next(turn) % len(weights)
        torch.matmul(torch.matmul(x, weights[i]), back[i])

    def attend() -> None:
        cache, q, scale = caches[next(turn) % len(caches)]
        cache.attend(q, scale)

    def timed(call: Callable[[], None]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    alone: dict[str, list[float]] = {"matmul": [], "attend": []}
    mixed: dict[str, list[float]] = {"matmul": [], "attend": []}
    calls = {"matmul": matmul, "attend": attend}
    with torch.inference_mode():
        for i in range(rounds + 1):
            found: tuple[dict[str, list[float]], dict[str, list[float]]] = (
                {name: [timed(call) for _ in range(burst)] for name, call in calls.items()},
                {name: [] for name in calls},
            )
            for _ in range(burst):
                for name, call in calls.items():
                    found[1][name].append(timed(call))
            if i:  # round 0 warms up
                for kept, new in zip((alone, mixed), found, strict=True):
                    for name in calls:
                        kept[name] += new[name]
            on_round()
    result: dict[str, Any] = {"keys": n, "matmul_size": [size, 4 * size]}
    for name in calls:
        a, b = statistics.median(alone[name]), statistics.median(mixed[name])
        result[name] = {"alone_ms": 1e3 * a, "in_turn_ms": 1e3 * b, "slowdown": b / a}
    return result
