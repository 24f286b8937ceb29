"""What the attention function "hsr" cannot honour is refused with a message, never ignored."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import hsr_attention as hsr  # noqa: E402
from hsr_attention.integrations.cache_argument import (  # noqa: E402
    CACHE_ARGUMENTS,
    cache_argument,
    with_cache,
)
from hsr_attention.integrations.transformers import hsr_attention  # noqa: E402

pytestmark = pytest.mark.transformers


def config(kind=transformers.LlamaConfig, **changes):
    settings = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    return kind(**(settings | changes))


def llama(implementation="hsr", **changes):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config(**changes)).eval()
    model.set_attn_implementation(implementation)
    return model


IDS = torch.arange(3, 23)[None]
NAME = cache_argument(llama())  # in the release that is installed


def call(model, ids=IDS, **settings):
    with torch.no_grad():
        return model(ids, **settings)


# --- the wrong cache, the wrong model -----------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_hsr_cache_without_hsr_attention(implementation, kv_heads):
    model = llama(implementation, num_key_value_heads=kv_heads)
    cache = hsr.HSRCache(model.config)
    with pytest.raises(ValueError, match=r"attn_implementation='hsr'"):
        call(model, **with_cache(model, cache))
    model.set_attn_implementation("hsr")  # the fix the message names
    call(model, **with_cache(model, cache))
    assert cache.get_seq_length() == IDS.shape[1]


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_hsr_attention_with_another_cache(kind):
    model = llama()
    with pytest.raises(ValueError, match=r"HSRCache\(model.config, policy\).*enable"):
        model.generate(IDS, max_new_tokens=4, do_sample=False, cache_implementation=kind)


def test_another_cache_inside_enable():
    model = llama("sdpa")
    with hsr.enable(model):
        for name in {"past_key_values", NAME}:  # old names are renamed later
            dense = transformers.DynamicCache(config=model.config)
            with pytest.raises(ValueError, match=f"{name} must be an HSRCache .* DynamicCache"):
                call(model, **{name: dense})
            with pytest.raises(ValueError, match=f"{name} must be an HSRCache .* tuple"):
                call(model, **{name: ((torch.zeros(1), torch.zeros(1)),)})
        dense = with_cache(model, transformers.DynamicCache())
        with pytest.raises(ValueError, match=r"must be an HSRCache .* DynamicCache"):
            model.generate(IDS, **dense, max_new_tokens=2)
        with pytest.raises(ValueError, match=r"cache_implementation must be None .* 'static'"):
            model.generate(IDS, cache_implementation="static", max_new_tokens=2)


def test_a_forward_call_that_takes_no_cache_by_a_known_name():
    class Nameless(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, **kwargs):
            return super().forward(input_ids, attention_mask, **kwargs)

    model = Nameless(config()).eval()
    before = model.config._attn_implementation
    message = "must take its cache as past_key_values or cache, got Nameless.forward with self"
    with pytest.raises(ValueError, match=message):
        cache_argument(model)
    with pytest.raises(ValueError, match=message), hsr.enable(model):
        raise AssertionError("the block runs")
    assert model.config._attn_implementation == before and not model._forward_pre_hooks


class OldName(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, past_key_values=None, **kwargs):
        return super().forward(input_ids, **{NAME: past_key_values}, **kwargs)


class NewName(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, cache=None, **kwargs):
        return super().forward(input_ids, **{NAME: cache}, **kwargs)


@pytest.mark.parametrize(
    ("kind", "name"), [(OldName, "past_key_values"), (NewName, "cache")], ids=CACHE_ARGUMENTS
)
def test_both_names_of_the_cache_are_known(kind, name):
    """Of another release of transformers, or of a model whose code comes with its weights."""
    model = kind(config()).eval()
    assert cache_argument(model) == name
    with hsr.enable(model):
        for settings in ({}, {"use_cache": True}, dict.fromkeys(CACHE_ARGUMENTS)):
            assert isinstance(call(model, **settings)[NAME], hsr.HSRCache), settings
        assert NAME not in call(model, use_cache=False)
        cache = hsr.HSRCache(model.config)
        assert call(model, **with_cache(model, cache))[NAME] is cache


def test_gradient_checkpointing_makes_no_other_cache():
    """Layers that are checkpointed take no cache; without gradients some releases make one."""
    model = llama("sdpa")
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model.train()
    with hsr.enable(model):
        assert NAME not in call(model)
        model(IDS).logits.sum().backward()
    with hsr.enable(model, hsr.ReLUPolicy()), pytest.raises(ValueError, match="use_cache=False"):
        call(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, "num_hidden_layers 2, got a model with 3"),
        ({"num_hidden_layers": 1}, "num_hidden_layers 2, got a model with 1"),
        ({"num_attention_heads": 8}, "num_attention_heads 4, got a model with 8"),
        ({"num_key_value_heads": 4}, "num_key_value_heads 2, got a model with 4"),
        ({"head_dim": 16}, "head_dim 8, got a model with 16"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
@pytest.mark.parametrize("used", [False, True])
def test_cache_of_another_model(changes, message, used):
    model, other = llama(), llama(**changes)
    cache = hsr.HSRCache(model.config)
    if used:
        call(model, **with_cache(model, cache))
    before = cache.get_seq_length()
    with pytest.raises(ValueError, match=f"{message}|like the cache|like the keys"):
        call(other, **with_cache(other, cache))
    assert cache.get_seq_length() == before
    call(model, **with_cache(model, cache))  # unharmed
    assert cache.get_seq_length() == before + IDS.shape[1]


def test_another_batch():
    model = llama()
    cache = hsr.HSRCache(model.config)
    call(model, **with_cache(model, cache))
    with pytest.raises(ValueError, match="like the cache"):
        call(model, IDS.repeat(2, 1), **with_cache(model, cache))


def test_layer_index_beyond_the_cache():
    cache = hsr.HSRCache(config())
    new = torch.zeros(2, 1, 2, 3, 8)
    with pytest.raises(ValueError, match="made for a model of 2 layers, got layer_idx 2"):
        cache.update(*new, 2)


def test_layers_out_of_step():
    cache = hsr.HSRCache(config())
    new = torch.zeros(2, 1, 2, 3, 8)
    cache.update(*new, 0)
    cache.update(*new, 0)
    with pytest.raises(ValueError, match="must hold the same tokens, got 3 in layer 1 and 6"):
        cache.update(*new, 1)


# --- what a cache is made from ------------------------------------------------------------------


def test_policy_and_config_types():
    with pytest.raises(TypeError, match="policy must be a SoftmaxPolicy or a ReLUPolicy"):
        hsr.HSRCache(config(), policy=0.05)
    with pytest.raises(TypeError, match="config must be the config of a model"):
        hsr.HSRCache(hsr.SoftmaxPolicy())
    with pytest.raises(
        TypeError, match="model must be a transformers PreTrainedModel, got Linear"
    ):
        hsr.enable(torch.nn.Linear(2, 2)).__enter__()


def test_softcapping_in_the_config():
    gemma2 = config(transformers.Gemma2Config)
    with pytest.raises(ValueError, match=r"soft-capped logits, got attn_logit_softcapping=50"):
        hsr.HSRCache(gemma2)
    model = transformers.Gemma2ForCausalLM(gemma2)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match="soft-capped"):
        hsr.enable(model).__enter__()
    assert model.config._attn_implementation == before


def test_encoder_decoder():
    with pytest.raises(ValueError, match="decoder-only models, got 'bart'"):
        hsr.HSRCache(transformers.BartConfig())


def test_latent_attention():
    with pytest.raises(ValueError, match="multi-head latent attention, got kv_lora_rank=512"):
        hsr.HSRCache(transformers.DeepseekV3Config())


def test_no_layer_with_full_attention():
    with pytest.raises(ValueError, match=r"needs a layer with full attention.*sliding_window=16"):
        hsr.HSRCache(config(transformers.MistralConfig, sliding_window=16))


def test_relu_in_a_model_with_sliding_windows():
    mixed = config(
        transformers.Gemma3TextConfig, layer_types=["sliding_attention", "full_attention"]
    )
    hsr.HSRCache(mixed)
    with pytest.raises(ValueError, match="ReLUPolicy needs full attention in every layer"):
        hsr.HSRCache(mixed, hsr.ReLUPolicy())


def test_relu_without_a_cache():
    model = llama("sdpa")
    message = "attends through its cache, got use_cache=False"
    with hsr.enable(model, hsr.ReLUPolicy()), pytest.raises(ValueError, match=message):
        call(model, use_cache=False)


def test_dtype():
    model = llama().double()
    with pytest.raises(
        TypeError, match=r"must be float32, bfloat16 or float16, got torch.float64"
    ):
        call(model, **with_cache(model, hsr.HSRCache(model.config)))


# --- what the attention function is asked for ---------------------------------------------------


def attend(n=12, m=12, attention_mask=None, **settings):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, h, t, 8) for h, t in ((4, m), (2, n), (2, n)))
    return hsr_attention(torch.nn.Identity(), query, key, value, attention_mask, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"softcap": 50.0}, "soft-capped logits, got the argument 'softcap'"),
        ({"s_aux": torch.zeros(4)}, "attention sinks, got the argument 's_aux'"),
        ({"sinks": torch.zeros(4)}, "attention sinks, got the argument 'sinks'"),
        ({"position_bias": torch.zeros(1, 4, 12, 12)}, "a position bias"),
        ({"cache": object()}, "continuous batching"),
        ({"head_mask": torch.ones(4)}, "a head mask"),
        ({"indices": torch.zeros(1)}, "an indexer's choice of keys"),
        ({"alibi": torch.zeros(4)}, "does not know the argument 'alibi'"),
        ({"output_attentions": True}, "does not compute attention weights"),
        ({"dropout": 0.1}, r"dropout=0.1; call model.eval\(\)"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        attend(**settings)


def test_absent_arguments_are_fine():
    plain = attend()[0]
    same = attend(softcap=None, s_aux=None, position_ids=torch.arange(12), use_cache=False)[0]
    assert torch.equal(plain, same)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(2, 1, 12, 12), "must be boolean .* got torch.float32"),
        (torch.ones(2, 4, 12, 12, dtype=torch.bool), "the same for all heads"),
        (torch.ones(3, 1, 12, 12, dtype=torch.bool), r"must have shape \[2 or 1, 1, 12, 12\]"),
        (torch.ones(2, 1, 12, 13, dtype=torch.bool), r"must have shape \[2 or 1, 1, 12, 12\]"),
        (torch.ones(2, 12, dtype=torch.bool), r"must have shape \[2 or 1, 1, 12, 12\]"),
        ("causal", "must be boolean .* got str"),
    ],
)
def test_masks(mask, message):
    with pytest.raises(ValueError, match=message):
        attend(attention_mask=mask)


def test_keys_of_nobody():
    with pytest.raises(ValueError, match="got another cache's 12 keys for 1 new positions"):
        attend(m=1)


def test_encoders_and_cross_attention_stay_dense():
    out = attend(m=5, is_causal=False)[0]
    assert out.shape == (2, 5, 4, 8) and torch.isfinite(out).all()


def test_dropout_while_training():
    model = llama(attention_dropout=0.1).train()
    with pytest.raises(ValueError, match="does not support dropout"):
        call(model, use_cache=False)


def test_output_attentions():
    model = llama()
    with pytest.raises(ValueError, match="output_attentions"):
        call(model, output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions"):
        model.config.output_attentions = True


def test_gradients_through_a_prompt_but_not_through_decoding():
    model = llama()
    cache = hsr.HSRCache(model.config)
    model(IDS, **with_cache(model, cache)).logits.sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
    out = model(IDS[:, :1], **with_cache(model, cache))
    with pytest.raises(RuntimeError, match="hsr attention over a cache has no gradient"):
        out.logits.sum().backward()


def test_a_mask_that_shows_newer_keys():
    """Image tokens that see each other: dense under softmax, refused under ReLU."""
    model = llama()
    ids, n = IDS[:, :4], 24
    mask = torch.ones(1, 1, 4, n, dtype=torch.bool)
    dense = llama("sdpa")
    with torch.no_grad():
        other = transformers.DynamicCache(config=dense.config)
        dense(IDS, **with_cache(dense, other))
        expected = dense(ids, **with_cache(dense, other), attention_mask=mask).logits
        cache = hsr.HSRCache(model.config, hsr.SoftmaxPolicy(top_r=1, tail="drop"))
        model(IDS, **with_cache(model, cache))
        found = model(ids, **with_cache(model, cache), attention_mask=mask).logits
        torch.testing.assert_close(found, expected)
        cache = hsr.HSRCache(model.config, hsr.ReLUPolicy())
        model(IDS, **with_cache(model, cache))
        with pytest.raises(ValueError, match="a ReLUPolicy needs causal attention"):
            model(ids, **with_cache(model, cache), attention_mask=mask)


def test_not_a_number():
    model = llama()
    model.model.layers[1].self_attn.k_proj.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="keys must be finite"):
        call(model, **with_cache(model, hsr.HSRCache(model.config)))


def test_unregistered_name_is_registered_by_asking_for_the_cache():
    assert "hsr" in transformers.AttentionInterface().valid_keys()
    assert "hsr" in transformers.AttentionMaskInterface().valid_keys()


# --- no tokens ------------------------------------------------------------------------------------


def test_an_empty_prompt():
    model, nothing = llama(), IDS[:, :0]
    with pytest.raises(
        ValueError, match="input_ids must hold at least one token, got a prompt of 0"
    ):
        call(model, nothing, **with_cache(model, hsr.HSRCache(model.config)))
    with hsr.enable(model), pytest.raises(ValueError, match="must hold at least one token"):
        call(model, nothing)
    with hsr.enable(model), pytest.raises(ValueError, match="must hold at least one token"):
        model.generate(nothing, max_new_tokens=2)
