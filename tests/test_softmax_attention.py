"""``softmax_attention`` as a function: shapes, kinds of arrays, masks, agreement with torch."""

import numpy as np
import pytest

import hsr_attention as hsr
from attention_cases import Case, make


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (4, 4), (6, 2), (9, 3), (8, 1), (14, 2)])
def test_grouped_heads(isa, heads, kv_heads):
    case = make("random", n=90, m=5, batch=2, heads=heads, kv_heads=kv_heads)
    out, certificate = hsr.softmax_attention(case.q, case.k, case.v, return_certificate=True)
    assert out.shape == (2, heads, 5, 32) and out.dtype == np.float32
    error = np.abs(out - case.softmax()).max(axis=-1)
    assert (error <= certificate.error_bound).all() and error.max() < 0.1


@pytest.mark.parametrize("m, n", [(0, 5), (3, 0), (0, 0), (1, 1), (7, 3), (3, 7)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_any_numbers_of_queries_and_keys(isa, m, n, is_causal):
    case = make("random", n=n, m=m, heads=2, visibility="causal" if is_causal else "all")
    out = hsr.softmax_attention(case.q, case.k, case.v, is_causal=is_causal)
    np.testing.assert_allclose(out, case.softmax(), atol=1e-5)


def test_causal_prefill_equals_decoding_token_by_token(isa):
    case = make("random", 1, n=120, m=120, heads=4, kv_heads=2, visibility="causal")
    policy = hsr.SoftmaxPolicy(top_r=10, tail="drop")
    out = hsr.softmax_attention(case.q, case.k, case.v, top_r=10, tail="drop", is_causal=True)
    cache = hsr.KVCache(policy)
    for t in range(120):
        cache.append(case.k[:, :, t : t + 1], case.v[:, :, t : t + 1])
        step = cache.attend(case.q[:, :, t : t + 1])
        np.testing.assert_allclose(step, out[:, :, t : t + 1], atol=2e-6)


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (2, 1), (2, 4)])
def test_masks_broadcast(isa, shape):
    case = make("random", 2, n=50, m=4, batch=2, heads=2)
    mask = np.random.default_rng(0).random((*shape, 50)) < 0.7
    masked = Case(case.q, case.k, case.v, mask=np.broadcast_to(mask, (2, 4, 50)))
    out = hsr.softmax_attention(case.q, case.k, case.v, epsilon=1e-6, tail="drop", mask=mask)
    np.testing.assert_allclose(out, masked.softmax(), atol=1e-5)
    for view in (np.asfortranarray(mask), mask[:, :, ::-1].copy()[:, :, ::-1]):
        again = hsr.softmax_attention(case.q, case.k, case.v, epsilon=1e-6, tail="drop", mask=view)
        np.testing.assert_array_equal(out, again)


def test_a_mask_of_left_padding(isa):
    """Padding must not change a row: the answer is that of the row alone."""
    case = make("random", 3, n=80, m=6, batch=2, heads=2)
    mask = np.ones((2, 1, 80), bool)
    mask[1, :, :33] = False
    out = hsr.softmax_attention(case.q, case.k, case.v, top_r=20, tail="drop", mask=mask)
    alone = hsr.softmax_attention(
        case.q[1:], case.k[1:, :, 33:], case.v[1:, :, 33:], top_r=20, tail="drop"
    )
    np.testing.assert_allclose(out[1:], alone, atol=2e-6)


def test_scale(isa):
    case = make("random", 4, n=60)
    doubled = Case((case.q * np.float32(2)), case.k, case.v)
    a = hsr.softmax_attention(case.q, case.k, case.v, scale=0.25, top_r=10, tail="drop")
    b = hsr.softmax_attention(doubled.q, case.k, case.v, scale=0.125, top_r=10, tail="drop")
    np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_close_to_torch(dtype, is_causal):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(5)
    q, k, v = (
        torch.from_numpy(rng.standard_normal((2, h, 64, 32)).astype(np.float32)).to(
            getattr(torch, dtype)
        )
        for h in (4, 2, 2)
    )
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=is_causal, enable_gqa=True
    )
    out, certificate = hsr.softmax_attention(
        q, k, v, epsilon=1e-5, tail="drop", is_causal=is_causal, return_certificate=True
    )
    assert out.dtype == q.dtype and isinstance(out, torch.Tensor)
    error = (out.double() - expected.double()).abs().amax(-1).numpy()
    # torch rounds too.
    assert (error <= 2 * certificate.error_bound + 2e-5).all()


def test_inputs_are_left_alone():
    case = make("random", 6, n=70)
    before = [x.copy() for x in (case.q, case.k, case.v)]
    for x in (case.q, case.k, case.v):
        x.flags.writeable = False
    hsr.softmax_attention(case.q, case.k, case.v)
    for x, y in zip((case.q, case.k, case.v), before, strict=True):
        np.testing.assert_array_equal(x, y)


def test_the_same_call_twice_gives_the_same_answer(isa):
    case = make("clustered", 7, n=5000, heads=4, kv_heads=2, m=9)
    first = hsr.softmax_attention(case.q, case.k, case.v)
    for _ in range(3):
        np.testing.assert_array_equal(first, hsr.softmax_attention(case.q, case.k, case.v))


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads_do_not_change_the_answer(threads):
    case = make("random", 8, n=9000, heads=4, kv_heads=2, m=3)
    before = hsr.info()["num_threads"]
    expected = hsr.softmax_attention(case.q, case.k, case.v)
    try:
        hsr.set_num_threads(threads)
        np.testing.assert_array_equal(expected, hsr.softmax_attention(case.q, case.k, case.v))
    finally:
        hsr.set_num_threads(before)


def test_levels_agree_within_their_certificates():
    from hsr_attention import _native

    before = _native.isa_in_use()
    case = make("random", 9, n=3000, m=3)
    answers = []
    for level in _native.isa_available():
        _native.use_isa(level)
        answers.append(hsr.softmax_attention(case.q, case.k, case.v, return_certificate=True))
    _native.use_isa(before)
    for out, certificate in answers[1:]:
        bound = certificate.error_bound + answers[0][1].error_bound
        assert (np.abs(out - answers[0][0]).max(axis=-1) <= bound).all()
