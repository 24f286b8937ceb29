"""Threads shared with torch: as many as torch uses, on the OpenMP run-time torch has loaded."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch

from hsr_attention import _native

# Another number than this, or than torch's when last followed, was chosen by the user.
_followed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def follow_torch() -> None:
    """Run on torch's threads, and on as many, unless HSR_NUM_THREADS or ``set_num_threads`` said."""
    global _followed
    share_openmp()
    if "HSR_NUM_THREADS" not in os.environ and _native.num_threads() == _followed:
        _followed = torch.get_num_threads()
        _native.set_num_threads(_followed)


def share_openmp() -> bool:
    """Run native loops on torch's own threads, where torch uses GNU OpenMP; say whether they do.

    OpenMP's threads spin for a while after each loop of torch, on the cores our own pool would use: a
    decode step beside them takes a sixth longer. On a machine busy with other work our own pool may
    be faster; ``hsr_attention._native.set_openmp(0)`` returns to it. As torch itself, loops on OpenMP
    do not survive ``fork``.
    """
    if (path := _libgomp()) is None:
        return False
    try:
        # Loaded already: this opens nothing new, and fails rather than bring in a second run-time.
        library = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        address = ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return False
    if address:
        _native.set_openmp(address)
    return bool(address)


def _libgomp() -> Path | None:
    """Return the GNU OpenMP library in the process, the one beside torch if there are several."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    loaded = {Path(line.split(maxsplit=5)[5]) for line in lines if ".so" in line}
    if any(path.name.startswith(("libiomp5", "libomp")) for path in loaded):
        return None  # torch may run on that one
    found = sorted(path for path in loaded if path.name.startswith("libgomp"))
    beside_torch = [path for path in found if Path(torch.__file__).parent in path.parents]
    chosen = beside_torch or found
    return chosen[0] if len(chosen) == 1 else None
