"""The float64 reference against the definitions, written out with loops."""

import math

import numpy as np
import pytest

from hsr_attention.attention import reference


@pytest.fixture
def example():
    rng = np.random.default_rng(0)
    return rng.standard_normal((3, 4)), rng.standard_normal((7, 4)), rng.standard_normal((7, 2))


def test_softmax_is_definition_1_1(example):
    q, k, v = example
    out = reference.softmax_attention(q, k, v, scale=0.5)
    for i in range(3):
        weights = [math.exp(0.5 * sum(q[i, c] * k[j, c] for c in range(4))) for j in range(7)]
        expected = sum(w * v[j] for j, w in enumerate(weights)) / sum(weights)
        np.testing.assert_allclose(out[i], expected, rtol=1e-12)


@pytest.mark.parametrize("power", [1, 2, 3])
def test_relu_is_definition_1_2(example, power):
    q, k, v = example
    out = reference.relu_attention(q, k, v, threshold=0.1, power=power, scale=0.5)
    for i in range(3):
        weights = [max(0.5 * float(q[i] @ k[j]) - 0.1, 0.0) ** power for j in range(7)]
        expected = sum(w * v[j] for j, w in enumerate(weights)) / sum(weights)
        np.testing.assert_allclose(out[i], expected, rtol=1e-12)


def test_rows_without_a_key_are_zero(example):
    q, k, v = example
    assert (reference.relu_attention(q, k, v, threshold=1e6) == 0).all()
    hidden = np.zeros((3, 7), bool)
    assert (reference.softmax_attention(q, k, v, visible=hidden) == 0).all()


def test_causal():
    np.testing.assert_array_equal(
        reference.causal(2, 4), [[True, True, True, False], [True, True, True, True]]
    )


def test_half_space(example):
    q, k, _ = example
    kept = reference.half_space(q, k, [0.0, 1.0, -1.0])
    for i, b in enumerate((0.0, 1.0, -1.0)):
        np.testing.assert_array_equal(kept[i], k @ q[i] >= b)


def test_top_r_prefers_the_smaller_index():
    scores = np.array([[1.0, 3.0, 3.0, 2.0, 3.0]])
    np.testing.assert_array_equal(reference.top_r(scores, 2), [[False, True, True, False, False]])
    assert reference.top_r(scores, 99).all()
    assert reference.top_r(np.array([[1.0, -np.inf]]), 2).tolist() == [[True, False]]


def test_omitted_mass_bounds_the_error(example):
    """Theorem 4.3: |out - exact|_inf <= 2 |V|_inf omitted."""
    q, k, v = example
    exact = reference.softmax_attention(q, k, v)
    for r in range(1, 8):
        kept = reference.top_r(reference.logits(q, k), r)
        omitted = reference.omitted_mass(q, k, kept)
        error = np.abs(reference.softmax_attention(q, k, v, kept=kept) - exact).max(axis=1)
        assert (error <= 2 * np.abs(v).max() * omitted + 1e-12).all()
    assert np.abs(omitted).max() < 1e-12
