"""Options that several commands share, and how they are read."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from hsr_attention.cli import console
from hsr_attention.evaluation.environment import machine as machine
from hsr_attention.evaluation.errors import InputError
from hsr_attention.experiments import index_scaling
from hsr_attention.policies import Policy, ReLUPolicy, SoftmaxPolicy
from hsr_attention.thresholds import Gaussian, SqrtLog


class Dtype(enum.StrEnum):
    """Element types of a model."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class RopeScaling(enum.StrEnum):
    """Ways to reach beyond the context a model was trained for."""

    yarn = "yarn"


class Storage(enum.StrEnum):
    """Where full-precision keys and values stand."""

    memory = "memory"
    disk = "disk"


Model = Annotated[
    str,
    typer.Option(
        "--model",
        help="A transformers directory, a .gguf file, or a word: smollm2, or the small models that "
        "come with hsr-attention, relu-demo, relu2-demo and softmax-demo.",
    ),
]
PromptFile = Annotated[
    Path | None, typer.Option("--prompt-file", help="A text file (UTF-8).", show_default=False)
]
Essays = Annotated[
    int | None,
    typer.Option(
        "--essays", min=1, help="Use this many tokens of the PaulGrahamEssays.", show_default=False
    ),
]
PolicyWords = Annotated[
    list[str] | None,
    typer.Option(
        "--policy",
        help="Which keys matter: epsilon=0.05 | top_r=64 | threshold=1.5 | threshold=gaussian | "
        "threshold=sqrt_log, "
        "and tail=sketch|drop, exact=true, exact_share=, tail_epsilon=, certify=; or "
        "attention=relu with threshold= and power=. Words stand between commas.",
        show_default="what the model was trained with: epsilon=0.04, or its own ReLU attention",
    ),
]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Element type of the model.")]
MaxContext = Annotated[
    int | None,
    typer.Option(
        "--max-context",
        min=1,
        help="Extend the model's context to this many tokens (YaRN).",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", min=1, help="Threads of torch and of hsr.", show_default="all cores"
    ),
]
ParallelLinear = Annotated[
    bool,
    typer.Option(
        "--parallel-linear/--torch-linear",
        help="Linear layers of a token on all threads where that is faster, of dense attention too.",
    ),
]

Plot = Annotated[
    Path | None, typer.Option("--plot", help="Write a picture (PNG).", show_default=False)
]
Keys = Annotated[
    list[Path] | None,
    typer.Option(
        "--keys",
        help="Heads captured by hsr capture; without, heads are made up. Given several times, the "
        "keys of the documents stand one after another, and the queries are those of the last.",
        show_default=False,
    ),
]
Shape = Annotated[
    str, typer.Option("--shape", help="Synthetic heads: query heads/key heads x head_dim.")
]

# Of the commands on indexes of few dimensions.
Dims = Annotated[str, typer.Option("--dim", help="Dimensions: 2..8, or 2,3.")]
Size = Annotated[str, typer.Option("--n", help="Number of keys: 100000, 1e5.")]
IndexKinds = Annotated[
    str,
    typer.Option(
        "--kind",
        help=f"Indexes, with commas: {', '.join(index_scaling.KINDS)}; all: those that serve the "
        "dimension.",
    ),
]
IndexData = Annotated[
    str,
    typer.Option(
        "--data", help=f"Keys, with commas: {', '.join(index_scaling.DATA)}; all: each of them."
    ),
]
IndexThreads = Annotated[int, typer.Option("--threads", min=1, help="Threads of the indexes.")]
Repeats = Annotated[
    int, typer.Option("--repeats", min=1, help="Measurements, of which the median counts.")
]
Seed = Annotated[int, typer.Option("--seed", help="Of what is made up.")]

_NUMBERS = {
    "epsilon": float,
    "top_r": int,
    "exact_share": float,
    "tail_epsilon": float,
    "power": int,
}
_FLAGS = ("exact", "certify")
_SOFTMAX = (
    "epsilon",
    "top_r",
    "threshold",
    "tail",
    "exact",
    "exact_share",
    "tail_epsilon",
    "certify",
)
_RELU = ("threshold", "power")


