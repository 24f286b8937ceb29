"""The command ``hsr``: one file for each command, put together in ``app``.

Exit codes: 0, 1 for a failure, 2 for bad usage or bad input. An error is one line on stderr;
``HSR_TRACEBACK=1`` shows where it came from.
"""

from __future__ import annotations

import os
import sys

EXTRAS = {
    "cli": ("typer", "rich", "matplotlib"),
    "libraries": ("sklearn",),
    "trees": ("scipy",),
    "transformers": ("torch", "transformers", "gguf"),
}


def main(argv: list[str] | None = None) -> int:
    """Run ``hsr`` with ``argv`` (default: the arguments of the process); return the exit code."""
    try:
        from hsr_attention.cli.app import UsageError, app
    except ModuleNotFoundError as error:
        return _fail(_missing(error), 1)

    from hsr_attention.evaluation.errors import InputError

    try:
        code = app(argv, prog_name="hsr", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except UsageError as error:
        return _fail(getattr(error, "format_message", error.__str__)(), 2)
    except InputError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except ModuleNotFoundError as error:
        return _fail(_missing(error), 1)
    except Exception as error:
        if os.environ.get("HSR_TRACEBACK"):
            raise
        return _fail(_failure(error), 1)


def _fail(message: str, code: int) -> int:
    if message:
        print(f"hsr: {' '.join(message.split())}", file=sys.stderr)
    return code


def _missing(error: ModuleNotFoundError) -> str:
    name = (error.name or "").partition(".")[0]
    if name == "safetensors":
        return "safetensors is not installed: pip install 'hsr-attention[cli]'"
    for extra, packages in EXTRAS.items():
        if name in packages:
            return f"{name} is not installed: pip install 'hsr-attention[{extra}]'"
    return str(error)


def _failure(error: Exception) -> str:
    text = str(error)
    if isinstance(error, MemoryError) or "allocate memory" in text or "out of memory" in text:
        return (
            "out of memory: use fewer tokens (--max-prompt-tokens), --dtype bfloat16, "
            f"or a smaller --prefill-chunk ({text or type(error).__name__})"
        )
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
