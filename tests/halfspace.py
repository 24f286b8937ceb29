"""Cases for half-space reporting, and the float64 oracle that judges the answers.

The contract (``HalfspaceIndex``): with tol = 2^-22 sqrt(d) |q| max|k|, a report holds each key whose
float64 score is >= b + tol and none whose float64 score is < b - tol.
"""

from dataclasses import dataclass

import ml_dtypes
import numpy as np

DTYPES = ("float32", "bfloat16", "float16")
# Around the block of 16 keys, the kernels' steps of 64 and 256 blocks, and the threads' ranges.
SIZES = (0, 1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65, 127, 128, 129, 255, 256, 257)
DIMS = (*range(1, 131), 160, 192, 256, 512)

KINDS = (
    "normal",
    "integers",  # scores are exact, ties everywhere
    "duplicates",
    "zeros",
    "subnormal",
    "norm 1e18",
    "mixed scales",
    "1e30 beside ordinary",
    "largest floats",
    "far cluster",
    "one loud coordinate",
    "constant",
    "one-hot",
)

NUMPY = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def vectors(rng, kind, n, d):
    """Return float64 [n, d] of one kind."""
    x = rng.standard_normal((n, d))
    if kind == "integers":
        return rng.integers(-2, 3, (n, d)).astype(float)
    if kind == "duplicates":
        return x[rng.integers(0, max(n // 8, 1), n)] if n else x
    if kind == "zeros":
        return x * (rng.random((n, 1)) < 0.5)
    if kind == "subnormal":
        return x * 1e-41
    if kind == "norm 1e18":
        return 1e18 * x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30)
    if kind == "mixed scales":
        return x * rng.choice([0.0, 1e-44, 1e-39, 1e-31, 1e-20, 1.0, 1e10, 1e18], (n, 1))
    if kind == "1e30 beside ordinary":
        return np.where(rng.random((n, 1)) < 0.2, np.sign(x) * 1e30, x)
    if kind == "largest floats":
        return np.where(rng.random((n, d)) < 0.3, np.sign(x) * 3e38, x)
    if kind == "far cluster":
        return 100.0 * rng.standard_normal((1, d)) + 1e-3 * x
    if kind == "one loud coordinate":
        x[:, int(rng.integers(d))] *= 1e4
        return x
    if kind == "constant":
        return np.full((n, d), x[0, 0] if n else 0.0)
    if kind == "one-hot":
        return np.eye(d)[rng.integers(0, d, n)] * rng.choice([-1.0, 1.0], (n, 1))
    return x


def typed(x, dtype):
    """Round float64 to one of the three dtypes, staying finite."""
    limit = float(ml_dtypes.finfo(NUMPY[dtype]).max)
    return np.clip(x, -limit, limit).astype(np.float32).clip(-limit, limit).astype(NUMPY[dtype])


@dataclass
class Case:
    keys: np.ndarray
    queries: np.ndarray
    thresholds: np.ndarray

    @property
    def scores(self):
        """Float64 scores [m, n]: products of 32-bit floats are exact, sums are off by 1e-13."""
        return self.queries.astype(np.float64) @ self.keys.astype(np.float64).T


def tolerance(queries, keys):
    """Return tol of the contract, float64 [m]."""
    q = np.linalg.norm(queries.astype(np.float64), axis=1)
    k = np.linalg.norm(keys.astype(np.float64), axis=1).max(initial=0.0)
    return 2.0**-22 * np.sqrt(queries.shape[1]) * q * k


def make(seed, n, d, m=3, dtype="float32", kind="normal", query_kind="normal", query_dtype=None):
    """Return one case; thresholds sit on scores, just beside them, between them, and at +-inf."""
    rng = np.random.default_rng(seed)
    keys = typed(vectors(rng, kind, n, d), dtype)
    queries = typed(vectors(rng, query_kind, m, d), query_dtype or dtype)
    if n and rng.random() < 0.3:  # a query that is a key
        queries[0] = typed(keys[int(rng.integers(n))].astype(np.float64), query_dtype or dtype)
    case = Case(keys, queries, np.zeros(m))
    scores = case.scores
    for i in range(m):
        at = float(rng.choice(scores[i])) if n else 0.0
        case.thresholds[i] = {
            0: at,
            1: np.nextafter(at, np.inf),
            2: np.nextafter(at, -np.inf),
            3: float(np.quantile(scores[i], rng.random())) if n else 1.0,
            4: 0.0,
            5: at * (1 + 1e-6),
            6: np.inf,
            7: -np.inf,
            8: float(np.float32(np.clip(at, -3e38, 3e38))),
            9: scores[i].max(initial=-1.0),
        }[int(rng.choice(10, p=[0.25, 0.1, 0.1, 0.25, 0.05, 0.05, 0.025, 0.025, 0.1, 0.05]))]
    return case


def check_report(report, case, ids=None):
    """Hold ``report`` against the oracle. ``ids[j]`` is the id of ``case.keys[j]``."""
    ids = np.arange(len(case.keys)) if ids is None else np.asarray(ids)
    scores, tol = case.scores, tolerance(case.queries, case.keys)
    assert report.indptr.dtype == np.int64 and report.indices.dtype == np.int64
    assert report.scores.dtype == np.float32
    assert len(report) == len(case.queries)
    assert report.indptr[0] == 0 and report.indptr[-1] == len(report.indices)
    assert report.work.reported == len(report.indices) == len(report.scores)
    for i, (found, found_scores) in enumerate(report):
        b = case.thresholds[i]
        assert (np.diff(found) > 0).all(), "ids must ascend and be unique"
        inside = np.isin(ids, found)
        assert inside.sum() == len(found), "a reported id is not a live key"
        missed = (scores[i] >= b + tol[i]) & ~inside
        extra = (scores[i] < b - tol[i]) & inside
        assert not missed.any(), f"row {i}: missed {ids[missed]} at b = {b}, tol = {tol[i]}"
        assert not extra.any(), f"row {i}: extra {ids[extra]} at b = {b}, tol = {tol[i]}"
        check_scores(found_scores, scores[i][inside], tol[i])


def check_scores(found, expected, tol):
    """Hold reported scores against float64 ones, rounded once to float32."""
    with np.errstate(over="ignore"):
        slack = tol + 2.0**-23 * np.abs(expected) + 1.5e-45
        least, most = (expected - slack).astype(np.float32), (expected + slack).astype(np.float32)
    assert ((least <= found) & (found <= most)).all()


def check_top_r(report, case, r, ids=None):
    """Hold ``top_r`` against the oracle."""
    ids = np.arange(len(case.keys)) if ids is None else np.asarray(ids)
    scores, tol = case.scores, tolerance(case.queries, case.keys)
    kept = min(r, len(ids))
    assert (report.counts == kept).all()
    for i, (found, found_scores) in enumerate(report):
        assert (np.diff(found) > 0).all()
        inside = np.isin(ids, found)
        assert inside.sum() == kept
        if kept == 0:
            continue
        last = np.sort(scores[i])[-kept]
        assert not ((scores[i] > last + tol[i]) & ~inside).any()
        assert not ((scores[i] < last - tol[i]) & inside).any()
        check_scores(found_scores, scores[i][inside], tol[i])
