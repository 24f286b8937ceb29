"""Keys, queries and thresholds that are hard for half-space reporting, and the oracle."""

import numpy as np


def scores(queries, keys):
    """Float64 scores summed in the order of the dimensions, as the native code sums them."""
    total = np.zeros((len(queries), len(keys)))
    for j in range(keys.shape[1]):
        total += queries[:, j : j + 1].astype(np.float64) * keys[None, :, j].astype(np.float64)
    return total


def _clusters(rng, n, d):
    centres = 3 * rng.normal(size=(20, d))
    member = rng.integers(0, 20, n)
    return centres[member] + rng.uniform(0.01, 1, 20)[member, None] * rng.normal(size=(n, d))


def _sphere(rng, n, d):
    points = rng.normal(size=(n, d))
    return points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-9)


def _two_scales(rng, n, d):
    points = rng.normal(size=(n, d))
    points[: n // 2] = 5 + 1e-3 * points[: n // 2]
    return points


def _plane(rng, n, d):
    points = rng.normal(size=(n, d))
    points[:, -1] = 0.5
    return points


GEOMETRIES = {
    "gaussian": lambda rng, n, d: rng.normal(size=(n, d)),
    "uniform": lambda rng, n, d: rng.uniform(size=(n, d)),
    "clusters": _clusters,
    "sphere": _sphere,
    "grid": lambda rng, n, d: rng.integers(0, 4, size=(n, d)),
    "equal": lambda rng, n, d: np.repeat(rng.normal(size=(1, d)), n, axis=0),
    "collinear": lambda rng, n, d: rng.normal(size=(n, 1)) * rng.normal(size=(1, d)),
    "plane": _plane,
    "duplicates": lambda rng, n, d: rng.normal(size=(n, d))[rng.integers(0, n // 10 + 1, n)],
    "zeros": lambda rng, n, d: np.zeros((n, d)),
    "subnormal": lambda rng, n, d: 1e-42 * rng.normal(size=(n, d)),
    "huge": lambda rng, n, d: 1e38 * np.clip(rng.normal(size=(n, d)), -3, 3),
    "all magnitudes": lambda rng, n, d: (
        rng.normal(size=(n, d)) * 10.0 ** rng.uniform(-30, 30, size=(n, 1))
    ),
    "far away": lambda rng, n, d: 1e6 + 0.1 * rng.normal(size=(n, d)),
    "two scales": _two_scales,
}


def make_keys(rng, n, d, geometry):
    return np.ascontiguousarray(GEOMETRIES[geometry](rng, n, d), dtype=np.float32).reshape(n, d)


def make_queries(rng, m, keys):
    d = keys.shape[1]
    queries = rng.normal(size=(m, d)).astype(np.float32)
    for i in range(m):
        change = rng.integers(0, 12)
        if change == 0:
            queries[i] = 0
        elif change == 1:
            queries[i] = np.eye(d, dtype=np.float32)[rng.integers(d)] * rng.choice([-1, 1])
        elif change == 2:
            queries[i] = np.round(queries[i])
        elif change == 3:
            queries[i] *= np.float32(1e37)
        elif change == 4 and len(keys):
            queries[i] = keys[rng.integers(len(keys))]
    return queries


def make_thresholds(rng, table):
    """Thresholds at, just above and between scores, for any output size; infinities too."""
    found = np.empty(len(table))
    for i, row in enumerate(table):
        kind = rng.random()
        if kind < 0.05 or row.size == 0:
            found[i] = rng.normal()
        elif kind < 0.1:
            found[i] = rng.choice([-np.inf, np.inf])
        else:
            k = min(row.size, int(row.size ** rng.random()))
            found[i] = np.partition(row, row.size - k)[row.size - k]
            if kind < 0.4:
                found[i] = np.nextafter(found[i], np.inf)
    return found


def assert_exact(index, keys, alive, rng, m=4):
    """Compare report, count and top_r with the oracle: the same keys, the same scores."""
    ids = np.flatnonzero(alive)
    queries = make_queries(rng, m, keys)
    table = scores(queries, keys[ids])
    limits = make_thresholds(rng, table)
    report, counts = index.report(queries, limits), index.count(queries, limits)
    r = int(rng.integers(1, 30)) if rng.random() < 0.7 else int(rng.integers(1, len(ids) + 5))
    best = index.top_r(queries, r)
    assert len(index) == len(ids)
    assert report.work.reported == len(report.indices)
    for i in range(m):
        wanted = table[i] >= limits[i]
        np.testing.assert_array_equal(report.row(i)[0], ids[wanted])
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(report.row(i)[1], table[i][wanted].astype(np.float32))
        assert counts[i] == wanted.sum()
        chosen = np.lexsort((ids, -table[i]))[:r]
        np.testing.assert_array_equal(best.row(i)[0], np.sort(ids[chosen]))


def random_history(make_index, dimensions, rng, sizes, steps=3):
    """Build, then append and delete at random, exact after every step."""
    names = list(GEOMETRIES)
    d, n = int(rng.choice(dimensions)), int(rng.choice(sizes))
    keys = make_keys(rng, n, d, names[rng.integers(len(names))])
    alive = np.ones(n, bool)
    index = make_index(keys)
    assert_exact(index, keys, alive, rng)
    for _ in range(int(rng.integers(0, steps + 1))):
        if rng.random() < 0.5:
            count = int(rng.choice([0, 1, 10, 300, 1100]))
            more = make_keys(rng, count, d, names[rng.integers(len(names))])
            np.testing.assert_array_equal(
                index.append(more), np.arange(len(keys), len(keys) + count)
            )
            keys, alive = np.concatenate([keys, more]), np.append(alive, np.ones(count, bool))
        else:
            ids = np.flatnonzero(alive)
            gone = rng.choice(
                ids, int(len(ids) * rng.choice([0.02, 0.3, 0.6, 1.0])), replace=False
            )
            index.delete(gone)
            alive[gone] = False
        assert_exact(index, keys, alive, rng)


def assert_reports(index, queries, limits, table):
    """Return the report, which holds exactly the keys whose scores in ``table`` reach the limits."""
    report, counts = index.report(queries, limits), index.count(queries, limits)
    for i, (found, _) in enumerate(report):
        np.testing.assert_array_equal(found, np.flatnonzero(table[i] >= limits[i]))
        assert counts[i] == len(found)
    return report
