"""One matrix over every low-dimensional index: the same answers as a scan, bit for bit."""

import itertools
import sys

import numpy as np
import pytest
from halfspace_cases import (
    GEOMETRIES,
    assert_exact,
    assert_reports,
    make_keys,
    random_history,
    scores,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from hsr_attention import _native
from hsr_attention.indexes.base import HalfspaceIndex
from hsr_attention.indexes.convex_layers import ConvexLayersIndex
from hsr_attention.indexes.partition_tree import PartitionTreeIndex
from hsr_attention.indexes.shallow_cutting import ShallowCuttingIndex

KINDS = {
    "convex_layers": (ConvexLayersIndex, [2]),
    "partition_tree": (PartitionTreeIndex, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
    "shallow_cutting": (ShallowCuttingIndex, [2, 3, 4]),
}
ROWS = [(kind, d) for kind, (_, dims) in KINDS.items() for d in dims]
SIZES = [0, 1, 2, 3, 5, 31, 32, 33, 64, 100, 129, 300, 1000, 3000]


@pytest.fixture(params=list(KINDS))
def kind(request):
    return request.param


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(("kind", "d"), ROWS)
def test_exact_on_every_geometry(kind, d, geometry):
    for n in (1, 40, 5000):
        rng = np.random.default_rng([n, d])
        keys = make_keys(rng, n, d, geometry)
        index = KINDS[kind][0](keys)
        for _ in range(4):
            assert_exact(index, keys, np.ones(n, bool), rng)


@pytest.mark.parametrize("geometry", ["gaussian", "clusters", "sphere", "collinear", "grid"])
@pytest.mark.parametrize(("kind", "d"), [(k, d) for k, d in ROWS if d in (2, 3, 6)])
def test_exact_when_deep(kind, d, geometry):
    rng = np.random.default_rng(d)
    keys = make_keys(rng, 40_000, d, geometry)
    index = KINDS[kind][0](keys)
    for _ in range(8):
        assert_exact(index, keys, np.ones(len(keys), bool), rng)


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
@pytest.mark.parametrize("leaf_size", [1, 16, 32, 48, 96, 100, 128])
@pytest.mark.parametrize("d", [4, 7, 8])
def test_leaves_read_as_codes(d, leaf_size, isa):
    """Leaves of whole runs of 32 keys are read as codes, others in full: the same answers."""
    before = _native.isa_in_use()
    try:
        _native.use_isa(isa)
    except ValueError:
        pytest.skip(f"this machine has no {isa}")
    try:
        rng = np.random.default_rng([d, leaf_size])
        n = 8003  # the last run is not full
        keys = make_keys(rng, n, d, "clusters")
        queries = rng.normal(size=(20, d)).astype(np.float32)
        table = scores(queries, keys)
        limits = np.partition(table, n - 30, axis=1)[:, n - 30]
        limits[::2] = np.nextafter(limits[::2], np.inf)
        report = PartitionTreeIndex(keys, leaf_size=leaf_size).report(queries, limits)
        for i in range(len(queries)):
            np.testing.assert_array_equal(report.row(i)[0], np.flatnonzero(table[i] >= limits[i]))
        if leaf_size >= 16:  # not by scans, which single keys as leaves come to
            assert report.work.full_scored < len(queries) * n / 2
    finally:
        _native.use_isa(before)


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_every_instruction_set_reports_the_same(kind, isa):
    before = _native.isa_in_use()
    try:
        _native.use_isa(isa)
    except ValueError:
        pytest.skip(f"this machine has no {isa}")
    try:
        for seed in range(30):
            random_history(KINDS[kind][0], KINDS[kind][1], np.random.default_rng(seed), SIZES)
    finally:
        _native.use_isa(before)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32), name=st.sampled_from(list(KINDS)))
def test_histories_of_appends_and_deletions(seed, name):
    random_history(KINDS[name][0], KINDS[name][1], np.random.default_rng(seed), SIZES)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(10))
def test_ten_thousand_cases(kind, block):
    sizes = [*SIZES, 3000, 6000, 20_000]
    for seed in range(1000 * block, 1000 * (block + 1)):
        random_history(KINDS[kind][0], KINDS[kind][1], np.random.default_rng(seed), sizes)


coordinate = st.floats(-4, 4, width=32)