def policy(words: list[str] | None) -> Policy:
    """Return the policy that words such as ``top_r=64,tail=drop`` ask for."""
    found: dict[str, Any] = {}
    for word in ",".join(words or []).replace(",", " ").split():
        name, equals, text = word.partition("=")
        if not equals or name not in {*_SOFTMAX, *_RELU, "attention"}:
            known = ", ".join(f"{x}=" for x in ("attention", *_SOFTMAX, "power"))
            raise InputError(f"unknown policy word {word!r}; expected {known}")
        if name in found:
            raise InputError(f"policy word {name}= is given twice")
        found[name] = _value(name, text)
    if words and not found:
        raise InputError(f"--policy must hold a word such as epsilon=0.05, got {words[0]!r}")
    attention = found.pop("attention", "softmax")
    if attention not in ("softmax", "relu"):
        raise InputError(f"policy attention= must be softmax or relu, got {attention!r}")
    allowed = _SOFTMAX if attention == "softmax" else _RELU
    for name in found:
        if name not in allowed:
            raise InputError(f"policy word {name}= does not belong to attention={attention}")
    try:
        return SoftmaxPolicy(**found) if attention == "softmax" else ReLUPolicy(**found)
    except (ValueError, TypeError) as error:
        raise InputError(f"policy: {error}") from None


def _value(name: str, text: str) -> Any:
    try:
        if name in _NUMBERS:
            return _NUMBERS[name](text)
        if name in _FLAGS:
            return {"true": True, "false": False}[text.lower()]
        if name == "threshold":
            rules = {"gaussian": Gaussian, "sqrt_log": SqrtLog}
            return rules[text]() if text in rules else float(text)
    except (ValueError, KeyError):
        rule = "true or false" if name in _FLAGS else "a number"
        if name == "threshold":
            rule = "a number, gaussian or sqrt_log"
        if name in ("top_r", "power"):
            rule = "an integer"
        raise InputError(f"policy {name}= must be {rule}, got {text!r}") from None
    return text


def shape(text: str) -> tuple[int, int, int]:
    """Return query heads, key heads and head_dim of a word such as ``9/3x64``."""
    found = re.fullmatch(r"(\d+)/(\d+)x(\d+)", text)
    heads, kv_heads, head_dim = map(int, found.groups()) if found else (0, 0, 0)
    if not (kv_heads and heads and heads % kv_heads == 0 and 1 <= head_dim <= 512):
        raise InputError(
            "--shape must be query heads/key heads x head_dim, such as 9/3x64 (heads a multiple "
            f"of key heads, head_dim at most 512), got {text!r}"
        )
    return heads, kv_heads, head_dim


def numbers(text: str, option: str) -> list[int]:
    """Return the integers of a text such as ``1,2,3``, ``2..8`` or ``1e3``, in order, each once."""
    try:
        if ".." in text:
            first, last = (int(word) for word in text.split(".."))
            found = list(range(first, last + 1))
        else:
            values = {float(word) for word in text.split(",")}
            found = sorted(int(value) for value in values if value.is_integer())
            if len(found) < len(values):
                raise ValueError
    except (ValueError, OverflowError):
        found = []
    if not found:
        raise InputError(f"{option} must be numbers with commas, got {text!r}")
    return found


def sizes(text: str, option: str) -> list[int]:
    """Return ``numbers`` that are at least 1."""
    found = numbers(text, option)
    if found[0] < 1:
        raise InputError(f"{option} must be at least 1, got {found[0]}")
    return found


def size(text: str, option: str) -> int:
    """Return one number that is at least 1."""
    found = sizes(text, option)
    if len(found) > 1:
        raise InputError(f"{option} must be one number, got {text!r}")
    return found[0]


def index_kinds(text: str) -> list[str]:
    """Return the indexes that ``--kind`` names."""
    return words(text, "--kind", tuple(index_scaling.KINDS))


def index_data(text: str) -> list[str]:
    """Return the sets of keys that ``--data`` names."""
    return words(text, "--data", index_scaling.DATA)


def text(prompt_file: Path | None, essays: int | None) -> str:
    """Return the text that was asked for: a file, or the essays."""
    from hsr_attention.evaluation import texts

    if (prompt_file is None) == (essays is None):
        raise InputError("give one of --prompt-file and --essays")
    return texts.essays() if prompt_file is None else texts.read_prompt(prompt_file)


def load_with_text(
    model: str,
    dtype: str,
    prompt_file: Path | None,
    essays: int | None,
    limit: int | None,
    new: int,
    max_context: int | None,
    threads: int | None,
    *,
    shorten: str | None = None,
    skip: int = 0,
    extend: bool = False,
) -> tuple[Any, Any]:
    """Load a model and the ids [1, n] of the text that was asked for.

    At most ``limit`` tokens of the text, after ``skip`` others, are used; with ``new`` more they
    must fit the model's context, which ``max_context`` extends, or ``extend`` as far as they need;
    ``shorten`` is the option that takes fewer.
    """
    from hsr_attention.evaluation import models, texts

    words = text(prompt_file, essays)
    source = models.find(model)
    quiet_libraries()
    set_threads(threads)
    tokenizer = models.load_tokenizer(source)
    limits = [x for x in (essays, limit) if x is not None]
    wanted = min(limits) + skip if limits else None
    ids = texts.token_ids(tokenizer, words, wanted)[:, skip:]
    if ids.shape[1] == 0:
        raise InputError(f"the text must have more than --skip {skip} tokens")
    if extend and max_context is None:
        max_context = ids.shape[1] + new
    check_context(models.load_config(source), ids.shape[1], new, max_context, shorten)
    return models.load(model, dtype, max_context, tokenizer), ids


