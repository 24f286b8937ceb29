"""What numbers depend on: versions, instruction set, threads, processor."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hsr_attention import _native


def processor() -> str:
    """Return the name of the processor."""
    return _entry("/proc/cpuinfo", "model name") or platform.processor()


def _entry(file: str, word: str) -> str | None:
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return None
    values = [line.partition(":")[2].strip() for line in lines if line.startswith(word)]
    return values[0] if values else None


@contextmanager
def native_threads(threads: int) -> Iterator[None]:
    """Run the native code on so many threads inside, and on as many as before afterwards."""
    before = _native.num_threads()
    _native.set_num_threads(threads)
    try:
        yield
    finally:
        _native.set_num_threads(before)


def native_machine(threads: int) -> dict[str, Any]:
    """Return what times of the native code alone depend on; it needs no torch."""
    return {"processor": processor(), "isa": _native.isa_in_use(), "threads": threads}


def machine() -> dict[str, Any]:
    """Return ``hsr.info()`` with torch's threads, the processor and the memory."""
    import torch

    import hsr_attention as hsr

    found = hsr.info()
    found["torch_threads"] = torch.get_num_threads()
    for file, word, name in (
        ("/proc/cpuinfo", "model name", "processor"),
        ("/proc/meminfo", "MemTotal", "memory"),
    ):
        if (value := _entry(file, word)) is not None:
            found[name] = value
    return found


def memory_available() -> int | None:
    """Return bytes that can be taken without swapping, None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
