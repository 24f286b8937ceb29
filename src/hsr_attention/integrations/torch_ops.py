"""``torch.ops.hsr``: a cache as operators of torch, for models that ``torch.compile`` takes whole.

A cache cannot be an argument of an operator, so a tensor stands for it: ``state`` int64 [2], the
cache's number in this process and its tokens. ``append`` changes the tensor and ``attend`` reads
it, which keeps them in order and alive in any graph::

    cache = hsr.KVCache(policy)
    state = torch_ops.cache_state(cache)
    torch.ops.hsr.append(state, keys, values)
    out = torch.ops.hsr.attend(queries, state, values.shape[3], scale)

The tokens in ``state`` are the truth: ``append`` first forgets what the cache holds beyond them.
"""

from __future__ import annotations

import itertools
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class Cache(Protocol):
    """What stands behind a state: a ``KVCache``, or anything with these calls."""

    def __len__(self) -> int:
        """Return the number of cached tokens."""
        ...

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add tokens."""

    def crop(self, n: int) -> None:
        """Keep the first n tokens."""

    def attend(
        self, q: Tensor, scale: float | None, *, mask: Tensor | None, tokens: int
    ) -> Tensor:
        """Attend from the newest of the first ``tokens`` positions."""
        ...


_numbers = itertools.count(1)
_caches: WeakValueDictionary[int, Cache] = WeakValueDictionary()


def cache_state(cache: Cache) -> Tensor:
    """Return the state, int64 [2], that stands for ``cache``; it does not keep the cache alive.

    After appending to, or cropping, the cache by other means, set ``state[1] = len(cache)``.
    """
    number = next(_numbers)
    _caches[number] = cache
    return torch.tensor([number, len(cache)])


def _open(state: Tensor) -> tuple[Cache, int]:
    if state.dtype != torch.int64 or tuple(state.shape) != (2,):
        raise ValueError(
            f"state must be int64 [2] of cache_state, got {state.dtype} {list(state.shape)}"
        )
    number, tokens = state.tolist()
    cache = _caches.get(number)
    if cache is None:
        raise ValueError(f"state must stand for a cache that is alive, got number {number}")
    if not 0 <= tokens <= len(cache):
        raise ValueError(
            f"state must count at most the {len(cache)} tokens of its cache, got {tokens}"
        )
    return cache, tokens


@torch.library.custom_op("hsr::append", mutates_args=("state",), device_types="cpu")
def append(state: Tensor, keys: Tensor, values: Tensor) -> None:
    """Add tokens behind those of ``state``: keys and values [batch, kv_heads, t, dim]."""
    cache, tokens = _open(state)
    if len(cache) > tokens:
        cache.crop(tokens)
    cache.append(keys, values)
    state[1] = len(cache)


@append.register_fake
def _(state: Tensor, keys: Tensor, values: Tensor) -> None:
    return None


@torch.library.custom_op("hsr::attend", mutates_args=(), device_types="cpu")
def attend(
    queries: Tensor,
    state: Tensor,
    value_dim: int,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Attend from the newest m positions, as ``KVCache.attend``; there is no gradient.

    queries [batch, heads, m, head_dim], mask bool [batch or 1, m or 1, tokens];
    returns [batch, heads, m, value_dim].
    """
    cache, tokens = _open(state)
    if mask is not None and bool(mask.all()):  # as compiled models make it where nothing is hidden
        mask = None
    # A compiler may put off an answer until more was appended: the state says what was there.
    out = cache.attend(queries, scale, mask=mask, tokens=tokens)
    if out.shape[3] != value_dim:
        raise ValueError(f"value_dim must be {out.shape[3]} like the values, got {value_dim}")
    return out.contiguous()


@attend.register_fake
def _(
    queries: Tensor,
    state: Tensor,
    value_dim: int,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    return queries.new_empty((*queries.shape[:3], value_dim))
