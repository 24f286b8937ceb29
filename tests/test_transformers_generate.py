"""Generation through ``HSRCache``: every way transformers generates gives the text of dense."""

import contextlib

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import hsr_attention as hsr  # noqa: E402
import hsr_attention.integrations.transformers  # noqa: E402  (makes "hsr" known)
from hsr_attention.integrations import answering  # noqa: E402
from hsr_attention.integrations.cache_argument import (  # noqa: E402
    CACHE_ARGUMENTS,
    cache_argument,
    with_cache,
)
from hsr_attention.integrations.layer import HSRLayer  # noqa: E402

pytestmark = pytest.mark.transformers

# Nothing is omitted and everything is read at full precision: the text must be that of dense.
EVERYTHING = hsr.SoftmaxPolicy(epsilon=1e-9, exact=True)
VOCABULARY = 97
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


@contextlib.contextmanager
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    with one_thread():
        yield


def sharpen(model):
    """Make attention of a random model selective, so that the text depends on it."""
    for name, weight in model.named_parameters():
        if any(part in name for part in ("q_proj", "k_proj")) and weight.ndim == 2:
            weight.data *= 12
    return model.eval()


def llama(kv_heads=2, dtype=torch.float32, **changes):
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        **(SMALL | {"num_hidden_layers": 3, "num_key_value_heads": kv_heads} | changes)
    )
    return sharpen(transformers.LlamaForCausalLM(config)).to(dtype)


def gemma3(window=24):
    torch.manual_seed(4)
    config = transformers.Gemma3TextConfig(
        **SMALL,
        num_hidden_layers=4,
        num_key_value_heads=2,
        query_pre_attn_scalar=16,
        sliding_window=window,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    return transformers.Gemma3ForCausalLM(config).eval()


def prompt(tokens=150, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=generator)


def padded(batch=3, tokens=120):
    ids = prompt(tokens, batch)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 33, 90)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    return ids, mask


def cache_in(out):
    """Return the cache of what a model, or ``generate``, returned."""
    return next((out[name] for name in CACHE_ARGUMENTS if name in out), None)


def generate(model, ids, seed=0, **settings):
    torch.manual_seed(seed)
    settings = {"max_new_tokens": 20, "do_sample": False} | settings
    return model.generate(ids, **settings)


def generate_hsr(model, ids, policy=EVERYTHING, seed=0, **settings):
    model.set_attn_implementation("hsr")
    cache = hsr.HSRCache(model.config, policy)
    try:
        out = generate(model, ids, seed, **with_cache(model, cache), **settings)
    finally:
        model.set_attn_implementation("sdpa")
    assert cache.get_seq_length() >= ids.shape[1]
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_greedy(kv_heads, dtype):
    model, ids = llama(kv_heads, dtype), prompt()
    assert torch.equal(generate(model, ids), generate_hsr(model, ids))


def test_the_text_depends_on_attention():
    # Otherwise the comparisons above prove nothing.
    model, ids = llama(), prompt()
    dropped = hsr.SoftmaxPolicy(top_r=1, tail="drop")
    assert not torch.equal(generate(model, ids), generate_hsr(model, ids, dropped))


@pytest.mark.parametrize("build", [llama, gemma3])
@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "top_k": 20},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "do_sample": True},
        {"prefill_chunk_size": 32},
        {"prefill_chunk_size": 7},
        {"num_return_sequences": 3, "do_sample": True},
    ],
    ids=str,
)
def test_ways_to_generate(build, settings):
    model, ids = build(), prompt()
    dense = generate(model, ids, **settings)
    assert torch.equal(dense, generate_hsr(model, ids, **settings))


@pytest.mark.parametrize("build", [llama, gemma3])
def test_prompt_lookup(several, build):
    model = build()
    ids = prompt(20).repeat(1, 6)  # repeats: candidates are found, some are taken back
    settings = {"prompt_lookup_num_tokens": 6, "max_new_tokens": 40}
    dense = generate(model, ids, **settings)
    assert torch.equal(dense, generate(model, ids, max_new_tokens=40))
    assert torch.equal(dense, generate_hsr(model, ids, **settings))


@pytest.mark.parametrize("build", [llama, gemma3])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"prefill_chunk_size": 50}], ids=str)
def test_left_padding(several, build, settings):
    model = build()
    ids, mask = padded()
    dense = generate(model, ids, attention_mask=mask, **settings)
    assert torch.equal(dense, generate_hsr(model, ids, attention_mask=mask, **settings))


