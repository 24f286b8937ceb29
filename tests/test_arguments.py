"""Bad input is refused with a message that names the argument, the rule, and what was found."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hsr_attention as hsr
from hsr_attention import arguments
from hsr_attention.arguments import Dtype

INDEXES = (hsr.FlatIndex, hsr.SketchIndex)


def floats(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


KEYS = [
    (floats(128), ValueError, "keys must have shape [n, head_dim], got (128,)"),
    (floats(2, 3, 4), ValueError, "keys must have shape [n, head_dim], got (2, 3, 4)"),
    (np.float32(1.0), ValueError, "keys must have shape [n, head_dim], got ()"),
    (floats(3, 0), ValueError, "keys must have head_dim in [1, 512], got 0"),
    (floats(3, 513), ValueError, "keys must have head_dim in [1, 512], got 513"),
    (
        floats(3, 4, dtype=np.complex64),
        TypeError,
        "keys must be float32, bfloat16 or float16, got complex64",
    ),
    (floats(3, 4, dtype=bool), TypeError, "keys must be float32, bfloat16 or float16, got bool"),
    (np.array([["a", "b"]]), TypeError, "keys must be float32, bfloat16 or float16, got <U1"),
    (None, TypeError, "keys must be float32, bfloat16 or float16, got None"),
]


@pytest.mark.parametrize("index_type", INDEXES)
@pytest.mark.parametrize("keys, error, message", KEYS)
def test_keys(index_type, keys, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        index_type(keys)


@pytest.mark.parametrize("index_type", INDEXES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_keys_and_queries_that_are_not_finite(index_type, bad, dtype):
    keys = floats(20, 5, dtype=dtype)
    keys[17, 3] = bad
    message = re.escape(f"must be finite, got {float(bad)} at (17, 3)")
    with pytest.raises(ValueError, match="^keys " + message):
        index_type(keys)
    index = index_type(floats(20, 5, dtype=dtype))
    with pytest.raises(ValueError, match="^keys " + message):
        index.append(keys)
    assert len(index) == 20
    for call in (index.report, index.count):
        with pytest.raises(ValueError, match="^queries " + message):
            call(keys, 0.0)
    with pytest.raises(ValueError, match="^queries " + message):
        index.top_r(keys, 1)


@pytest.mark.parametrize("index_type", (*INDEXES, hsr.ConvexLayersIndex))
def test_float64_that_float32_cannot_hold(index_type):
    for found, rule in (
        (-1e300, "at most 3.4e38 in size, the largest float32, got -1e+300"),
        (np.inf, "finite, got inf"),
    ):
        with pytest.raises(ValueError, match=rf"^keys must be {re.escape(rule)} at \(1, 1\)$"):
            index_type([[1.0, 0.0], [2.0, found]])


def test_a_float64_tensor_that_float32_cannot_hold():
    torch = pytest.importorskip("torch")
    k = torch.zeros(1, 1, 3, 2, dtype=torch.float64)
    k[0, 0, 2, 1] = 1e39
    message = "k must be at most 3.4e38 in size, the largest float32, got 1e+39 at (0, 0, 2, 1)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        hsr.softmax_attention(k[:, :, :1] * 0, k, k)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: hsr.FlatIndex(K[0, 0]).report(None, 0), "queries must be float32, .* got None"),
        (lambda: hsr.FlatIndex(K[0, 0]).report(K[0, 0], None), "thresholds must be real .* None"),
        (lambda: hsr.FlatIndex(K[0, 0]).delete(None), "ids must be integers, got None"),
        (lambda: hsr.softmax_attention(None, K, V), "q must be float32, .* got None"),
        (lambda: hsr.softmax_attention(Q, None, V), "k must be float32, .* got None"),
        (lambda: hsr.relu_attention(Q, K, None, threshold=0), "v must be float32, .* got None"),
        (lambda: hsr.KVCache().append(None, V), "keys must be float32, .* got None"),
        (lambda: hsr.KVCache().append(K, None), "values must be float32, .* got None"),
    ],
)
def test_none_is_called_none(call, message):
    with pytest.raises(TypeError, match=f"^{message}$"):
        call()


@pytest.mark.parametrize("index_type", (*INDEXES, hsr.ConvexLayersIndex))
def test_a_wrong_call_names_the_class(index_type):
    with pytest.raises(TypeError, match=f"^{index_type.__name__}.__init__"):
        index_type(floats(3, 2), foo=1)


def test_huge_values_are_written_short():
    message = "values must be at most 1e18 in size, got 1e+30 at (0, 0, 1, 0)"
    v = with_bad(V, (0, 0, 1, 0), 1e30)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        hsr.KVCache().append(K, v)


@pytest.mark.parametrize("index_type", INDEXES)
def test_calls_on_an_index(index_type):
    index = index_type(floats(4, 8, dtype=np.float16))
    for call, error, message in (
        (lambda: index.append(floats(1, 7)), ValueError, "keys must have head_dim 8, got 7"),
        (
            lambda: index.append(floats(1, 8)),
            TypeError,
            "keys must be float16 like the index, got float32",
        ),
        (lambda: index.report(floats(1, 9), 0), ValueError, "queries must have head_dim 8, got 9"),
        (
            lambda: index.report(floats(8), 0),
            ValueError,
            "queries must have shape [m, head_dim], got (8,)",
        ),
        (
            lambda: index.report(floats(3, 8), [0, 1]),
            ValueError,
            "thresholds must be a scalar or have shape [3], got (2,)",
        ),
        (
            lambda: index.report(floats(3, 8), "0.5"),
            TypeError,
            "thresholds must be real numbers, got <U3",
        ),
        (lambda: index.report(floats(3, 8), np.nan), ValueError, "thresholds must not be NaN"),
        (
            lambda: index.count(floats(3, 8), 1j),
            TypeError,
            "thresholds must be real numbers, got complex128",
        ),
        (lambda: index.top_r(floats(3, 8), 0), ValueError, "r must be >= 1, got 0"),
        (lambda: index.top_r(floats(3, 8), -3), ValueError, "r must be >= 1, got -3"),
        (lambda: index.top_r(floats(3, 8), 2.0), TypeError, "r must be an integer, got 2.0"),
        (lambda: index.top_r(floats(3, 8), True), TypeError, "r must be an integer, got True"),
        (lambda: index.delete([1, 1]), ValueError, "ids must not repeat, got id 1 twice"),
        (lambda: index.delete([0.5]), TypeError, "ids must be integers, got float64"),
        (lambda: index.delete([[0]]), ValueError, "ids must have shape [count], got (1, 1)"),
    ):
        with pytest.raises(error, match=f"^{re.escape(message)}$"):
            call()
    with pytest.raises(KeyError, match="got unknown or deleted id 4"):
        index.delete(4)
    index.delete([])
    index.delete(np.int32(3))
    assert len(index) == 3


Q, K, V = floats(1, 4, 3, 8), floats(1, 2, 5, 8), floats(1, 2, 5, 6)


def with_bad(array, place, value):
    array = array.copy()
    array[place] = value
    return array


@pytest.mark.parametrize("attention", ["softmax", "relu"])
@pytest.mark.parametrize(
    "q, k, v, error, message",
    [
        (
            Q[0],
            K,
            V,
            ValueError,
            "q must have shape [batch, heads, sequence, head_dim], got (4, 3, 8)",
        ),
        (
            Q,
            K[0],
            V,
            ValueError,
            "k must have shape [batch, heads, sequence, head_dim], got (2, 5, 8)",
        ),
        (
            Q,
            K,
            V[0],
            ValueError,
            "v must have shape [batch, heads, sequence, head_dim], got (2, 5, 6)",
        ),
        (Q[..., :7], K, V, ValueError, "q must have head_dim 8 like the keys, got 7"),
        (Q[:, :3], K, V, ValueError, "q must have a multiple of kv_heads = 2 heads, got 3"),
        (np.concatenate([Q, Q]), K, V, ValueError, "q must have batch 1 like the keys, got 2"),
        (
            Q,
            K,
            V[:, :, :4],
            ValueError,
            "v must have [batch, kv_heads, tokens] = (1, 2, 5) like k, got (1, 2, 4)",
        ),
        (
            Q,
            K,
            V[:, :1],
            ValueError,
            "v must have [batch, kv_heads, tokens] = (1, 2, 5) like k, got (1, 1, 5)",
        ),
        (Q, K, V.astype(np.float16), TypeError, "v must be float32 like k, got float16"),
        (
            Q.astype(complex),
            K,
            V,
            TypeError,
            "q must be float32, bfloat16 or float16, got complex128",
        ),
        (
            with_bad(Q, (0, 3, 2, 1), np.nan),
            K,
            V,
            ValueError,
            "q must be finite, got nan at (0, 3, 2, 1)",
        ),
        (
            Q,
            with_bad(K, (0, 1, 4, 0), np.inf),
            V,
            ValueError,
            "k must be finite, got inf at (0, 1, 4, 0)",
        ),
        (
            Q,
            K,
            with_bad(V, (0, 0, 2, 5), -np.inf),
            ValueError,
            "v must be finite, got -inf at (0, 0, 2, 5)",
        ),
    ],
)
def test_attention_arrays(attention, q, k, v, error, message):
    # The names of the call, or those of the cache it fills.
    names = {"q": "(q|queries)", "k": "(k|keys)", "v": "(v|values)"}
    first, rest = message[0], re.escape(message[1:]).replace("like\\ k,", "like\\ (k|keys),")
    with pytest.raises(error, match=f"^{names[first]}{rest}$"):
        if attention == "softmax":
            hsr.softmax_attention(q, k, v)
        else:
            hsr.relu_attention(q, k, v, threshold=0.0)


@pytest.mark.parametrize(
    "settings, error, message",
    [
        (dict(epsilon=0.0), ValueError, "epsilon must lie in (0, 1), got 0.0"),
        (dict(epsilon=1.0), ValueError, "epsilon must lie in (0, 1), got 1.0"),
        (dict(epsilon=-0.1), ValueError, "epsilon must lie in (0, 1), got -0.1"),
        (dict(epsilon=np.nan), ValueError, "epsilon must lie in (0, 1), got nan"),
        (dict(epsilon="0.1"), TypeError, "epsilon must be a number, got '0.1'"),
        (dict(epsilon=True), TypeError, "epsilon must be a number, got True"),
        (dict(top_r=0), ValueError, "top_r must be >= 1, got 0"),
        (dict(top_r=-5), ValueError, "top_r must be >= 1, got -5"),
        (dict(top_r=2.5), TypeError, "top_r must be an integer, got 2.5"),
        (dict(top_r="8"), TypeError, "top_r must be an integer, got '8'"),
        (dict(tail="keep"), ValueError, "tail must be one of 'sketch', 'drop', got 'keep'"),
        (
            dict(epsilon=0.1, top_r=8),
            ValueError,
            "give one of epsilon, top_r and threshold, got epsilon and top_r",
        ),
        (
            dict(top_r=8, threshold=0.0),
            ValueError,
            "give one of epsilon, top_r and threshold, got top_r and threshold",
        ),
        (
            dict(epsilon=0.5, top_r=8, threshold=0.0),
            ValueError,
            "give one of epsilon, top_r and threshold, got epsilon and top_r and threshold",
        ),
        (dict(threshold=np.nan), ValueError, "threshold must not be NaN"),
        (
            dict(threshold="x"),
            TypeError,
            "threshold must be a number, an array or a rule such as hsr_attention.Gaussian(), got 'x'",
        ),
        (
            dict(threshold=[0.0, 1.0]),
            ValueError,
            "threshold must be a scalar, have shape [heads] = [4], or broadcast to "
            "[batch, heads, m] = [1, 4, 3], got (2,)",
        ),
        (dict(scale=0.0), ValueError, "scale must be finite and > 0, got 0.0"),
        (dict(scale=-1), ValueError, "scale must be finite and > 0, got -1"),
        (dict(scale=np.inf), ValueError, "scale must be finite and > 0, got inf"),
        (dict(scale="1"), TypeError, "scale must be a number, got '1'"),
        (dict(mask=floats(1, 3, 5)), TypeError, "mask must be boolean, got float32"),
        (
            dict(mask=np.ones((3, 5), bool)),
            ValueError,
            "mask must have shape [1, 3 or 1, 5] (batch, queries, keys), got (3, 5)",
        ),
        (
            dict(mask=np.ones((1, 3, 4), bool)),
            ValueError,
            "mask must have shape [1, 3 or 1, 5] (batch, queries, keys), got (1, 3, 4)",
        ),
    ],
)
def test_softmax_settings(settings, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        hsr.softmax_attention(Q, K, V, **settings)


@pytest.mark.parametrize(
    "settings, error, message",
    [
        (dict(threshold=0.0, power=0), ValueError, "power must be >= 1, got 0"),
        (dict(threshold=0.0, power=17), ValueError, "power must be <= 16, got 17"),
        (dict(threshold=0.0, power=1.5), TypeError, "power must be an integer, got 1.5"),
        (dict(threshold=np.nan), ValueError, "threshold must not be NaN"),
        (dict(threshold=None), TypeError, "threshold must"),
        (dict(), TypeError, "threshold"),
    ],
)
def test_relu_settings(settings, error, message):
    with pytest.raises(error, match=re.escape(message)):
        hsr.relu_attention(Q, K, V, **settings)


@pytest.mark.parametrize("name, huge", [("top_r", 2**70), ("r", 2**70), ("power", 2**40)])
def test_integers_beyond_the_native_ones(name, huge):
    """Either honoured or refused by name; never a message about the native code."""
    try:
        if name == "top_r":
            out = hsr.softmax_attention(Q, K, V, top_r=huge)
        elif name == "r":
            assert hsr.FlatIndex(K[0, 0]).top_r(Q[0, 0], huge).counts.tolist() == [5] * 3
            return
        else:
            out = hsr.relu_attention(Q, K, V, threshold=0.0, power=huge)
        assert out.shape == (1, 4, 3, 6)
    except ValueError as error:
        assert str(error).startswith(f"{name} must")


def test_policies_check_themselves():
    with pytest.raises(ValueError, match="exact_share must lie in"):
        hsr.SoftmaxPolicy(exact_share=1.0)
    with pytest.raises(ValueError, match="tail_epsilon must lie in"):
        hsr.SoftmaxPolicy(tail_epsilon=0.0)
    with pytest.raises(ValueError, match=r"exponent must lie in \(0, 1\], got 1.5"):
        hsr.Gaussian(1.5)
    assert hsr.SoftmaxPolicy().epsilon is not None
    assert hsr.SoftmaxPolicy(top_r=np.int64(3)).epsilon is None
    assert hsr.SoftmaxPolicy(exact=True).tail == "drop"


def test_accepted_conversions():
    index = hsr.FlatIndex([[1, 2], [3, 4]])
    assert index.dtype is Dtype.float32
    assert hsr.FlatIndex(np.eye(3)).dtype is Dtype.float32
    report = index.report([[1, 0]], 2)
    assert report.indices.tolist() == [1] and report.scores.tolist() == [3.0]
    with pytest.raises(TypeError, match="keys must be float32, bfloat16 or float16, got >f4"):
        hsr.FlatIndex(np.array([[1, 2], [3, 4]], ">f4"))


def test_float_arrays_convert_exactly():
    x = np.array([1.5, -0.0, 6.1e-5, 65504.0, 1e-7], np.float16)
    np.testing.assert_array_equal(arguments.float_array("x", x).to_float32(), x.astype(np.float32))
    torch = pytest.importorskip("torch")
    t = torch.tensor([1.5, -3e38, 1e-40]).bfloat16()
    np.testing.assert_array_equal(arguments.float_array("x", t).to_float32(), t.float().numpy())
    with pytest.raises(TypeError, match="x must be float32, bfloat16 or float16, got int64"):
        arguments.float_array("x", torch.arange(3))
    with pytest.raises(TypeError, match="x must be on the CPU"):
        arguments.float_array("x", torch.empty(2, device="meta"))


# ---- nothing crashes: any shape and layout gives an answer of the right shape, or an error of ours

dims = st.integers(0, 3)


@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(
    q=st.lists(dims, min_size=0, max_size=5),
    k=st.lists(dims, min_size=0, max_size=5),
    same=st.booleans(),
    dtype=st.sampled_from(["float16", "float32", "float64", "int8", "bool"]),
    layout=st.sampled_from(["plain", "fortran", "reversed", "strided", "read-only", "broadcast"]),
    causal=st.booleans(),
    relu=st.booleans(),
)
def test_odd_shapes_never_crash(q, k, same, dtype, layout, causal, relu):
    if same and len(q) == 4:
        k = [q[0], q[1] or 1, *k[:1], q[3]] if k else q

    def array(shape):
        x = np.ones(shape, dtype)
        if layout == "fortran":
            return np.asfortranarray(x)
        if layout == "reversed":
            return x[(slice(None, None, -1),) * x.ndim]
        if layout == "strided":
            return np.ones([2 * s for s in shape], dtype)[(slice(None, None, 2),) * x.ndim]
        if layout == "read-only":
            x.flags.writeable = False
        if layout == "broadcast":
            return np.broadcast_to(np.ones((), dtype), shape)
        return x

    try:
        if relu:
            out = hsr.relu_attention(array(q), array(k), array(k), threshold=0.0, is_causal=causal)
        else:
            out = hsr.softmax_attention(array(q), array(k), array(k), is_causal=causal)
    except (ValueError, TypeError) as error:
        assert re.match(r"(q|k|v|keys|values|queries) must ", str(error)), str(error)
    else:
        assert out.shape == (*q[:3], k[3])
        assert np.isfinite(out).all()
    for index_type in INDEXES:
        try:
            index = index_type(array(k))
            report = index.report(array(q), -1.0)
            index.top_r(array(q), 2)
        except (ValueError, TypeError) as error:
            assert re.match(r"(keys|queries) must ", str(error)), str(error)
        else:
            assert report.counts.tolist() == [k[0]] * q[0]


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda: hsr.SoftmaxPolicy(exact="no"), "exact"),
        (lambda: hsr.SoftmaxPolicy(certify=None), "certify"),
        (lambda: hsr.softmax_attention(Q, K, V, exact=1), "exact"),
        (lambda: hsr.softmax_attention(Q, K, V, is_causal="no"), "is_causal"),
        (lambda: hsr.softmax_attention(Q, K, V, return_certificate="no"), "return_certificate"),
        (lambda: hsr.relu_attention(Q, K, V, threshold=0, is_causal=0), "is_causal"),
        (lambda: hsr.relu_attention(Q, K, V, threshold=0, index="flat", is_causal=0), "is_causal"),
    ],
)
def test_flags_are_truth_values(call, name):
    with pytest.raises(TypeError, match=rf"{name} must be True or False, got "):
        call()


def test_numpy_truth_values_are_flags():
    assert hsr.SoftmaxPolicy(exact=np.True_).tail == "drop"


@pytest.mark.parametrize("index", [None, "flat"])
def test_a_mask_may_have_a_head_axis(index):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, h, n, 4), np.float32) for h, n in ((4, 3), (2, 9), (2, 9)))
    mask = rng.random((2, 1, 3, 9)) < 0.7
    options = {"threshold": 0.0, "index": index}
    found = hsr.relu_attention(q, k, v, mask=mask, **options)
    np.testing.assert_array_equal(found, hsr.relu_attention(q, k, v, mask=mask[:, 0], **options))
    with pytest.raises(ValueError, match=r"mask must have shape \[2 or 1, 3 or 1, 9\]"):
        hsr.relu_attention(q, k, v, mask=mask.repeat(2, axis=1), **options)


@pytest.mark.transformers
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("index", [None, "flat"])
def test_gradients_are_refused(name, index):
    torch = pytest.importorskip("torch")
    tensors = {n: torch.randn(1, 1, 6, 4) for n in "qkv"}
    tensors[name].requires_grad_()
    for attend in (
        lambda: hsr.softmax_attention(**tensors, index=index),
        lambda: hsr.relu_attention(**tensors, threshold=0.0, index=index),
    ):
        with pytest.raises(ValueError, match=f"{name} must not require a gradient"):
            attend()
        with torch.no_grad():
            assert attend().shape == (1, 1, 6, 4)
