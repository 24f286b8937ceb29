"""``hsr analyze`` on a tiny model."""

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("typer")

import tiny
from hsr_attention.cli import main

pytestmark = pytest.mark.transformers


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(tiny.words(900))
    return ["--model", str(tiny.save(tmp_path_factory.mktemp("model"))), "--text", str(text)]


def test_analyze_prints_and_draws(capsys, given, tmp_path):
    out = tmp_path / "atlas"
    arguments = ["--tokens", "300", "--queries", "8", "--out", str(out), "--json"]
    assert main(["analyze", *given, *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    data = found["data"]
    assert (data["n"], data["layers"]) == (300, [0, 1])
    assert data["certificates"] == {"rows": 2 * 5 * 8 * tiny.HEADS, "violations": 0}
    assert json.loads((out / "data.json").read_text())["data"] == data
    for name in ("keys-0.99", "sinks", "recent", "density", "bound"):
        assert (out / f"{name}.png").exists()
        assert (out / f"{name}.svg").exists()
    assert "An atlas of attention heads" in (out / "report.html").read_text()
    assert (
        main(["analyze", *given, "--tokens", "300", "--layers", "1", "--policy", "top_r=9"]) == 0
    )
    assert "top_r=9" in capsys.readouterr().out


def test_analyze_reads_as_far_as_the_context(capsys, given):
    assert main(["analyze", *given, "--json", "--layers", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["n"] == tiny.CONTEXT


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--tokens", "600"], "--max-context 600"),
        (["--essays", "5"], "give one of --prompt-file and --essays"),
        (["--layers", "7"], "--layers must lie in"),
        (["--policy", "attention=relu"], "must not be relu"),
        (["--out", "/nowhere/at/all"], "does not exist"),
        (["--tokens", "5000", "--max-context", "8192"], "the text has 900 tokens"),
    ],
)
def test_bad_input_is_refused(capsys, given, arguments, expected):
    assert main(["analyze", *given, *arguments]) == 2
    assert expected in capsys.readouterr().err.splitlines()[-1]
