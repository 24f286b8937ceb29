"""The small models that come with the package: ReLU attention with alpha = 1 and 2 beside softmax."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from hsr_attention.evaluation import generation, models, texts
from hsr_attention.experiments import figures
from hsr_attention.experiments.growth import exponent, table
from hsr_attention.experiments.workbench import Workbench
from hsr_attention.integrations.cache_argument import with_cache

NAME = "relu-model"
TITLE = "A language model whose attention is ReLU"
USES_MODEL = (
    False  # of the user's: these come with the package, and the essays they were trained on
)
EXPLANATION = """
Half of the paper is about ReLU^α attention, where a key below the threshold b weighs nothing and
half-space reporting is *exact*. No public language model attends so. Two small ones come with the
package, and their softmax twin: same size, same text, same steps (`examples/train_relu_lm.py`).

Their threshold is that of Lemma 6.1, b = σ √(0.4 ln n) with n the keys a query sees: it rises with
the context, so the share of the keys above it falls. Measured on the essays that were held out:
perplexity; the density of every head; times against dense ReLU attention in torch; and whether
dense attention and half-space reporting write the same text.
"""
NAMES: tuple[str, ...] = ("relu-demo", "relu2-demo", "softmax-demo")
RELU = NAMES[:2]
LABELS: dict[str, str] = dict(zip(NAMES, ("ReLU, α = 1", "ReLU, α = 2", "softmax"), strict=True))
LENGTHS = (128, 256, 512, 1024, 2048)  # the models were trained on texts of up to 2,048 tokens
LONG = (4096, 8192, 16_384)  # beyond what they were trained for: only times
LONGEST_PROMPT = 4096
PROMPT = 1536  # of the comparison of texts
TOKENS = 500
ROUNDS = 31  # of single tokens


def held_out_essays() -> list[str]:
    """Return the essays that ``examples/train_relu_lm.py`` holds out: every tenth."""
    return texts.essay_list()[9::10]


def run(quick: bool, bench: Workbench) -> dict[str, Any]:
    """Measure perplexities, densities and agreement, then times; ``quick`` takes shorter texts."""
    data = bench.part("perplexity, density, agreement", lambda: quality(quick))
    data |= bench.part("times", lambda: speed(quick))
    return data | {"tables": [_quality_table(data), _times_table(data)]}


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
    """Return times against dense ReLU attention."""
    lengths = (512, LENGTHS[-1]) if quick else (*LENGTHS[1:], *LONG)
    found = {}
    for name in RELU:
        loaded = models.load(name)
        found[name] = times(loaded.model, _tokens(loaded.tokenizer, texts.essay_list()), lengths)
    return {"times": found}


def training(name: str) -> dict[str, Any]:
    """Return what ``examples/train_relu_lm.py`` noted when it made the model."""
    return json.loads((models.find(name).directory / "training.json").read_text())


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
    import torch

    windows = []
    with torch.no_grad():
        for start in range(0, stream.shape[1] - length, length):
            cache = generation.hsr_cache(model, generation.default_policy(model.config))
            part = stream[:, start : start + length]
            model(part, **with_cache(model, cache), logits_to_keep=1)
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


COLOURS: dict[str, str] = dict(
    zip(NAMES, (figures.BLUE, figures.GREEN, figures.GREY), strict=True)
)
WHAT = {
    "attention": "attention of one token, all layers",
    "decode": "one token of the whole model",
    "prefill": "a whole prompt",
}


def _quality_table(data: dict[str, Any]) -> dict[str, Any]:
    def densities_of(name: str) -> list[str]:
        found = data["density"].get(name)
        return [f"{100 * np.mean(found[n]):.1f} %" if found else "" for n in map(str, LENGTHS)]

    def same(name: str) -> str:
        found = data["agreement"].get(name, [])
        return f"{sum(x['same'] for x in found)} of {sum(x['tokens'] for x in found)}"

    rows: list[list[Any]] = [
        [f"perplexity, windows of {int(n):,}", *(f"{data['perplexity'][m][n]:.1f}" for m in NAMES)]
        for n in data["perplexity"][NAMES[0]]
    ]
    shares = zip(*map(densities_of, NAMES), strict=True)
    rows += [
        [f"density, {n // 2:,} to {n:,} keys", *share]
        for n, share in zip(LENGTHS, shares, strict=True)
    ]
    rows += [["same tokens, dense and reported", *map(same, RELU), ""]]
    worst = (f"{_worst(data, name):.1e}" for name in RELU)
    rows += [["largest difference of their log-probabilities", *worst, ""]]
    return table(["", *(LABELS[name] for name in NAMES)], rows, "On held-out essays")


def _worst(data: dict[str, Any], name: str) -> float:
    return max(x["logprob_difference_max"] for x in data["agreement"][name])


def _times_table(data: dict[str, Any]) -> dict[str, Any]:
    rows = []
    for what, label in WHAT.items():
        for n in data["times"][RELU[0]][what]:
            row: list[Any] = [label, f"{int(n):,}"]
            for name in RELU:
                found = data["times"][name][what][n]
                row += [f"{found[path]:.3g}" for path in ("dense", "hsr")]
                row += [f"{found['dense'] / found['hsr']:.2f}x"]
            rows.append(row)
    columns = [f"{LABELS[name]}: {x}" for name in RELU for x in ("dense, ms", "hsr, ms", "gain")]
    return table(["", "tokens", *columns], rows, "Times against dense ReLU attention in torch")


def findings(data: dict[str, Any]) -> list[str]:
    """Say what the data show."""
    end = {name: data["perplexity"][name][str(LENGTHS[-1])] for name in NAMES}
    sentences = [
        "Held-out perplexity: " + ", ".join(f"{LABELS[n]} {x:.1f}" for n, x in end.items()) + "."
    ]
    for name in RELU:
        found = data["density"][name]
        share = [float(np.mean(found[str(n)])) for n in LENGTHS]
        e = 1 + exponent(LENGTHS, share)["exponent"]
        sentences.append(
            f"{LABELS[name]}: density falls from {100 * share[0]:.0f} % to {100 * share[-1]:.1f} %; "
            f"the keys above b grow like n^{e:.2f}."
        )
        same, of = (sum(x[k] for x in data["agreement"][name]) for k in ("same", "tokens"))
        sentences.append(
            f"{LABELS[name]}: {same} of {of} tokens are the same dense and reported, their "
            f"log-probabilities to {_worst(data, name):.0e}."
        )
    return sentences


def plot(data: dict[str, Any]) -> dict[str, Any]:
    """Draw losses, densities by context and head, and times."""
    made = {"losses": _losses(data), "density": _density_figure(data)}
    for name in RELU:
        made[f"heads-{name}"] = figures.heat(
            (100 * np.array(data["density"][name][str(LENGTHS[-1])])).tolist(),
            f"{LABELS[name]}: density, {LENGTHS[-1]:,} keys",
            "per cent of the keys",
            list(range(len(data["density"][name][str(LENGTHS[-1])]))),
            log=True,
        )
    return made | {f"time-{what}": _time_figure(data, what) for what in WHAT}


def _losses(data: dict[str, Any]) -> Any:
    made, axes = figures.panel("Loss on held-out essays", "training step", "nats a token")
    for name in NAMES:
        steps, losses = zip(*data["training"][name]["held_out_loss_by_step"], strict=True)
        perplexity = data["perplexity"][name][str(LENGTHS[-1])]
        label = f"{LABELS[name]}: perplexity {perplexity:.1f}"
        axes.plot(steps, losses, color=COLOURS[name], label=label)
    figures.legend(axes)
    return made


def _density_figure(data: dict[str, Any]) -> Any:
    made, axes = figures.panel(
        "Density falls with the context (thin: each head)",
        "keys the query sees (n/2 ... n)",
        "per cent of the keys above b",
        log="xy",
    )
    for name in RELU:
        share = 100 * np.array([data["density"][name][str(n)] for n in LENGTHS])
        for head in share.reshape(len(LENGTHS), -1).T:
            axes.plot(LENGTHS, head, color=COLOURS[name], alpha=0.25, linewidth=0.8)
        mean = share.mean(axis=(1, 2))
        axes.plot(LENGTHS, mean, "o-", color=COLOURS[name], label=f"{LABELS[name]}, mean")
    figures.powers_of_two(axes, LENGTHS)
    _plain_ticks(axes)
    figures.legend(axes)
    return made


def _time_figure(data: dict[str, Any], what: str) -> Any:
    title = WHAT[what][0].upper() + WHAT[what][1:]
    made, axes = figures.panel(
        title, "tokens (dotted: longest trained on)", "milliseconds", log="xy"
    )
    sizes = [int(n) for n in data["times"][RELU[0]][what]]
    for name, marker in zip(RELU, "os", strict=True):
        found = data["times"][name][what]
        for path, colour, label in (
            ("dense", figures.ORANGE, "dense, torch"),
            ("hsr", COLOURS[name], "half-space reporting"),
        ):
            ms = [found[str(n)][path] for n in sizes]
            faint = path == "dense" and name != RELU[0]
            axes.plot(
                sizes,
                ms,
                "-" + marker,
                color=colour,
                alpha=0.55 if faint else 1.0,
                label=f"{label}, {LABELS[name]}",
            )
    axes.axvline(LENGTHS[-1], color=figures.GREY, linestyle=":", linewidth=1)
    figures.powers_of_two(axes, sizes)
    _plain_ticks(axes)
    figures.legend(axes)
    return made


def _plain_ticks(axes: Any) -> None:
    """Label a logarithmic y axis with 1, 2 and 5 times powers of ten."""
    low, high = axes.get_ylim()
    ticks = [d * 10.0**e for e in range(-3, 6) for d in (1, 2, 5) if low <= d * 10.0**e <= high]
    axes.set_yticks(ticks, [f"{x:g}" for x in ticks])
    axes.minorticks_off()
