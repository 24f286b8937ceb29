import numpy as np
import pytest

from hsr_attention.attention.sparse_rows import relu_rows, softmax_rows
from hsr_attention.indexes.partition_tree import PartitionTreeIndex


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(5000, 3)).astype(np.float32)
    values = rng.normal(size=(5000, 4)).astype(np.float32)
    queries = rng.normal(size=(6, 3)).astype(np.float32)
    return keys, values, queries, queries.astype(np.float64) @ keys.T.astype(np.float64)


@pytest.mark.parametrize("power", [1, 2, 3])
def test_relu_equals_dense(case, power):
    keys, values, queries, scores = case
    limits = np.linspace(0.2, 0.8, 6)
    weights = np.maximum(0.5 * scores - limits[:, None], 0) ** power
    report = PartitionTreeIndex(keys).report(queries, limits / 0.5)
    found = relu_rows(report, values, threshold=limits, power=power, scale=0.5)
    assert found.dtype == np.float32
    wanted = weights @ values / weights.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)


def test_softmax_over_everything_equals_dense(case):
    keys, values, queries, scores = case
    found = softmax_rows(PartitionTreeIndex(keys).report(queries, -np.inf), values, scale=3.0)
    weights = np.exp(3 * (scores - scores.max(axis=1, keepdims=True)))
    wanted = weights @ values / weights.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)


def test_top_r(case):
    keys, values, queries, scores = case
    found = softmax_rows(PartitionTreeIndex(keys).top_r(queries, 1), values)
    np.testing.assert_array_equal(found, values[scores.argmax(axis=1)])


def test_empty_rows_are_zero(case):
    keys, values, queries, _ = case
    limits = np.array([np.inf, 0, np.inf, np.inf, 0, np.inf])
    report = PartitionTreeIndex(keys).report(queries, limits)
    for found in (relu_rows(report, values, threshold=0.0), softmax_rows(report, values)):
        assert (found[[0, 2, 3, 5]] == 0).all() and (found[[1, 4]] != 0).any(axis=1).all()


def test_too_few_values(case):
    keys, values, queries, _ = case
    report = PartitionTreeIndex(keys).report(queries, -np.inf)
    with pytest.raises(ValueError, match="values must have a row for key 4999, got 10"):
        softmax_rows(report, values[:10])
