"""The growing cache of one layer: append, crop, reorder, views."""

import time

import numpy as np
import pytest

import hsr_attention as hsr
from attention_cases import Case, make

POLICIES = {
    "default": hsr.SoftmaxPolicy(),
    "epsilon, drop": hsr.SoftmaxPolicy(epsilon=0.05, tail="drop"),
    "top_r, drop": hsr.SoftmaxPolicy(top_r=16, tail="drop"),
    "exact": hsr.SoftmaxPolicy(exact=True, epsilon=1e-9),
    "relu": hsr.ReLUPolicy(threshold=0.5),
}


def filled(policy, k, v, pieces=None):
    cache = hsr.KVCache(policy)
    first = 0
    for count in pieces or (k.shape[2],):
        cache.append(k[:, :, first : first + count], v[:, :, first : first + count])
        first += count
    assert first == k.shape[2] == len(cache)
    return cache


def check(cache, case, exact=None):
    """Hold the newest queries against float64 dense attention."""
    out, certificate = cache.attend(case.q, mask=case.mask, return_certificate=True)
    m, n = case.logits.shape[2:]
    hidden = np.arange(n) > np.arange(n - m, n)[:, None]
    shown = Case(case.q, case.k, case.v, case.scale, False, case.mask)
    shown.logits[..., hidden] = -np.inf
    relu = isinstance(cache.policy, hsr.ReLUPolicy)
    if exact is None:
        exact = shown.relu(0.5) if relu else shown.softmax()
    error = np.abs(out.astype(np.float64) - exact).max(axis=-1)
    assert (error <= certificate.error_bound).all()
    return out


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("pieces", [(1,) * 100, (37, 1, 1, 61), (16, 16, 16, 52), (99, 1)])
def test_pieces_equal_the_whole(isa, policy, pieces):
    case = make("random", n=100, m=2, batch=2, heads=4, kv_heads=2)
    whole = check(filled(POLICIES[policy], case.k, case.v), case)
    parts = check(filled(POLICIES[policy], case.k, case.v, pieces), case)
    if policy in ("exact", "top_r, drop", "relu"):
        np.testing.assert_allclose(whole, parts, atol=2e-6)


@pytest.mark.parametrize("kind", ["random", "growing norms", "common mean", "one loud coordinate"])
def test_token_by_token_over_a_growing_sequence(isa, kind):
    """Every step of a decode is right, whatever the codes' centre was when they were made."""
    full = make(kind, n=700, m=700, d=16, heads=2)
    cache = hsr.KVCache()
    for n in range(1, 701):
        cache.append(full.k[:, :, n - 1 : n], full.v[:, :, n - 1 : n])
        if n < 40 or n % 37 == 0:
            now = Case(full.q[:, :, n - 1 : n], full.k[:, :, :n], full.v[:, :, :n])
            check(cache, now)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("left", [0, 1, 15, 16, 17, 50, 99, 100, 500])
def test_crop(isa, policy, left):
    case = make("random", 1, n=100, m=1)
    cache = filled(POLICIES[policy], case.k, case.v)
    cache.crop(left)
    assert len(cache) == min(left, 100)
    # What was cropped may be written anew, with other numbers.
    other = make("clustered", 2, n=60, m=1)
    cache.append(other.k, other.v)
    k, v = (
        np.concatenate([a[:, :, :left], b], axis=2)
        for a, b in ((case.k, other.k), (case.v, other.v))
    )
    check(cache, Case(case.q, k, v))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0, 1], [1, 1, 1], [2], [0, 0, 1, 2, 2], [1, 0]])
def test_reorder(isa, policy, rows):
    case = make("random", 3, n=70, m=2, batch=3, heads=4, kv_heads=2)
    cache = filled(POLICIES[policy], case.k, case.v)
    cache.reorder(rows)
    more = make("random", 4, n=20, m=1, batch=len(rows), heads=4, kv_heads=2)
    cache.append(more.k, more.v)
    k = np.concatenate([case.k[rows], more.k], axis=2)
    v = np.concatenate([case.v[rows], more.v], axis=2)
    check(cache, Case(case.q[rows], k, v))


