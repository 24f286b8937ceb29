"""Attention over a low-dimensional index: the float64 reference, its rules, and its certificate."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hsr_attention as hsr
from attention_cases import KINDS, between, make
from hsr_attention.attention import reference

SERVED = {
    "flat": (2, 5),
    "convex_layers": (2,),
    "partition_tree": (1, 3, 8),
    "shallow_cutting": (2, 3),
    "auto": (2, 4),
}
INDEXES = [(kind, d) for kind, dims in SERVED.items() for d in dims]
VISIBILITIES = ("all", "causal", "masked")


def options(case):
    return {"scale": case.scale, "is_causal": case.is_causal, "mask": case.mask}


def close(out, exact, values):
    size = np.abs(values).max(initial=1e-30)
    np.testing.assert_allclose(out, exact, rtol=0, atol=2.0**-21 * size)


def certified(out, certificate, exact):
    error = np.abs(out - exact).max(axis=-1, initial=0)
    assert (error <= certificate.error_bound).all()


@pytest.mark.parametrize("visibility", VISIBILITIES)
@pytest.mark.parametrize(("kind", "d"), INDEXES)
def test_relu_equals_dense(kind, d, visibility):
    for shape, power in ((dict(m=7), 1), (dict(m=40, heads=4, kv_heads=2, batch=2), 3)):
        case = make("random", 3, n=400, d=d, value_dim=5, visibility=visibility, **shape)
        for quantile in (0.2, 0.95):
            b = between(case.logits, quantile)
            out, certificate = hsr.relu_attention(
                case.q, case.k, case.v, threshold=b, power=power, index=kind,
                return_certificate=True, **options(case),
            )  # fmt: skip
            close(out, case.relu(b, power), case.v)
            certified(out, certificate, case.relu(b, power))
            seen = np.maximum(np.isfinite(case.logits).sum(axis=-1), 1)
            kept = (case.logits > b).sum(axis=-1)
            np.testing.assert_allclose(certificate.density, kept / seen, rtol=1e-6)


@pytest.mark.parametrize("visibility", VISIBILITIES)
@pytest.mark.parametrize(("kind", "d"), INDEXES)
def test_softmax_keeps_what_the_rule_says(kind, d, visibility):
    case = make(
        "random", 5, n=900, m=30, d=d, value_dim=6, heads=4, kv_heads=2, visibility=visibility
    )
    exact = case.softmax()
    b = between(case.logits, 0.9)
    rules = (
        ({"threshold": b}, case.logits >= b),
        ({"top_r": 17}, case.largest(17)),
        ({"top_r": 5000}, np.isfinite(case.logits)),
        ({"epsilon": 0.02}, None),
    )
    for rule, kept in rules:
        out, certificate = hsr.softmax_attention(
            case.q, case.k, case.v, index=kind, return_certificate=True, **rule, **options(case)
        )
        certified(out, certificate, exact)
        seen = np.maximum(np.isfinite(case.logits).sum(axis=-1), 1)
        if kept is None:
            assert (certificate.omitted_mass <= 0.02).all()
            kept = case.largest(900)
        else:
            close(out, case.softmax(kept), case.v)
            np.testing.assert_allclose(certificate.density, kept.sum(-1) / seen, rtol=1e-6)
            left = 1 - (case.probabilities() * kept).sum(axis=-1)
            visible = np.isfinite(case.logits).any(axis=-1)
            assert (left[visible] <= certificate.omitted_mass[visible] + 1e-9).all()
        alone = hsr.softmax_attention(case.q, case.k, case.v, index=kind, **rule, **options(case))
        np.testing.assert_array_equal(out, alone)


@pytest.mark.parametrize("epsilon", [0.3, 0.01, 1e-4])
def test_epsilon_leaves_out_what_weighs_little(epsilon):
    case = make("random", 2, n=20_000, m=8, d=3)
    q = 20 * case.q
    out, certificate = hsr.softmax_attention(
        q, case.k, case.v, epsilon=epsilon, index="partition_tree", return_certificate=True
    )
    assert certificate.density.max() < 0.5
    for h in range(3):
        exact = reference.softmax_attention(q[0, h], case.k[0, 0], case.v[0, 0])
        certified(out[0, h], _Of(certificate.error_bound[0, h]), exact)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("visibility", VISIBILITIES)
def test_certificates_hold_on_hard_inputs(kind, visibility):
    case = make(kind, 7, n=600, m=6, d=3, value_dim=4, visibility=visibility)
    exact = case.softmax()
    for rule in ({"epsilon": 0.1}, {"top_r": 3}, {"threshold": between(case.logits, 0.8)}):
        out, certificate = hsr.softmax_attention(
            case.q, case.k, case.v, index="partition_tree", return_certificate=True,
            **rule, **options(case),
        )  # fmt: skip
        certified(out, certificate, exact)
        if "epsilon" in rule:
            assert (certificate.omitted_mass <= 0.1 + 1e-6).all()
    b = between(case.logits, 0.7)
    out, certificate = hsr.relu_attention(
        case.q, case.k, case.v, threshold=b, index="partition_tree", return_certificate=True,
        **options(case),
    )  # fmt: skip
    certified(out, certificate, case.relu(b))


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    n=st.integers(0, 300),
    d=st.integers(1, 4),
    epsilon=st.floats(1e-6, 0.9),
    visibility=st.sampled_from(VISIBILITIES),
)
def test_epsilon_bounds_the_omitted_mass(seed, n, d, epsilon, visibility):
    rng = np.random.default_rng(seed)
    q = (rng.normal(size=(1, 2, 9, d)) * 10.0 ** rng.uniform(-2, 2)).astype(np.float32)
    k, v = rng.normal(size=(2, 1, 1, n, d)).astype(np.float32)
    visible = reference.causal(n, n)[:9] if visibility == "causal" else np.ones((9, n), bool)
    visible = np.concatenate([visible, np.ones((9 - len(visible), n), bool)])
    if visibility == "masked":
        visible = rng.random((9, n)) < 0.7
    out, certificate = hsr.softmax_attention(
        q, k, v, epsilon=epsilon, index="partition_tree", return_certificate=True,
        is_causal=visibility == "causal", mask=visible[None] if visibility == "masked" else None,
    )  # fmt: skip
    assert (certificate.omitted_mass <= epsilon * (1 + 1e-6)).all()
    for h in range(2):
        exact = reference.softmax_attention(q[0, h], k[0, 0], v[0, 0], visible=visible)
        certified(out[0, h], _Of(certificate.error_bound[0, h]), exact)


class _Of:
    def __init__(self, error_bound):
        self.error_bound = error_bound


def test_decoding_with_a_growing_index():
    """An index built once answers token after token; query m sees what was appended before."""
    rng = np.random.default_rng(0)
    k, v = rng.normal(size=(2, 1, 1, 3000, 2)).astype(np.float32)
    index = hsr.ConvexLayersIndex(k[0, 0, :1000])
    for n in (1000, 1001, 2500, 3000):
        index.append(k[0, 0, len(index) : n])
        q = rng.normal(size=(1, 3, 2, 2)).astype(np.float32)
        out = hsr.softmax_attention(q, k[:, :, :n], v[:, :, :n], top_r=n // 3, index=index)
        for h in range(3):
            kept = reference.top_r(reference.logits(q[0, h], k[0, 0, :n]), n // 3)
            exact = reference.softmax_attention(q[0, h], k[0, 0, :n], v[0, 0, :n], kept=kept)
            close(out[0, h], exact, v)


def test_one_index_for_each_batch_row_and_head():
    case = make("random", 9, n=500, m=3, d=2, batch=2, heads=4, kv_heads=2)
    table = [[hsr.ConvexLayersIndex(case.k[b, g]) for g in range(2)] for b in range(2)]
    out = hsr.relu_attention(case.q, case.k, case.v, threshold=0.8, index=table)
    close(out, case.relu(0.8), case.v)
    rule = hsr.Gaussian()
    out = hsr.relu_attention(case.q, case.k, case.v, threshold=rule, index=table)
    np.testing.assert_allclose(
        out, hsr.relu_attention(case.q, case.k, case.v, threshold=rule), atol=1e-5
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_tensors(dtype):
    torch = pytest.importorskip("torch")
    case = make("random", 4, n=300, d=4, m=5)
    q, k, v = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in (case.q, case.k, case.v))
    wide = [x.float().numpy() for x in (q, k, v)]
    out, certificate = hsr.softmax_attention(
        q, k, v, top_r=20, index="auto", return_certificate=True
    )
    assert out.dtype is q.dtype
    exact = reference.softmax_attention(wide[0][0, 1], wide[1][0, 0], wide[2][0, 0])
    certified(out.float().numpy()[0, 1], _Of(certificate.error_bound[0, 1]), exact)


def test_a_certificate_looks_at_every_key_of_an_index():
    """The changed key is not reported: only a certificate, which speaks of all keys, can tell."""
    case = make("random", 4, n=300, d=3, m=2)
    index = hsr.PartitionTreeIndex(case.k[0, 0])
    k = case.k.copy()
    k[0, 0, 123] *= 1.001
    with pytest.raises(ValueError, match="got another score for key 123"):
        hsr.softmax_attention(case.q, k, case.v, top_r=5, index=index, return_certificate=True)
    index.delete(index.append(k[0, 0, :1]))
    hsr.softmax_attention(case.q, case.k, case.v, top_r=5, index=index, return_certificate=True)
    index.delete(np.array([7]))
    index.append(case.k[0, 0, 7:8])
    with pytest.raises(ValueError, match="by position, got other ids"):
        hsr.softmax_attention(
            case.q, case.k, case.v, top_r=5, index=index, return_certificate=True
        )


def test_refusals():
    case = make("random", 1, n=200, d=2, m=3)
    index = hsr.ConvexLayersIndex(case.k[0, 0])

    def attend(index, q=case.q, k=case.k, v=case.v, **rule):
        return hsr.softmax_attention(q, k, v, index=index, **(rule or {"top_r": 5}))

    with pytest.raises(ValueError, match=r"index must hold the 200 keys of k, got 199"):
        attend(hsr.ConvexLayersIndex(case.k[0, 0, 1:]))
    with pytest.raises(ValueError, match="index must hold the keys of k, got another score"):
        attend(hsr.ConvexLayersIndex(case.k[0, 0, ::-1]))
    with pytest.raises(ValueError, match="index must have head_dim 2 like the keys, got 3"):
        attend(hsr.FlatIndex(np.zeros((200, 3), np.float32)))
    with pytest.raises(ValueError, match=r"one index for each .* \[1\]\[1\], got \[1, 2\]"):
        attend([[index, index]])
    with pytest.raises(TypeError, match=r"index must be a kind, .* got int"):
        attend(3)
    with pytest.raises(TypeError, match="index must hold half-space indexes, got int"):
        attend([[3]])
    with pytest.raises(ValueError, match="kind must be one of 'auto', 'flat'"):
        attend("kd_tree")
    with pytest.raises(ValueError, match=r"v must have .* like k"):
        attend(index, v=case.v[:, :, 1:])
    with pytest.raises(ValueError, match="q must be finite, got nan"):
        attend(index, q=np.full_like(case.q, np.nan))
    with pytest.raises(ValueError, match="v must be finite, got nan"):
        attend(index, v=np.full_like(case.v, np.nan))
    with pytest.raises(ValueError, match="keys must be finite, got nan"):
        attend("auto", k=np.full_like(case.k, np.nan))
    moved = hsr.ConvexLayersIndex(case.k[0, 0])
    moved.delete([0])
    moved.append(case.k[0, 0, :1])
    with pytest.raises(ValueError, match="index must hold the keys of k by position, got id 200"):
        attend(moved, threshold=-100.0)
