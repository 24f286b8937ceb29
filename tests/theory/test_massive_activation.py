"""(gamma, beta1, beta2): the definition, word by word, on sorted rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hsr_attention.theory import massive_activation


@given(
    logits=arrays(np.float64, (3, 20), elements=st.floats(-50, 50)),
    r=st.integers(1, 19),
)
@settings(deadline=None)
def test_the_definition(logits, r):
    norms = np.array([1.0, 2.0, 0.5])
    found = massive_activation.measure(logits, norms, r)
    rows = -np.sort(-logits, axis=1)
    unit = norms * np.log(20)
    np.testing.assert_allclose(found.beta1, rows[:, :r].mean(axis=1) / unit, atol=1e-12)
    np.testing.assert_allclose(found.beta2, rows[:, r] / unit, atol=1e-12)
    assert 20**found.gamma == pytest.approx(r)
    exponent = found.gamma + (found.beta1 - found.beta2) * norms - 1
    np.testing.assert_allclose(found.exponent, exponent, atol=1e-9)


@pytest.mark.parametrize("r", [0, 10, 11])
def test_r_must_leave_something(r):
    with pytest.raises(ValueError, match=rf"r must lie in \[1, n\) = \[1, 10\), got {r}"):
        massive_activation.measure(np.zeros((2, 10)), np.ones(2), r)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="logits must have shape"):
        massive_activation.measure(np.zeros(10), np.ones(1), 2)
    with pytest.raises(ValueError, match="query_norms must have shape"):
        massive_activation.measure(np.zeros((2, 10)), np.ones(3), 2)
