"""Prompts: many queries at once (paper, Algorithm 3), against float64, at every instruction-set level.

Rows of one call share tiles and panels, and the queries of a tile see different prefixes; so cases
here have hundreds of queries, and lengths around the boundaries of blocks (16), words (64)
ranges of coded values (256)
and panels (1,024).
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hsr_attention as hsr
from attention_cases import KINDS, Case, between, make
from hsr_attention import _native
from hsr_attention.prefill import attend_once
from test_certificate import check
from test_relu_attention import check as check_relu

POLICIES = {
    "default": dict(),
    "epsilon 1e-4": dict(epsilon=1e-4),
    "epsilon 0.3, coarse": dict(epsilon=0.3, exact_share=0.5),
    "epsilon, drop": dict(epsilon=0.05, tail="drop"),
    "threshold": dict(threshold=1.0),
    "threshold, drop": dict(threshold=0.5, tail="drop"),
    "top_r": dict(top_r=8),
}
# Logits that 8-bit codes cannot bound are left to the kernels of decoding.
UNBOUNDED = {"huge logits"}


def epsilon_of(policy):
    return hsr.SoftmaxPolicy(**policy).epsilon


@pytest.mark.parametrize("kind", KINDS)
def test_error_bound_of_each_kind(isa, kind):
    """Every kind under one policy; ``test_error_bound`` has every pair."""
    check_error_bound(kind, list(POLICIES)[KINDS.index(kind) % len(POLICIES)])


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", KINDS)
def test_error_bound(isa, kind, policy):
    check_error_bound(kind, policy)


def check_error_bound(kind, policy):
    visibility = ("all", "causal", "masked")[(len(kind) + len(policy)) % 3]
    case = make(kind, 3, n=1100, m=1100 if visibility == "causal" else 70, visibility=visibility)
    certificate = check(case, POLICIES[policy])
    if kind not in UNBOUNDED and policy != "top_r":
        assert certificate.work["panels"] > 0
    if epsilon_of(POLICIES[policy]) is not None:
        assert certificate.omitted_mass.max() <= epsilon_of(POLICIES[policy]) * 1.001


@pytest.mark.parametrize("kind", KINDS)
def test_relu_of_each_kind_equals_dense(isa, kind):
    i = KINDS.index(kind)
    check_relu_equals_dense(kind, ("all", "causal", "masked")[i % 3], 1 + i // 3 % 3)


@pytest.mark.slow
@pytest.mark.parametrize("power", [1, 2, 3])
@pytest.mark.parametrize("visibility", ["all", "causal", "masked"])
@pytest.mark.parametrize("kind", KINDS)
def test_relu_equals_dense(isa, kind, visibility, power):
    check_relu_equals_dense(kind, visibility, power)


def check_relu_equals_dense(kind, visibility, power):
    m = 600 if visibility == "causal" else 70
    case = make(kind, 4, n=600, m=m, heads=2, kv_heads=1, visibility=visibility)
    for quantile in (0.1, 0.9):
        check_relu(case, between(case.logits, quantile), power)


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 33, 64, 65, 511, 512, 513, 528, 1025, 1600])
def test_lengths(isa, n):
    case = make("near one-hot", n, n=n, m=n, heads=2, kv_heads=2, visibility="causal")
    check(case, dict())
    check_relu(case, 0.3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (9, 3), (8, 1), (32, 2), (7, 7)])
def test_dtypes_and_groups(isa, dtype, heads, kv_heads):
    case = make(
        "clustered", 5, n=700, m=90, batch=2, heads=heads, kv_heads=kv_heads, dtype=dtype, d=64
    )
    check(case, dict())


@pytest.mark.parametrize(
    "d, value_dim",
    [(1, 1), (2, 3), (7, 5), (16, 16), (80, 80), (96, 64), (128, 128), (256, 40), (512, 512)],
)
def test_dimensions(isa, d, value_dim):
    case = make("random", 6, n=640, m=300, d=d, value_dim=value_dim, visibility="all")
    check(case, dict())
    check_relu(case, between(case.logits, 0.8))


def test_threshold_without_a_tail_is_the_papers(isa):
    case = make("clustered", 7, n=900, m=200)
    b = between(case.logits, 0.9)
    out, certificate = hsr.softmax_attention(
        case.q, case.k, case.v, threshold=b, tail="drop", return_certificate=True
    )
    kept = case.logits >= b
    assert (certificate.density == np.float32(kept.mean(axis=-1))).all()
    some = kept.any(axis=-1)
    np.testing.assert_allclose(out[some], case.softmax(kept)[some], atol=2e-5)


def test_one_threshold_a_query(isa):
    case = make("random", 8, n=600, m=100, heads=2, kv_heads=1)
    b = np.quantile(case.logits, 0.8, axis=-1)
    out = hsr.relu_attention(case.q, case.k, case.v, threshold=b)
    np.testing.assert_allclose(out, case.relu(b[..., None]), atol=2e-5)


def test_queries_of_length_zero_over_a_key_without_a_code(isa):
    rng = np.random.default_rng(3)
    k, v = (rng.standard_normal((1, 1, 600, 64)).astype(np.float32) for _ in "kv")
    k[0, 0, 5] *= 1e31
    out, certificate = hsr.softmax_attention(
        np.zeros_like(k), k, v, is_causal=True, return_certificate=True
    )
    means = v[0, 0].astype(np.float64).cumsum(axis=0) / np.arange(1, 601)[:, None]
    assert (np.abs(out[0, 0] - means).max(axis=1) <= certificate.error_bound[0, 0]).all()
    assert certificate.error_bound.max() < 1e-3


def test_excesses_of_the_size_of_their_rounding(isa):
    """All keys just above the threshold: the weights are differences of nearly equal numbers."""
    rng = np.random.default_rng(9)
    q = np.repeat(rng.standard_normal((1, 1, 1, 64)), 40, axis=2).astype(np.float32)
    k = (np.repeat(rng.standard_normal((1, 1, 1, 64)), 300, axis=2)).astype(np.float32)
    k += (1e-6 * rng.standard_normal(k.shape)).astype(np.float32)
    v = rng.standard_normal((1, 1, 300, 64)).astype(np.float32)
    case = Case(q, k, v)
    b = float(np.median(case.logits[0, 0, 0]))
    out, certificate = hsr.relu_attention(q, k, v, threshold=b, return_certificate=True)
    error = np.abs(out - case.relu(b)).max(axis=-1)
    assert error.max() < 1e-4 and (error <= certificate.error_bound).all()


def test_chunks_are_the_prompt(isa):
    """A prompt in chunks attends to everything before it through the same code."""
    case = make("near one-hot", 10, n=1500, m=1500, heads=4, kv_heads=2, visibility="causal")
    whole = hsr.softmax_attention(case.q, case.k, case.v, is_causal=True, epsilon=1e-5)
    cache = hsr.KVCache(hsr.SoftmaxPolicy(epsilon=1e-5))
    pieces = []
    for start in range(0, 1500, 333):
        part = slice(start, min(start + 333, 1500))
        cache.append(case.k[:, :, part], case.v[:, :, part])
        pieces.append(cache.attend(case.q[:, :, part]))
    np.testing.assert_allclose(np.concatenate(pieces, axis=2), whole, atol=1e-3)
    np.testing.assert_allclose(whole, case.softmax(), atol=1e-3)


def test_later_keys_change_nothing(isa):
    """Causality: a row is the same, bit by bit, whatever stands behind its position."""
    case = make("random", 11, n=1040, m=1040, visibility="causal")
    out = hsr.softmax_attention(case.q, case.k, case.v, is_causal=True)
    k, v = case.k.copy(), case.v.copy()
    # The codes are centred on all keys: keep their mean and change the rest.
    k[:, :, 700:] = k[:, :, 700:][:, :, ::-1]
    v[:, :, 700:] = -v[:, :, 700:]
    np.testing.assert_array_equal(
        hsr.softmax_attention(case.q, k, v, is_causal=True)[:, :, :640], out[:, :, :640]
    )


def test_many_small_weights_do_not_vanish(isa):
    """Half of the mass in weights of two thirds of a digit, beside larger ones that set the digit."""
    n, m, d = 76_800, 24, 16
    rng = np.random.default_rng(13)
    large = (
        np.arange(n) % 150 == 7
    )  # 512 keys of 1/1,024 of the mass each, the others 1/150 of that
    direction = np.ones(d) / 4
    logits = np.where(large, np.log(150.0), 0.0)
    k = (4 * logits[:, None] * direction).astype(np.float32)[None, None]
    q = np.broadcast_to(direction, (1, 1, m, d)).astype(np.float32)
    v = np.where(large[:, None], -1.0, 1.0) + 0.1 * rng.standard_normal((n, d))
    case = Case(q, k, v.astype(np.float32)[None, None])
    exact = case.softmax()
    assert np.abs(exact).max() < 0.05
    out, certificate = hsr.softmax_attention(
        case.q, case.k, case.v, epsilon=1e-4, return_certificate=True
    )
    assert certificate.work["sketched"] > 0.9 * m * n
    np.testing.assert_allclose(out, exact, atol=0.01)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e15])
def test_values_of_any_size(isa, size):
    case = make("random", 14, n=1200, m=1200, visibility="causal")
    v = (case.v * np.float32(size)).astype(np.float32)
    out = hsr.softmax_attention(case.q, case.k, v, is_causal=True)
    np.testing.assert_allclose(out / size, case.softmax(), atol=0.1)


def test_threads_change_nothing(isa):
    case = make("clustered", 12, n=900, m=900, heads=6, kv_heads=3, visibility="causal")
    before = _native.num_threads()
    outs = []
    try:
        for threads in (1, 2, 3):
            hsr.set_num_threads(threads)
            outs.append(hsr.softmax_attention(case.q, case.k, case.v, is_causal=True))
    finally:
        hsr.set_num_threads(before)
    np.testing.assert_allclose(outs[0], outs[1], atol=2e-2)
    np.testing.assert_allclose(outs[0], outs[2], atol=2e-2)


def test_density_is_what_was_kept(isa):
    case = make("near one-hot", 13, n=2100, m=2100, d=64, visibility="causal")
    policy = hsr.SoftmaxPolicy()
    _, certificate = attend_once(policy, case.q, case.k, case.v, None, True, None, certify=True)
    assert certificate.density[..., -100:].max() < 0.3
    work = certificate.work
    assert 0 < work["skipped"] < work["sketch_scored"]


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    n=st.integers(1, 1300),
    m=st.integers(24, 200),
    d=st.sampled_from([3, 16, 31, 64]),
    epsilon=st.sampled_from([1e-6, 0.01, 0.03, 0.5]),
    visibility=st.sampled_from(["all", "causal", "masked"]),
    seed=st.integers(0, 10**6),
)
def test_certificates_hold(kind, n, m, d, epsilon, visibility, seed):
    case = make(kind, seed, n=n, m=m, d=d, heads=2, kv_heads=1, visibility=visibility)
    certificate = check(case, dict(epsilon=epsilon))
    assert certificate.omitted_mass.max() <= max(epsilon * 1.001, 1e-6)
