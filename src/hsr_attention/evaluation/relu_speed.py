"""ReLU attention at the Gaussian threshold (at most about n^(4/5) keys) against dense in torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from hsr_attention.evaluation.alternation import median_seconds
from hsr_attention.kv_cache import KVCache
from hsr_attention.policies import ReLUPolicy
from hsr_attention.thresholds import Gaussian


def measure(
    heads: int,
    kv_heads: int,
    head_dim: int,
    n: int,
    dtype: str,
    rounds: int = 15,
    seed: int = 0,
    exponent: float = 0.8,
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Check both against float64, then time them in turn; keys and queries are Gaussian."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    kind = getattr(torch, dtype)

    def gaussian(*shape: int) -> Any:
        return torch.randn(shape, generator=generator).to(kind)

    k, v = gaussian(1, kv_heads, n, head_dim), gaussian(1, kv_heads, n, head_dim)
    queries = [gaussian(1, heads, 1, head_dim) for _ in range(8)]
    rule, scale = Gaussian(exponent), head_dim**-0.5
    cache = KVCache(ReLUPolicy(threshold=rule))
    for first in range(0, n, 16384):
        cache.append(k[:, :, first : first + 16384], v[:, :, first : first + 16384])
    # The thresholds of the rule, once for each query: dense attention is not to pay for them.
    key_rms = (k.double() ** 2).mean(dim=(2, 3)).sqrt().repeat_interleave(heads // kv_heads, dim=1)
    seen = np.array([[[n]]])
    thresholds = [rule(q.float().numpy(), key_rms.numpy(), seen, scale) for q in queries]
    shape = (1, kv_heads, heads // kv_heads, head_dim)

    def dense(q: Any, b: Any, k: Any = k, v: Any = v) -> Any:
        logits = torch.matmul(q.view(shape), k.transpose(-1, -2)).mul_(scale)
        weights = logits.sub_(b.view(1, kv_heads, -1, 1)).relu_()
        total = weights.sum(dim=-1, keepdim=True)
        return (torch.matmul(weights, v) / total).view(1, heads, 1, head_dim)

    given = [torch.tensor(b, dtype=kind) for b in thresholds]
    errors: dict[str, list[float]] = {"hsr": [], "dense": []}
    kept = []
    k64, v64 = k.double(), v.double()
    with torch.inference_mode():
        for q, b, b64 in zip(queries, given, thresholds, strict=True):
            exact = dense(q.double(), torch.tensor(b64), k64, v64).numpy()
            out, certificate = cache.attend(q, scale, return_certificate=True)
            kept.append(float(certificate.density.mean()) * n)
            for name, found in (("hsr", out), ("dense", dense(q, b))):
                gap = np.linalg.norm(found.double().numpy() - exact, axis=-1)
                errors[name].append(float((gap / np.linalg.norm(exact, axis=-1)).mean()))
        del k64, v64
        turn = iter(range(10**9))

        def ours() -> Any:
            return cache.attend(queries[next(turn) % len(queries)], scale)

        calls = {"hsr": ours, "dense": lambda: dense(queries[0], given[0])}
        seconds = median_seconds(calls, rounds, on_round)
    return {
        "n": n,
        "hsr_ms": 1e3 * seconds["hsr"],
        "dense_ms": 1e3 * seconds["dense"],
        "speedup": seconds["dense"] / seconds["hsr"],
        "keys_kept": float(np.mean(kept)),
        # A Gaussian exceeds t sigma with this probability, which is at most exp(-t^2 / 2) =
        # n^(exponent - 1).
        "keys_expected": n * 0.5 * math.erfc(math.sqrt((1 - exponent) * math.log(n))),
        "exponent": exponent,
        "relative_error": float(np.mean(errors["hsr"])),
        "dense_relative_error": float(np.mean(errors["dense"])),
    }