@settings(deadline=None, max_examples=100)
@given(
    points=st.lists(st.tuples(coordinate, coordinate), max_size=200),
    query=st.tuples(coordinate, coordinate),
    threshold=coordinate,
)
def test_the_plane_with_shrinking(points, query, threshold):
    keys = np.array(points, np.float32).reshape(-1, 2)
    queries = np.array([query], np.float32)
    wanted = np.flatnonzero(scores(queries, keys)[0] >= threshold)
    for make, _ in KINDS.values():
        np.testing.assert_array_equal(make(keys).report(queries, threshold).indices, wanted)


@pytest.mark.parametrize(("kind", "d"), [(k, d) for k, d in ROWS if d > 1])
@pytest.mark.parametrize("geometry", ["gaussian", "sphere", "duplicates", "two scales"])
def test_agrees_with_a_ball_tree_through_lifting(kind, d, geometry):
    """With x' = (x, sqrt(M^2 - |x|^2)): <q, x> >= b where |q' - x'|^2 <= |q|^2 + M^2 - 2 b."""
    neighbors = pytest.importorskip("sklearn.neighbors")
    rng = np.random.default_rng(d)
    keys = make_keys(rng, 3000, d, geometry)
    wide = keys.astype(np.float64)
    squares = (wide**2).sum(axis=1)
    lifted = np.column_stack([wide, np.sqrt(np.maximum(squares.max() - squares, 0))])
    queries = rng.normal(size=(20, d)).astype(np.float32)
    table = scores(queries, keys)
    limits = np.sort(table, axis=1)[np.arange(20), rng.integers(1500, 2990, 20)]
    limits += 1e-9  # between scores: the two sides round differently at a score
    squared = (queries.astype(np.float64) ** 2).sum(axis=1) + squares.max() - 2 * limits
    balls = neighbors.BallTree(lifted).query_radius(
        np.column_stack([queries.astype(np.float64), np.zeros(20)]),
        np.sqrt(np.maximum(squared, 0)),
    )
    report = KINDS[kind][0](keys).report(queries, limits)
    for i, (found, _) in enumerate(report):
        differing = np.setxor1d(found, balls[i])
        assert (abs(table[i][differing] - limits[i]) < 1e-6).all()
        assert len(differing) < 5 or geometry == "duplicates"


def test_every_line_through_two_points_of_a_grid():
    """Thresholds exactly at the scores of collinear keys, in every direction of a small grid."""
    keys = np.array(list(itertools.product(range(12), repeat=2)), np.float32)
    queries = np.array(list(itertools.product(range(-3, 4), repeat=2)), np.float32)
    table = scores(queries, keys)
    for make, _ in KINDS.values():
        index = make(keys)
        for step in (0, 10, 70, 140):
            limits = np.sort(table, axis=1)[:, step]
            assert_reports(index, queries, limits, table)


def test_nearly_convex_layers():
    """Points a rounding away from a line or a circle: the orientation test must be exact."""
    t = np.linspace(0, 1, 20_000)
    turn = 2 * np.pi * t
    shapes = [
        np.column_stack([t, t * 0.1 + 0.7]),
        np.column_stack([1 + 1e-7 * t, 1 + 1e-7 * t**2]),
        np.column_stack([np.cos(turn), np.sin(turn)]),
        1000 + np.column_stack([np.cos(turn), np.sin(turn)]),
        np.concatenate(
            [[[0, 1e6], [-1e6, -1e6], [1e6, -1e6]], np.column_stack([np.cos(turn), np.sin(turn)])]
        ),
    ]
    for seed, shape in enumerate(shapes):
        keys = shape.astype(np.float32)
        rng = np.random.default_rng(seed)
        index = ConvexLayersIndex(keys)
        for _ in range(20):
            assert_exact(index, keys, np.ones(len(keys), bool), rng)


def test_protocol_and_repr(kind):
    index = KINDS[kind][0](np.ones((3, 2), np.float32))
    assert isinstance(index, HalfspaceIndex)
    assert index.kind == kind and index.kind in repr(index) and "reason" in repr(index)
    assert index.head_dim == 2 and index.nbytes > 0


def test_empty(kind):
    index = KINDS[kind][0](np.empty((0, 2), np.float32))
    queries = np.ones((3, 2), np.float32)
    assert len(index) == 0
    assert index.report(queries, -np.inf).indptr.tolist() == [0, 0, 0, 0]
    assert index.top_r(queries, 5).indptr.tolist() == [0, 0, 0, 0]
    assert index.count(queries, 0).tolist() == [0, 0, 0]
    assert index.report(np.empty((0, 2)), 0.0).indptr.tolist() == [0]
    assert index.append(np.ones((2, 2))).tolist() == [0, 1]


