"""Prompt prefilling (paper, Algorithm 3): the keys are new, the index is built inside the call."""

from __future__ import annotations

from typing import Any

import numpy as np

from hsr_attention import arguments
from hsr_attention.attention.certificate import Certificate
from hsr_attention.kv_cache import KVCache
from hsr_attention.policies import Policy


def attend_once(
    policy: Policy,
    q: Any,
    k: Any,
    v: Any,
    scale: float | None,
    is_causal: bool,
    mask: Any,
    certify: bool,
) -> tuple[Any, Certificate | None]:
    """Index the keys, answer all queries, forget the index.

    Causal queries see a prefix of the keys: the report of query i is cut at position i, which costs
    nothing, since blocks of codes stand in the order of the keys.
    """
    queries, keys = arguments.heads("q", q), arguments.heads("k", k)
    m, n = queries.shape[2], keys.shape[2]
    cache = KVCache(policy)
    cache._append(k, v, "k", "v")
    visible = np.minimum(np.arange(1, m + 1), n) if is_causal else np.full(m, n)
    return cache._attend(q, queries, visible.astype(np.int64), scale, mask, certify, len(cache))
