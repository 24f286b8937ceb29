"""Long prompts through the attention function "hsr": by the policy, like dense attention."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import hsr_attention as hsr  # noqa: E402
from hsr_attention.integrations import answering, masks  # noqa: E402
from hsr_attention.integrations.cache_argument import with_cache  # noqa: E402
from test_transformers_generate import EVERYTHING, llama, prompt  # noqa: E402

pytestmark = pytest.mark.transformers

KEYS = 1024  # of a prompt that is answered by its policy, whatever the instruction set
LONG = KEYS + 60


@pytest.fixture(autouse=True)
def prompt_keys(monkeypatch):
    monkeypatch.setattr(answering, "prompt_keys", lambda: KEYS)


@pytest.fixture
def counted(monkeypatch):
    """Count the tokens of prompts that go each way."""
    calls = {"sparse": 0, "dense": 0}
    for name, key in (("_sparse", "sparse"), ("dense_attention", "dense")):
        real = getattr(answering, name)

        def count(*args, real=real, key=key, **kwargs):
            query = next(a for a in args if isinstance(a, torch.Tensor))
            calls[key] += query.shape[2]
            return real(*args, **kwargs)

        monkeypatch.setattr(answering, name, count)
    return calls


def model_and_ids(batch=1):
    model = llama(max_position_embeddings=2048)
    ids = torch.cat([prompt(LONG, seed=i) for i in range(batch)])
    return model, ids


def dense_logits(model, ids, **settings):
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        return model(ids, **settings).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_long_prompt_equals_dense(counted, dtype):
    model, ids = model_and_ids()
    model = model.to(dtype)
    dense = dense_logits(model, ids)
    model.set_attn_implementation("hsr")
    cache = hsr.HSRCache(model.config, EVERYTHING, collect=True)
    with torch.no_grad():
        found = model(ids, **with_cache(model, cache)).logits
    tolerance = 1e-3 if dtype == torch.float32 else 0.3
    torch.testing.assert_close(found, dense, rtol=tolerance, atol=tolerance)
    assert counted == {"sparse": 3 * LONG, "dense": 0}
    assert cache.statistics()[0].density.size == 0  # statistics are of decoding


def test_the_default_policy_stays_near_dense(counted):
    model, ids = model_and_ids()
    dense = dense_logits(model, ids).log_softmax(-1)
    with hsr.enable(model), torch.no_grad():
        found = model(ids).logits.log_softmax(-1)
    assert counted["sparse"] == 3 * LONG
    assert (dense.exp() * (dense - found)).sum(-1).mean() < 0.02


@pytest.mark.parametrize("chunk", [1050, 300])
def test_chunks_equal_the_whole(counted, chunk):
    model, ids = model_and_ids()
    dense = dense_logits(model, ids)
    model.set_attn_implementation("hsr")
    cache = hsr.HSRCache(model.config, EVERYTHING)
    pieces = []
    with torch.no_grad():
        for part in ids.split(chunk, dim=1):
            pieces.append(model(part, **with_cache(model, cache)).logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), dense, rtol=1e-3, atol=1e-3)
    assert counted["sparse"] > 0


def test_padding_needs_no_matrix(counted, monkeypatch):
    """Rows of a padded batch are what they are alone; no mask has a row for each position."""
    model, ids = model_and_ids(batch=2)
    mask = torch.ones_like(ids)
    mask[1, :400] = 0
    dense = dense_logits(model, ids[1:, 400:])
    seen = []
    real = masks.sdpa_mask

    def recorded(**kwargs):
        made = real(**kwargs)
        seen.append(None if made is None else made.shape)
        return made

    monkeypatch.setattr(masks, "sdpa_mask", recorded)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with hsr.enable(model, EVERYTHING), torch.no_grad():
        found = model(ids, attention_mask=mask, position_ids=positions).logits
    assert counted == {"sparse": 3 * LONG, "dense": 0} and not seen
    torch.testing.assert_close(found[1:, 400:], dense, rtol=1e-3, atol=1e-3)
    assert torch.isfinite(found).all()
    whole = torch.ones_like(ids)
    with hsr.enable(model, EVERYTHING), torch.no_grad():
        found = model(ids, attention_mask=whole).logits
    torch.testing.assert_close(found, dense_logits(model, ids), rtol=1e-3, atol=1e-3)


def test_padded_generation_is_that_of_dense():
    model, ids = model_and_ids(batch=2)
    mask = torch.ones_like(ids)
    mask[0, :37] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    model.set_attn_implementation("sdpa")
    dense = model.generate(ids, **settings)
    with hsr.enable(model, EVERYTHING):
        assert torch.equal(model.generate(ids, **settings), dense)


def test_top_r_prompts_and_gradients_are_dense(counted):
    model, ids = model_and_ids()
    with hsr.enable(model, hsr.SoftmaxPolicy(top_r=8)), torch.no_grad():
        model(ids)
    assert counted == {"sparse": 0, "dense": 3 * LONG}
    with hsr.enable(model, EVERYTHING):
        model(ids).logits.sum().backward()
    assert counted == {"sparse": 0, "dense": 6 * LONG}
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None


def test_a_mask_that_is_no_padding_is_still_checked():
    model, ids = model_and_ids()
    one_row = torch.ones(1, 1, 1, LONG, dtype=torch.bool)
    with (
        hsr.enable(model),
        torch.no_grad(),
        pytest.raises(ValueError, match=r"attention_mask must have shape"),
    ):
        model(ids, attention_mask=one_row)