def test_infinite_thresholds_and_subsets(kind):
    keys = np.random.default_rng(0).normal(size=(500, 2)).astype(np.float32)
    index = KINDS[kind][0](keys)
    query = np.array([[0.3, -0.8]], np.float32)
    assert index.report(query, -np.inf).indices.tolist() == list(range(500))
    assert index.report(query, np.inf).indices.size == 0
    before = set(range(500))
    for threshold in np.linspace(-3, 3, 25):
        found = set(index.report(query, threshold).indices.tolist())
        assert found <= before
        before = found


def test_scaling_and_permuting(kind):
    rng = np.random.default_rng(1)
    keys = rng.normal(size=(2000, 2)).astype(np.float32)
    order = rng.permutation(2000)
    query = rng.normal(size=(1, 2)).astype(np.float32)
    make = KINDS[kind][0]
    found = make(keys).report(query, 0.5).indices
    np.testing.assert_array_equal(make(keys).report(4 * query, 2.0).indices, found)
    permuted = make(keys[order]).report(query, 0.5).indices
    np.testing.assert_array_equal(np.sort(order[permuted]), found)


def test_half_precision_keys_and_queries(kind):
    keys = np.random.default_rng(2).normal(size=(300, 2)).astype(np.float16)
    index = KINDS[kind][0](keys)
    wide = KINDS[kind][0](keys.astype(np.float32))
    query = keys[:5]
    np.testing.assert_array_equal(
        index.report(query, 0.1).indices, wide.report(query.astype(np.float32), 0.1).indices
    )


def test_ids_survive_merges_and_rebuilds(kind):
    rng = np.random.default_rng(3)
    index = KINDS[kind][0](np.zeros((1, 2), np.float32))
    keys, alive = np.zeros((1, 2), np.float32), np.ones(1, bool)
    for _ in range(60):
        more = rng.normal(size=(90, 2)).astype(np.float32)
        index.append(more)
        keys, alive = np.concatenate([keys, more]), np.append(alive, np.ones(90, bool))
        gone = rng.choice(np.flatnonzero(alive), 50, replace=False)
        index.delete(gone)
        alive[gone] = False
    assert_exact(index, keys, alive, rng)
    assert len(index._forest.parts) <= 4
    assert index.nbytes < 400 * alive.sum()


def test_one_key_at_a_time(kind):
    rng = np.random.default_rng(4)
    keys = rng.normal(size=(2100, 2)).astype(np.float32)
    index = KINDS[kind][0](keys[:0])
    for i in range(len(keys)):
        assert index.append(keys[i : i + 1]).tolist() == [i]
    assert_exact(index, keys, np.ones(len(keys), bool), rng)


def test_unknown_ids_change_nothing(kind):
    index = KINDS[kind][0](np.ones((50, 2), np.float32))
    index.delete([7])
    for wrong in ([7], [50], [-1], [3, 4, 99]):
        with pytest.raises(KeyError, match=r"ids must be ids of live keys, got"):
            index.delete(wrong)
    assert len(index) == 49
    with pytest.raises(ValueError, match="repeat"):
        index.delete([3, 3])


def test_bad_input(kind):
    make = KINDS[kind][0]
    index = make(np.ones((4, 2), np.float32))
    with pytest.raises(ValueError, match=r"keys must be finite, got nan at \(1, 0\)"):
        make(np.array([[0, 1], [np.nan, 1]], np.float32))
    with pytest.raises(ValueError, match=r"keys must be finite, got inf at \(0, 1\)"):
        index.append(np.array([[0, np.inf]], np.float32))
    with pytest.raises(ValueError, match=r"queries must be finite, got -inf at \(0, 0\)"):
        index.report(np.array([[-np.inf, 0]], np.float32), 0.0)
    with pytest.raises(ValueError, match="queries must have head_dim 2, got 3"):
        index.report(np.ones((1, 3)), 0.0)
    with pytest.raises(ValueError, match="thresholds must not be NaN"):
        index.report(np.ones((1, 2)), np.nan)
    with pytest.raises(ValueError, match="r must be >= 1, got 0"):
        index.top_r(np.ones((1, 2)), 0)
    with pytest.raises(ValueError, match="keys must have shape"):
        make(np.ones(4, np.float32))
    assert len(index) == 4


@pytest.mark.parametrize(("make", "d"), [(ConvexLayersIndex, 3), (ShallowCuttingIndex, 5)])
def test_other_dimensions_name_who_serves_them(make, d):
    with pytest.raises(ValueError, match=f"got {d}; .*PartitionTreeIndex"):
        make(np.ones((3, d), np.float32))


