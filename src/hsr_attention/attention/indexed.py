"""Attention over half-space reporting indexes, for heads of few dimensions: report, then attend.

The paper's two pipelines as they stand: an index built beforehand answers every query (Algorithm 1),
or is built inside the call (Algorithm 3). Nothing is read but what is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hsr_attention import arguments
from hsr_attention.attention.certificate import Certificate
from hsr_attention.indexes.base import HalfspaceIndex
from hsr_attention.indexes.choose import halfspace_index
from hsr_attention.kv_cache import keys_seen
from hsr_attention.policies import Policy, ReLUPolicy, SoftmaxPolicy
from hsr_attention.report import Report

Floats = NDArray[np.float64]
UNIT = 2.0**-53
FIRST_TOP, TOP_GROWTH = 64, 4  # keys asked for at first under ``epsilon``; how the number grows


@dataclass
class Row:
    """What a query attends to: keys by id, their logits, and what is known of the others."""

    ids: NDArray[np.int64]
    logits: Floats
    seen: int  # keys the query may see
    below: float  # no key that was left out has a larger logit


@dataclass
class Head:
    """One key head and the queries that share it; arrays of keys and values by id, uncopied."""

    index: HalfspaceIndex
    queries: NDArray[np.float32]  # [rows, head_dim]
    keys: arguments.FloatArray  # [n, head_dim]
    values: arguments.FloatArray  # [n, value_dim]
    scale: float
    last: NDArray[np.int64]  # [rows]: keys from here on are hidden
    mask: NDArray[np.bool_] | None  # [rows, n], true where a key may be seen

    def __post_init__(self) -> None:
        self.work = {"full_scored": 0, "nodes_visited": 0}

    def rows(self, report: Report, which: NDArray[np.int64]) -> Iterator[Row]:
        """Score the reported pairs in float64 and drop the keys that a query may not see.

        ``below`` is the smallest logit of the report; a row of ``top_r`` leaves out none above it.
        """
        self.work["full_scored"] += report.work.full_scored
        self.work["nodes_visited"] += report.work.nodes_visited
        for row, (ids, found) in zip(which, report, strict=True):
            if ids.size and ids.max() >= self.keys.shape[0]:
                raise ValueError(
                    f"index must hold the keys of k by position, got id {ids.max()} for "
                    f"{self.keys.shape[0]} keys"
                )
            keys = gather("k", self.keys, ids)
            scores, different = _compare(keys, self.queries[row], found)
            if different.any() and np.isfinite(found[different]).any():
                raise ValueError(
                    f"index must hold the keys of k, got another score for key {ids[different][0]}"
                )
            logits = self.scale * scores
            below = float(logits.min(initial=np.inf))
            visible = self.visible(row, ids)
            yield Row(ids[visible], logits[visible], self.count(row), below)

    def visible(self, row: int, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Say which keys a query may see."""
        seen = ids < self.last[row]
        return seen if self.mask is None else seen & self.mask[row, ids]

    def count(self, row: int) -> int:
        """Return how many keys a query may see."""
        if self.mask is None:
            return int(self.last[row])
        return int(np.count_nonzero(self.mask[row, : self.last[row]]))


