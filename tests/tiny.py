"""A tiny random Llama with a tiny word tokenizer, saved as transformers does."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = 60
CONTEXT = 512
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 16


def tokenizer():
    """Return a tokenizer that knows the words w0 ... w59."""
    vocabulary = {"<unk>": 0, "</s>": 1} | {f"w{i}": i + 2 for i in range(WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.decoder = decoders.Metaspace(replacement=" ")
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")


def config(**changes):
    """Return the config of the model."""
    settings = {
        "vocab_size": WORDS + 2,
        "hidden_size": HEADS * HEAD_DIM,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    return LlamaConfig(**(settings | changes))


def model(**changes):
    """Return the model, random but with attention that is not flat."""
    torch.manual_seed(0)
    made = LlamaForCausalLM(config(**changes)).eval()
    with torch.no_grad():
        for layer in made.model.layers:
            layer.self_attn.q_proj.weight.mul_(12)
            layer.self_attn.k_proj.weight.mul_(12)
    return made


def save(directory):
    """Write model and tokenizer."""
    model().save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def words(count, seed=0):
    """Return a text of this many tokens."""
    picks = torch.randint(WORDS, (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{i}" for i in picks.tolist())