def test_views_stay_valid():
    """``rows`` are views without a copy; later appends, crops and reorders leave them alone."""
    case = make("random", 5, n=2000, batch=2, heads=2, kv_heads=2)
    cache = filled(None, case.k[:, :, :50], case.v[:, :, :50])
    keys, values = cache.rows()
    assert keys.bits.shape == (2, 2, 50, 32) and not keys.bits.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        keys.bits[0, 0, 0, 0] = 1
    for n in range(50, 2000):
        cache.append(case.k[:, :, n : n + 1], case.v[:, :, n : n + 1])
    np.testing.assert_array_equal(keys.bits, case.k[:, :, :50])
    np.testing.assert_array_equal(values.bits, case.v[:, :, :50])
    again = cache.rows()[0]
    np.testing.assert_array_equal(again.bits, case.k)
    cache.reorder([1])
    np.testing.assert_array_equal(again.bits, case.k)
    del cache
    np.testing.assert_array_equal(again.bits, case.k)


def test_views_survive_a_crop_that_is_written_over():
    case = make("random", 6, n=64)
    cache = filled(None, case.k, case.v)
    keys = cache.rows()[0].bits
    before = keys.copy()
    cache.crop(10)
    cache.append(-case.k[:, :, :54], case.v[:, :, :54])
    # The first ten were not touched; the rest is the memory of the cache.
    np.testing.assert_array_equal(keys[:, :, :10], before[:, :, :10])
    np.testing.assert_array_equal(cache.rows()[0].bits[:, :, 10:], -case.k[:, :, :54])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_caches(isa, dtype):
    case = make("random", 7, n=80, m=2, dtype=dtype)
    cache = filled(None, case.k, case.v, (30, 50))
    assert cache.attend(case.q).dtype == case.q.dtype
    check(cache, case)
    assert cache.row_nbytes == 80 * 2 * 32 * 2
    single = Case(case.q.astype(np.float32), case.k, case.v)
    check(cache, single)


def test_torch_tensors():
    torch = pytest.importorskip("torch")
    case = make("random", 8, n=80, m=2, dtype="bfloat16")
    q, k, v = (torch.from_numpy(x.astype(np.float32)).bfloat16() for x in (case.q, case.k, case.v))
    cache = hsr.KVCache()
    cache.append(k, v)
    out = cache.attend(q)
    assert out.dtype == torch.bfloat16 and out.shape == (1, 3, 2, 32)
    expected = filled(None, case.k, case.v).attend(case.q)
    np.testing.assert_array_equal(out.float().numpy(), expected.astype(np.float32))


def test_append_takes_any_layout():
    case = make("random", 9, n=40, batch=2, heads=2, kv_heads=2)
    plain = filled(None, case.k, case.v).rows()[0].bits
    swapped = np.ascontiguousarray(case.k.swapaxes(1, 2)).swapaxes(1, 2)
    backwards = case.k[:, :, ::-1].copy()[:, :, ::-1]
    for keys in (swapped, backwards, np.asfortranarray(case.k)):
        np.testing.assert_array_equal(filled(None, keys, case.v).rows()[0].bits, plain)


@pytest.mark.parametrize(
    "keys, values, error, message",
    [
        ((1, 2, 3, 9), (1, 2, 3, 8), ValueError, "must have .*head_dim.* like the cache"),
        ((1, 3, 3, 8), (1, 3, 3, 8), ValueError, "must have .*kv_heads.* like the cache"),
        ((2, 2, 3, 8), (2, 2, 3, 8), ValueError, "must have .*batch.* like the cache"),
        ((1, 2, 3, 8), (1, 2, 4, 8), ValueError, "values must have .* like keys, got"),
        ((2, 3, 8), (2, 3, 8), ValueError, r"keys must have shape \[batch, heads"),
        ("float16", "float16", TypeError, "keys must be float32 like the cache, got float16"),
        ("float32", "float16", TypeError, "values must be float32 like keys, got float16"),
        ("nan keys", None, ValueError, r"keys must be finite, got nan at \(0, 1, 2, 3\)"),
        ("inf values", None, ValueError, r"values must be finite, got -inf at \(0, 0, 1, 7\)"),
    ],
)
def test_errors_leave_the_cache_unchanged(keys, values, error, message):
    case = make("random", 10, n=37, d=8, heads=2, kv_heads=2, m=1)
    cache = filled(None, case.k, case.v)
    before = cache.attend(case.q)
    if keys == "nan keys":
        k, v = np.zeros((2, 1, 2, 3, 8), np.float32)
        k[0, 1, 2, 3] = np.nan
    elif keys == "inf values":
        k, v = np.zeros((2, 1, 2, 3, 8), np.float32)
        v[0, 0, 1, 7] = -np.inf
    elif isinstance(keys, str):
        k, v = np.zeros((1, 2, 3, 8), keys), np.zeros((1, 2, 3, 8), values)
    else:
        k, v = np.zeros(keys, np.float32), np.zeros(values, np.float32)
    with pytest.raises(error, match=message):
        cache.append(k, v)
    assert len(cache) == 37
    np.testing.assert_array_equal(cache.attend(case.q), before)