def attend_over(
    index: Any,
    policy: Policy,
    q: Any,
    k: Any,
    v: Any,
    scale: float | None,
    is_causal: bool,
    mask: Any,
    certify: bool,
) -> tuple[Any, Certificate | None]:
    """Attend to what indexes over the keys report; see ``softmax_attention``."""
    queries, keys, values = (
        arguments.heads(name, x) for name, x in (("q", q), ("k", k), ("v", v))
    )
    batch, heads, m, dim = queries.shape
    kv_heads, n = keys.shape[1:3]
    _agree(queries, keys, values)
    group, scale = heads // kv_heads, arguments.scale(scale, dim)
    visible = np.minimum(np.arange(1, m + 1), n) if is_causal else np.full(m, n)
    seen = None if mask is None else arguments.key_mask(mask, batch, m, n)
    limits = _limits(policy, queries, keys, scale, keys_seen(n, m, visible, seen))
    seen = None if mask is None else _spread_mask(mask, batch, m, n)
    last = np.minimum(np.arange(1, m + 1), n) if is_causal else np.full(m, n)
    out = np.zeros((batch, heads, m, values.shape[3]), np.float32)
    bounds = {
        name: np.zeros((batch, heads, m), np.float32)
        for name in ("error_bound", "estimated_error", "omitted_mass", "density", "lse")
    }
    work: dict[str, int] = {}
    for b, row in enumerate(_indexes(index, keys)):
        for g, one in enumerate(row):
            own = slice(g * group, (g + 1) * group)
            head = Head(
                one,
                _float32(queries, (b, own)).reshape(group * m, dim),
                arguments.FloatArray(keys.bits[b, g], keys.dtype),
                arguments.FloatArray(values.bits[b, g], values.dtype),
                scale,
                np.tile(last, group),
                None if seen is None else np.tile(seen[b], (group, 1)),
            )
            arguments.finite("q", arguments.FloatArray(head.queries, arguments.Dtype.float32))
            if certify and not isinstance(index, str):
                _same_keys(head)
            limit = None if limits is None else limits[b, own].reshape(-1)
            rows = _kept(head, policy, limit)
            weights = _Weights(head, policy, limit, certify)
            found = [weights.average(i, row) for i, row in enumerate(rows)]
            out[b, own] = np.reshape([each[0] for each in found], out[b, own].shape)
            for at, name in enumerate(bounds):
                bounds[name][b, own] = np.reshape([each[1][at] for each in found], (group, m))
            for name, count in head.work.items():
                work[name] = work.get(name, 0) + count
    answer = arguments.like(q, out)
    if not certify:
        return answer, None
    bounds["error_bound"] += arguments.output_rounding(q, out)
    np.minimum(bounds["estimated_error"], bounds["error_bound"], out=bounds["estimated_error"])
    return answer, Certificate(**bounds, work=work)


def _compare(
    keys: Floats, query: NDArray[np.float32], found: NDArray[Any]
) -> tuple[Floats, NDArray[np.bool_]]:
    """Return the scores of keys in float64, and where an index found others."""
    wide = query.astype(np.float64)
    scores, reach = keys @ wide, np.abs(keys) @ np.abs(wide)
    return scores, np.abs(scores - found) > 2.0**-20 * reach + 1e-37


def _same_keys(head: Head) -> None:
    """Refuse an index over other keys: a bound of the error needs what was *not* reported as well.

    The scores of all keys along one arbitrary direction tell any two keys apart that differ by more
    than rounding, but for an unlucky few. As costly as the ranges that a certificate reads anyway.
    """
    n, dim = head.keys.shape
    direction = np.random.default_rng(0).standard_normal(dim).astype(np.float32)
    report = head.index.report(direction[None], np.array([-np.inf]))
    if not np.array_equal(report.indices, np.arange(n)):
        raise ValueError(f"index must hold the {n} keys of k by position, got other ids")
    keys = head.keys.to_float32().astype(np.float64)
    _, different = _compare(keys, direction, report.scores)
    if different.any():
        raise ValueError(
            f"index must hold the keys of k, got another score for key {np.argmax(different)}"
        )


def _kept(head: Head, policy: Policy, limits: Floats | None) -> list[Row]:
    """Return the keys that the rule keeps, one ``Row`` a query."""
    everything = np.arange(len(head.queries))
    if limits is None:
        assert isinstance(policy, SoftmaxPolicy)
        if policy.top_r is not None:
            rows = _largest(head, policy.top_r, _holds(policy.top_r))
            return [_best(row, policy.top_r) for row in rows]
        assert policy.epsilon is not None
        return _largest(head, FIRST_TOP, _omits(policy.epsilon))
    # A hair lower: the quotient is rounded, and the logit decides below.
    scores = limits / head.scale
    with np.errstate(invalid="ignore"):
        lower = np.where(np.isfinite(scores), scores - 4 * UNIT * np.abs(scores), scores)
    report = head.index.report(head.queries, lower)
    strictly = isinstance(policy, ReLUPolicy)
    kept = []
    for row, limit in zip(head.rows(report, everything), limits, strict=True):
        enough = row.logits > limit if strictly else row.logits >= limit
        kept.append(Row(row.ids[enough], row.logits[enough], row.seen, float(limit)))
    return kept


def _largest(head: Head, first: int, enough: Callable[[Row], bool]) -> list[Row]:
    """Ask for the largest scores, TOP_GROWTH times as many again while a row has not enough.

    All keys left out score no more than the least reported one, whether it may be seen or not.
    """
    rows: list[Row] = [Row(np.empty(0, np.int64), np.empty(0), 0, -np.inf)] * len(head.queries)
    pending, size, n = np.arange(len(rows)), first, len(head.index)
    while pending.size and n:
        report = head.index.top_r(head.queries[pending], min(size, n))
        short = []
        for i, row in zip(pending, head.rows(report, pending), strict=True):
            if size >= n:
                row.below = -np.inf
            rows[i] = row
            if size < n and not enough(row):
                short.append(i)
        pending, size = np.array(short, np.int64), size * TOP_GROWTH
    return rows


