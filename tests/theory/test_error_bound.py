"""Bounds of top-r attention: each holds, they stand in order, and the theorem is often vacuous."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsr_attention.attention import reference
from hsr_attention.theory import error_bound, massive_activation


@given(
    seed=st.integers(0, 10**6),
    spread=st.floats(0.01, 12),
    n=st.integers(3, 60),
    share=st.floats(0, 1),
)
@settings(deadline=None, max_examples=200)
def test_every_bound_holds(seed, spread, n, share):
    rng = np.random.default_rng(seed)
    r = 1 + round(share * (n - 2))
    q, k = rng.standard_normal((2, 8)), spread * rng.standard_normal((n, 8))
    v = rng.uniform(-1, 1, (n, 5))
    s = reference.logits(q, k)
    exact = reference.softmax_attention(q, k, v)
    top = reference.softmax_attention(q, k, v, kept=reference.top_r(s, r))
    error = np.abs(top - exact).max(axis=1) / np.abs(v).max()
    found = massive_activation.measure(s, np.linalg.norm(q, axis=1) / np.sqrt(8), r)
    omitted = error_bound.omitted_mass(s, r)
    slack = 1e-12
    assert (error <= 2 * omitted + slack).all()
    assert (2 * omitted <= error_bound.after_the_fact(s, r) + slack).all()
    assert (error <= error_bound.theorem(found) + slack).all()
    np.testing.assert_allclose(
        omitted, reference.omitted_mass(q, k, reference.top_r(s, r)), atol=1e-12
    )


def test_the_theorem_says_something_only_across_a_gap():
    n, r = 1000, 10
    for gap, vacuous in ((np.log(n / r) - 0.01, True), (np.log(n / r) + 0.01, False)):
        logits = np.r_[np.full(r, gap), np.zeros(n - r)][None]
        found = massive_activation.measure(logits, np.ones(1), r)
        assert error_bound.vacuous(found).tolist() == [vacuous]
        assert (error_bound.theorem(found)[0] > error_bound.TRIVIAL) == vacuous


def test_the_theorem_unrolled():
    rng = np.random.default_rng(3)
    s = rng.standard_normal((4, 200))
    found = massive_activation.measure(s, np.ones(4), 20)
    rows = -np.sort(-s, axis=1)
    expected = 2 * 200 / 20 * np.exp(rows[:, 20] - rows[:, :20].mean(axis=1))
    np.testing.assert_allclose(error_bound.theorem(found), expected)


def test_nothing_is_left_out_when_all_keys_are_kept():
    s = np.arange(6.0)[None]
    assert error_bound.after_the_fact(s, 6) == [0.0]
    assert error_bound.omitted_mass(s, 6) == [0.0]


@pytest.mark.parametrize("r", [0, 7])
def test_r_is_checked(r):
    with pytest.raises(ValueError, match=rf"r must lie in \[1, n\] = \[1, 6\], got {r}"):
        error_bound.after_the_fact(np.zeros((1, 6)), r)
    with pytest.raises(ValueError, match="r must lie in"):
        error_bound.omitted_mass(np.zeros((1, 6)), r)
    with pytest.raises(ValueError, match=r"logits must have shape \[m, n\]"):
        error_bound.after_the_fact(np.zeros(6), 2)
