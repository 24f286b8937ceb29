"""Every shape, dtype and grouping is decoded by the same kernel, within its certificate."""

import numpy as np
import pytest

import hsr_attention as hsr
from attention_cases import Case, make

HEAD_DIMS = (64, 80, 96, 128, 256)
GROUPS = tuple(range(1, 17))
DTYPES = ("float32", "bfloat16", "float16")
N = 1500


def decode(case, policy=None, mask=None, pieces=(N,)):
    """Append in pieces, attend from the newest position, and hold the answer to its certificate."""
    cache = hsr.KVCache(policy)
    first = 0
    for count in pieces:
        cache.append(case.k[:, :, first : first + count], case.v[:, :, first : first + count])
        first += count
    out, certificate = cache.attend(case.q, mask=mask, return_certificate=True)
    exact = Case(case.q, case.k, case.v, mask=mask).softmax()
    error = np.abs(out.astype(np.float64) - exact).max(axis=-1)
    assert (error <= certificate.error_bound).all()
    assert out.shape == (*case.q.shape[:3], case.v.shape[3])
    return error, certificate


def assert_sparse(certificate, kv_heads, tiles, batch=1):
    """The first plane of every coded key was scanned, and nothing fell back to full rows.

    ``tiles``: groups of up to four query heads that are scored together, a key head.
    """
    work = certificate.work
    assert work["scanned_full"] == 0
    assert work["scanned_four"] + work["scanned_eight"] == batch * kv_heads * tiles
    assert work["full_scored"] < 0.2 * work["sketch_scored"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims_and_dtypes(isa, head_dim, dtype):
    case = make("clustered", n=N, m=1, d=head_dim, heads=6, kv_heads=2, dtype=dtype)
    _, certificate = decode(case)
    assert_sparse(certificate, 2, 1)
    assert (certificate.density < 0.9).all()


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_queries(isa, group, dtype):
    case = make("clustered", n=N, m=1, d=64, heads=2 * group, kv_heads=2, dtype=dtype)
    _, certificate = decode(case)
    assert_sparse(certificate, 2, -(-group // 4))


@pytest.mark.parametrize("group", (1, 3, 5, 8, 16))
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_groups_of_every_head_dim(group, head_dim):
    case = make("clustered", n=N, m=1, d=head_dim, heads=group, dtype="bfloat16")
    _, certificate = decode(case)
    assert_sparse(certificate, 1, -(-group // 4))


@pytest.mark.parametrize("value_dim", (64, 80, 128))
def test_values_of_another_dimension(isa, value_dim):
    case = make("clustered", n=N, m=1, d=96, value_dim=value_dim, heads=4, kv_heads=2)
    _, certificate = decode(case)
    assert_sparse(certificate, 2, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", (64, 80, 256))
def test_padded_batches(isa, head_dim, dtype):
    """Rows of a batch that start at different places, as left padding makes them."""
    case = make("clustered", n=N, m=1, d=head_dim, batch=4, heads=6, kv_heads=2, dtype=dtype)
    mask = np.arange(N) >= np.array([0, 1, 700, N - 1])[:, None, None]
    _, certificate = decode(case, mask=mask)
    assert_sparse(certificate, 2, 1, batch=4)
    alone = Case(case.q[2:3], case.k[2:3, :, 700:], case.v[2:3, :, 700:])
    cache = hsr.KVCache()
    cache.append(alone.k, alone.v)
    bound = cache.attend(alone.q, return_certificate=True)[1].error_bound
    # Over the heads together: which keys one head leaves out depends on the centre of the codes.
    assert certificate.error_bound[2].max() < 4 * bound[0].max() + 1e-3


@pytest.mark.parametrize("n", (1, 15, 16, 17, 31, 33, 2047, 2048, 2049, 4099))
@pytest.mark.parametrize("head_dim", (64, 80))
def test_ragged_lengths(isa, n, head_dim):
    """Lengths around the block of 16 keys and the chunk of 2,048, filled piece by piece."""
    case = make("clustered", n=n, m=1, d=head_dim, heads=3, kv_heads=1)
    for pieces in ((n,), (n - n // 2, n // 2)):
        _, certificate = decode(case, pieces=pieces)
        assert certificate.work["scanned_full"] == 0
        if n < 16:  # no block yet: all keys at full precision
            assert certificate.work["sketch_scored"] == 0


def test_the_only_way_to_full_precision_is_seen():
    """Logits in the thousands, where even 8-bit codes decide nothing: counted, and exact."""
    case = make("huge logits", n=N, m=1, d=64, heads=3)
    error, certificate = decode(case)
    assert certificate.work["scanned_full"] == 1
    assert certificate.work["full_scored"] >= N - 16
    assert error.max() < 1e-3
