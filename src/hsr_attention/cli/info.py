"""``hsr info``: what the library runs on."""

from __future__ import annotations

from hsr_attention.cli import console, options


def run(json: options.Json = False) -> None:
    """Show version, instruction set, threads, and the optional packages found."""
    import hsr_attention as hsr

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
