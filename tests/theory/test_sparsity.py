"""Lemma 6.1: the two thresholds against each other, against the library, and against counting."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsr_attention.theory import sparsity
from hsr_attention.thresholds import Gaussian


def test_the_calibrated_threshold_is_the_rule_of_the_library():
    rng = np.random.default_rng(0)
    q = rng.standard_normal((5, 24)).astype(np.float32)
    expected = Gaussian()(q[None, None], np.array([[1.7]]), 3000, 24**-0.5)[0, 0]
    np.testing.assert_allclose(sparsity.calibrated_threshold(q, 1.7, 3000), expected)
    np.testing.assert_allclose(
        sparsity.calibrated_threshold(q, 1.7, 3000, 2.0), expected * 2 * math.sqrt(24)
    )


def test_the_expected_count_is_what_is_counted():
    rng = np.random.default_rng(1)
    n, d = 200_000, 16
    q, k = rng.standard_normal((8, d)), 1.3 * rng.standard_normal((n, d))
    b = sparsity.calibrated_threshold(q, 1.3, n)
    expected = sparsity.expected_count(n, b, np.linalg.norm(q, axis=1), 1.3, d**-0.5)
    counts = (q @ k.T * d**-0.5 >= b[:, None]).sum(axis=1)
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()


@given(n=st.integers(10, 10**7), deviation=st.floats(1e-3, 1e3))
@settings(deadline=None)
def test_at_the_calibrated_threshold_fewer_than_n_to_the_four_fifths(n, deviation):
    b = deviation * math.sqrt(0.4 * math.log(n))
    assert 0 < sparsity.expected_count(n, b, deviation, 1.0, 1.0) < n**0.8


def test_a_query_of_zeros_has_no_distribution():
    with pytest.raises(ValueError, match="must be > 0"):
        sparsity.expected_count(100, 0.0, 0.0, 1.0, 1.0)
    assert sparsity.calibrated_threshold(np.zeros((1, 4)), 1.0, 100) == [0.0]


def test_the_constant_of_the_lemma_is_about_four_times_too_large():
    factor = sparsity.loose_factor(32768, 64, 64, 1.0, 1.0)
    assert 4 < factor < 5
    lemma = sparsity.lemma_threshold(32768, 64, 64, 1.0, 1.0)
    assert lemma / math.sqrt(0.4 * math.log(32768)) == pytest.approx(factor)
    # The row of ReLU attention is empty: its expected number of entries is far below one.
    assert sparsity.expected_count(32768, lemma, math.sqrt(64), 1.0, 64**-0.5) < 1e-10


def test_queries_must_be_rows():
    with pytest.raises(ValueError, match=r"queries must have shape \[m, head_dim\], got \(4,\)"):
        sparsity.calibrated_threshold(np.zeros(4), 1.0, 10)
