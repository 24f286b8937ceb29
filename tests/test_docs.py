"""The documentation holds: every code block, every link, every page of the site.

A block that is not accounted for fails. By language:

- ``python``: the blocks of a page run in order, in one namespace, in a directory with a model and a text;
- ``output``: what the block before it printed, compared;
- ``sh``: every command must exist and take its options; those in ``RUN`` run;
- ``text``: diagrams; must hold no code.
"""

import contextlib
import doctest
import io
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec

import numpy as np
import pytest

import hsr_attention as hsr
import hsr_attention.kv_cache
import pages
from pages import PAGES, ROOT

LANGUAGES = ("python", "output", "sh", "text")
CODE = re.compile(r"^ *(hsr |pip |make |python |import |from \w+ import |>>> )", re.MULTILINE)

# What the reader of a page is supposed to have already.
BEFORE = {
    "README.md": """
from hsr_attention.evaluation import models
from transformers import AutoTokenizer
path = models.find("softmax-demo").directory
inputs = AutoTokenizer.from_pretrained(path)("The best way to start is", return_tensors="pt")
""",
}
NEEDS = {"docs/experiments.md": "lm_eval"}  # not in the environment of `make test`
TORCH = ("README.md", "docs/quickstart.md", "docs/transformers.md", "docs/relu_model.md")
TORCH += ("docs/experiments.md", "docs/extend/experiment.md")

# Commands cheap enough to run every time. The others take minutes, or a model that must be downloaded.
RUN = (
    "hsr info",
    "hsr experiments list",
    "hsr generate --model relu-demo",
    "hsr generate --model path/to/model",
)
DEMO = ROOT / "src" / "hsr_attention" / "pretrained" / "softmax-demo"
ESSAY = "The best way to begin is to write down what you already know, and to look at it. " * 8

of_torch = pytest.mark.transformers
with_torch = pytest.mark.skipif(find_spec("torch") is None, reason="needs torch")


def params(names):
    """Return pages as parameters; those that use torch carry its mark."""
    return [pytest.param(x, marks=[of_torch, with_torch] if x in TORCH else []) for x in names]


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """Work in a directory as a reader would have it: a model, texts, a place for files."""
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "model").symlink_to(DEMO)
    for name in ("essay.txt", "book.txt"):
        (tmp_path / name).write_text(ESSAY)
    (tmp_path / "scratch").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # modules that a page has its reader write
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_it_is(page):
    for block in pages.blocks(page):
        assert block.language in LANGUAGES, f"{block}: ```{block.language}"
        assert block.language != "text" or not CODE.search(block.code), f"{block}: code as text"
    assert pages.text(page).count("\n```") % 2 == 0
    formulas = re.findall(r"(?:^    .*\n)+", pages.prose(page), re.MULTILINE)
    assert not any(CODE.search(formula) for formula in formulas), f"{page}: indented code"


@pytest.mark.parametrize("page", [x for x in PAGES if x.startswith("docs/")])
def test_code_fits_the_column_of_the_site(page):
    for block in pages.blocks(page):
        if block.language != "text":
            wide = [line for line in block.code.splitlines() if len(line) > 76]
            assert wide == [], f"{block}"


@pytest.mark.parametrize("page", params(x for x in PAGES if pages.blocks(x, "python")))
def test_python(page, desk):
    found = pages.blocks(page)
    if page in NEEDS and find_spec(NEEDS[page]) is None:
        for block in pages.blocks(page, "python"):
            compile(block.code, str(block), "exec")
            assert all(hasattr(hsr, x) for x in re.findall(r"\bhsr\.(\w+)", block.code)), block
        return
    names, printed = {"__name__": "page"}, ""
    exec(compile(BEFORE.get(page, ""), f"before {page}", "exec"), names)
    for block in found:
        if block.language == "python":
            code = "\n" * (block.line - 1) + block.code  # a traceback shows the line of the page
            if "model" in names:  # as the page tells readers to, with a transformers before 5.24
                from hsr_attention.integrations.cache_argument import cache_argument

                code = code.replace("cache=cache", f"{cache_argument(names['model'])}=cache")
            with contextlib.redirect_stdout(io.StringIO()) as out, eager():
                exec(compile(code, str(ROOT / page), "exec"), names)
            printed = out.getvalue()
        elif block.language == "output":
            assert printed == block.code, f"{block}: printed\n{printed}"


def eager():
    """Let ``torch.compile`` run models as they are; tests/test_torch_ops.py compiles them."""
    if "torch" not in sys.modules:
        return contextlib.nullcontext()
    import torch

    return torch.compiler.set_stance("force_eager")


def shell():
    """Return every command of every page, with its block."""
    from commands import commands

    for page in PAGES:
        for block in pages.blocks(page, "sh"):
            for words in commands(block.code):
                yield block, words


@of_torch
def test_shell_commands_are_what_our_tools_take():
    pytest.importorskip("typer")
    from commands import problem

    wrong = [(block, shlex.join(words), problem(words)) for block, words in shell()]
    assert [f"{block}: {line}: {why}" for block, line, why in wrong if why] == []


