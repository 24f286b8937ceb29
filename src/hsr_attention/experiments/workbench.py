"""What an experiment works with: a model, its text, prompts read once, and parts that are kept."""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from hsr_attention.evaluation import models, prompt_state, texts
from hsr_attention.evaluation.prompt_state import PromptState


class Experiment(Protocol):
    """What a module of this package provides to be an experiment.

    ``plot`` returns figures by file name. ``findings`` says in sentences what the data show.
    """

    @property
    def NAME(self) -> str:
        """Word on the command line, and directory."""
        ...

    @property
    def TITLE(self) -> str:
        """Heading in the report."""
        ...

    @property
    def EXPLANATION(self) -> str:
        """What a curious reader should know before the figures; paragraphs."""
        ...

    @property
    def USES_MODEL(self) -> bool:
        """Say whether a model and a text are needed."""
        ...

    def run(self, quick: bool, bench: Workbench) -> dict[str, Any]:
        """Measure; return plain JSON data."""
        ...

    def plot(self, data: dict[str, Any]) -> dict[str, Any]:
        """Draw the data: matplotlib figures by file name."""
        ...

    def findings(self, data: dict[str, Any]) -> list[str]:
        """Say what the data show, a sentence or two each."""
        ...


@dataclass(frozen=True)
class Settings:
    """What a run is about; a directory belongs to one of them.

    Attributes
    ----------
    quick
        Fewer and smaller measurements.
    model, second_model
        As ``--model`` takes them; a second model joins the figures that compare perplexity.
    text, digest
        Name of the text, and of its contents.
    lengths
        Tokens of the prompts, ascending; beyond the model's context by YaRN.
    scored
        Tokens at the end of each that are forced and scored.
    seed, dtype
    """

    quick: bool
    model: str
    second_model: str | None
    text: str
    digest: str
    lengths: list[int]
    scored: int
    seed: int = 0
    dtype: str = "float32"


def text_digest(text: str) -> str:
    """Return a name for the contents of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Workbench:
    """The directory of a run, as one experiment sees it.

    Parameters
    ----------
    root : Path
        Of the run: ``states/`` holds prompts that were read, ``<experiment>/parts/`` what is done.
    settings : Settings
    text : str
        What the prompts are cut from.
    say
        Called with what is being done.
    """

    def __init__(
        self,
        root: Path,
        settings: Settings,
        text: str,
        say: Callable[[str], None] = lambda what: None,
    ) -> None:
        self.root, self.settings, self.text, self.say = root, settings, text, say
        self._experiment = ""
        self._loaded: tuple[tuple[str, int], models.Model] | None = None
        self._tokenizers: dict[str, Any] = {}

    def begin(self, experiment: str) -> None:
        """Keep parts for this experiment from now on."""
        self._experiment = experiment

    @property
    def directory(self) -> Path:
        """Of the experiment that is running."""
        return self.root / self._experiment

    def part(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return what ``compute`` gives, plain JSON; from disk if an earlier run finished it."""
        words = "".join(c if c.isalnum() or c in "=.,-" else "_" for c in name)
        file = self.directory / "parts" / f"{words}.json"
        try:
            return json.loads(file.read_text())
        except (OSError, json.JSONDecodeError):
            pass
        self.say(name)
        value = plain(compute())
        write_json(file, value)
        return value

    # ---- models and prompts

    @property
    def models(self) -> list[str]:
        """The model, and the second one if there is one."""
        return [m for m in (self.settings.model, self.settings.second_model) if m is not None]

    def label(self, model: str) -> str:
        """Return a short name of a model that no other model of this run has."""
        short = Path(model).name
        same = [m for m in self.models if Path(m).name == short]
        return short if len(same) < 2 else f"{short} {1 + same.index(model)}"

    def tokenizer(self, model: str | None = None) -> Any:
        """Return the tokenizer of a model."""
        name = model or self.settings.model
        if name not in self._tokenizers:
            self._tokenizers[name] = models.load_tokenizer(models.find(name))
        return self._tokenizers[name]

    def ids(self, length: int, model: str | None = None) -> Any:
        """Return the first ``length`` tokens of the text, int64 [1, length]."""
        return texts.token_ids(self.tokenizer(model), self.text, length)

    def model(self, length: int, model: str | None = None) -> Any:
        """Return the model, its context extended to ``length`` by YaRN if it is shorter.

        One model is held at a time.
        """
        name = model or self.settings.model
        config = models.load_config(models.find(name))
        context = models.context_length(config)
        key = (name, length if context is not None and length > context else 0)
        if self._loaded is None or self._loaded[0] != key:
            self.say(f"load {name}")
            self._loaded = None
            gc.collect()
            loaded = models.load(name, self.settings.dtype, key[1] or None, self.tokenizer(model))
            self._loaded = (key, loaded)
        return self._loaded[1].model

    def state(self, length: int, model: str | None = None) -> PromptState:
        """Return the state of a prompt: ``length - scored`` tokens, read densely once a run."""
        name = model or self.settings.model
        ids = self.ids(length, model)[:, : length - self.settings.scored]
        word = hashlib.sha256(name.encode()).hexdigest()[:8]
        directory = self.root / "states" / f"{word}-{length}"
        found = prompt_state.find(directory, ids)
        if found is None:
            loaded = self.model(length, model)
            label = f"read {ids.shape[1]:,} tokens densely (kept for all experiments)"
            self.say(label)
            found = prompt_state.create(
                directory, loaded, ids, lambda layer: self.say(f"{label}: layer {layer}")
            )
        return found

    def is_extended(self, length: int, model: str | None = None) -> bool:
        """Say whether a prompt of this length needs YaRN."""
        config = models.load_config(models.find(model or self.settings.model))
        context = models.context_length(config)
        return context is not None and length > context


def some_layers(layers: list[int], count: int) -> list[int]:
    """Return ``count`` layers spread evenly from the first to the last."""
    if len(layers) <= count:
        return layers
    step = (len(layers) - 1) / max(count - 1, 1)
    return [layers[round(i * step)] for i in range(count)]


def plain(value: Any) -> Any:
    """Return a value as JSON has it: numbers that are not finite become None."""
    if hasattr(value, "__dataclass_fields__"):
        value = asdict(value)
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):  # numpy, torch
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def write_json(path: Path, value: Any) -> None:
    """Write a file that is either whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(plain(value), indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(partial, path)
