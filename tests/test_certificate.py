"""The certificate of softmax attention: the true error never exceeds it.

A row is one query of one head, judged against dense attention in float64. Every kind of input
(``attention_cases.KINDS``) meets every policy, at each of the L instruction-set levels of the machine:

- quick: 16 kinds x 11 policies x 12 rows = 2,112 rows a level, and 3,456 of other shapes and dtypes;
- slow: 16 kinds x 11 policies x 3 visibilities x 48 rows = 25,344 rows a level.
"""

import copy
import dataclasses
import pickle
import threading
from collections import Counter

import numpy as np
import pytest

import hsr_attention as hsr
from attention_cases import KINDS, Case, between, make
from hsr_attention.prefill import attend_once

POLICIES = {
    "default": dict(),
    "epsilon 0.3": dict(epsilon=0.3),
    "epsilon 1e-4": dict(epsilon=1e-4),
    "epsilon, coarse": dict(epsilon=0.1, exact_share=0.5),
    "epsilon, drop": dict(epsilon=0.05, tail="drop"),
    "top_r": dict(top_r=8),
    "top_r, drop": dict(top_r=64, tail="drop"),
    "threshold": dict(threshold=1.0),
    "threshold, drop": dict(threshold=0.5, tail="drop"),
    "exact": dict(exact=True),
    "exact, epsilon 0.2": dict(epsilon=0.2, exact=True),
}


def attend(case, policy):
    if isinstance(policy, dict):
        policy = hsr.SoftmaxPolicy(**policy)
    return attend_once(
        policy, case.q, case.k, case.v, case.scale, case.is_causal, case.mask, certify=True
    )


def check(case, policy):
    """Hold out and certificate against float64; returns the certificate."""
    out, certificate = attend(case, policy)
    assert np.isfinite(out.astype(np.float64)).all()
    error = np.abs(out.astype(np.float64) - case.softmax()).max(axis=-1, initial=0.0)
    bad = ~(error <= certificate.error_bound)
    assert not bad.any(), (
        f"error {error[bad][0]} exceeds the bound {certificate.error_bound[bad][0]} "
        f"at {np.argwhere(bad)[0]} ({bad.sum()} of {bad.size} rows)"
    )
    rows = case.q.shape[:3]
    for name in ("error_bound", "estimated_error", "omitted_mass", "density", "lse"):
        field = getattr(certificate, name)
        assert field.shape == rows and field.dtype == np.float32, name
        assert not np.isnan(field).any(), name
    assert (certificate.density >= 0).all() and (certificate.density <= 1).all()
    assert (certificate.omitted_mass >= 0).all() and (certificate.omitted_mass <= 1).all()
    return certificate


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", KINDS)
def test_error_bound(isa, kind, policy):
    visibility = ("all", "causal", "masked")[(len(kind) + len(policy)) % 3]
    case = make(kind, n=530, heads=3, m=4, visibility=visibility)
    check(case, POLICIES[policy])