def test_convex_layers_visit_few_nodes():
    """Every node opened holds a reported key or is a child of one that does."""
    rng = np.random.default_rng(5)
    for geometry in ("gaussian", "uniform", "sphere", "clusters"):
        keys = make_keys(rng, 50_000, 2, geometry)
        index = ConvexLayersIndex(keys)
        queries = rng.normal(size=(40, 2)).astype(np.float32)
        table = scores(queries, keys)
        for k in (1, 10, 100):
            limits = np.sort(table, axis=1)[:, -k]
            work = index.report(queries, limits).work
            assert work.nodes_visited <= 2 * work.reported + 40


def test_convex_layers_leave_out_children_without_a_reported_key():
    """Half of the nodes would be such children, and are told from the polygon around them."""
    rng = np.random.default_rng(9)
    for geometry in ("uniform", "sphere", "gaussian", "clusters"):
        keys = make_keys(rng, 200_000, 2, geometry)
        index = ConvexLayersIndex(keys)
        queries = rng.normal(size=(20, 2)).astype(np.float32)
        table = scores(queries, keys)
        for k in (1, 100, 3000):
            limits = np.sort(table, axis=1)[:, -k]
            report = assert_reports(index, queries, limits, table)
            assert k != 100 or report.work.nodes_visited <= 8 * len(queries)


@pytest.mark.parametrize("share", [0.9, 0.5, 0.01])
def test_a_layer_that_is_reported_nearly_whole(share):
    """The run of reported vertices goes around the end of its layer, and nearly meets itself."""
    turn = np.linspace(0, 2 * np.pi, 2000, endpoint=False)
    keys = np.column_stack([np.cos(turn), np.sin(turn)]).astype(np.float32)
    keys = np.concatenate([keys, 0.1 * np.random.default_rng(3).normal(size=(30_000, 2))])
    keys = keys.astype(np.float32)
    index = ConvexLayersIndex(keys)
    queries = np.column_stack([np.cos(turn[::37]), np.sin(turn[::37])]).astype(np.float32)
    table = scores(queries, keys)
    limits = np.quantile(table[:, :2000], 1 - share, axis=1)
    assert_reports(index, queries, limits, table)


