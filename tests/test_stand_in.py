"""What stands in for the keys that a sketched tail leaves out: values that the query sees, and no others."""

import numpy as np
import pytest

import hsr_attention as hsr
from attention_cases import make

N = 5000


@pytest.fixture
def case():
    return make("random", 21, n=N, heads=4, kv_heads=2, m=3)


def cached(case, v):
    layer = hsr.KVCache(hsr.SoftmaxPolicy(epsilon=0.3))
    layer.append(case.k, v)
    return layer


def test_hidden_values_do_not_enter(isa, case):
    mask = np.ones((1, 1, N), dtype=bool)
    mask[..., :1500] = False
    other = case.v.copy()
    other[:, :, :1500] = 1e6
    out = [cached(case, v).attend(case.q, mask=mask) for v in (case.v, other)]
    np.testing.assert_array_equal(*out)


def test_values_of_the_future_do_not_enter(isa, case):
    q = np.repeat(case.q[:, :, :1], 1000, axis=2)
    other = case.v.copy()
    other[:, :, N - 999 :] = 1e6
    out = [cached(case, v).attend(q)[:, :, 0] for v in (case.v, other)]
    np.testing.assert_array_equal(*out)


def test_cropped_values_do_not_enter(isa, case):
    """Not even their rounding: 1e17 once in a sum would leave it wrong by more than one."""
    expected = cached(case, case.v).attend(case.q)
    layer = hsr.KVCache(hsr.SoftmaxPolicy(epsilon=0.3))
    layer.append(case.k[:, :, :3000], case.v[:, :, :3000])
    layer.append(case.k[:, :, :1500], np.full_like(case.v[:, :, :1500], 1e17))
    layer.crop(3000)
    layer.append(case.k[:, :, 3000:], case.v[:, :, 3000:])
    # The centre of the codes was taken at another time, so the answers differ, within their bounds.
    out, certificate = layer.attend(case.q, return_certificate=True)
    assert np.abs(out - case.softmax()).max() < 2 * np.abs(expected - case.softmax()).max() + 0.05
    assert (np.abs(out - case.softmax()).max(axis=-1) <= certificate.error_bound).all()


def test_it_halves_the_error(isa):
    """A key in ten weighs 300 times as much as the rest; their values are +1, the others' -1.

    With omitted mass W the exact answer is 1 - 2 W or so: leaving W out is off by 2 W.
    """
    rng = np.random.default_rng(3)
    n, d = 4096, 32
    heavy = rng.random(n) < 0.1
    q = np.zeros((1, 1, 1, d), dtype=np.float32)
    q[..., 0] = 1.0
    k = 0.05 * rng.standard_normal((1, 1, n, d)).astype(np.float32)
    k[0, 0, heavy, 0] += np.float32(np.log(300.0))
    v = np.repeat(np.where(heavy, 1.0, -1.0).astype(np.float32)[None, None, :, None], 8, axis=3)
    policy = hsr.SoftmaxPolicy(epsilon=0.045)  # the light keys, and hardly a heavy one
    layer = hsr.KVCache(policy)
    layer.append(k, v)
    out, certificate = layer.attend(q, 1.0, return_certificate=True)
    logits = k[0, 0].astype(np.float64) @ q[0, 0, 0].astype(np.float64)
    weight = np.exp(logits)
    exact = (weight @ v[0, 0, :, 0].astype(np.float64)) / weight.sum()
    assert certificate.density[0, 0, 0] < 0.2, "the light keys are to be left out"
    left_out = weight[~heavy].sum() / weight.sum()
    assert abs(out[0, 0, 0, 0] - exact) < left_out
    assert abs(out[0, 0, 0, 0] - exact) <= certificate.error_bound[0, 0, 0]


@pytest.mark.parametrize(
    "spread, m, most",
    [(1.0, 2, 0.3), (1.0, 40, 0.4), (3.5, 2, 0.8)],
    ids=["most are kept", "most are kept, a prompt", "few are kept"],
)
def test_it_beats_the_mean_value_where_logits_are_normally_distributed(isa, spread, m, most):
    """Values are linear in the keys, so that those left out have another mean than all of them.

    Where most keys are kept it lies beyond the mean of all, where few are, towards theirs.
    """
    rng = np.random.default_rng(5)
    n, d = 8192, 32
    k = rng.standard_normal((1, 1, n, d)).astype(np.float32)
    v = k @ rng.standard_normal((d, 16)).astype(np.float32)
    q = rng.standard_normal((1, 1, m, d))
    q = (q * spread / np.linalg.norm(q, axis=-1, keepdims=True)).astype(np.float32)
    layer = hsr.KVCache(hsr.SoftmaxPolicy(epsilon=0.06))
    layer.append(k, v)
    out, certificate = layer.attend(q, 1.0, return_certificate=True)
    ours, of_means = [], []
    for i in range(m):
        seen = n - m + 1 + i
        values = v[0, 0, :seen].astype(np.float64)
        logits = k[0, 0, :seen].astype(np.float64) @ q[0, 0, i].astype(np.float64)
        weight = np.exp(logits)
        exact = weight @ values / weight.sum()
        kept = np.argsort(-logits)[: round(float(certificate.density[0, 0, i]) * seen)]
        left = np.delete(weight, kept).sum()
        of_mean = (weight[kept] @ values[kept] + left * values.mean(axis=0)) / weight.sum()
        ours.append(out[0, 0, i] - exact)
        of_means.append(of_mean - exact)
        assert np.abs(ours[-1]).max() <= certificate.error_bound[0, 0, i]
    assert np.linalg.norm(ours) < most * np.linalg.norm(of_means)
