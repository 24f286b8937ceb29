"""The small models that come with the package: ReLU attention with alpha = 1 and 2 beside softmax.

Held-out perplexity, density by layer and head against the number of keys, time of decoding and of
prompts against dense ReLU attention in torch, and the greatest difference between the two. ``run``
returns data, ``plot`` draws them; ``python -m hsr_attention.experiments.relu_model`` does both.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hsr_attention.evaluation import generation, models, texts

NAMES = ("relu-demo", "relu2-demo", "softmax-demo")
RELU = NAMES[:2]
LABELS = {
    "relu-demo": r"ReLU, $\alpha$ = 1",
    "relu2-demo": r"ReLU, $\alpha$ = 2",
    "softmax-demo": "softmax",
}
LENGTHS = (128, 256, 512, 1024, 2048)  # the models were trained on texts of up to 2,048 tokens
LONG = (4096, 8192, 16_384)  # beyond what they were trained for: only times
LONGEST_PROMPT = 4096
PROMPT = 1536  # of the comparison of texts
TOKENS = 500
ROUNDS = 7


def held_out_essays() -> list[str]:
    """Return the essays that ``examples/train_relu_lm.py`` holds out: every tenth."""
    return texts.essay_list()[9::10]


def run(quick: bool, out: Path) -> dict[str, Any]:
    """Measure everything; ``quick`` takes shorter texts. ``out`` is a directory for the data."""
    data = quality(quick) | speed(quick)
    (out / "relu_model.json").write_text(json.dumps(data))
    return data


def quality(quick: bool) -> dict[str, Any]:
    """Return what the models are worth: perplexities, densities, agreement with dense."""
    loaded = {name: models.load(name) for name in NAMES}
    text = _tokens(loaded[NAMES[0]].tokenizer, held_out_essays())
    return {
        "held_out_tokens": text.shape[1],
        "training": {name: training(name) for name in NAMES},
        "perplexity": {
            name: {n: perplexity(model.model, text, n) for n in (512, LENGTHS[-1])}
            for name, model in loaded.items()
        },
        "density": {name: densities(loaded[name].model, text, LENGTHS[-1]) for name in RELU},
        "agreement": {
            name: [
                agreement(loaded[name].model, text[:, i : i + PROMPT], 50 if quick else TOKENS)
                for i in (0, 5000, 10_000)
            ]
            for name in RELU
        },
    }


def speed(quick: bool) -> dict[str, Any]:
    """Return times against dense ReLU attention, and the machine they are of."""
    lengths = (512, LENGTHS[-1]) if quick else (*LENGTHS[1:], *LONG)
    found: dict[str, Any] = {"machine": _machine(), "times": {}}
    for name in RELU:
        loaded = models.load(name)
        found["times"][name] = times(
            loaded.model, _tokens(loaded.tokenizer, texts.essay_list()), lengths
        )
    return found


def training(name: str) -> dict[str, Any]:
    """Return what ``examples/train_relu_lm.py`` noted when it made the model."""
    return json.loads((models.find(name).directory / "training.json").read_text())


def _machine() -> dict[str, Any]:
    import torch

    import hsr_attention as hsr

    return hsr.info() | {"torch_threads": torch.get_num_threads()}


def _tokens(tokenizer: Any, essays: list[str]) -> Any:
    import torch

    ids = [[tokenizer.eos_token_id, *tokenizer(x, verbose=False).input_ids] for x in essays]
    return torch.tensor([[token for essay in ids for token in essay]])


def perplexity(model: Any, stream: Any, length: int) -> float:
    """Return dense perplexity in windows of ``length`` tokens that do not overlap."""
    import torch

    generation.dense_cache(model)
    total = scored = 0
    with torch.no_grad():
        for start in range(0, stream.shape[1] - length, length):
            window = stream[:, start : start + length + 1]
            logits = model(window[:, :-1], use_cache=False).logits[0]
            total += torch.nn.functional.cross_entropy(
                logits, window[0, 1:], reduction="sum"
            ).item()
            scored += length
    return math.exp(total / scored)


def densities(model: Any, stream: Any, length: int) -> dict[int, list[list[float]]]:
    """Return the mean density [layers][heads] of queries that see about 128, 256, ... keys.

    Windows of ``length`` held-out tokens are read through ``HSRCache``; queries that see n / 2 ... n
    keys are averaged.
    """
    import numpy as np
    import torch

    windows = []
    with torch.no_grad():
        for start in range(0, stream.shape[1] - length, length):
            cache = generation.hsr_cache(model, generation.default_policy(model.config))
            model(stream[:, start : start + length], past_key_values=cache, logits_to_keep=1)
            windows.append(np.stack([layer.density for layer in cache.statistics()]))
    mean = np.mean(windows, axis=0)  # [layers, heads, positions]
    sizes = [n for n in LENGTHS if n <= length]
    return {n: mean[:, :, n // 2 : n].mean(axis=2).tolist() for n in sizes}


def _alternate(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return the median milliseconds of each call, taking turns; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(times[1:]) for name, times in seconds.items()}


def times(model: Any, text: Any, lengths: tuple[int, ...]) -> dict[str, dict[int, Any]]:
    """Return milliseconds of attention, of a token of the whole model, and of a prompt, by length.

    One dense pass over the longest text gives the keys, values and queries of the shorter ones.
    """
    from hsr_attention.evaluation.capture import capture

    longest = max(lengths)
    layers = list(range(model.config.num_hidden_layers))
    heads = capture(model, text[:, :longest], layers, queries=longest)
    found: dict[str, dict[int, Any]] = {"attention": {}, "decode": {}, "prefill": {}}
    for n in lengths:
        parts = [[heads.tensors[f"{x}{i}"][None, :, :n] for x in "qkv"] for i in layers]
        found["attention"][n] = attention_times(model.config, parts, heads.scale)
        found["decode"][n] = decode_times(model, parts, int(text[0, n]))
        if n <= LONGEST_PROMPT:
            found["prefill"][n] = prefill_times(model, text[:, :n])
    return found


def attention_times(config: Any, layers: list[Any], scale: float | None) -> dict[str, Any]:
    """Time the attention of one token in all layers, the newest of those in ``layers`` [q, k, v].

    Dense attention reads its keys in place, query heads that share a key head in one product, which
    is the fastest in torch. Density and the greatest difference of the outputs stand beside.
    """
    import torch

    from hsr_attention.integrations.relu_model import dense_relu_attention
    from hsr_attention.kv_cache import KVCache

    sigma, power = config.relu_sigma, config.relu_power
    dense_layers, caches = [], []
    for q, k, v in layers:
        cache = KVCache(generation.default_policy(config))
        cache.append(k, v)
        newest = q[:, :, -1:].contiguous()
        caches.append((cache, newest))
        dense_layers.append((newest, k.contiguous(), v.contiguous()))

    def dense() -> list[Any]:
        with torch.no_grad():
            return [dense_relu_attention(q, k, v, sigma, power, scale) for q, k, v in dense_layers]

    def hsr() -> list[Any]:
        return [cache.attend(q, scale) for cache, q in caches]

    certificates = [cache.attend(q, scale, return_certificate=True)[1] for cache, q in caches]
    return _alternate({"dense": dense, "hsr": hsr}, ROUNDS) | {
        "density": statistics.fmean(float(c.density.mean()) for c in certificates),
        "difference": max(float((a - b).abs().max()) for a, b in zip(dense(), hsr(), strict=True)),
    }


def decode_times(model: Any, layers: list[Any], token: int) -> dict[str, Any]:
    """Time one token of the whole model behind the keys and values in ``layers`` [q, k, v]."""
    caches = {
        "dense": generation.dense_cache(model),
        "hsr": generation.hsr_cache(model, generation.default_policy(model.config), collect=False),
    }
    for cache in caches.values():
        for i, (_, k, v) in enumerate(layers):
            cache.update(k, v, i)
    n = caches["dense"].get_seq_length()
    path, caches["dense"] = _fastest_dense(model, caches["dense"], token)

    def call(name: str) -> Callable[[], None]:
        def one() -> None:
            model.set_attn_implementation("relu" if name == "dense" else "hsr")
            generation.step(model, caches[name], token)
            if generation.croppable(caches[name]):
                generation.crop(caches[name], n)

        return one

    return _alternate({name: call(name) for name in caches}, ROUNDS) | {"dense_path": path}


def _fastest_dense(model: Any, cache: Any, token: int) -> tuple[str, Any]:
    model.set_attn_implementation("relu")
    return generation.fastest_dense(model, cache, token, ROUNDS + 2)


def prefill_times(model: Any, ids: Any) -> dict[str, float]:
    """Time a whole prompt, dense in one piece and through an ``HSRCache``."""

    def dense() -> None:
        generation.prefill(model, ids, generation.dense_cache(model), None)

    def hsr() -> None:
        policy = generation.default_policy(model.config)
        generation.prefill(model, ids, generation.hsr_cache(model, policy, collect=False), None)

    return _alternate({"dense": dense, "hsr": hsr}, 3)


def agreement(model: Any, prompt: Any, tokens: int) -> dict[str, Any]:
    """Continue a prompt greedily, dense and by reporting; compare tokens and log-probabilities."""
    dense = generation.dense_cache(model)
    logits = generation.prefill(model, prompt, dense)
    free = generation.decode(model, dense, logits, tokens)
    policy = generation.default_policy(model.config)
    hsr = generation.hsr_cache(model, policy, collect=False)
    logits = generation.prefill(model, prompt, hsr)
    found = generation.decode(model, hsr, logits, tokens)
    same = [a == b for a, b in zip(free.tokens, found.tokens, strict=True)]
    pairs = zip(free.logprobs, found.logprobs, strict=True)
    return {
        "tokens": tokens,
        "same": sum(same),
        "logprob_difference_max": max(abs(a - b) for a, b in pairs),
    }


COLOURS = {"relu-demo": "#2f7fc1", "relu2-demo": "#1f9e77", "softmax-demo": "#8a8f98"}
DENSE_COLOUR = "#d9772b"


def plot(data: dict[str, Any], path: Path) -> None:
    """Draw training, densities and times as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    _draw_training(axes[0, 0], data)
    _draw_growth(axes[0, 1], data)
    _draw_heads(figure, axes[0, 2], data)
    _draw_times(axes[1, 0], data, "attention", "Attention of one token, all layers")
    _draw_times(axes[1, 1], data, "decode", "One token of the whole model")
    _draw_times(axes[1, 2], data, "prefill", "A whole prompt")
    figure.savefig(path, dpi=120, facecolor="white")