def _holds(r: int) -> Callable[[Row], bool]:
    return lambda row: len(row.ids) >= min(r, row.seen)


def _omits(epsilon: float) -> Callable[[Row], bool]:
    return lambda row: omitted_share(row) <= epsilon


def omitted_share(row: Row, slack: float = 0.0) -> float:
    """Bound the share of the softmax mass left out: T / (Z + T), T = (n - |R|) e^b.

    R are the kept keys, Z their mass, b the largest logit a key outside R may have, and n the
    number of keys the query may see. ``slack`` bounds the rounding of a logit.
    """
    left = row.seen - len(row.ids)
    if left == 0:
        return 0.0
    if not len(row.ids) or row.below == np.inf:
        return 1.0
    top = max(float(row.logits.max()), row.below)
    kept = np.exp(row.logits - top - slack).sum()
    tail = left * np.exp(row.below - top + slack)
    return float(tail / (kept + tail)) * (1 + 1e-12)


def _best(row: Row, r: int) -> Row:
    """Return the r largest logits of a row; ties go to the smaller id."""
    if len(row.ids) <= r:
        return row
    chosen = np.sort(np.lexsort((row.ids, -row.logits))[:r])
    below = float(row.logits[chosen].min())
    return Row(row.ids[chosen], row.logits[chosen], row.seen, below)


class _Weights:
    """Averages of values over rows, with what bounds their error."""

    def __init__(self, head: Head, policy: Policy, limits: Floats | None, certify: bool):
        self.head, self.policy, self.limits, self.certify = head, policy, limits, certify
        if certify:
            values, keys = head.values.to_float32(), head.keys.to_float32()
            self.least = values.min(axis=0, initial=np.inf).astype(np.float64)
            self.most = values.max(axis=0, initial=-np.inf).astype(np.float64)
            self.longest = float(
                np.sqrt((keys.astype(np.float64) ** 2).sum(axis=1)).max(initial=0)
            )

    def average(self, i: int, row: Row) -> tuple[NDArray[np.float32], tuple[float, ...]]:
        """Return sum_j w_j v_j / sum_j w_j, and the certificate's numbers.

        With estimated weights w' of the kept keys, and E >= sum |w - w'| over all keys that may be
        seen, Z (out - exact) = sum (w' - w)(v - out), so |out - exact|_j <= E D_j / (Z' - E), where
        D_j bounds |v_ij - out_j|; and <= D_j always, exact being an average of values.
        """
        head, values = self.head, gather("v", self.head.values, row.ids)
        relu = self.policy if isinstance(self.policy, ReLUPolicy) else None
        if not len(row.ids):
            out = np.zeros(head.values.shape[1])
            lost = row.seen > 0 and relu is None
            bound = self._spread(out) * (1 + 2.0**-20) if lost and self.certify else 0.0
            return out.astype(np.float32), (bound, bound, float(lost), 0.0, -np.inf)
        if relu is not None:
            assert self.limits is not None
            excess = row.logits - self.limits[i]
            largest = float(excess.max())
            weights = (excess / largest) ** relu.power
        else:
            excess, largest = row.logits, float(row.logits.max())
            weights = np.exp(row.logits - largest)
        total = float(weights.sum())
        out = (weights @ values) / total
        if not self.certify:
            return out.astype(np.float32), (np.nan,) * 5
        # A logit is a sum of d products, scaled: d + 2 roundings of at most scale |q| |k|; the
        # threshold is subtracted from it with one more.
        norm = float(np.linalg.norm(head.queries[i].astype(np.float64)))
        slack = (head.keys.shape[1] + 4) * UNIT * head.scale * norm * self.longest
        if relu is not None:
            assert self.limits is not None
            slack = (slack + 2 * UNIT * (abs(self.limits[i]) + largest)) / largest
            wrong = ((excess / largest + slack) ** relu.power - weights).sum()
            wrong += (row.seen - len(row.ids)) * slack**relu.power
            omitted, lse = 0.0, relu.power * np.log(largest) + np.log(total)
        else:
            omitted = omitted_share(row, slack)
            wrong = total * (np.expm1(2 * slack) + 4 * UNIT)
            wrong += total * omitted / (1 - omitted) if omitted < 1 else np.inf
            lse = largest + np.log(total)
        wrong += total * (len(row.ids) + 8) * UNIT
        spread = self._spread(out)
        share = wrong / (total - wrong) if wrong < total else np.inf
        rounding = 2.0**-23 * float(np.abs(out).max(initial=0)) + 1e-44
        bound = min(share, 1.0) * spread * (1 + 2.0**-20) + rounding
        # Half of the bound of what is omitted: it lies between nothing and all of it.
        return out.astype(np.float32), (
            bound, 0.5 * omitted * spread + rounding, omitted, len(row.ids) / row.seen, lse,
        )  # fmt: skip

    def _spread(self, out: Floats) -> float:
        return float(np.maximum(self.most - out, out - self.least).max(initial=0))


