"""Time of one decoding call against the number of keys: whether it grows in proportion.

Two calls are timed at every length. *decode* is the call of the policy. *scan* keeps nothing: its
threshold is above every logit, and known before the scan, so that it reads the first code plane of
all keys and no more, and writes nothing. Its bytes over its time, as a share of the bandwidth of the
machine, say how good the scan is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from hsr_attention.evaluation import decode_speed, output_error
from hsr_attention.evaluation.alternation import median_seconds
from hsr_attention.evaluation.decode_speed import Heads
from hsr_attention.kv_cache import KVCache
from hsr_attention.policies import Policy, ReLUPolicy, SoftmaxPolicy

PIECE = 16384  # tokens appended at a time
# No logit reaches it, so every key is scanned and none kept.
NOTHING = ReLUPolicy(threshold=1e29)


def lengths(largest: int, smallest: int = 1024) -> list[int]:
    """Return smallest, twice that, ... up to ``largest``."""
    found = []
    n = smallest
    while n <= largest:
        found.append(n)
        n *= 2
    return found or [largest]


def measure(
    heads: Heads,
    ns: list[int],
    policy: SoftmaxPolicy,
    rounds: int = 15,
    dense: bool = True,
    on_step: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Return a row for each number of keys: the newest ``n`` of ``heads``, next to the queries."""
    import torch

    bandwidth = decode_speed.memory_bandwidth()
    rows = []
    with torch.inference_mode():
        for n in sorted(ns):
            on_step(f"{n:,} keys")
            rows.append(_row(heads, n, policy, rounds, dense, bandwidth))
    steps = [
        b["decode_ms"] / a["decode_ms"] / (b["n"] / a["n"]) for a, b in itertools.pairwise(rows)
    ]
    return {
        "lengths": rows,
        "memory_bandwidth_gb_s": bandwidth / 1e9,
        # Growth of the time over growth of the keys between neighbours; above 1 is a step.
        "largest_step": max(steps, default=None),
    }


def _filled(policy: Policy, k: Any, v: Any) -> KVCache:
    cache = KVCache(policy)
    for first in range(0, k.shape[2], PIECE):
        cache.append(k[:, :, first : first + PIECE], v[:, :, first : first + PIECE])
    return cache


def _row(
    heads: Heads, n: int, policy: SoftmaxPolicy, rounds: int, dense: bool, bandwidth: float
) -> dict[str, Any]:
    part = Heads(heads.name, heads.q, heads.k[:, :, -n:], heads.v[:, :, -n:], heads.scale)
    cache, scanned = _filled(policy, part.k, part.v), _filled(NOTHING, part.k, part.v)
    queries = [part.q[:, :, i : i + 1].contiguous() for i in range(part.q.shape[2])]
    query = queries[-1]
    q, k, v = (x[0].double().numpy() for x in (part.q[:, :, -1:], part.k, part.v))
    exact = output_error.exact_attention(q, k, v, part.scale)
    out, certificate = cache.attend(query, part.scale, return_certificate=True)
    error = output_error.relative_error(out[0].double().numpy(), exact)
    work = certificate.work
    _, empty = scanned.attend(query, part.scale, return_certificate=True)
    turn = iter(range(10**9))

    def attend() -> Any:
        return cache.attend(queries[next(turn) % len(queries)], part.scale)

    calls: dict[str, Callable[[], Any]] = {
        "decode": attend,
        "scan": lambda: scanned.attend(query, part.scale),
    }
    paths = decode_speed.dense_paths(part) if dense else {}
    calls |= {name: lambda path=path: path(query) for name, path in paths.items()}
    seconds = median_seconds(calls, rounds)
    fastest = min(paths, key=lambda name: seconds[name]) if paths else None
    scan_bytes = decode_speed.bytes_read(empty.work, part)
    bytes_read = decode_speed.bytes_read(work, part)
    return {
        "n": n,
        "decode_ms": 1e3 * seconds["decode"],
        "scan_ms": 1e3 * seconds["scan"],
        "dense_ms": 1e3 * seconds[fastest] if fastest else None,
        "fastest_dense": fastest,
        "density": float(certificate.density.mean()),
        "relative_error": float(error.mean()),
        "scan_bytes": scan_bytes,
        "scan_bandwidth_share": scan_bytes / seconds["scan"] / bandwidth,
        "decode_bytes": bytes_read,
        "decode_bandwidth_share": bytes_read / seconds["decode"] / bandwidth,
        "code_bytes": cache.code_nbytes,
    }