def test_padding_does_not_change_a_row():
    model = llama()
    ids, mask = padded()
    together = generate_hsr(model, ids, attention_mask=mask)
    for row, start in enumerate((0, 33, 90)):
        alone = generate_hsr(model, ids[row : row + 1, start:])
        assert torch.equal(together[row, ids.shape[1] :], alone[0, ids.shape[1] - start :])


@pytest.mark.parametrize(
    "policy", [EVERYTHING, hsr.ReLUPolicy(threshold=0.1)], ids=["softmax", "relu"]
)
def test_padding_rows_are_finite(several, policy):
    model = llama()
    ids, mask = padded()
    model.set_attn_implementation("hsr")
    with torch.no_grad():
        cache = hsr.HSRCache(model.config, policy)
        for start in (0, 60, 63):  # whole chunks of padding, dense and sparse
            end = {0: 60, 60: 63, 63: 120}[start]
            out = model(
                ids[:, start:end], attention_mask=mask[:, :end], **with_cache(model, cache)
            )
            assert torch.isfinite(out.logits).all()


@pytest.fixture(params=["sparse", "dense"])
def several(request, monkeypatch):
    """Answer several new positions at once by reports, or by one dense pass as for few keys."""
    keys = 0 if request.param == "sparse" else 10**9
    monkeypatch.setattr(answering, "KEYS_PER_POSITION", keys)
    monkeypatch.setattr(answering, "prompt_keys", lambda: keys)
    return request.param


@pytest.mark.parametrize("m", [1, 2, 16, 40])
def test_logits_equal_dense_for_any_number_of_new_tokens(several, m):
    model, ids = llama(), prompt(200)
    with torch.no_grad():
        dense = model(ids).logits[:, -m:]
        model.set_attn_implementation("hsr")
        cache = hsr.HSRCache(model.config, EVERYTHING, collect=True)
        model(ids[:, :-m], **with_cache(model, cache))
        found = model(ids[:, -m:], **with_cache(model, cache)).logits
    torch.testing.assert_close(found, dense, rtol=1e-4, atol=1e-4)
    is_prompt = 2 * m >= answering.PROMPT_ROWS  # two query heads a key head; not recorded
    reported = m if m == 1 or (several == "sparse" and not is_prompt) else 0
    assert cache.statistics()[0].density.size == 4 * reported


@pytest.mark.parametrize(
    "policy",
    [
        hsr.SoftmaxPolicy(),
        hsr.SoftmaxPolicy(epsilon=0.02, tail="drop"),
        hsr.SoftmaxPolicy(top_r=64),
        hsr.SoftmaxPolicy(threshold=hsr.Gaussian()),
    ],
    ids=["default", "drop", "top_r", "threshold"],
)
def test_policies_stay_near_dense(policy):
    model, ids = llama(), prompt(600)
    with torch.no_grad():
        dense = model(ids).logits[:, -1].log_softmax(-1)
        model.set_attn_implementation("hsr")
        cache = hsr.HSRCache(model.config, policy)
        model(ids[:, :-1], **with_cache(model, cache))
        sparse = model(ids[:, -1:], **with_cache(model, cache)).logits[:, -1].log_softmax(-1)
    assert (dense.exp() * (dense - sparse)).sum() < 0.02