def gather(name: str, rows: arguments.FloatArray, ids: NDArray[np.int64]) -> Floats:
    """Return the rows of these ids in float64, refusing what is not finite."""
    found = arguments.FloatArray(rows.bits[ids], rows.dtype).to_float32().astype(np.float64)
    if not np.isfinite(found).all():
        raise ValueError(f"{name} must be finite, got {found[~np.isfinite(found)][0]}")
    return found


def _float32(array: arguments.FloatArray, where: Any) -> NDArray[np.float32]:
    part = np.ascontiguousarray(array.bits[where])
    return arguments.FloatArray(part, array.dtype).to_float32()


def _agree(
    queries: arguments.FloatArray, keys: arguments.FloatArray, values: arguments.FloatArray
) -> None:
    if values.shape[:3] != keys.shape[:3]:
        raise ValueError(
            f"v must have [batch, kv_heads, tokens] = {keys.shape[:3]} like k, "
            f"got {values.shape[:3]}"
        )
    if queries.shape[0] != keys.shape[0]:
        raise ValueError(
            f"q must have batch {keys.shape[0]} like the keys, got {queries.shape[0]}"
        )
    if queries.shape[3] != keys.shape[3]:
        raise ValueError(
            f"q must have head_dim {keys.shape[3]} like the keys, got {queries.shape[3]}"
        )
    kv_heads = keys.shape[1]
    if not kv_heads or queries.shape[1] == 0 or queries.shape[1] % kv_heads:
        raise ValueError(
            f"q must have a multiple of kv_heads = {kv_heads} heads, got {queries.shape[1]}"
        )


def _limits(
    policy: Policy,
    queries: arguments.FloatArray,
    keys: arguments.FloatArray,
    scale: float,
    seen: NDArray[np.int64],
) -> Floats | None:
    rule, shape = policy.threshold, queries.shape[:3]
    if rule is None:
        return None
    if callable(rule):
        squares = np.square(keys.to_float32().astype(np.float64)).mean(axis=(2, 3))
        rms = np.repeat(np.sqrt(squares), shape[1] // keys.shape[1], axis=1)
        rule = rule(queries.to_float32(), rms, seen, scale)
    return arguments.attention_thresholds(rule, shape).reshape(shape)


def _spread_mask(mask: Any, batch: int, m: int, n: int) -> NDArray[np.bool_]:
    return np.broadcast_to(arguments.key_mask(mask, batch, m, n).view(np.bool_), (batch, m, n))


def _indexes(index: Any, keys: arguments.FloatArray) -> Sequence[Sequence[HalfspaceIndex]]:
    """Return one index for each batch row and key head, checked against the keys."""
    batch, kv_heads, n, dim = keys.shape
    if isinstance(index, str):
        parts = [[_float32(keys, (b, g)) for g in range(kv_heads)] for b in range(batch)]
        return [[halfspace_index(part, index) for part in row] for row in parts]
    given = [[index]] if isinstance(index, HalfspaceIndex) else index
    try:
        table = [list(row) for row in given]
    except TypeError:
        raise TypeError(
            "index must be a kind, a half-space index, or [batch][kv_heads] of them, "
            f"got {type(index).__name__}"
        ) from None
    found = (len(table), *sorted({len(row) for row in table}))
    if found != (batch, kv_heads):
        raise ValueError(
            "index must have one index for each batch row and key head, "
            f"[{batch}][{kv_heads}], got {list(found)}"
        )
    for one in (one for row in table for one in row):
        if not isinstance(one, HalfspaceIndex):
            raise TypeError(f"index must hold half-space indexes, got {type(one).__name__}")
        if one.head_dim != dim:
            raise ValueError(f"index must have head_dim {dim} like the keys, got {one.head_dim}")
        if len(one) != n:
            raise ValueError(f"index must hold the {n} keys of k, got {len(one)}")
    return table