def _draw_training(axes: Any, data: dict[str, Any]) -> None:
    for name in NAMES:
        held = data["training"][name]["held_out_loss_by_step"]
        steps, losses = zip(*held, strict=True)
        label = f"{LABELS[name]}: perplexity {_at(data['perplexity'][name], 2048):.1f}"
        axes.plot(steps, losses, color=COLOURS[name], label=label)
    axes.set(xlabel="training step", ylabel="nats a token", title="Loss on held-out essays")
    axes.set_ylim(top=6.0)
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_growth(axes: Any, data: dict[str, Any]) -> None:
    sizes = sorted(int(n) for n in data["density"][RELU[0]])
    for name in RELU:
        found = data["density"][name]
        for layer, rows in enumerate(_at(found, sizes[0])):
            for head in range(len(rows)):
                share = [100 * _at(found, n)[layer][head] for n in sizes]
                axes.plot(sizes, share, color=COLOURS[name], alpha=0.25, linewidth=0.8)
        mean = [100 * _mean(_at(found, n)) for n in sizes]
        axes.plot(sizes, mean, "o-", color=COLOURS[name], label=f"{LABELS[name]}, mean")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [f"{n:,}" for n in sizes])
    _percent_ticks(axes.yaxis, (0.01, 0.1, 1, 10, 100))
    axes.set(
        xlabel="keys the query sees (n/2 ... n)",
        ylabel="per cent of the keys above b",
        title="Density falls with the context; thin: each head",
    )
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_heads(figure: Any, axes: Any, data: dict[str, Any]) -> None:
    import numpy as np
    from matplotlib.colors import LogNorm

    found = [np.array(_at(data["density"][name], LENGTHS[-1])) for name in RELU]
    share = 100 * np.concatenate(found, axis=1)
    low, high = max(share.min(), 0.01), max(share.max(), 0.02)
    image = axes.imshow(
        np.maximum(share, low), aspect="auto", cmap="viridis", norm=LogNorm(low, high)
    )
    heads = found[0].shape[1]
    axes.axvline(heads - 0.5, color="white", linewidth=3)
    axes.set_xticks(range(share.shape[1]), [str(i % heads) for i in range(share.shape[1])])
    axes.set_yticks(range(len(share)))
    axes.set(
        xlabel=f"head; left {LABELS[RELU[0]]}, right {LABELS[RELU[1]]}",
        ylabel="layer",
        title=f"Density by head, {LENGTHS[-1]:,} keys",
    )
    bar = figure.colorbar(image, ax=axes, label="per cent of the keys (logarithmic)")
    ticks = [x for x in (0.01, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if low <= x <= high]
    bar.set_ticks(ticks, labels=[f"{x:g}" for x in ticks])
    bar.minorticks_off()


def _draw_times(axes: Any, data: dict[str, Any], what: str, title: str) -> None:
    sizes = sorted(int(n) for n in data["times"][RELU[0]][what])
    for name in RELU:
        found = data["times"][name][what]
        marker = "o" if name == RELU[0] else "s"
        for path, colour, label in (
            ("dense", DENSE_COLOUR, "dense, torch"),
            ("hsr", COLOURS[name], "half-space reporting"),
        ):
            axes.plot(
                sizes,
                [_at(found, n)[path] for n in sizes],
                "-" + marker,
                color=colour,
                markersize=4,
                alpha=1.0 if path == "hsr" or name == RELU[0] else 0.5,
                label=f"{label}, {LABELS[name]}",
            )
    axes.axvline(LENGTHS[-1], color="#8a8f98", linestyle=":", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sizes[:: 1 + len(sizes) // 6]
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axes.set(xlabel="tokens (dotted: longest trained on)", ylabel="milliseconds", title=title)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)


def _percent_ticks(axis: Any, ticks: tuple[float, ...]) -> None:
    axis.set_ticks(ticks, labels=[f"{x:g}" for x in ticks])


def _at(found: dict[Any, Any], n: int) -> Any:
    """Return an entry by its number, also of data that went through JSON."""
    return found[n] if n in found else found[str(n)]


def _mean(rows: list[list[float]]) -> float:
    return statistics.fmean(x for row in rows for x in row)


def main() -> None:
    """Run and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="shorter texts")
    parser.add_argument("--out", type=Path, default=Path("relu_model"))
    parts = {"quality": quality, "speed": speed}
    parser.add_argument("--only", choices=parts, help="measure one part again, keep the other")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / "relu_model.json"
    if given.only is None:
        data = run(given.quick, given.out)
    else:
        data = json.loads(file.read_text()) if file.exists() else {}
        data |= parts[given.only](given.quick)
        file.write_text(json.dumps(data))
    if {"density", "times"} <= set(data):
        plot(data, given.out / "relu_model.png")
        print(given.out / "relu_model.png")


if __name__ == "__main__":
    main()