@pytest.mark.slow
@pytest.mark.parametrize("visibility", ["all", "causal", "masked"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", KINDS)
def test_error_bound_over_more_keys(isa, kind, policy, visibility):
    case = make(kind, 1, n=2600, d=48, batch=2, heads=4, kv_heads=2, m=6, visibility=visibility)
    check(case, POLICIES[policy])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "d, value_dim", [(1, 1), (7, 33), (64, 64), (80, 16), (129, 31), (256, 5)]
)
def test_shapes_and_dtypes(isa, dtype, d, value_dim):
    """The bound covers the rounding of the output to the dtype of q."""
    for n, m in ((1, 1), (15, 2), (16, 3), (17, 1), (64, 16), (300, 1)):
        case = make("random", n, n=n, m=m, d=d, value_dim=value_dim, batch=2, heads=2, dtype=dtype)
        check(case, POLICIES["default"])
        check(case, POLICIES["exact"])


@pytest.mark.parametrize("kind", ["tiny values", "heavy-tailed values"])
def test_output_in_float16_stays_inside_the_bound(kind):
    """Where float16 is subnormal its rounding is absolute, not relative."""
    case = make(kind, n=100)
    for size in (1e-4, 1e-6, 1e-8):
        v = (case.v / np.abs(case.v).max() * size).astype(np.float32)
        half = Case(case.q.astype(np.float16), case.k, v)
        check(half, POLICIES["exact"])


def identity_case(kind, n=400, visibility="all"):
    """Values are the identity: an output names the keys that entered it and their weights."""
    case = make(kind, 2, n=n, m=5, heads=3, visibility=visibility)
    identity = np.eye(n, dtype=np.float32)[None, None]
    return Case(case.q, case.k, identity, is_causal=case.is_causal, mask=case.mask)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", KINDS)
def test_omitted_mass(isa, kind, policy):
    visibility = ("masked", "all", "causal")[(len(kind) + len(policy)) % 3]
    case = identity_case(kind, visibility=visibility)
    out, certificate = attend(case, POLICIES[policy])
    p, visible = case.probabilities(), np.isfinite(case.logits)
    omitted = np.where(out == 0, p, 0.0).sum(axis=-1)
    assert (omitted <= certificate.omitted_mass.astype(np.float64) + 1e-12).all()
    kept = (out != 0).sum(axis=-1)
    assert not (out[~visible] != 0).any(), "a hidden key entered the answer"
    seen = np.maximum(visible.sum(axis=-1), 1)
    # A kept key whose weight underflows cannot be seen in the output.
    assert (kept <= certificate.density * seen + 1e-3).all()
    settings = POLICIES[policy]
    if "top_r" not in settings and "threshold" not in settings:
        epsilon = settings.get("epsilon", hsr.SoftmaxPolicy().epsilon)
        assert (certificate.omitted_mass <= epsilon * (1 + 1e-6)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_lse(isa, kind):
    """Lse is that of the kept keys; when everything is exact and little is omitted, of all keys."""
    case = make(kind, 3, n=333)
    _, certificate = attend(case, dict(epsilon=1e-4, exact=True))
    top = case.logits.max(axis=-1)
    lse = top + np.log(np.exp(case.logits - top[..., None]).sum(axis=-1))
    size = np.abs(case.logits).max(axis=-1)
    np.testing.assert_array_less(np.abs(certificate.lse - lse), 2e-4 + 1e-6 * size)


NORMAL = [k for k in KINDS if k not in ("huge logits", "tiny values")]


def restricted_budget(case, kept):
    """Twice the error of float32 numpy over the same keys, and a few roundings of the values."""
    s = np.where(kept, case.logits, -np.inf).astype(np.float32)
    top = s.max(axis=-1, keepdims=True)
    w = np.exp(s - np.where(np.isfinite(top), top, 0))
    total = w.sum(axis=-1, keepdims=True)
    single = (w / np.where(total > 0, total, 1)) @ case.values.astype(np.float32)
    error = np.abs(single - case.softmax(kept)).max()
    return 2 * error + 2.0**-20 * np.abs(case.v.astype(np.float64)).max()


@pytest.mark.parametrize("r", [1, 7, 64, 331, 1000])
@pytest.mark.parametrize("kind", NORMAL)
def test_top_r_with_drop_is_the_paper(isa, kind, r):
    """Exactly the r largest logits, Theorem 4.2; ties, where scores are equal in exact arithmetic."""
    for visibility in ("all", "causal", "masked"):
        case = make(kind, 4, n=333, m=5, visibility=visibility)
        out, certificate = attend(case, dict(top_r=r, tail="drop"))
        kept = case.largest(r)
        counts = np.isfinite(case.logits).sum(axis=-1)
        np.testing.assert_allclose(
            certificate.density * np.maximum(counts, 1), np.minimum(r, counts), rtol=1e-5
        )
        if kind in ("duplicate keys", "constant keys", "keys of all sizes", "two opposite groups"):
            continue  # ties or near ties: which of them is kept is rounding
        assert np.abs(out - case.softmax(kept)).max() <= restricted_budget(case, kept)


@pytest.mark.parametrize("kind", NORMAL)
def test_threshold_with_drop_is_the_paper(isa, kind):
    """Exactly the keys with logit >= b, for b that no key is near."""
    for visibility in ("all", "causal", "masked"):
        case = make(kind, 5, n=333, m=5, visibility=visibility)
        for quantile in (0.2, 0.8, 0.99):
            b = between(case.logits, quantile)
            out, certificate = attend(case, dict(threshold=b, tail="drop"))
            kept = case.logits >= b
            counts = np.isfinite(case.logits).sum(axis=-1)
            np.testing.assert_allclose(
                certificate.density * np.maximum(counts, 1), kept.sum(axis=-1), rtol=1e-5
            )
            assert np.abs(out - case.softmax(kept)).max() <= restricted_budget(case, kept)


@pytest.mark.parametrize("tail", ["sketch", "drop"])
def test_threshold_that_nothing_reaches(isa, tail):
    case = make("random", n=100)
    out, certificate = attend(case, dict(threshold=np.inf, tail=tail))
    if tail == "drop":
        assert (out == 0).all()
        assert (certificate.omitted_mass == 1).all() and (certificate.density == 0).all()
        assert (certificate.lse == -np.inf).all()
    check(case, dict(threshold=np.inf, tail=tail))
    everything = check(case, dict(threshold=-np.inf, tail=tail))
    assert (everything.density == 1).all()


def test_thresholds_for_each_head_and_query(isa):
    case = make("random", 6, n=200, heads=3, m=4)
    for shape in ((3,), (3, 1), (1, 3, 4), (3, 4), (1, 1, 4)):
        b = np.linspace(-0.5, 1.0, int(np.prod(shape))).reshape(shape)
        spread = b[:, None] if b.shape == (3,) else b
        kept = case.logits >= np.broadcast_to(spread, (1, 3, 4))[..., None]
        out, _ = attend(case, dict(threshold=b, tail="drop"))
        assert np.abs(out - case.softmax(kept)).max() <= restricted_budget(case, kept)


def test_every_kind_of_scan_is_taken(isa):
    work = Counter()
    for kind in ("random", "wide bands", "huge logits"):
        work.update(check(make(kind, n=530), {}).work)
    assert work["scanned_four"] > 0 and work["scanned_eight"] > 0 and work["scanned_full"] > 0
    assert {"sketch_scored", "refined", "full_scored", "sketched", "selected_again"} <= set(work)


def test_logits_of_any_size(isa):
    """From nothing to 1e29: finite answers inside the bound, also before the first block of codes."""
    for n in (5, 16, 100):
        for power in (-44, -30, -10, 0, 5, 8, 10, 12, 15, 20, 28):
            case = make("random", 7, n=n, d=16)
            q = (case.q.astype(np.float64) * 10.0**power).astype(np.float32)
            big = Case(q, case.k, case.v)
            for policy in ("default", "epsilon, drop", "top_r, drop", "threshold, drop", "exact"):
                check(big, POLICIES[policy])


def test_largest_values(isa):
    """Values near the documented limit of 1e18 do not overflow on the way to their mean."""
    case = make("random", 8, n=200)
    v = (np.sign(case.v) * 9.9e17).astype(np.float32)
    for policy in ("default", "epsilon, drop", "exact"):
        check(Case(case.q, case.k, v), POLICIES[policy])
        check(Case(case.q, case.k, np.abs(v)), POLICIES[policy])
    with pytest.raises(
        ValueError, match=r"(v|values) must be at most 1e18 in size, got .* at \(0, 0, 0, 0\)"
    ):
        attend(Case(case.q, case.k, np.abs(v) * 2), {})


def test_bounds_are_worth_having(isa):
    """On ordinary input the certificate is small, not merely true."""
    case = make("random", 9, n=2000, d=64)
    span = np.abs(case.v).max()
    assert check(case, dict(epsilon=1e-4, exact=True)).error_bound.max() < 1e-3 * span
    assert check(case, dict(epsilon=0.01, exact=True)).error_bound.max() < 0.03 * span
    default = check(case, {})
    assert default.error_bound.max() < 0.5 * span
    assert (default.estimated_error <= default.error_bound).all()


def test_more_keys_are_kept_for_a_smaller_epsilon(isa):
    case = make("clustered", 10, n=2000)
    densities = [
        check(case, dict(epsilon=e, tail="drop")).density.mean() for e in (0.5, 0.1, 0.01, 1e-4)
    ]
    assert densities == sorted(densities) and densities[0] < 0.9 * densities[-1]


@pytest.mark.parametrize("tail", ["sketch", "drop"])
def test_rows_that_see_nothing_are_zero(isa, tail):
    case = make("random", 11, n=64, m=4, visibility="masked")
    out, certificate = attend(case, dict(tail=tail))
    assert (out[:, :, 0] == 0).all()
    for name in ("error_bound", "omitted_mass", "density"):
        assert (getattr(certificate, name)[:, :, 0] == 0).all()
    assert (certificate.lse[:, :, 0] == -np.inf).all()


def test_without_a_certificate():
    case = make("random", 12, n=300)
    out = hsr.softmax_attention(case.q, case.k, case.v)
    again, certificate = hsr.softmax_attention(case.q, case.k, case.v, return_certificate=True)
    np.testing.assert_allclose(out, again, atol=1e-6)
    assert np.isfinite(certificate.error_bound).all()
    policy = hsr.SoftmaxPolicy(certify=False)
    _, uncertified = attend(case, policy)
    assert np.isnan(uncertified.error_bound).all() and np.isnan(uncertified.omitted_mass).all()


@pytest.mark.parametrize("m", [1, 3, 40])
def test_counters_of_work(isa, m):
    case = make("random", 3, n=3000, m=m)
    _, relu = hsr.relu_attention(
        case.q, case.k, case.v, threshold=hsr.Gaussian(), return_certificate=True
    )
    assert relu.work["sketched"] == 0  # ReLU weighs nothing from codes
    _, softmax = hsr.softmax_attention(case.q, case.k, case.v, return_certificate=True)
    assert softmax.work["sketched"] > 0
    for certificate in (relu, softmax):
        assert min(certificate.work.values()) >= 0
        assert (certificate.estimated_error <= certificate.error_bound).all()


def _certificate():
    case = make("random", heads=2, n=64)
    return hsr.softmax_attention(case.q, case.k, case.v, return_certificate=True)[1]


@pytest.mark.parametrize("remade", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_certificates_can_be_kept(remade):
    certificate = remade(_certificate())
    for field in dataclasses.fields(hsr.Certificate):
        np.testing.assert_equal(
            getattr(certificate, field.name), getattr(_certificate(), field.name)
        )
    assert "error_bound=array" in repr(_certificate())


def test_certificates_do_not_change():
    certificate = _certificate()
    with pytest.raises(AttributeError, match="no attribute 'erorr_bound'"):
        certificate.erorr_bound  # noqa: B018
    with pytest.raises(dataclasses.FrozenInstanceError):
        certificate.error_bound = 0.0


def test_threads_read_one_certificate():
    for _ in range(50):
        certificate, seen = _certificate(), []
        start = threading.Barrier(4)

        def read(certificate=certificate, seen=seen, start=start):
            start.wait()
            seen.append(float(certificate.lse.sum()) + certificate.work["sketch_scored"])

        readers = [threading.Thread(target=read) for _ in range(4)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        assert len(seen) == 4 and len(set(seen)) == 1