def relu_dense(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Dense ReLU attention, written for eyes: what ``ReLUPolicy`` must equal."""
    group, m, n = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    weights = (query.double() @ key.double().mT * scaling - 0.1).relu()
    weights = weights * torch.ones(m, n).tril(n - m)
    if attention_mask is not None:
        weights = weights * attention_mask
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-300)
    return (weights @ value.double()).to(query.dtype).transpose(1, 2), None


@pytest.mark.parametrize("settings", [{}, {"prefill_chunk_size": 50}], ids=str)
def test_relu_attention_equals_dense(settings):
    model = llama()
    ids, mask = padded()
    transformers.AttentionInterface.register("relu_dense", relu_dense)
    transformers.AttentionMaskInterface.register(
        "relu_dense", transformers.masking_utils.sdpa_mask
    )
    try:
        model.set_attn_implementation("relu_dense")
        dense = generate(model, ids, attention_mask=mask, **settings)
    finally:
        transformers.AttentionInterface._global_mapping.pop("relu_dense")
        transformers.AttentionMaskInterface._global_mapping.pop("relu_dense")
    policy = hsr.ReLUPolicy(threshold=0.1)
    model.set_attn_implementation("sdpa")
    softmax = generate(model, ids, attention_mask=mask, **settings)
    sparse = generate_hsr(model, ids, policy, attention_mask=mask, **settings)
    assert torch.equal(dense, sparse)
    assert not torch.equal(softmax, sparse)


def test_autocast():
    model, ids = llama(), prompt()
    model.set_attn_implementation("hsr")
    cache = hsr.HSRCache(model.config)
    with torch.autocast("cpu", torch.bfloat16):
        text = generate(model, ids, **with_cache(model, cache))
    assert text.shape == (1, ids.shape[1] + 20)
    assert all(x.dtype is torch.bfloat16 for x in cache.layers[0].tensors())


def test_assistant():
    model, assistant, ids = llama(), llama(num_hidden_layers=1), prompt(20).repeat(1, 6)
    dense = generate(model, ids, assistant_model=assistant)
    with hsr.enable(model, EVERYTHING):
        assert torch.equal(dense, generate(model, ids, assistant_model=assistant))


def test_a_conversation_goes_on_in_the_same_cache():
    model, ids = llama(), prompt()
    model.set_attn_implementation("hsr")
    cache = hsr.HSRCache(model.config, EVERYTHING)
    first = generate(model, ids, **with_cache(model, cache))
    longer = torch.cat([first, prompt(9, seed=9)], 1)
    second = generate(model, longer, **with_cache(model, cache))
    model.set_attn_implementation("sdpa")
    assert torch.equal(second, generate(model, longer))


def test_a_cached_prefix_serves_two_prompts():
    import copy

    model, ids = llama(), prompt()
    model.set_attn_implementation("hsr")
    prefix = hsr.HSRCache(model.config, EVERYTHING)
    with torch.no_grad():
        model(ids[:, :100], **with_cache(model, prefix))
    texts = [
        generate(
            model,
            torch.cat([ids[:, :100], prompt(30, seed=seed)], 1),
            **with_cache(model, copy.deepcopy(prefix)),
        )
        for seed in (1, 2)
    ]
    model.set_attn_implementation("sdpa")
    for seed, text in zip((1, 2), texts, strict=True):
        whole = torch.cat([ids[:, :100], prompt(30, seed=seed)], 1)
        assert torch.equal(text, generate(model, whole))


ARCHITECTURES = {
    "Qwen3": {},
    "Phi3": {"sliding_window": None},
    "Granite": {"attention_multiplier": 0.3},
    "GPTNeoX": {},
    "GPT2": {"n_embd": 64, "n_head": 4, "n_layer": 2},
    "Cohere2": {"sliding_window": 16},
    "Llama4": {"intermediate_size_mlp": 96, "num_local_experts": 2, "attention_chunk_size": 32},
    "Qwen3Next": {  # linear attention in three layers of four
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "Gemma3n": {  # the last layers read the keys of earlier ones
        "num_hidden_layers": 10,
        "num_kv_shared_layers": 5,
        "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 2,
        "sliding_window": 16,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * 10,
    },
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name):
    part = "Text" if name in ("Llama4", "Gemma3n") else ""
    settings = SMALL | {"num_hidden_layers": 4, "num_key_value_heads": 2} | ARCHITECTURES[name]
    torch.manual_seed(5)
    head = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    config = getattr(transformers, f"{name}{part}Config")(**settings)
    model = getattr(transformers, head)(config).eval()
    ids, mask = padded(tokens=100)
    dense = generate(model, ids, attention_mask=mask, max_new_tokens=12)
    with hsr.enable(model, EVERYTHING):
        out = generate(
            model, ids, attention_mask=mask, max_new_tokens=12, return_dict_in_generate=True
        )
    assert isinstance(cache_in(out), hsr.HSRCache)
    assert torch.equal(out.sequences, dense)


# --- enable -------------------------------------------------------------------------------------


def state_of(model):
    configs = [m.config for m in model.modules() if hasattr(m, "config")]
    return (
        [c._attn_implementation for c in configs],
        sorted(model.__dict__),
        len(model._forward_pre_hooks),
    )


def test_enable_generates_and_restores():
    model, ids = llama(), prompt()
    dense, before = generate(model, ids), state_of(model)
    with hsr.enable(model, EVERYTHING) as inside:
        assert inside is model
        out = generate(model, ids, return_dict_in_generate=True)
        assert isinstance(cache_in(out), hsr.HSRCache)
        assert torch.equal(out.sequences, dense)
    assert state_of(model) == before
    out = generate(model, ids, return_dict_in_generate=True)
    assert isinstance(cache_in(out), transformers.DynamicCache)
    assert torch.equal(out.sequences, dense)


@pytest.mark.parametrize(
    "settings", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 5}, {"use_cache": False}], ids=str
)
def test_enable_covers_ways_to_generate(settings):
    model, ids = gemma3(), prompt()
    dense = generate(model, ids, **settings)
    with hsr.enable(model, EVERYTHING):
        assert torch.equal(dense, generate(model, ids, **settings))


def test_enable_restores_after_an_error():
    model = llama()
    before = state_of(model)
    with pytest.raises(RuntimeError, match="inside"), hsr.enable(model):
        raise RuntimeError("inside")
    assert state_of(model) == before


def test_enable_nests_and_the_innermost_policy_holds():
    model, ids = llama(), prompt(20)
    outer, inner = hsr.SoftmaxPolicy(top_r=4), hsr.SoftmaxPolicy(top_r=8)
    before = state_of(model)

    def policies():
        made = model.generate(ids, max_new_tokens=2, return_dict_in_generate=True)
        called = model(ids)
        return cache_in(made).policy, cache_in(called).policy

    with hsr.enable(model, outer):
        assert policies() == (outer, outer)
        with hsr.enable(model, inner):
            assert policies() == (inner, inner)
        assert policies() == (outer, outer)
    assert state_of(model) == before


def test_enable_changes_no_other_model():
    one, other = llama(), llama()
    with hsr.enable(one):
        assert isinstance(cache_in(other(prompt(10))), transformers.DynamicCache)
        assert other.config._attn_implementation == "sdpa"


def test_enable_covers_calls_of_the_model():
    model, ids = llama(), prompt()
    with torch.no_grad():
        dense = model(ids).logits
        with hsr.enable(model, EVERYTHING):
            scored = model(ids, use_cache=False)  # perplexity: the whole sequence at once
            assert torch.equal(scored.logits, dense) and cache_in(scored) is None
            first = model(ids[:, :-2], use_cache=True)
            assert isinstance(cache_in(first), hsr.HSRCache)
            last = model(ids[:, -2:], **with_cache(model, cache_in(first)))
            positional = model(ids, None, None, None)
            assert isinstance(cache_in(positional), hsr.HSRCache)
    torch.testing.assert_close(last.logits, dense[:, -2:], rtol=1e-4, atol=1e-4)


def test_without_enable_whole_sequences_need_no_cache():
    model, ids = llama(), prompt()
    with torch.no_grad():
        dense = model(ids, use_cache=False).logits
        model.set_attn_implementation("hsr")
        assert torch.equal(model(ids, use_cache=False).logits, dense)


def word_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="w0", padding_side="left"
    )


def test_pipeline():
    model = llama()
    texts = [" ".join(f"w{int(i)}" for i in prompt(n, seed=n)[0]) for n in (40, 90)]
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=word_tokenizer())
    settings = {"max_new_tokens": 12, "do_sample": False, "batch_size": 2}
    dense = pipe(texts, **settings)
    made = []
    with hsr.enable(model, EVERYTHING):
        hook = model.register_forward_pre_hook(
            lambda _, args, kwargs: made.append(kwargs[cache_argument(model)]), with_kwargs=True
        )
        assert pipe(texts, **settings) == dense
        hook.remove()
    assert made and all(isinstance(cache, hsr.HSRCache) for cache in made)


def test_evaluation_harness():
    """The calls of lm-eval's HFLM: generate and forward, without a word about caches."""
    model = llama()
    ids, mask = padded()

    def generate_until():
        return model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_length=ids.shape[1] + 12,
            stopping_criteria=transformers.StoppingCriteriaList(),
            pad_token_id=0,
            use_cache=True,
            do_sample=False,
        )

    def loglikelihood():
        with torch.no_grad():
            return model(ids).logits

    dense = generate_until(), loglikelihood()
    with hsr.enable(model, EVERYTHING):
        assert torch.equal(generate_until(), dense[0])
        seen = mask.bool()
        torch.testing.assert_close(loglikelihood()[seen], dense[1][seen])


def test_mixed_models_report_only_in_full_layers():
    model, ids = gemma3(), prompt()
    model.set_attn_implementation("hsr")
    cache = hsr.HSRCache(model.config, EVERYTHING, collect=True)
    generate(model, ids, **with_cache(model, cache), max_new_tokens=5)
    assert [isinstance(layer, HSRLayer) for layer in cache.layers] == [False, True, False, True]
    assert [s.layer for s in cache.statistics()] == [1, 3]
    assert all(s.density.shape == (4, 4) for s in cache.statistics())
    assert cache.layers[0].keys.shape[2] == 23  # the window, less the newest
