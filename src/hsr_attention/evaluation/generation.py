"""Greedy generation, step by step, so that every token can be timed, scored and shown.

The same two functions run dense attention and half-space reporting; only the cache and the model's
``attn_implementation`` differ.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hsr_attention.evaluation.errors import InputError
from hsr_attention.integrations.cache_argument import with_cache
from hsr_attention.policies import Policy


@dataclass
class Decoded:
    """Tokens one after another.

    Attributes
    ----------
    tokens
        What was generated, or the tokens that were forced.
    logprobs
        Log-probability of each token in ``tokens``, in nats.
    best
        The most probable token at each place.
    seconds
        Time of each pass of the model; one less than tokens, since the prefill gives the first.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    best: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float | None:
        """Decoding speed; None if there was only the token of the prefill."""
        return len(self.seconds) / sum(self.seconds) if self.seconds else None


def default_policy(config: Any) -> Policy:
    """Return what a model attends by if no policy is asked for."""
    from hsr_attention.integrations.cache import default_policy

    return default_policy(config)


@dataclass(frozen=True)
class Storage:
    """Where an ``HSRCache`` keeps full-precision keys and values."""

    storage: str = "memory"
    directory: Path | None = None


def hsr_cache(
    model: Any, policy: Policy, collect: bool = True, storage: Storage | None = None
) -> Any:
    """Switch ``model`` to half-space reporting and return an empty cache for it."""
    from hsr_attention.integrations.transformers import HSRCache

    place = {} if storage is None else asdict(storage)
    try:
        cache = HSRCache(model.config, policy, collect=collect, **place)
        model.set_attn_implementation("hsr")
    # Soft-capped logits, an encoder, no layer with full attention; a directory that is none.
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from None
    return cache


def dense_cache(model: Any) -> Any:
    """Switch ``model`` to torch's dense attention and return an empty cache for it."""
    from transformers import DynamicCache

    from hsr_attention.integrations.relu_model import NAME, ReLULMConfig

    model.set_attn_implementation(NAME if isinstance(model.config, ReLULMConfig) else "sdpa")
    return DynamicCache(config=model.config)


def warm_up(model: Any, ids: Any) -> None:
    """Read every weight once, so that the first run that is timed does not pay for it."""
    import torch

    with torch.no_grad():
        model(ids[:, :8], use_cache=False, logits_to_keep=1)


def prefill(
    model: Any,
    ids: Any,
    cache: Any,
    chunk: int | None = None,
    on_tokens: Callable[[int], None] = lambda done: None,
) -> Any:
    """Run the prompt ``ids`` [1, n] in chunks; return the logits after its last token, [vocab]."""
    import torch

    n = ids.shape[1]
    step = n if chunk is None else chunk
    logits = None
    with torch.no_grad():
        for start in range(0, n, step):
            part = ids[:, start : start + step]
            out = model(part, **with_cache(model, cache), use_cache=True, logits_to_keep=1)
            logits = out.logits[0, -1]
            on_tokens(min(start + step, n))
    return logits


def decode(
    model: Any,
    cache: Any,
    logits: Any,
    count: int,
    *,
    forced: list[int] | None = None,
    stop: Iterable[int] = (),
    on_token: Callable[[int], None] = lambda token: None,
) -> Decoded:
    """Generate ``count`` tokens after ``logits``: the most probable ones, or those in ``forced``.

    Generation ends early after a token in ``stop``.
    """
    import torch

    stop = set(stop)
    result = Decoded()
    with torch.no_grad():
        for i in range(count):
            best = int(logits.argmax())
            token = best if forced is None else forced[i]
            result.best.append(best)
            result.tokens.append(token)
            result.logprobs.append(float(torch.log_softmax(logits.float(), -1)[token]))
            on_token(token)
            if i + 1 == count or token in stop:
                break
            start = time.perf_counter()
            logits = step(model, cache, token)
            result.seconds.append(time.perf_counter() - start)
    return result


def step(model: Any, cache: Any, token: int) -> Any:
    """Run one token through the model; return the logits after it, [vocab]."""
    import torch

    with torch.no_grad():
        ids = torch.tensor([[token]])
        return model(ids, **with_cache(model, cache), use_cache=True).logits[0, -1]


def crop(cache: Any, n: int) -> None:
    """Keep the first ``n`` tokens of a cache."""
    surplus = cache.get_seq_length() - n
    if surplus > 0:
        cache.crop(-surplus)


