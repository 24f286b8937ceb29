"""``hsr info``: what the library runs on, and what becomes of the layers of a model."""

from __future__ import annotations

from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hsr_attention.cli import console, options

if TYPE_CHECKING:
    from hsr_attention.integrations.paths import LayerPath


def run(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="Say which way each layer of this model goes: a transformers directory, a .gguf "
            "file, or a word: smollm2, relu-demo, relu2-demo or softmax-demo.",
            show_default=False,
        ),
    ] = None,
    policy: options.PolicyWords = None,
    dtype: options.DtypeOption = options.Dtype.float32,
    json: options.Json = False,
) -> None:
    """Show version, instruction set, threads, optional packages; or the layers of a model.

    Example: hsr info --model smollm2 --dtype bfloat16
    """
    import hsr_attention as hsr

    if model is not None:
        _model(model, policy, dtype, json)
        return
    found = hsr.info()
    if json:
        console.print_json(found)
        return
    packages = found.pop("packages")
    rows = [[name.replace("_", " "), _text(value)] for name, value in found.items()]
    rows += [[name, version or "not installed"] for name, version in packages.items()]
    console.print_table("hsr-attention", ["what", "found"], rows)


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _model(name: str, words: list[str] | None, dtype: str, json: bool) -> None:
    from hsr_attention.evaluation import generation, models

    wanted = options.policy(words) if words else None
    source = models.find(name)
    options.quiet_libraries()
    import torch

    import hsr_attention as hsr
    from hsr_attention.integrations.paths import layer_paths

    skeleton = models.skeleton(source, models.load_config(source))
    policy = wanted or generation.default_policy(skeleton.config)
    layers = layer_paths(skeleton, policy, getattr(torch, dtype))
    facts: dict[str, Any] = {
        "model": source.name,
        "model_type": skeleton.config.model_type,
        "dtype": str(dtype),
        "policy": repr(policy),
        "isa": hsr.info()["isa"],
    }
    if json:
        console.print_json(facts | {"layers": [asdict(layer) for layer in layers]})
        return
    rows = [_row(list(group)) for _, group in groupby(layers, _what)]
    columns = ["layers", "decoding", "prompt", "heads", "head_dim", "rows", "codes", "why"]
    title = f"{source.name} ({facts['model_type']}), {dtype}, {facts['isa']} kernels\n{policy}"
    console.print_table(title, columns, rows)
    console.out().print("rows, codes: bytes a token and layer.")


def _what(layer: LayerPath) -> dict[str, Any]:
    return asdict(layer) | {"layer": None}


def _row(group: list[LayerPath]) -> list[str]:
    first, last = group[0], group[-1]
    numbers = str(first.layer) if first is last else f"{first.layer}-{last.layer}"
    heads = f"{first.heads}/{first.kv_heads}" if first.heads else console.NONE
    sizes = (first.head_dim, first.row_bytes, first.code_bytes)
    cells = [console.NONE if size is None else f"{size:g}" for size in sizes]
    return [numbers, first.path, first.prompt, heads, *cells, first.why]
