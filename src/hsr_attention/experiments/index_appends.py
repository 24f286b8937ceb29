"""What appending to and deleting from the low-dimensional indexes costs, amortised.

The logarithmic method builds structures as keys come, so single calls are cheap or dear: the time
of all calls over the number of keys is what counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hsr_attention.evaluation.environment import native_machine, native_threads
from hsr_attention.experiments.index_scaling import KINDS, make_data, thread_clock


@dataclass(frozen=True)
class Row:
    """Microseconds a key, builds included.

    ``append`` is of n keys in calls of ``block``, from an empty index on; ``delete`` of three
    quarters of them, in random order, in calls as large.
    """

    kind: str
    data: str
    d: int
    n: int
    block: int
    append: float
    delete: float
    slowest_append: float  # milliseconds of the slowest call


def measure(
    dims: Sequence[int] = (2, 3, 4),
    n: int = 100_000,
    kinds: Sequence[str] = tuple(KINDS),
    *,
    blocks: Sequence[int] = (64, 1),
    data: Sequence[str] = ("gaussian",),
    threads: int = 1,
    seed: int = 0,
    on_row: Callable[[str], None] = lambda what: None,
) -> list[Row]:
    """Append n keys to each kind that serves d, delete three quarters, and check what is left."""
    with native_threads(threads):
        rows = []
        for d in dims:
            for name in data:
                generator = np.random.default_rng(seed)
                keys, q = make_data(name, n, d, 4, generator)
                gone = generator.permutation(n)[: 3 * n // 4]
                for kind in kinds:
                    if d not in KINDS[kind].dimensions:  # type: ignore[attr-defined]
                        continue
                    for block in blocks:
                        on_row(f"d = {d}, {name}, {kind}, blocks of {block}")
                        rows.append(_measure_one(kind, name, keys, q, gone, block))
        return rows


def _measure_one(kind: str, data: str, keys: Any, q: Any, gone: Any, block: int) -> Row:
    n, d = keys.shape
    clock = thread_clock()
    index = KINDS[kind](keys[:0])
    seconds = []
    for first in range(0, n, block):
        start = clock()
        index.append(keys[first : first + block])
        seconds.append(clock() - start)
    start = clock()
    for first in range(0, len(gone), block):
        index.delete(gone[first : first + block])
    deleted = clock() - start
    alive = np.setdiff1d(np.arange(n), gone)
    scores = q.astype(np.float64) @ keys[alive].T.astype(np.float64)
    for query, row in zip(q, scores, strict=True):
        limit = np.sort(row)[-min(len(row), 50) :][:2].mean()  # between two scores
        if not np.array_equal(index.report(query[None], limit).indices, alive[row >= limit]):
            raise AssertionError(f"{kind} lost count of its keys at d = {d}, blocks of {block}")
    return Row(kind, data, d, n, block, 1e6 * sum(seconds) / n, 1e6 * deleted / len(gone),
               1e3 * max(seconds))  # fmt: skip


def run(**options: Any) -> dict[str, Any]:
    """Measure; everything as plain values, with the machine."""
    rows = measure(**options)
    return {
        "machine": native_machine(options.get("threads", 1)),
        "rows": [asdict(row) for row in rows],
    }  # fmt: skip