def test_attend_refuses_what_does_not_fit():
    empty = hsr.KVCache()
    q = np.zeros((1, 2, 1, 8), np.float32)
    with pytest.raises(ValueError, match="cache must hold keys"):
        empty.attend(q)
    with pytest.raises(ValueError, match="empty"):
        empty.rows()
    case = make("random", 11, n=5, d=8, heads=2, kv_heads=2)
    cache = filled(None, case.k, case.v)
    for shape, message in (
        ((1, 2, 6, 8), "q must have at most 5 positions"),
        ((1, 3, 1, 8), "q must have a multiple of kv_heads = 2 heads, got 3"),
        ((1, 0, 1, 8), "q must have a multiple of kv_heads = 2 heads, got 0"),
        ((2, 2, 1, 8), "q must have batch 1 like the keys, got 2"),
        ((1, 2, 1, 7), "q must have head_dim 8 like the keys, got 7"),
        ((2, 1, 8), r"q must have shape \[batch, heads, sequence, head_dim\], got \(2, 1, 8\)"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.attend(np.zeros(shape, np.float32))
    assert cache.attend(np.zeros((1, 2, 0, 8), np.float32)).shape == (1, 2, 0, 8)


def test_bad_crops_and_reorders():
    case = make("random", 12, n=5, batch=2, heads=1)
    cache = filled(None, case.k, case.v)
    with pytest.raises(ValueError, match="n must be >= 0, got -1"):
        cache.crop(-1)
    with pytest.raises(TypeError, match=r"n must be an integer, got 2\.5"):
        cache.crop(2.5)
    for rows in ([2], [-1], [], [[0]], [0.5]):
        with pytest.raises(ValueError, match="batch_indices must"):
            cache.reorder(rows)
    assert len(cache) == 5


def test_description_and_sizes():
    cache = hsr.KVCache(hsr.SoftmaxPolicy(epsilon=0.1))
    assert "empty" in repr(cache) and cache.nbytes == 0 and len(cache) == 0
    cache.reorder([0])
    cache.crop(3)
    case = make("random", 13, n=160, d=64)
    cache.append(case.k, case.v)
    assert "n=160" in repr(cache) and "epsilon=0.1" in repr(cache)
    assert cache.row_nbytes == 2 * 160 * 64 * 4
    # 8 bits a key coordinate, 4 a value coordinate, and their parameters.
    assert 160 * 96 <= cache.code_nbytes <= 160 * 120
    assert cache.nbytes == cache.row_nbytes + cache.code_nbytes
    with pytest.raises(TypeError, match="policy must be a SoftmaxPolicy or a ReLUPolicy"):
        hsr.KVCache("epsilon=0.1")


def cost_of_appending(n, tokens=512, repeats=7):
    """Return the median seconds to append ``tokens`` one by one to a cache of n."""
    rng = np.random.default_rng(0)
    cache = hsr.KVCache()
    cache.append(*rng.standard_normal((2, 1, 3, n, 64), dtype=np.float32))
    token = rng.standard_normal((2, 1, 3, 1, 64), dtype=np.float32)
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(tokens):
            cache.append(*token)
        taken.append(time.perf_counter() - start)
        cache.crop(n)
    return min(taken)


def test_appending_costs_the_same_at_any_length():
    """Within 2x by design; a loose bound here, since the machine may be busy."""
    short, long = cost_of_appending(5_000), cost_of_appending(100_000)
    assert long < 4 * short


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_answer_in_place_is_the_numpy_one_rounded(dtype):
    """Tensors cross by address: any strides, and answers and bounds rounded as torch rounds."""
    torch = pytest.importorskip("torch")
    from hsr_attention import arguments

    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(2, 600, h, 48, generator=generator) for h in (2, 2)]
    k, v = (x.to(getattr(torch, dtype)).transpose(1, 2) for x in made)  # not contiguous
    q = torch.randn(2, 3, 6, 48, generator=generator).to(k.dtype).transpose(1, 2)
    cache = filled(None, k, v)
    out, certificate = cache.attend(q, return_certificate=True)
    wide = q.float().numpy()  # the same numbers, answered in float32 through numpy
    expected, plain = cache.attend(wide, return_certificate=True)
    assert out.dtype == k.dtype and out.is_contiguous()
    assert torch.equal(out, torch.from_numpy(expected).to(k.dtype))
    rounding = arguments.output_rounding(q, expected)
    np.testing.assert_allclose(certificate.error_bound, plain.error_bound + rounding, rtol=1e-6)
    assert torch.equal(cache.attend(q), out)
