"""ReLU attention is exact: within twice the error of dense float32 attention, against float64."""

import numpy as np
import pytest

import hsr_attention as hsr
from attention_cases import KINDS, Case, between, make


def single(case, threshold, power):
    """Dense ReLU attention in float32 numpy."""
    group = case.q.shape[1] // case.k.shape[1]
    q = case.q.astype(np.float32)
    k, v = (np.repeat(x.astype(np.float32), group, axis=1) for x in (case.k, case.v))
    scale = np.float32(1.0 / np.sqrt(q.shape[-1]) if case.scale is None else case.scale)
    s = scale * (q @ k.swapaxes(-1, -2)) - np.asarray(threshold, np.float32)
    w = np.where(np.isfinite(case.logits), np.maximum(s, 0) ** power, 0)
    total = w.sum(axis=-1, keepdims=True)
    return (w @ v) / np.where(total > 0, total, 1)


def check(case, threshold=0.5, power=1):
    """``threshold`` broadcasts to [batch, heads, m, 1]."""
    out, certificate = hsr.relu_attention(
        case.q,
        case.k,
        case.v,
        threshold=np.broadcast_to(np.asarray(threshold)[..., 0], case.q.shape[:3])
        if np.ndim(threshold)
        else threshold,
        power=power,
        scale=case.scale,
        is_causal=case.is_causal,
        mask=case.mask,
        return_certificate=True,
    )
    exact = case.relu(threshold, power)
    error = np.abs(out - exact)
    dense = np.abs(single(case, threshold, power) - exact).max(initial=0.0)
    size = np.abs(case.values).max(initial=0.0)
    assert error.max(initial=0.0) <= 2 * dense + 2.0**-22 * size
    empty = ~(case.logits > threshold).any(axis=-1)
    assert (out[empty] == 0).all()
    assert (certificate.omitted_mass < 1e-30).all()
    assert (error.max(axis=-1, initial=0.0) <= certificate.error_bound).all()
    seen = np.maximum(np.isfinite(case.logits).sum(axis=-1), 1)
    kept = (case.logits > threshold).sum(axis=-1)
    # Scores within rounding of the threshold may fall on either side.
    near = (np.abs(case.logits - threshold) < 1e-6 * (1 + np.abs(case.logits))).sum(axis=-1)
    assert (np.abs(certificate.density * seen - kept) <= near + 1e-3).all()
    return out


@pytest.mark.parametrize("power", [1, 2, 3])
@pytest.mark.parametrize("visibility", ["all", "causal", "masked"])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_dense(isa, kind, visibility, power):
    case = make(kind, 1, n=530, m=5, heads=4, kv_heads=2, visibility=visibility)
    for quantile in (0.1, 0.9):
        check(case, between(case.logits, quantile), power)


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 31, 32, 33, 2047, 2048, 2049, 4100])
def test_block_and_chunk_edges(isa, n):
    case = make("random", n, n=n, m=min(n, 3), d=20)
    check(case, 0.0)
    check(case, 1.0)