def croppable(cache: Any) -> bool:
    """Say whether tokens can be taken off the end: not where a sliding window dropped some."""
    return all(
        getattr(layer, "is_croppable", True) and not getattr(layer, "is_sliding", False)
        for layer in cache.layers
    )


def time_by_position(
    model: Any,
    cache: Any,
    token: int,
    positions: Iterable[int],
    static: bool = False,
    repeats: int = 3,
) -> dict[int, float]:
    """Return the median time of a token behind each number of cached ones; shortens the cache.

    ``static`` times a ``StaticCache`` of that length with the same tokens.
    """
    times = {}
    for n in sorted(set(positions), reverse=True):
        crop(cache, n)
        timed = static_copy(model, cache, repeats + 1) if static else cache
        seconds = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            step(model, timed, token)
            seconds.append(time.perf_counter() - start)
            crop(cache, n)
        times[n] = statistics.median(seconds[1:])
    return dict(sorted(times.items()))


def static_copy(model: Any, cache: Any, room: int) -> Any:
    """Return a ``StaticCache`` with the tokens of a ``DynamicCache`` and room for more.

    None if transformers cannot build one for this model.
    """
    from transformers import StaticCache

    try:
        static = StaticCache(config=model.config, max_cache_len=cache.get_seq_length() + room)
        for i, layer in enumerate(cache.layers):
            static.update(layer.keys, layer.values, i)
    except (NotImplementedError, TypeError, ValueError, AttributeError, RuntimeError):
        return None
    return static


def fastest_dense(model: Any, cache: Any, token: int, room: int) -> tuple[str, Any]:
    """Time a few tokens on ``cache`` and on a ``StaticCache``; return the faster, and its name.

    ``cache`` comes back as it was. The static cache that was timed is dropped: one token must not
    stand in it twice, so a fresh copy is returned.
    """
    attention = model.config._attn_implementation
    if not croppable(cache):
        return f"{attention}, DynamicCache", cache
    n = cache.get_seq_length()
    static = static_copy(model, cache, max(room, 4))
    if static is None:
        return f"{attention}, DynamicCache", cache
    seconds: dict[str, list[float]] = {"dynamic": [], "static": []}
    for _ in range(4):
        for name, one in (("dynamic", cache), ("static", static)):
            start = time.perf_counter()
            step(model, one, token)
            seconds[name].append(time.perf_counter() - start)
        crop(cache, n)
    del static
    if statistics.median(seconds["static"][1:]) < statistics.median(seconds["dynamic"][1:]):
        return f"{attention}, StaticCache", static_copy(model, cache, room)
    return f"{attention}, DynamicCache", cache


@dataclass(frozen=True)
class Agreement:
    """How one decoding agrees with another.

    Attributes
    ----------
    tokens
        Places where the two free-running texts hold the same token, and of how many.
    first_difference
        First place where they differ, None if nowhere.
    best
        With the same tokens forced on both: places where both find the same one most probable.
    logprob_mean, logprob_max
        With the same tokens forced on both: |difference| of their log-probabilities, in nats.
    """

    tokens: int
    of: int
    first_difference: int | None
    best: int
    best_of: int
    logprob_mean: float
    logprob_max: float


def agreement(free: Decoded, other_free: Decoded, other_forced: Decoded) -> Agreement:
    """Compare ``free`` with another that ran free, and once forced on the tokens of ``free``."""
    of = min(len(free.tokens), len(other_free.tokens))
    same = [a == b for a, b in zip(free.tokens, other_free.tokens, strict=False)]
    gaps = [abs(a - b) for a, b in zip(free.logprobs, other_forced.logprobs, strict=True)]
    best = [a == b for a, b in zip(free.best, other_forced.best, strict=True)]
    return Agreement(
        tokens=sum(same),
        of=of,
        first_difference=same.index(False) if False in same else None,
        best=sum(best),
        best_of=len(best),
        logprob_mean=statistics.fmean(gaps),
        logprob_max=max(gaps),
    )


class Detokenizer:
    """Text of tokens as they come: holds back the bytes of an unfinished character."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._shown = 0

    def add(self, token: int) -> str:
        """Return the new text that this token completes."""
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        if text.endswith("\ufffd"):
            return ""
        new = text[self._shown :]
        self._shown = len(text)
        return new


def stop_tokens(model: Any) -> set[int]:
    """Return the tokens that end a text."""
    eos = getattr(model.generation_config, "eos_token_id", None)
    if eos is None:
        return set()
    return set(eos) if isinstance(eos, list | tuple) else {eos}
