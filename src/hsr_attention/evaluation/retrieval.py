"""Finding something again: needles in essays, and a long list of pairs; made offline, from a seed.

A task is a context and questions about it, each with one right answer. The context is read densely;
the question and the answer are forced token by token through the path that is measured. The answer
is right when each of its tokens was the most probable one, which is when greedy decoding gives it.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hsr_attention.evaluation import generation
from hsr_attention.evaluation.errors import InputError
from hsr_attention.policies import SoftmaxPolicy

CITIES = re.findall(
    r"\w+",
    "Lisbon Nairobi Oslo Quito Hanoi Dublin Lima Cairo Sofia Riga Tokyo Madrid Havana Accra Vienna "
    "Zagreb Warsaw Bogota Dakar Seoul Athens Prague Tunis Ankara",
)
ADJECTIVES = re.findall(
    r"\w+",
    "amber brave calm dark early faint gentle hollow icy jolly keen lively mellow narrow open pale "
    "quiet rapid silent tidy upper vivid warm young zesty bitter clever dusty eager fancy grand humble",
)
NOUNS = re.findall(
    r"\w+",
    "apple bridge candle desert engine forest garden harbor island jacket kettle ladder meadow needle "
    "orange pencil quarry river saddle temple umbrella valley window yard zebra anchor basket cactus "
    "dragon eagle falcon glove",
)
TASKS = ("needles", "pairs")


@dataclass(frozen=True)
class Question:
    """Something asked about a context: where the answer stands, as a share of it; tokens."""

    depth: float
    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Task:
    """A context of tokens, and questions about it."""

    name: str
    context: list[int]
    questions: list[Question]


def make(name: str, tokenizer: Any, hay: list[int], length: int, depths: int, seed: int) -> Task:
    """Make a task whose context, question and answer fit ``length`` tokens.

    ``needles`` hides a sentence with a city and its number at each depth of ``hay``, tokens of a
    text; ``pairs`` is a list of names and numbers and nothing else.
    """
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    rng = np.random.default_rng([seed, length])
    return (_needles if name == "needles" else _pairs)(tokenizer, hay, length, depths, rng)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def _question(tokenizer: Any, depth: float, prompt: str, answer: str) -> Question:
    return Question(depth, _ids(tokenizer, prompt), _ids(tokenizer, answer))


def _needles(tokenizer: Any, hay: list[int], length: int, depths: int, rng: Any) -> Task:
    cities = rng.permutation(CITIES)[:depths]
    numbers = rng.choice(90000, depths, replace=False) + 10000
    sentences, questions = [], []
    for i, (city, number) in enumerate(zip(cities, numbers, strict=True)):
        fact = f"The special magic number for {city} is:"
        sentences.append(_ids(tokenizer, f" {fact} {number}."))
        questions.append(_question(tokenizer, i / max(depths - 1, 1), f"\n\n{fact}", f" {number}"))
    room = (
        length - sum(map(len, sentences)) - max(len(q.prompt) + len(q.answer) for q in questions)
    )
    if room < depths or len(hay) < room:
        raise InputError(
            f"needles need {max(room, depths)} tokens of text for a length of {length}, got "
            f"{len(hay)}"
        )
    stops = _sentence_ends(tokenizer, hay[:room])
    context, at = [], 0
    for sentence, question in zip(sentences, questions, strict=True):
        wanted = round(question.depth * room)
        until = min(stops, key=lambda x: abs(x - wanted), default=wanted)
        until = max(at, until if abs(until - wanted) < 100 else wanted)
        context += hay[at:until] + sentence
        at = until
    return Task("needles", context + hay[at:room], questions)


def _sentence_ends(tokenizer: Any, ids: list[int]) -> list[int]:
    words = tokenizer.convert_ids_to_tokens(ids)
    return [0] + [i + 1 for i, word in enumerate(words) if word.endswith(".")] + [len(ids)]


def _pairs(tokenizer: Any, hay: list[int], length: int, depths: int, rng: Any) -> Task:
    names = [f"{a} {b}" for a in ADJECTIVES for b in NOUNS]
    names += [f"{name} {i}" for i in range(2, 40) for name in names]
    order = rng.permutation(len(names))
    numbers = rng.integers(10000, 100000, len(names))
    lines = [f"{names[i]}: {x}\n" for i, x in zip(order, numbers, strict=True)]
    room = length - 24  # the question and its answer
    context, used = _ids(tokenizer, "Numbers:\n"), 0
    for line in lines:
        more = _ids(tokenizer, line)
        if len(context) + len(more) > room:
            break
        context += more
        used += 1
    if used < depths:
        raise InputError(f"pairs need room for {depths} lines, got a length of {length}")
    questions = []
    for i in range(depths):
        line = lines[round(i * (used - 1) / max(depths - 1, 1))]
        name, _, number = line.strip().rpartition(": ")
        questions.append(_question(tokenizer, i / max(depths - 1, 1), f"\n{name}:", f" {number}"))
    return Task("pairs", context, questions)


def ask(
    model: Any,
    task: Task,
    policies: dict[str, SoftmaxPolicy | None],
    say: Callable[[str], None] = lambda what: None,
) -> list[dict[str, Any]]:
    """Read the context densely, then ask every question under every policy (None: dense).

    Returns a row for each: ``right``, and the mean surprise of the answer's tokens in ``nats``.
    """
    import torch

    say("read the context")
    dense = generation.dense_cache(model)
    generation.prefill(model, torch.tensor([task.context]), dense)
    ours = None
    rows = []
    for name, policy in policies.items():
        say(name)
        if policy is None:
            cache = dense
            model.set_attn_implementation("sdpa")
        else:
            if ours is None:
                ours = generation.hsr_cache(model, SoftmaxPolicy(), collect=False)
                for layer, rows_of in enumerate(dense.layers):
                    ours.update(rows_of.keys, rows_of.values, layer)
            cache = ours
            model.set_attn_implementation("hsr")
            ours.use_policy(policy)
        for question in task.questions:
            rows.append({"policy": name, **_asked(model, cache, question, len(task.context))})
    return rows


def _asked(model: Any, cache: Any, question: Question, n: int) -> dict[str, Any]:
    forced = question.prompt + question.answer
    logits = generation.step(model, cache, forced[0])
    try:
        found = generation.decode(model, cache, logits, len(forced) - 1, forced=forced[1:])
    finally:
        generation.crop(cache, n)
    count = len(question.answer)
    return {
        "depth": question.depth,
        "right": found.best[-count:] == question.answer,
        "nats": -statistics.fmean(found.logprobs[-count:]),
    }