@pytest.mark.parametrize(
    "d, value_dim", [(1, 1), (3, 40), (64, 64), (128, 7), (511, 2), (512, 512)]
)
def test_head_dims(isa, d, value_dim):
    check(make("random", d, n=70, d=d, value_dim=value_dim, heads=2), 0.3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_inputs(isa, dtype):
    """The keys' own values are exact; the output is rounded to the dtype of q."""
    case = make("random", 2, n=200, dtype=dtype)
    out = hsr.relu_attention(case.q, case.k, case.v, threshold=0.2)
    assert out.dtype == case.q.dtype
    exact = case.relu(0.2)
    half_unit = {"bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
    error = np.abs(out.astype(np.float64) - exact)
    assert (error <= half_unit * np.abs(exact) + 1e-5).all()


def test_causal_prefill_of_the_whole_sequence(isa):
    case = make("random", 3, n=150, m=150, heads=2, visibility="causal")
    out = check(case, 0.4, 2)
    assert (out[:, :, 0] == 0).all() or (case.logits[:, :, 0, 0] > 0.4).any()


def test_thresholds_for_each_head_and_query(isa):
    case = make("random", 4, n=300, heads=3, m=4)
    heads = np.array([0.1, 0.5, 2.0])
    out = hsr.relu_attention(case.q, case.k, case.v, threshold=heads)
    np.testing.assert_array_equal(out, check(case, heads[None, :, None, None]))
    queries = np.linspace(-1, 2, 12).reshape(1, 3, 4)
    out = hsr.relu_attention(case.q, case.k, case.v, threshold=queries)
    np.testing.assert_array_equal(out, check(case, queries[..., None]))


def test_gaussian_rule(isa):
    """About n^(4/5) keys are kept of Gaussian ones, and the answer is that of the same thresholds."""
    n, d = 8000, 64
    case = make("random", 5, n=n, d=d, heads=4, kv_heads=2)
    out, certificate = hsr.relu_attention(
        case.q, case.k, case.v, threshold=hsr.Gaussian(), return_certificate=True
    )
    kept = certificate.density * n
    # P(N(0,1) > t) is below exp(-t^2/2) by about t sqrt(2 pi).
    assert (kept > n**0.8 / 12).all() and (kept < n**0.8).all()
    sigma = np.sqrt((case.k.astype(np.float64) ** 2).mean(axis=(2, 3)))
    norms = np.linalg.norm(case.q.astype(np.float64), axis=-1)
    b = norms * np.repeat(sigma, 2, axis=1)[..., None] * np.sqrt(0.4 * np.log(n) / d)
    exact = case.relu(b[..., None])
    np.testing.assert_allclose(out, exact, atol=2e-6)


def test_a_key_on_the_threshold_weighs_nothing(isa):
    q = np.ones((1, 1, 1, 4), np.float32)
    k = np.stack([np.full(4, x, np.float32) for x in (0.25, 0.5, 1.0)])[None, None]
    v = np.eye(3, dtype=np.float32)[None, None]
    out = hsr.relu_attention(q, k, v, threshold=2.0, scale=1.0)
    np.testing.assert_array_equal(out[0, 0, 0], [0, 0, 1])
    out, certificate = hsr.relu_attention(
        q, k, v, threshold=4.0, scale=1.0, return_certificate=True
    )
    assert (out == 0).all() and (certificate.lse == -np.inf).all()
    assert (certificate.density == 0).all()


def test_infinite_threshold_is_an_empty_row():
    case = make("random", 6, n=40)
    assert (hsr.relu_attention(case.q, case.k, case.v, threshold=np.inf) == 0).all()


def test_minus_infinite_threshold_is_refused():
    case = make("random", 6, n=40)
    with pytest.raises(ValueError, match="threshold"):
        hsr.relu_attention(case.q, case.k, case.v, threshold=-np.inf)


@pytest.mark.parametrize(
    "power, size", [(3, 1e12), (16, 1e8), (16, 100.0), (12, 1e-3), (16, 1e-3)]
)
def test_powers_do_not_overflow_or_vanish(isa, power, size):
    case = make("random", 7, n=60, m=2)
    big = Case(case.q, (case.k * size).astype(np.float32), case.v)
    out = hsr.relu_attention(big.q, big.k, big.v, threshold=0.0, power=power)
    # Relative to the largest logit nothing leaves the range of float64.
    s = np.maximum(big.logits / big.logits.max(axis=-1, keepdims=True), 0.0) ** power
    exact = (s / s.sum(axis=-1, keepdims=True)) @ big.values
    np.testing.assert_allclose(out, exact, atol=1e-4)


def test_grouped_queries_equal_repeated_keys(isa):
    case = make("random", 8, n=100, heads=6, kv_heads=2, batch=2)
    grouped = hsr.relu_attention(case.q, case.k, case.v, threshold=0.5)
    k, v = (np.repeat(x, 3, axis=1) for x in (case.k, case.v))
    np.testing.assert_allclose(grouped, hsr.relu_attention(case.q, k, v, threshold=0.5), atol=1e-6)