@contextmanager
def linear_layers(model: Any, parallel: bool) -> Iterator[dict[str, int]]:
    """Run the linear layers of ``model`` on all threads; yield the parts of each size, "out x in"."""
    if not parallel:
        yield {}
        return
    from hsr_attention.integrations.parallel_linear import parallel_linear

    with parallel_linear(model) as split:
        yield {f"{out} x {into}": parts for (out, into), parts in split.items()}


def linear_line(split: dict[str, int]) -> str:
    """Say in a line which linear layers are split."""
    if not split:
        return "Linear layers: by torch alone."
    sizes = ", ".join(split)
    return f"Linear layers of one token in {max(split.values())} parts, dense too: {sizes}."


def check_context(
    config: Any, tokens: int, new: int, reach: int | None, shorten: str | None
) -> None:
    """Refuse a text that with ``new`` more tokens does not fit the context, extended or not."""
    from hsr_attention.evaluation import models

    context = models.context_length(config)
    longest = None if context is None else max(context, reach or 0)
    need = tokens + new
    if longest is None or need <= longest:
        return
    shorter = f"{shorten} {longest - new}, or " if shorten and longest > new else ""
    more = f" and with {new} new ones needs {need}" if new else ""
    raise InputError(
        f"the text has {tokens} tokens{more}, but the model's context is {longest}: use "
        f"{shorter}--max-context {need} to extend the model by YaRN"
    )


def set_threads(threads: int | None) -> int:
    """Give torch and hsr the same number of threads, by default one for each core we may use."""
    import os

    import torch

    import hsr_attention as hsr
    from hsr_attention.integrations import torch_threads

    if threads is None:
        given = os.environ.get("HSR_NUM_THREADS")
        allowed = getattr(os, "sched_getaffinity", None)
        threads = int(given) if given else len(allowed(0)) if allowed else os.cpu_count() or 1
    torch.set_num_threads(threads)
    hsr.set_num_threads(threads)
    torch_threads.share_openmp()
    return threads


def quiet_libraries() -> None:
    """Keep the progress bars and notices of transformers off stderr."""
    import os

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def fitting(policy: Policy | None, loaded: Any) -> Policy:
    """Return the policy for a model, by default its own; refuse one it was not trained for."""
    from hsr_attention.evaluation.generation import default_policy

    own = default_policy(loaded.model.config)
    if policy is not None and isinstance(own, ReLUPolicy) and not isinstance(policy, ReLUPolicy):
        raise InputError(
            f"{loaded.source.name} was trained with ReLU attention: leave --policy out, or use "
            "attention=relu,threshold=..."
        )
    if isinstance(policy, ReLUPolicy) and not isinstance(own, ReLUPolicy):
        console.note(
            f"{loaded.source.name} was trained with softmax attention: under ReLU attention it is "
            "another model, and its text is not the one it learnt to write"
        )
    return policy or own


def softmax_model(loaded: Any, command: str) -> None:
    """Refuse a model with ReLU attention where torch's softmax attention is compared with."""
    from hsr_attention.evaluation.generation import default_policy

    if isinstance(default_policy(loaded.model.config), ReLUPolicy):
        raise InputError(
            f"{command} compares with torch's softmax attention, but {loaded.source.name} was "
            "trained with ReLU attention: use hsr generate --compare-dense"
        )


PICTURES = (".pdf", ".png", ".svg")


def writable(path: Path | None, option: str) -> None:
    """Refuse an output file in a directory that does not exist, before any work is done."""
    if path is not None and not path.parent.is_dir():
        raise InputError(f"{option}: directory {path.parent} does not exist")


def picture(path: Path | None, option: str) -> None:
    """Refuse a picture that could not be written, before any work is done."""
    writable(path, option)
    if path is not None and path.suffix.lower() not in PICTURES:
        raise InputError(f"{option} must end in {', '.join(PICTURES)}, got {path.name}")


def words(text: str, option: str, allowed: tuple[str, ...]) -> list[str]:
    """Return the words of a text such as ``one,two``; ``all`` is every allowed one."""
    found = list(allowed) if text == "all" else text.split(",")
    for word in found:
        if word not in allowed:
            raise InputError(f"{option} must be among {', '.join(allowed)}, got {word!r}")
    return found
