"""Exactness of ``FlatIndex`` and ``SketchIndex`` against a float64 oracle.

A case is one set of keys with up to four queries and thresholds, and is asked of both indexes at one
instruction-set level: ``report``, ``count`` and ``top_r``. With L levels on the machine,

- quick: 250 random cases a level, 402 cases of every (head_dim, dtype) a level, 100 sequences of
  appends and deletions a level;
- slow: 20,000 random cases (shared by the levels) and 2,010 of every (head_dim, dtype) with five kinds of
  keys a level, and 1,000 sequences a level.

With one level that makes more than 20,000 cases, with three more than 26,000.
"""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hsr_attention as hsr
from halfspace import (
    DIMS,
    DTYPES,
    KINDS,
    SIZES,
    Case,
    check_report,
    check_top_r,
    make,
    typed,
    vectors,
)
from hsr_attention import _native
from hsr_attention.attention import reference

INDEXES = (hsr.FlatIndex, hsr.SketchIndex)
LEVELS = len(_native.isa_available())

explicit = {
    "deadline": None,
    "database": None,
    "derandomize": True,
    # The `isa` fixture holds for all examples of a test.
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}

cases = st.builds(
    make,
    seed=st.integers(0, 2**32 - 1),
    n=st.one_of(st.sampled_from(SIZES), st.integers(0, 300)),
    d=st.one_of(st.sampled_from(DIMS[:32]), st.sampled_from(DIMS), st.sampled_from((64, 80, 128))),
    m=st.integers(1, 4),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    query_kind=st.sampled_from(KINDS),
    query_dtype=st.sampled_from((None, None, *DTYPES)),
)


def check_case(case, r):
    for index_type in INDEXES:
        index = index_type(case.keys)
        report = index.report(case.queries, case.thresholds)
        check_report(report, case)
        np.testing.assert_array_equal(
            index.count(case.queries, case.thresholds), report.counts, strict=True
        )
        check_top_r(index.top_r(case.queries, r), case, r)


@settings(max_examples=250, **explicit)
@given(case=cases, r=st.integers(1, 40))
def test_random_cases(isa, case, r):
    check_case(case, r)


