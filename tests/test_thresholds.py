"""Rules for the threshold b."""

import re

import numpy as np
import pytest

import hsr_attention as hsr
from hsr_attention import thresholds


@pytest.mark.parametrize("exponent", [0.5, 0.8, 0.95])
def test_gaussian_keeps_at_most_about_n_to_the_exponent(exponent):
    rng = np.random.default_rng(0)
    n, d = 20_000, 64
    keys = 1.7 * rng.standard_normal((n, d))
    queries = 3.0 * rng.standard_normal((1, 1, 8, d))
    rule = hsr.Gaussian(exponent)
    b = rule(queries.astype(np.float32), np.full((1, 1), 1.7), np.full((1, 1, 8), n), 1 / 8)
    assert b.shape == (1, 1, 8)
    kept = (queries[0, 0] @ keys.T / 8 >= b[0, 0, :, None]).sum(axis=1)
    assert (kept <= 1.2 * n**exponent).all() and (kept >= n**exponent / 20).all()


def test_gaussian_scales_with_everything():
    q = np.ones((1, 2, 1, 4), np.float32)
    rms = np.array([[1.0, 2.0]])
    b = hsr.Gaussian()(q, rms, 1000, 0.5)
    np.testing.assert_allclose(b[0, 1], 2 * b[0, 0])
    np.testing.assert_allclose(hsr.Gaussian()(3 * q, rms, 1000, 0.5), 3 * b)
    np.testing.assert_allclose(hsr.Gaussian()(q, rms, 1000, 1.0), 2 * b)
    assert (hsr.Gaussian(1.0)(q, rms, 1000, 1.0) == 0).all()
    assert np.isfinite(hsr.Gaussian()(q, rms, 0, 1.0)).all()


def test_the_lemma_is_looser_than_the_calibrated_rule():
    n, d = 8192, 64
    q = np.random.default_rng(1).standard_normal((1, 1, 5, d)).astype(np.float32)
    calibrated = hsr.Gaussian()(q, np.ones((1, 1)), n, 1 / np.sqrt(d))
    lemma = thresholds.lemma_threshold(n, 1, d, 1.0, 1.0)
    assert 3 < lemma / calibrated.mean() < 6


@pytest.mark.parametrize("exponent", [0.0, -1.0, 1.1, float("nan")])
def test_bad_exponents(exponent):
    with pytest.raises(ValueError, match=r"exponent must lie in \(0, 1\], got"):
        hsr.Gaussian(exponent)


def test_a_rule_is_any_such_function():
    """A user's own rule; it sees queries, the keys' size, their number and the scale."""

    class Constant:
        def __call__(self, queries, key_rms, n, scale):
            assert queries.shape == (2, 4, 3, 8) and queries.dtype == np.float32
            assert key_rms.shape == (2, 4) and scale == 0.25
            np.testing.assert_array_equal(n, np.full((1, 1, 3), 40))
            return np.full(queries.shape[:3], 0.75)

    assert isinstance(Constant(), thresholds.ThresholdRule)
    rng = np.random.default_rng(2)
    q = rng.standard_normal((2, 4, 3, 8)).astype(np.float32)
    k, v = rng.standard_normal((2, 2, 2, 40, 8)).astype(np.float32)
    for attention, more in ((hsr.relu_attention, {}), (hsr.softmax_attention, {"tail": "drop"})):
        np.testing.assert_array_equal(
            attention(q, k, v, threshold=Constant(), scale=0.25, **more),
            attention(q, k, v, threshold=0.75, scale=0.25, **more),
        )


def test_sqrt_log_grows_with_the_number_of_keys_a_query_sees():
    q = np.zeros((2, 3, 4, 8), np.float32)
    n = np.array([1, 10, 100, 1000])[None, None]
    b = hsr.SqrtLog((1.0, 2.0, 0.5))(q, np.ones((2, 3)), n, 1.0)
    assert b.shape == (2, 3, 4)
    np.testing.assert_allclose(b[1, 1], 2 * np.sqrt(0.4 * np.log(n[0, 0])))
    np.testing.assert_allclose(b[:, 2], 0.25 * b[:, 1])
    assert (hsr.SqrtLog()(q, np.ones((2, 3)), n, 1.0)[:, 0] == b[:, 0]).all()


@pytest.mark.parametrize(
    "sigma", [float("nan"), (1.0, float("inf")), ((1.0,), (2.0,)), -1, (1.0, -0.5)]
)
def test_bad_sigmas(sigma):
    rule = re.escape("sigma must be finite and >= 0, one number or one for each head, got ")
    with pytest.raises(ValueError, match=rf"^{rule}{re.escape(repr(sigma))}$"):
        hsr.SqrtLog(sigma)


def test_settings_of_rules_are_numbers():
    for sigma in ("1", None, True):
        with pytest.raises(
            TypeError, match=r"^sigma must be a number, or one for each head, got "
        ):
            hsr.SqrtLog(sigma)
    with pytest.raises(TypeError, match=r"^exponent must be a number, got '0.8'$"):
        hsr.Gaussian("0.8")
    assert hsr.SqrtLog(0).sigma == 0


def test_sigma_must_fit_the_heads():
    with pytest.raises(ValueError, match="sigma must have one entry for each of 3 heads, got 2"):
        hsr.SqrtLog((1.0, 2.0))(np.zeros((1, 3, 1, 8), np.float32), np.ones((1, 3)), 5, 1.0)


def test_a_rule_is_told_how_many_keys_each_query_sees():
    seen = []

    class Note:
        def __call__(self, queries, key_rms, n, scale):
            seen.append(n.tolist())
            return np.zeros(queries.shape[:3])

    q, k, v = np.ones((3, 2, 1, 4, 8), np.float32)
    mask = np.ones((2, 1, 4), bool)
    mask[1, 0, :2] = False
    hsr.relu_attention(q, k, v, threshold=Note(), is_causal=True)
    hsr.relu_attention(q, k, v, threshold=Note(), is_causal=True, mask=mask)
    hsr.relu_attention(q, k, v, threshold=Note(), mask=mask[1:])
    cache = hsr.KVCache(hsr.ReLUPolicy(Note()))
    cache.append(k, v)
    cache.attend(q[:, :, :2])
    assert seen == [[[[1, 2, 3, 4]]], [[[1, 2, 3, 4]], [[0, 0, 1, 2]]], [[[2] * 4]], [[[3, 4]]]]
