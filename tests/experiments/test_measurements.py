"""What the experiments measure with: prompts on disk, the atlas, retrieval, masked attention."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import hsr_attention as hsr  # noqa: E402
import tiny  # noqa: E402
from hsr_attention.attention import reference  # noqa: E402
from hsr_attention.evaluation import (  # noqa: E402
    atlas,
    generation,
    masked_attention,
    prompt_state,
    retrieval,
    texts,
)
from hsr_attention.evaluation.capture import stream  # noqa: E402
from hsr_attention.evaluation.errors import InputError  # noqa: E402
from hsr_attention.evaluation.perplexity import perplexity, score  # noqa: E402
from hsr_attention.experiments import growth  # noqa: E402

pytestmark = pytest.mark.transformers
PREFIX, SCORED = 300, 40


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture(scope="module")
def ids():
    return texts.token_ids(tiny.tokenizer(), tiny.words(PREFIX + SCORED))


@pytest.fixture(scope="module")
def state(model, ids, tmp_path_factory):
    return prompt_state.create(tmp_path_factory.mktemp("state"), model, ids[:, :PREFIX])


# ---- prompts on disk


def test_a_state_is_what_a_cache_holds_after_the_prompt(model, ids, state):
    cache = generation.dense_cache(model)
    logits = generation.prefill(model, ids[:, :PREFIX], cache)
    assert torch.allclose(state.logits, logits, atol=1e-4)
    for layer in range(tiny.LAYERS):
        q, k, v = state.layer(layer)
        assert torch.allclose(k, cache.layers[layer].keys[0], atol=1e-5)
        assert torch.allclose(v, cache.layers[layer].values[0], atol=1e-5)
        assert q.shape == (tiny.HEADS, prompt_state.LAST, tiny.HEAD_DIM)
        assert state.scale[layer] == pytest.approx(tiny.HEAD_DIM**-0.5)


def test_a_state_keeps_queries_before_earlier_lengths(model, tmp_path):
    ids = texts.token_ids(tiny.tokenizer(), tiny.words(512))
    state = prompt_state.create(tmp_path, model, ids)
    seen = []
    stream(model, ids, lambda layer, q, k, v, scale: seen.append(q.clone()))
    assert state.lengths == [256, 512]
    for length, count in ((256, prompt_state.EARLIER), (512, prompt_state.LAST)):
        found = state.queries(1, length)
        assert torch.equal(found, seen[1][:, length - count : length])
    with pytest.raises(ValueError, match=r"length must be one of \[256, 512\], got 100"):
        state.queries(0, 100)


def test_a_state_is_found_again_only_whole_and_for_its_tokens(ids, state):
    prompt = ids[:, :PREFIX]
    assert prompt_state.find(state.directory, prompt) == state
    assert prompt_state.find(state.directory, prompt + 1) is None
    assert prompt_state.find(state.directory / "nowhere", prompt) is None
    facts = state.directory / "state.json"
    kept = facts.read_text()
    facts.write_text(kept[:20])
    assert prompt_state.find(state.directory, prompt) is None
    facts.write_text(kept)


@pytest.mark.parametrize("policy", [None, hsr.SoftmaxPolicy(top_r=8, tail="drop")])
def test_scoring_from_a_state_is_scoring_from_a_prompt(model, ids, state, policy):
    expected = perplexity(model, ids, PREFIX, policy, SCORED)
    cache = (
        generation.dense_cache(model) if policy is None else generation.hsr_cache(model, policy)
    )
    found = score(model, state.fill(cache), state.logits, ids[0, PREFIX:].tolist(), PREFIX)
    assert found.nats == pytest.approx(expected.nats, abs=1e-3)


# ---- one cache, several policies

POLICIES = [
    hsr.SoftmaxPolicy(top_r=5, tail="drop"),
    hsr.SoftmaxPolicy(top_r=5),
    hsr.SoftmaxPolicy(epsilon=0.2),
    hsr.SoftmaxPolicy(threshold=0.5),
    hsr.ReLUPolicy(threshold=0.1, power=2),
]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_a_filled_cache_answers_another_policy_as_its_own_would(policy):
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, 1, 2, 333, 24), dtype=np.float32)
    q = rng.standard_normal((1, 4, 1, 24), dtype=np.float32)
    own = hsr.KVCache(policy)
    own.append(k, v)
    other = hsr.KVCache(hsr.SoftmaxPolicy(epsilon=0.01))
    other.append(k, v)
    other.attend(q)
    other.use_policy(policy)
    assert other.policy is policy
    for a, b in zip(
        own.attend(q, return_certificate=True),
        other.attend(q, return_certificate=True),
        strict=True,
    ):
        if isinstance(a, np.ndarray):
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_array_equal(a.error_bound, b.error_bound)


def test_a_cache_without_codes_of_values_refuses_to_sketch():
    k, v = np.ones((2, 1, 1, 40, 8), np.float32)
    cache = hsr.KVCache(hsr.SoftmaxPolicy(top_r=2, tail="drop"))
    cache.use_policy(hsr.SoftmaxPolicy(top_r=3))  # empty: anything goes
    cache.use_policy(hsr.SoftmaxPolicy(top_r=2, tail="drop"))
    cache.append(k, v)
    with pytest.raises(ValueError, match="holds no codes of values"):
        cache.use_policy(hsr.SoftmaxPolicy())
    assert cache.policy == hsr.SoftmaxPolicy(top_r=2, tail="drop")
    with pytest.raises(TypeError, match="policy must be"):
        cache.use_policy("dense")


def test_the_cache_of_a_model_changes_policy_and_forgets_statistics(model, state):
    cache = state.fill(generation.hsr_cache(model, hsr.SoftmaxPolicy()))
    generation.step(model, cache, 5)
    assert cache.statistics()[0].density.shape == (tiny.HEADS, 1)
    policy = hsr.SoftmaxPolicy(top_r=3, tail="drop")
    cache.use_policy(policy)
    assert cache.statistics()[0].density.size == 0
    generation.step(model, cache, 5)
    kept = cache.statistics()[0].density * len(cache.hsr_layers[0].rows)
    np.testing.assert_allclose(kept, 3, atol=1e-3)


# ---- masked attention, the independent check


@pytest.mark.parametrize("r", [4, 64, 10_000])
def test_masks_and_the_decoding_path_agree(model, ids, state, r):
    policy = hsr.SoftmaxPolicy(top_r=r, tail="drop")
    cache = state.fill(generation.hsr_cache(model, policy))
    forced = ids[0, PREFIX:].tolist()
    decoded = score(model, cache, state.logits, forced, PREFIX)
    masked = masked_attention.top_r_nats(model, state, forced, r)
    assert np.mean(masked) == pytest.approx(np.mean(decoded.nats), abs=2e-3)


# ---- the atlas


def test_the_atlas_counts_what_weights_say(state):
    q, k, v = state.layer(1)
    q, m, n = q[:, -6:], 6, PREFIX
    found = atlas.analyse_layer(1, q, k, v, state.scale[1])
    assert found["n"] == n
    assert found["queries"] == m
    for head in range(tiny.HEADS):
        logits = reference.logits(q[head], k[head // 2], state.scale[1])
        logits[~reference.causal(m, n)] = -np.inf
        w = np.exp(logits - logits.max(axis=1, keepdims=True))
        w /= w.sum(axis=1, keepdims=True)
        for share in atlas.SHARES:
            counts = []
            for row in -np.sort(-w, axis=1):
                count = next(c for c in range(1, n + 1) if row[:c].sum() >= share - 1e-12)
                counts.append(count)
            assert found["keys_needed"][f"{share:g}"][head] == pytest.approx(np.mean(counts))
        assert found["sinks"][head] == pytest.approx(w[:, : atlas.SINKS].sum(axis=1).mean())
        recent = [w[i, n - m + i + 1 - atlas.RECENT : n - m + i + 1].sum() for i in range(m)]
        assert found["recent"][head] == pytest.approx(np.mean(recent))
    for name, policy in found["policies"].items():
        assert policy["rows"] == tiny.HEADS * m
        assert policy["violations"] == 0, name
        assert len(policy["density"]) == tiny.HEADS
    assert max(found["policies"]["top_r=64, drop"]["density"]) <= 64 / (n - m + 1) + 1e-6
    needed = atlas.keys_needed(q, k, state.scale[1])
    for share, counts in zip(atlas.SHARES, needed, strict=True):
        assert counts == pytest.approx(found["keys_needed"][f"{share:g}"])


def test_the_atlas_of_a_model_looks_at_the_layers_asked_for(model, ids):
    rows = atlas.analyse_model(model, ids, [1], queries=4)
    assert [row["layer"] for row in rows] == [1]
    assert rows[0]["n"] == ids.shape[1]


# ---- retrieval


@pytest.mark.parametrize("name", retrieval.TASKS)
def test_the_answer_stands_where_the_question_says(name):
    tokenizer = characters()
    hay = tokenizer("All is well. " * 400).input_ids
    task = retrieval.make(name, tokenizer, hay, 2000, 4, seed=3)
    longest = max(len(q.prompt) + len(q.answer) for q in task.questions)
    assert len(task.context) + longest <= 2000
    assert len(task.context) > 1700
    text = tokenizer.decode(task.context)
    for question in task.questions:
        fact = tokenizer.decode(question.prompt).strip() + tokenizer.decode(question.answer)
        assert text.count(fact) == 1
        assert text.index(fact) / len(text) == pytest.approx(question.depth, abs=0.12)
    same = retrieval.make(name, tokenizer, hay, 2000, 4, seed=3)
    other = retrieval.make(name, tokenizer, hay, 2000, 4, seed=4)
    assert same == task
    assert other != task


def characters():
    """Return a tokenizer of single characters."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({chr(i): i for i in range(128)}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?")