@pytest.mark.slow
@settings(max_examples=-(-20_000 // LEVELS), **explicit)
@given(case=cases, r=st.integers(1, 300))
def test_twenty_thousand_random_cases(isa, case, r):
    check_case(case, r)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_head_dim(isa, dtype):
    for d in DIMS:
        check_case(make(d, 70, d, dtype=dtype), 5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "kind", ["integers", "norm 1e18", "mixed scales", "far cluster", "one loud coordinate"]
)
def test_every_head_dim_with_difficult_keys(isa, dtype, kind):
    for d in DIMS:
        check_case(make(d, 141, d, m=4, dtype=dtype, kind=kind, query_kind=kind), 9)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("index_type", INDEXES)
def test_block_edges(isa, index_type, n):
    """Ties at the threshold, scores exact: the report equals the definition, ids and all."""
    for d in (1, 16, 63):
        case = make(n, n, d, m=4, kind="integers", query_kind="integers")
        case.thresholds[:] = (-1, 0, 1, 2)
        expected = reference.half_space(case.queries, case.keys, case.thresholds)
        index = index_type(case.keys)
        for i, (found, scores) in enumerate(index.report(case.queries, case.thresholds)):
            np.testing.assert_array_equal(found, np.flatnonzero(expected[i]))
            np.testing.assert_array_equal(scores, case.scores[i][expected[i]])
        for r in (1, 7, 16, 300):
            kept = reference.top_r(case.scores, r)
            for i, (found, _) in enumerate(index.top_r(case.queries, r)):
                np.testing.assert_array_equal(found, np.flatnonzero(kept[i]))


@pytest.mark.parametrize("index_type", INDEXES)
def test_many_keys_and_queries(isa, index_type):
    """More keys than one task scans, and more queries than a tile holds."""
    for n, m in ((40_000, 1), (20_000, 5), (1_000, 97)):
        case = make(n, n, 24, m=m)
        case.thresholds[:] = np.quantile(case.scores, 0.99, axis=1)
        index = index_type(case.keys)
        check_report(index.report(case.queries, case.thresholds), case)
        check_top_r(index.top_r(case.queries, 64), case, 64)


# ---- appending and deleting


@st.composite
def histories(draw):
    """A sequence of appends and deletions with the kind of keys it runs on."""
    steps = st.one_of(
        st.tuples(st.just("append"), st.sampled_from((0, 1, 3, 15, 16, 17, 40, 100))),
        st.tuples(st.just("delete"), st.sampled_from((0.0, 0.1, 0.4, 0.7, 1.0))),
    )
    return {
        "seed": draw(st.integers(0, 2**32 - 1)),
        "d": draw(st.sampled_from((1, 2, 7, 16, 33, 64))),
        "dtype": draw(st.sampled_from(DTYPES)),
        "kind": draw(st.sampled_from(KINDS)),
        "steps": draw(st.lists(steps, max_size=8)),
    }


def check_history(index_type, seed, d, dtype, kind, steps):
    rng = np.random.default_rng(seed)
    rows = typed(vectors(rng, kind, int(rng.integers(0, 100)), d), dtype)
    index = index_type(rows)
    ids, next_id = np.arange(len(rows)), len(rows)
    for step, amount in steps:
        if step == "append":
            more = typed(vectors(rng, kind, amount, d), dtype)
            new = index.append(more)
            np.testing.assert_array_equal(new, np.arange(next_id, next_id + amount), strict=True)
            rows, ids = np.concatenate([rows, more]), np.concatenate([ids, new])
            next_id += amount
        else:
            gone = rng.random(len(ids)) < amount
            index.delete(rng.permutation(ids[gone]))
            if gone.any():
                before = len(index)
                with pytest.raises(KeyError, match=str(ids[gone][0])):
                    index.delete([ids[gone][0]])
                assert len(index) == before
            rows, ids = rows[~gone], ids[~gone]
        assert len(index) == len(ids)
        queries = typed(vectors(rng, kind, 2, d), dtype)
        case = Case(rows, queries, np.zeros(2))
        if len(rows):
            case.thresholds[:] = [np.median(case.scores[0]), rng.choice(case.scores[1])]
        check_report(index.report(queries, case.thresholds), case, ids)
        check_top_r(index.top_r(queries, 5), case, 5, ids)


@pytest.mark.parametrize("index_type", INDEXES)
@settings(max_examples=50, **explicit)
@given(history=histories())
def test_append_and_delete(isa, index_type, history):
    check_history(index_type, **history)


@pytest.mark.slow
@pytest.mark.parametrize("index_type", INDEXES)
@settings(max_examples=500, **explicit)
@given(history=histories())
def test_append_and_delete_long(isa, index_type, history):
    check_history(index_type, **history)


@pytest.mark.parametrize("index_type", INDEXES)
@pytest.mark.parametrize("pieces", [(1,) * 40, (16,) * 5, (15, 1, 17, 31, 0, 64), (500, 1, 1)])
def test_pieces_equal_the_whole(isa, index_type, pieces):
    case = make(1, sum(pieces), 20, kind="duplicates")
    case.thresholds[:] = np.median(case.scores, axis=1)
    whole, parts = index_type(case.keys), index_type(case.keys[:0])
    ends = np.cumsum(pieces)
    for first, last in zip((0, *ends[:-1]), ends, strict=True):
        parts.append(case.keys[first:last])
    a = whole.report(case.queries, case.thresholds)
    b = parts.report(case.queries, case.thresholds)
    np.testing.assert_array_equal(a.indptr, b.indptr)
    np.testing.assert_array_equal(a.indices, b.indices)
    np.testing.assert_array_equal(a.scores, b.scores)


@pytest.mark.parametrize("index_type", INDEXES)
def test_deleting_most_keys_compacts_and_keeps_ids(isa, index_type):
    case = make(3, 1000, 32)
    index = index_type(case.keys)
    full = index.nbytes
    index.delete(np.arange(0, 900))
    assert len(index) == 100
    assert index.nbytes < full / 4
    assert index.append(case.keys[:2]).tolist() == [1000, 1001]
    living = Case(np.concatenate([case.keys[900:], case.keys[:2]]), case.queries, case.thresholds)
    ids = np.arange(900, 1002)
    check_report(index.report(case.queries, case.thresholds), living, ids)
    index.delete(ids)
    assert len(index) == 0
    assert index.report(case.queries, -np.inf).indices.size == 0
    assert index.append(case.keys[:1]).tolist() == [1002]


@pytest.mark.parametrize("index_type", INDEXES)
@pytest.mark.parametrize("ids", [[5], [-1], [0, 99], [2**40], [3]])
def test_deleting_an_unknown_id_removes_nothing(index_type, ids):
    index = index_type(np.eye(5, dtype=np.float32))
    index.delete(3)
    with pytest.raises(KeyError, match="ids must name live keys, got unknown or deleted id"):
        index.delete(ids)
    assert len(index) == 4


# ---- properties


@pytest.mark.parametrize("index_type", INDEXES)
@settings(max_examples=60, **explicit)
@given(case=cases)
def test_a_higher_threshold_reports_a_subset(isa, index_type, case):
    index = index_type(case.keys)
    low = index.report(case.queries, case.thresholds)
    with np.errstate(invalid="ignore"):
        raised = case.thresholds + np.abs(case.thresholds) * 0.1 + 0.1
    high = index.report(case.queries, np.where(np.isnan(raised), np.inf, raised))
    for (more, _), (fewer, _) in zip(low, high, strict=True):
        assert np.isin(fewer, more).all()


@pytest.mark.parametrize("index_type", INDEXES)
@settings(max_examples=60, **explicit)
@given(case=cases, seed=st.integers(0, 1000))
def test_permuting_keys_permutes_the_report(isa, index_type, case, seed):
    order = np.random.default_rng(seed).permutation(len(case.keys))
    permuted = Case(case.keys[order], case.queries, case.thresholds)
    report = index_type(permuted.keys).report(case.queries, case.thresholds)
    check_report(report, permuted)
    direct = index_type(case.keys).report(case.queries, case.thresholds)
    for (a, _), (b, _) in zip(direct, report, strict=True):
        np.testing.assert_array_equal(a, np.sort(order[b]))


@pytest.mark.parametrize("index_type", INDEXES)
@pytest.mark.parametrize("factor", [2.0**-20, 0.5, 4.0, 2.0**30])
def test_scaling_query_and_threshold_changes_nothing(isa, index_type, factor):
    """A power of two scales every float32 exactly."""
    for kind in ("normal", "integers", "far cluster"):
        case = make(5, 200, 40, m=4, kind=kind)
        case.thresholds[:] = [np.quantile(s, 0.7) for s in case.scores]
        index = index_type(case.keys)
        scaled = (case.queries * np.float32(factor)).astype(np.float32)
        a = index.report(case.queries, case.thresholds)
        b = index.report(scaled, case.thresholds * factor)
        np.testing.assert_array_equal(a.indptr, b.indptr)
        np.testing.assert_array_equal(a.indices, b.indices)


@pytest.mark.parametrize("index_type", INDEXES)
@pytest.mark.parametrize("kind", KINDS)
def test_infinite_thresholds(isa, index_type, kind):
    case = make(7, 100, 24, kind=kind, query_kind=kind)
    index = index_type(case.keys)
    assert index.count(case.queries, -np.inf).tolist() == [100] * 3
    assert index.count(case.queries, np.inf).tolist() == [0] * 3
    assert index.report(case.queries, -np.inf).counts.tolist() == [100] * 3
    assert index.report(case.queries, np.inf).counts.tolist() == [0] * 3


@pytest.mark.parametrize("index_type", INDEXES)
def test_all_levels_report_the_same(index_type):
    before = _native.isa_in_use()
    case = make(11, 500, 48, m=4)
    case.thresholds[:] = np.quantile(case.scores, 0.9, axis=1)
    index, reports = index_type(case.keys), []
    for level in _native.isa_available():
        _native.use_isa(level)
        reports.append(index.report(case.queries, case.thresholds).indices)
    _native.use_isa(before)
    for other in reports[1:]:
        np.testing.assert_array_equal(reports[0], other)


# ---- input of every kind


@pytest.mark.parametrize("index_type", INDEXES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_layout_of_the_arrays(isa, index_type, dtype):
    case = make(13, 64, 24, dtype=dtype)
    case.thresholds[:] = np.median(case.scores, axis=1)
    expected = index_type(case.keys).report(case.queries, case.thresholds)
    wide = np.zeros((64, 48), case.keys.dtype)
    wide[:, ::2] = case.keys
    frozen = case.keys.copy()
    frozen.flags.writeable = False
    for keys in (
        np.asfortranarray(case.keys),
        wide[:, ::2],
        case.keys[::-1, ::-1].copy()[::-1, ::-1],
        np.concatenate([case.keys, case.keys])[:64],
        frozen,
    ):
        report = index_type(keys).report(np.asfortranarray(case.queries), case.thresholds)
        np.testing.assert_array_equal(report.indices, expected.indices)
        np.testing.assert_array_equal(report.scores, expected.scores)


@pytest.mark.parametrize("index_type", INDEXES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_tensors(index_type, dtype):
    torch = pytest.importorskip("torch")
    case = make(17, 50, 16, dtype=dtype)
    keys = torch.from_numpy(case.keys.astype(np.float32)).to(getattr(torch, dtype))
    queries = torch.from_numpy(case.queries.astype(np.float32)).to(getattr(torch, dtype))
    index = index_type(keys.requires_grad_())
    assert index.dtype.name == dtype
    check_report(index.report(queries, case.thresholds), case)
    ids = index.append(keys[:3])
    assert ids.tolist() == [50, 51, 52]


@pytest.mark.parametrize("index_type", INDEXES)
def test_the_index_keeps_its_own_copy(index_type):
    case = make(19, 40, 8)
    keys = case.keys.copy()
    index = index_type(keys)
    keys[:] = 0
    check_report(index.report(case.queries, case.thresholds), case)


@pytest.mark.parametrize("index_type", INDEXES)
def test_a_float32_index_takes_other_dtypes(index_type):
    case = make(23, 20, 8, dtype="float16")
    index = index_type(case.keys[:5].astype(np.float32))
    index.append(case.keys[5:])
    check_report(index.report(case.queries, case.thresholds), case)


@pytest.mark.parametrize("index_type", INDEXES)
def test_work_counters(isa, index_type):
    """Counters are part of the answer: every key is scored somewhere, few of them at full precision."""
    case = make(29, 4096, 64, m=1)
    case.thresholds[:] = np.quantile(case.scores, 0.99)
    work = index_type(case.keys).report(case.queries, case.thresholds).work
    assert work.reported == 41
    if index_type is hsr.FlatIndex:
        assert work.full_scored == 4096 and work.sketch_scored == 0
    else:
        assert work.sketch_scored == 4096
        assert work.reported <= work.full_scored < 100
        assert work.full_scored <= work.refined < 2000
    assert work.keys_scored == work.sketch_scored + work.refined + work.full_scored


@pytest.mark.parametrize("index_type", INDEXES)
def test_description(index_type):
    index = index_type(np.zeros((3, 5), np.float16))
    assert repr(index) == f"{index_type.__name__}(n=3, head_dim=5, dtype=float16)"
    assert isinstance(index, hsr.HalfspaceIndex)
    assert index.head_dim == 5 and len(index) == 3 and index.nbytes > 0