@of_torch
def test_commands_in_sentences_exist():
    pytest.importorskip("typer")
    from commands import names

    for page in PAGES:
        for span in re.findall(r"(?<!`)`(hsr [^`]+)`(?!`)", pages.prose(page)):
            words = span.split()[1:]
            why = None if words[0].isupper() else names(words)
            assert why is None, f"{page}: `{span}`: {why}"


@of_torch
@with_torch
def test_cheap_commands_run(desk, capsys):
    from hsr_attention.cli import main

    lines = sorted({shlex.join(words) for _, words in shell()})
    ran = [line for line in lines if line.startswith(RUN)]
    for start in RUN:
        assert any(line.startswith(start) for line in ran), f"no page has {start!r}"
    for line in ran:
        words = shlex.split(line)[1:]
        if words[0] == "generate" and "--max-new-tokens" not in words:
            words += ["--max-new-tokens", "4"]
        assert main(words) == 0, f"{line}: {capsys.readouterr().err}"


@pytest.mark.parametrize("module", [hsr_attention.kv_cache])
def test_docstring_examples(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0


# ---- README


def test_the_readme_is_short_and_starts_without_a_model():
    assert len(pages.text("README.md").splitlines()) <= 90
    first = pages.blocks("README.md", "python")[0].code
    assert len([line for line in first.splitlines() if line.strip()]) <= 16
    assert "torch" not in first and "transformers" not in first


# ---- links and the site


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """In the repository, as GitHub shows it."""
    for target in pages.links(page):
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if anchor and not anchor.startswith("hsr_attention."):  # docstrings: in the site only
            name = str(file.resolve().relative_to(ROOT))
            assert anchor in pages.anchors(name), f"{page}: {target}"


def test_every_public_name_is_in_the_reference():
    listed = " ".join(
        re.findall(r"^::: (\S+)$", "".join(map(pages.text, PAGES)), re.MULTILINE)
    ).split()
    missing = {name for name in hsr.__all__ if not any(x.endswith(f".{name}") for x in listed)}
    assert missing == set()


class Page(HTMLParser):
    """Collect the ids, links and loaded files of a page."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.loads = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if values.get("id"):
            self.ids.add(values["id"])
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        for name in ("src", "srcset", "data"):
            if values.get(name):
                self.loads.append(values[name])
        if tag == "link" and values.get("rel") not in ("canonical", "next", "prev"):
            self.loads.append(values.get("href", ""))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Build the site; a warning is an error."""
    pytest.importorskip("mkdocs")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    return {
        path.relative_to(out).as_posix(): Page(path.read_text(encoding="utf-8"))
        for path in out.rglob("*.html")
    }, out


def test_the_site_is_whole_and_needs_no_network(site):
    found, out = site
    assert len(found) > 20
    for name, page in found.items():
        for target in page.links + page.loads:
            if re.match(r"(https?:|mailto:)", target):
                assert target in page.links, f"{name} loads {target}"
                continue
            if name == "404.html":  # written for the root of a server
                continue
            path, _, anchor = target.partition("#")
            file = ((out / name).parent / path).resolve() if path else out / name
            assert file.exists(), f"{name}: {target}"
            if anchor:
                assert anchor in found[file.relative_to(out).as_posix()].ids, f"{name}: {target}"


@pytest.mark.parametrize("page", PAGES)
def test_no_page_writes_a_scalar_product_as_html(page):
    prose = re.sub(r"`[^`]*`", "", pages.prose(page))
    assert re.findall(r"<\w+, *\w+>", prose) == []


def test_scalar_products_are_not_taken_for_html(site):
    found, out = site
    text = (out / "reference" / "attention.html").read_text(encoding="utf-8")
    assert "exp(scale ⟨q, k_j⟩)" in text
    for name in found:
        text = (out / name).read_text(encoding="utf-8")
        assert not re.search(r"<[qk](,| )", text), f"{name}: <q, k> became a tag"


def test_the_reference_describes_every_parameter(site):
    found, out = site
    for name in found:
        if name.startswith("reference/"):
            text = (out / name).read_text(encoding="utf-8")
            assert not re.search(r"\u2013\s*(<p>\s*</p>|<div[^>]*>\s*</div>)?\s*</li>", text), name
            assert "optional)</code>" not in text, f"{name}: a type in double brackets"


@of_torch
def test_pictures_can_be_drawn_again(tmp_path):
    """From heads that are made up; a certificate or a band that is broken stops it."""
    safetensors = pytest.importorskip("safetensors.numpy")
    pytest.importorskip("matplotlib")
    rng = np.random.default_rng(0)
    heads = {
        f"{name}{layer}": rng.standard_normal((count, n, 64), dtype=np.float32)
        for layer in (4, 7)
        for name, count, n in (("q", 9, 16), ("k", 3, 700), ("v", 3, 700))
    }
    safetensors.save_file(heads, tmp_path / "heads.safetensors")
    command = [sys.executable, str(ROOT / "docs" / "pictures.py")]
    command += ["--heads", str(tmp_path / "heads.safetensors"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    drawn = {path.name for path in tmp_path.glob("*.png")}
    shown = set(re.findall(r"pictures/(\w+\.png)", "".join(map(pages.text, PAGES))))
    assert drawn and drawn <= shown and all((ROOT / "docs/pictures" / x).exists() for x in shown)