def test_tasks_that_do_not_fit_are_refused():
    tokenizer = characters()
    with pytest.raises(InputError, match="needles need"):
        retrieval.make("needles", tokenizer, [65] * 50, 2000, 4, 0)
    with pytest.raises(InputError, match="pairs need room for 4 lines"):
        retrieval.make("pairs", tokenizer, [], 40, 4, 0)
    with pytest.raises(ValueError, match="task must be one of needles, pairs, got 'x'"):
        retrieval.make("x", tokenizer, [], 100, 1, 0)


def test_an_exact_policy_answers_as_dense_does(model, ids):
    question = retrieval.Question(0.5, ids[0, 200:205].tolist(), ids[0, 205:208].tolist())
    task = retrieval.Task("made up", ids[0, :200].tolist(), [question, question])
    exact = hsr.SoftmaxPolicy(epsilon=1e-7, exact=True)
    rows = retrieval.ask(model, task, {"dense": None, "exact": exact})
    assert [r["policy"] for r in rows] == ["dense", "dense", "exact", "exact"]
    assert rows[0] == rows[1]  # the cache came back as it was
    assert rows[2]["nats"] == pytest.approx(rows[0]["nats"], abs=1e-4)
    with torch.no_grad():
        logits = model(ids[:, :208]).logits[0, 204:207]
    expected = torch.nn.functional.cross_entropy(logits, ids[0, 205:208])
    assert rows[0]["nats"] == pytest.approx(float(expected), abs=1e-4)
    assert rows[0]["right"] == bool((logits.argmax(-1) == ids[0, 205:208]).all())


# ---- growth


def test_exponents_and_crossings():
    n = np.geomspace(100, 10_000, 5)
    fit = growth.exponent(n, 3 * n**0.7)
    assert fit["exponent"] == pytest.approx(0.7)
    assert fit["error"] == pytest.approx(0, abs=1e-9)
    assert np.exp(fit["offset"]) == pytest.approx(3)
    assert growth.crossing([100, 1000, 10_000], [0.1, 0.5, 2.0]) == pytest.approx(10**3.5)
    assert growth.crossing([100, 1000], [2.0, 3.0]) == pytest.approx(100)
    assert growth.crossing([100, 1000], [2.0, 0.5]) is None
