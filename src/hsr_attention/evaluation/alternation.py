"""Calls timed in turn in one process, so that a busy moment falls on all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any


def median_seconds(
    calls: dict[str, Callable[[], Any]],
    rounds: int,
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Return the median time of each call, over ``rounds`` rounds after one that warms up.

    Every round starts with another call.
    """
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds + 1):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - start)
        on_round()
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}
