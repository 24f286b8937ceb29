"""``torch.ops.hsr`` and models inside ``torch.compile``: whole graphs, the answers of eager code."""

import gc

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import hsr_attention as hsr  # noqa: E402
import tiny  # noqa: E402
from hsr_attention.integrations import torch_ops, transformers  # noqa: E402, F401
from hsr_attention.integrations.cache_argument import with_cache  # noqa: E402

pytestmark = [
    pytest.mark.transformers,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

BACKENDS = ["eager", "aot_eager", "inductor"]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def rows(n, heads=2, dim=32, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, heads, n, dim, generator=generator).to(dtype)


def filled(n=300, dtype=torch.float32, policy=None):
    cache = hsr.KVCache(policy)
    cache.append(rows(n, dtype=dtype), rows(n, seed=1, dtype=dtype))
    return cache, torch_ops.cache_state(cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(dtype, masked):
    _checked, state = filled(dtype=dtype)
    q = rows(2, heads=4, seed=2, dtype=dtype)
    mask = (torch.arange(300) > 7).expand(1, 1, 300) if masked else None
    torch.library.opcheck(torch_ops.attend, (q, state, 32, 0.2, mask))
    torch.library.opcheck(torch_ops.append, (state, rows(3, dtype=dtype), rows(3, dtype=dtype)))
    expected = filled(dtype=dtype)[0].attend(q, 0.2, mask=mask)
    _cache, state = filled(dtype=dtype)
    assert torch.equal(torch.ops.hsr.attend(q, state, 32, 0.2, mask), expected)
    assert expected.dtype == dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_function_of_the_operators_compiles_whole(backend):
    """Appends and answers keep their order; ten steps, one graph."""
    policy = hsr.SoftmaxPolicy(epsilon=1e-9, exact=True)
    other, _ = filled(policy=policy)
    cache, state = filled(policy=policy)

    def step(state, q, k, v):
        torch.ops.hsr.append(state, k, v)
        out = torch.ops.hsr.attend(2 * q, state, v.shape[3], 0.1)
        torch.ops.hsr.append(state, k + 1, v)
        return out + torch.ops.hsr.attend(q, state, v.shape[3], 0.1)

    compiled = torch.compile(step, backend=backend, fullgraph=True)
    for i in range(10):
        q, k, v = rows(1, heads=4, seed=i), rows(1, seed=i + 50), rows(1, seed=i + 90)
        out = compiled(state, q, k, v)
        other.append(k, v)
        expected = other.attend(2 * q, 0.1)
        other.append(k + 1, v)
        expected = expected + other.attend(q, 0.1)
        torch.testing.assert_close(out, expected)
        assert state[1] == len(cache) == len(other) == 302 + 2 * i


def test_the_tokens_of_the_state_are_the_truth():
    cache, state = filled()
    before = state.clone()
    k, v = rows(5, seed=3), rows(5, seed=4)
    torch.ops.hsr.append(state, k, v)
    torch.ops.hsr.append(before, 2 * k, v)  # the same step once more, with other keys
    assert len(cache) == 305 and torch.equal(before, state)
    assert torch.equal(torch.tensor(cache.rows()[0].bits[:, :, 300:]), 2 * k)


@pytest.mark.parametrize("masked", [False, True])
def test_an_answer_put_off_is_over_the_tokens_of_its_state(masked):
    cache, state = filled()
    q, mask = rows(2, heads=4), (torch.arange(300) > 20).expand(1, 1, 300) if masked else None
    expected = cache.attend(q, mask=mask)
    before = state.clone()
    torch.ops.hsr.append(state, 9 * rows(40), 9 * rows(40))
    found = torch.ops.hsr.attend(q, before, 32, None, mask)
    assert len(cache) == 340 and torch.equal(before, torch.stack([state[0], state[1] - 40]))
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)  # codes have another centre
    with pytest.raises(ValueError, match=r"tokens must lie in \[0, 340\], got 341"):
        cache.attend(q, tokens=341)


def test_bad_states():
    cache, state = filled()
    q = rows(1, heads=4)
    for wrong, message in (
        (torch.tensor([0, 1]), "state must stand for a cache that is alive, got number 0"),
        (torch.tensor([1.0, 1.0]), r"state must be int64 \[2\] of cache_state, got torch.float32"),
        (torch.tensor([1]), r"state must be int64 \[2\] of cache_state, got torch.int64 \[1\]"),
        (torch.stack([state[0], state[1] + 1]), "state must count at most the 300 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            torch.ops.hsr.attend(q, wrong, 32)
    with pytest.raises(ValueError, match="value_dim must be 32 like the values, got 31"):
        torch.ops.hsr.attend(q, state, 31)
    del cache
    gc.collect()
    with pytest.raises(ValueError, match="a cache that is alive"):
        torch.ops.hsr.attend(q, state, 32)


def test_there_is_no_gradient():
    _cache, state = filled()
    q = rows(1, heads=4).requires_grad_()
    out = torch.ops.hsr.attend(q, state, 32)
    with pytest.raises(RuntimeError, match="autograd"):
        out.sum().backward()


# ---- models of transformers


def decode(model, forward, cache, ids, steps=12, mask=None):
    """Prefill eagerly, then decode greedily through ``forward``; return all logits."""
    logits = []
    with torch.no_grad():
        out = model(ids, attention_mask=mask, **with_cache(model, cache))
        for _ in range(steps):
            token = out.logits[:, -1:].argmax(-1)
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            out = forward(input_ids=token, attention_mask=mask, **with_cache(model, cache))
            logits.append(out.logits[:, -1])
    return torch.stack(logits)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padded", [False, True])
def test_a_llama_decodes_in_whole_graphs(backend, padded):
    """One graph for all steps but the first: no break, no graph for each length."""
    model = tiny.model()
    model.set_attn_implementation("hsr")
    ids = torch.randint(2, 60, (2, 200), generator=torch.Generator().manual_seed(0))
    mask = None
    if padded:
        mask = torch.ones_like(ids)
        mask[0, :30] = 0
    policy = hsr.SoftmaxPolicy(epsilon=1e-9, exact=True)
    eager = decode(model, model, hsr.HSRCache(model.config, policy), ids, mask=mask)
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    cache = hsr.HSRCache(model.config, policy, collect=True)
    found = decode(model, compiled, cache, ids, mask=mask)
    torch.testing.assert_close(found, eager, atol=2e-4, rtol=1e-4)
    assert graphs["unique_graphs"] == 2
    assert cache.get_seq_length() == 212
    assert all(x.density.shape == (4, 24) for x in cache.statistics())


def test_eager_and_compiled_steps_take_turns():
    model = tiny.model()
    model.set_attn_implementation("hsr")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    ids = torch.randint(2, 60, (1, 90), generator=torch.Generator().manual_seed(0))
    one, other = (hsr.HSRCache(model.config) for _ in range(2))
    with torch.no_grad():
        model(ids[:, :50], **with_cache(model, one))
        model(ids[:, :50], **with_cache(model, other))
        for i in range(50, 90):
            step = compiled if i % 3 else model
            out = step(input_ids=ids[:, i : i + 1], **with_cache(model, one))
            expected = model(ids[:, i : i + 1], **with_cache(model, other))
            torch.testing.assert_close(out.logits, expected.logits, atol=1e-5, rtol=1e-5)
            if i == 70:  # and what was cropped is forgotten by both
                one.crop(-9)
                other.crop(-9)
    assert one.get_seq_length() == other.get_seq_length() == 81


def test_prompts_compile_too():
    model = tiny.model()
    model.set_attn_implementation("hsr")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    ids = torch.randint(2, 60, (1, 40), generator=torch.Generator().manual_seed(0))
    cache, other = (hsr.HSRCache(model.config) for _ in range(2))
    with torch.no_grad():
        found = compiled(input_ids=ids, **with_cache(model, cache)).logits
        expected = model(ids, **with_cache(model, other)).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert cache.get_seq_length() == 40
