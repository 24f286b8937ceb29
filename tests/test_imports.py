"""The arrows between modules, read from the source; and what an import of the package loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hsr_attention

ROOT = Path(hsr_attention.__file__).parent

# Floors, from the ground. A module imports from its own floor or below; a package is one name.
FLOORS = (
    (
        "_native",
        "report",
        "arguments",
        "thresholds",
        "attention.reference",
        "attention.certificate",
    ),
    ("policies", "indexes", "machine", "theory"),
    ("kv_cache",),
    ("decode", "prefill"),
    ("attention", "distributed"),
    ("integrations",),
    ("evaluation", "experiments"),
    ("cli",),
)
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
LEAVES = ("report", "arguments", "thresholds", "attention.reference", "attention.certificate")
USES_TORCH = ("integrations", "evaluation", "experiments", "cli", "distributed")


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts != ("__init__",):
            yield path, ".".join(p for p in parts if p != "__init__")


def unit(module):
    """Return the name under which a module stands in FLOORS."""
    return module if module in FLOOR else module.partition(".")[0]


def imports(path):
    """Yield (imported module, line) of every import that runs, wherever in the file it stands."""
    package = ("hsr_attention", *path.relative_to(ROOT).parent.parts)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join((*package[: len(package) - node.level + 1], *filter(None, [base])))
            for alias in node.names:
                child = f"{base}.{alias.name}"
                inside = child.replace("hsr_attention.", "", 1).replace(".", "/")
                is_module = base.startswith("hsr_attention") and (
                    (ROOT / f"{inside}.py").exists()
                    or (ROOT / inside).is_dir()
                    or alias.name == "_native"
                )
                yield (child if is_module else base), node.lineno


@pytest.mark.parametrize(
    "path, module", list(modules()), ids=lambda x: x if isinstance(x, str) else ""
)
def test_imports_run_one_way(path, module):
    floor = FLOOR[unit(module)]
    for imported, line in imports(path):
        if not imported.startswith("hsr_attention."):
            continue
        other = unit(imported.removeprefix("hsr_attention."))
        assert other in FLOOR, f"{module}:{line}: {imported} stands on no floor of this test"
        assert FLOOR[other] <= floor, f"{module}:{line} imports upwards: {imported}"
        if module in LEAVES:
            raise AssertionError(f"{module}:{line}: a leaf imports {imported}")


def test_nothing_imports_in_a_circle():
    edges = {}
    for path, module in modules():
        edges.setdefault(unit(module), set()).update(
            unit(imported.removeprefix("hsr_attention."))
            for imported, _ in imports(path)
            if imported.startswith("hsr_attention.")
        )
    done = set()

    def visit(name, trail):
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for other in edges.get(name, set()) - {name}:
                visit(other, (*trail, name))
            done.add(name)

    for name in list(edges):
        visit(name, ())


@pytest.mark.parametrize(
    "path, module", list(modules()), ids=lambda x: x if isinstance(x, str) else ""
)
def test_only_the_integrations_import_torch(path, module):
    if module.partition(".")[0] in USES_TORCH:
        return
    allowed = {"hsr_attention", "numpy"}
    if module == "indexes.shallow_cutting":
        allowed.add("scipy")  # Qhull; imported when a cutting is built, by the extra "trees"
    for imported, line in imports(path):
        top = imported.partition(".")[0]
        assert top in allowed or top in sys.stdlib_module_names, (
            f"{module}:{line}: the core imports {imported}"
        )


def test_the_reference_imports_numpy_only():
    names = {name.partition(".")[0] for name, _ in imports(ROOT / "attention" / "reference.py")}
    assert names == {"__future__", "numpy"}


def test_import_loads_neither_torch_nor_transformers():
    code = (
        "import sys, hsr_attention; "
        "heavy = {'torch', 'transformers', 'matplotlib', 'typer', 'rich'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_public_names():
    for name in hsr_attention.__all__:
        if name not in hsr_attention._LAZY:
            assert hasattr(hsr_attention, name)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        hsr_attention.nothing  # noqa: B018
    assert hsr_attention.__version__ == hsr_attention.info()["version"]
