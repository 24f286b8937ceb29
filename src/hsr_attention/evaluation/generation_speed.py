"""Decoding speed of a whole model against the length of the context, beside every dense way.

The context is read once, densely; all caches hold the same keys and values, and are cut to each
length in turn. Dense: ``DynamicCache`` and ``StaticCache``, each with torch's sdpa and with the
eager attention of transformers. Before a length is timed, the next-token distribution of
half-space reporting is compared with that of dense attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hsr_attention.evaluation import generation
from hsr_attention.evaluation.alternation import median_seconds
from hsr_attention.evaluation.errors import InputError
from hsr_attention.policies import Policy

HSR = "hsr"
DEFAULT = "sdpa, DynamicCache"  # what generate() does if nothing is asked for


def measure(
    model: Any,
    ids: Any,
    lengths: list[int],
    policy: Policy,
    rounds: int = 5,
    chunk: int = 1024,
    on_tokens: Callable[[int], None] = lambda done: None,
    on_step: Callable[[str], None] = lambda what: None,
) -> list[dict[str, Any]]:
    """Return one row for each length, the shortest first; ids [1, n] with n >= max(lengths)."""
    longest = max(lengths)
    dynamic = generation.dense_cache(model)
    if not generation.croppable(dynamic):
        raise InputError("hsr bench generate needs a model whose layers all have full attention")
    generation.prefill(model, ids[:, :longest], dynamic, chunk, on_tokens)
    ours = generation.hsr_cache(model, policy, collect=False)
    for i, layer in enumerate(dynamic.layers):
        ours.update(layer.keys, layer.values, i)
    token = int(ids[0, -1])
    rows = []
    for n in sorted(lengths, reverse=True):
        generation.crop(dynamic, n)
        generation.crop(ours, n)
        rows.append(_row(model, n, ours, dynamic, token, rounds, on_step))
    return rows[::-1]


def _row(
    model: Any,
    n: int,
    ours: Any,
    dynamic: Any,
    token: int,
    rounds: int,
    on_step: Callable[[str], None],
) -> dict[str, Any]:
    static = generation.static_copy(model, dynamic, 2 * rounds + 4)

    def step(implementation: str, cache: Any) -> Any:
        model.set_attn_implementation(implementation)
        logits = generation.step(model, cache, token)
        if cache is not static:  # a static one has room for all of them
            generation.crop(cache, n)
        return logits

    calls: dict[str, Callable[[], Any]] = {HSR: lambda: step("hsr", ours)}
    for implementation in ("sdpa", "eager"):
        for name, cache in (("DynamicCache", dynamic), ("StaticCache", static)):
            if cache is not None:
                calls[f"{implementation}, {name}"] = lambda i=implementation, c=cache: step(i, c)
    difference = _difference(calls[HSR](), calls[DEFAULT]())
    on_step(f"{n:,} tokens")
    seconds = median_seconds(calls, rounds)
    dense = {name: s for name, s in seconds.items() if name != HSR}
    fastest = min(dense, key=lambda name: dense[name])
    return {
        "n": n,
        "hsr_tokens_per_second": 1 / seconds[HSR],
        "dense_tokens_per_second": {name: 1 / s for name, s in dense.items()},
        "fastest_dense": fastest,
        "speedup": dense[fastest] / seconds[HSR],
        "speedup_over_default": dense[DEFAULT] / seconds[HSR],
        "logprob_difference_mean": difference,
        "row_bytes": ours.row_nbytes,
        "code_bytes": ours.code_nbytes,
    }


def _difference(found: Any, expected: Any) -> float:
    """Return E |log p - log p'| of the next token, over the dense distribution."""
    import torch

    a, b = (torch.log_softmax(x.double(), -1) for x in (found, expected))
    return float((b.exp() * (a - b).abs()).sum())