@pytest.mark.parametrize("inner", [1, 2, 3, 200])
@pytest.mark.parametrize("shape", ["polygons", "ellipse", "parabola", "ring", "shells"])
def test_layers_that_share_a_node(shape, inner):
    """Layers of like and of unlike sizes, merged by angle; queries along edges, axes and ends."""
    rng = np.random.default_rng([inner, len(shape)])
    turn = rng.uniform(0, 2 * np.pi, 4000 * inner if inner < 200 else 20_000)
    circle = np.column_stack([np.cos(turn), np.sin(turn)])
    if shape == "polygons":  # each layer the same shape
        keys = np.concatenate([circle[:600] * (1 - 0.01 * i) for i in range(8 + inner % 20)])
    elif shape == "ellipse":
        keys = circle * [1, 1e-4]
    elif shape == "parabola":  # all edges but one within a small angle
        t = np.linspace(-1, 1, len(turn))
        keys = np.column_stack([t, 1e-3 * t**2])
    elif shape == "ring":
        keys = circle * (1 - 1e-6 * rng.random((len(turn), 1)))
    else:  # layers of many vertices outside, of `inner` times fewer inside
        keys = np.concatenate([circle, 0.5 * circle[::inner], 0.2 * circle[::inner]])
    keys = keys.astype(np.float32)
    index = ConvexLayersIndex(keys)
    alive = np.ones(len(keys), bool)
    for _ in range(10):
        assert_exact(index, keys, alive, rng)
    i, j = rng.integers(0, len(keys), (2, 20))
    edges = (keys[i] - keys[j]) @ np.float32([[0, 1], [-1, 0]])
    axes = np.float32([[-1, 0], [-1, -0.0], [-1, -1e-30], [1, 0], [0, 1], [0, -1]])
    queries = np.concatenate([edges, axes])
    table = scores(queries, keys)
    for k in (1, 2, 30, len(keys) // 10):
        limits = np.sort(table, axis=1)[:, -k]
        assert_reports(index, queries, limits, table)
        assert_reports(index, queries, np.nextafter(limits, np.inf), table)


def test_layers_of_a_circle_share_nodes():
    """Its keys a rounding away from a circle are many large layers, which one sweep reads."""
    rng = np.random.default_rng(2)
    keys = make_keys(rng, 200_000, 2, "sphere")
    index = ConvexLayersIndex(keys)
    queries = rng.normal(size=(40, 2)).astype(np.float32)
    table = scores(queries, keys)
    limits = np.sort(table, axis=1)[:, -100]
    work = assert_reports(index, queries, limits, table).work
    assert work.nodes_visited <= 3 * len(queries)
    assert work.full_scored <= 4 * work.reported


@pytest.mark.parametrize("d", [2, 3, 4])
def test_partition_tree_scores_few_keys(d):
    rng = np.random.default_rng(6)
    for geometry in ("gaussian", "uniform", "clusters"):
        keys = make_keys(rng, 50_000, d, geometry)
        queries = rng.normal(size=(20, d)).astype(np.float32)
        limits = np.sort(scores(queries, keys), axis=1)[:, -20]
        work = PartitionTreeIndex(keys).report(queries, limits).work
        assert work.full_scored < 0.1 * 20 * 50_000


def test_partition_tree_never_works_much_harder_than_a_scan():
    rng = np.random.default_rng(7)
    for d, geometry in itertools.product((2, 5, 8), ("sphere", "gaussian", "equal", "zeros")):
        keys = make_keys(rng, 30_000, d, geometry)
        index = PartitionTreeIndex(keys)
        queries = rng.normal(size=(10, d)).astype(np.float32)
        table = np.sort(scores(queries, keys), axis=1)
        for k in (1, 300, 3000, 15_000, 30_000):
            work = index.report(queries, table[:, -k]).work
            assert work.full_scored <= 1.15 * 10 * 30_000


def test_partition_tree_is_not_fooled_by_a_period():
    """Each 256th part of the keys begins with one in the half-space, and few others are in it."""
    rng = np.random.default_rng(8)
    keys = rng.normal(size=(51_200, 4))
    keys[::200, 0] = 10
    keys = keys.astype(np.float32)
    queries = np.tile(np.float32([1, 0, 0, 0]), (5, 1))
    report = PartitionTreeIndex(keys).report(queries, 6.0)
    for found, _ in report:
        np.testing.assert_array_equal(found, np.arange(0, 51_200, 200))
    assert report.work.full_scored < 0.1 * 5 * 51_200


def test_queries_that_fall_behind_scan_the_rest_together():
    """Flat sets across each other: their cells are crossed, though few keys are reported."""
    rng = np.random.default_rng(10)
    keys, normals = rng.normal(size=(60_000, 8)), rng.normal(size=(2, 8))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    for half, normal in zip((keys[::2], keys[1::2]), normals, strict=True):
        half -= 0.999 * np.outer(half @ normal, normal)
    keys[1::2] -= 3 * normals[0]
    keys = keys.astype(np.float32)
    queries = (normals[0] + 1e-4 * rng.normal(size=(70, 8))).astype(np.float32)
    table = scores(queries, keys)
    for k in (60, 600, 3000):
        limits = np.sort(table, axis=1)[:, -k]
        assert_reports(PartitionTreeIndex(keys), queries, limits, table)


def test_cuttings_have_levels_and_use_them():
    rng = np.random.default_rng(8)
    keys = rng.normal(size=(30_000, 3)).astype(np.float32)
    index = ShallowCuttingIndex(keys)
    assert index.levels == 3
    queries = rng.normal(size=(50, 3)).astype(np.float32)
    limits = np.sort(scores(queries, keys), axis=1)[:, -5]
    work = index.report(queries, limits).work
    assert work.full_scored < 50 * 3000


@pytest.mark.parametrize("geometry", ["equal", "plane", "zeros"])
def test_degenerate_samples_leave_the_tree(geometry):
    rng = np.random.default_rng(9)
    keys = make_keys(rng, 5000, 3, geometry)
    index = ShallowCuttingIndex(keys)
    assert index.levels == 0
    assert_exact(index, keys, np.ones(5000, bool), rng)


def test_cutting_refuses_too_much_memory_with_the_number():
    keys = np.random.default_rng(10).normal(size=(20_000, 4)).astype(np.float32)
    with pytest.raises(MemoryError, match=r"max_bytes must be at least \d+ .* got 1000"):
        ShallowCuttingIndex(keys, max_bytes=1000)


def test_cutting_names_the_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.spatial", None)
    with pytest.raises(ImportError, match="pip install scipy"):
        ShallowCuttingIndex(np.random.default_rng(0).normal(size=(2000, 3)))
