"""Every command on a tiny model, and every bad input with its exit code and its one line."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from hsr_attention.cli import main
from hsr_attention.cli.options import policy
from hsr_attention.evaluation.errors import InputError
from hsr_attention.policies import ReLUPolicy, SoftmaxPolicy
from hsr_attention.thresholds import Gaussian, SqrtLog

needs_torch = pytest.mark.transformers


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    pytest.importorskip("transformers")
    import tiny

    return str(tiny.save(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def prompt(tmp_path_factory):
    import tiny

    path = tmp_path_factory.mktemp("text") / "prompt.txt"
    path.write_text(tiny.words(300))
    return str(path)


@pytest.fixture
def run(capsys):
    """Run ``hsr``; return the exit code, stdout, and stderr."""

    def call(*arguments):
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def ok(result):
    code, out, err = result
    assert code == 0, err
    return out


def refused(result, *expected, code=2):
    """Check the exit code and that stderr ends in one line that says why."""
    found, _, err = result
    lines = err.strip().splitlines()
    assert found == code, err
    assert lines[-1].startswith("hsr: ")
    for text in expected:
        assert text in lines[-1]


# ---- info and the frame


def test_info(run):
    found = json.loads(ok(run("info", "--json")))
    assert found["isa"] in found["isa_available"]
    assert set(found) >= {"version", "num_threads", "packages"}
    assert found["isa"] in ok(run("info"))


@needs_torch
def test_info_says_which_way_each_layer_goes(run, model):
    found = json.loads(ok(run("info", "--model", model, "--json", "--dtype", "bfloat16")))
    assert [layer["path"] for layer in found["layers"]] == ["sparse decode"] * 2
    layer = found["layers"][1]
    assert (layer["heads"], layer["kv_heads"], layer["head_dim"]) == (4, 2, 16)
    assert layer["row_bytes"] == 2 * 2 * 16 * 2  # keys and values, 2 heads, 16, bfloat16
    assert 2 * (16 + 8) < layer["code_bytes"] < layer["row_bytes"]
    out = ok(run("info", "--model", model))
    assert "0-1" in out and "sparse decode" in out
    relu = ok(run("info", "--model", model, "--policy", "attention=relu", "--json"))
    assert json.loads(relu)["layers"][0]["code_bytes"] < layer["code_bytes"]  # no value codes
    refused(run("info", "--model", "nosuch"), "does not exist")


@needs_torch
def test_info_of_a_relu_model_asks_for_its_own_attention(run):
    found = json.loads(ok(run("info", "--model", "relu-demo", "--json")))
    assert {layer["path"] for layer in found["layers"]} == {"sparse decode"}
    assert found["policy"] == "ReLUPolicy(threshold=SqrtLog(sigma=2.0), power=1)"
    softmax = ok(run("info", "--model", "relu-demo", "--policy", "epsilon=0.05", "--json"))
    assert {layer["path"] for layer in json.loads(softmax)["layers"]} == {"refused"}


@needs_torch
@pytest.mark.parametrize("command", [("generate", "--lengths", 64), ("prefill", "--n", 64)])
def test_benches_of_a_model_refuse_relu_attention(run, command, prompt):
    arguments = ("--model", "relu-demo", "--prompt-file", prompt, "--rounds", 1)
    refused(run("bench", *command, *arguments), "was trained with ReLU attention")


@needs_torch
def test_info_of_models_with_other_layers(run, tmp_path):
    import transformers

    settings = {
        "vocab_size": 62,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    }
    kinds = ["sliding_attention", "full_attention"] * 2
    transformers.Gemma3TextConfig(**settings, layer_types=kinds, sliding_window=8).save_pretrained(
        tmp_path / "gemma3"
    )
    found = json.loads(ok(run("info", "--model", tmp_path / "gemma3", "--json")))["layers"]
    assert [layer["path"] for layer in found] == ["dense", "sparse decode"] * 2
    assert "window of 8 keys" in found[0]["why"]
    transformers.Gemma2Config(**settings).save_pretrained(tmp_path / "gemma2")
    found = json.loads(ok(run("info", "--model", tmp_path / "gemma2", "--json")))["layers"]
    assert [layer["path"] for layer in found] == ["refused"] * 4
    assert "soft-capped logits" in found[0]["why"]
    transformers.GptOssConfig(**settings, num_local_experts=2).save_pretrained(tmp_path / "oss")
    found = json.loads(ok(run("info", "--model", tmp_path / "oss", "--json")))["layers"]
    assert {layer["path"] for layer in found} == {"refused"}
    assert "attention sinks" in found[0]["why"]


def test_version_and_help(run):
    assert "hsr-attention" in ok(run("--version"))
    for command in ("info", "generate", "capture", "bench", "evaluate"):
        assert command in ok(run("--help"))


def test_the_command_starts_without_torch():
    code = "import sys, hsr_attention.cli.app; print('torch' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "False"


@pytest.mark.parametrize(("module", "extra"), [("typer", "cli"), ("rich", "cli")])
def test_a_missing_package_names_its_extra(module, extra):
    code = f"import sys; sys.modules[{module!r}] = None; from hsr_attention.cli import main; "
    code += "sys.exit(main(['info']))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 1
    assert found.stderr.strip().count("\n") == 0
    assert f"pip install 'hsr-attention[{extra}]'" in found.stderr


def test_missing_torch_names_its_extra(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "p.txt").write_text("text")
    code = "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None; "
    code += "from hsr_attention.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["generate", "--model", str(tmp_path), "--prompt-file", str(tmp_path / "p.txt")]
    found = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True
    )
    assert found.returncode == 1
    assert "pip install 'hsr-attention[transformers]'" in found.stderr


def test_unknown_command_and_option(run):
    refused(run("nosuch"), "nosuch")
    refused(run("info", "--nosuch"), "--nosuch")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [("HSR_ISA", "avx3", "unknown isa 'avx3'"), ("HSR_NUM_THREADS", "many", "HSR_NUM_THREADS")],
)
def test_bad_settings_of_the_environment(name, value, expected):
    code = "import sys; from hsr_attention.cli import main; sys.exit(main(['info']))"
    environment = os.environ | {name: value}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert found.returncode == 2
    assert expected in found.stderr
    assert found.stderr.strip().count("\n") == 0


# ---- policies


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], SoftmaxPolicy()),
        (["epsilon=0.05"], SoftmaxPolicy(epsilon=0.05)),
        (["top_r=64,tail=drop"], SoftmaxPolicy(top_r=64, tail="drop")),
        (["top_r=64", "tail=drop"], SoftmaxPolicy(top_r=64, tail="drop")),
        (["exact=true certify=false"], SoftmaxPolicy(exact=True, certify=False)),
        (["threshold=-1.5"], SoftmaxPolicy(threshold=-1.5)),
        (["threshold=gaussian"], SoftmaxPolicy(threshold=Gaussian())),
        (["attention=relu,threshold=sqrt_log"], ReLUPolicy(threshold=SqrtLog())),
        (["attention=relu,threshold=0.5,power=2"], ReLUPolicy(threshold=0.5, power=2)),
    ],
)
def test_policy_words(words, expected):
    assert policy(words) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("epsilon", "unknown policy word 'epsilon'"),
        ("epsilonn=0.1", "unknown policy word"),
        ("epsilon=much", "epsilon= must be a number"),
        ("epsilon=1.5", "epsilon must lie in (0, 1)"),
        ("epsilon=0", "epsilon must lie in (0, 1)"),
        ("top_r=0", "top_r must be >= 1"),
        ("top_r=-3", "top_r must be >= 1"),
        ("top_r=1.5", "top_r= must be an integer"),
        ("top_r=4,epsilon=0.1", "give one of epsilon, top_r and threshold"),
        ("tail=keep", "tail must be one of"),
        ("exact=maybe", "exact= must be true or false"),
        ("epsilon=0.1,epsilon=0.2", "given twice"),
        ("attention=linear", "attention= must be softmax or relu"),
        ("attention=relu,top_r=5", "does not belong to attention=relu"),
    ],
)
def test_bad_policy_words(words, expected, run, tmp_path):
    with pytest.raises(InputError) as error:
        policy([words])
    assert expected in str(error.value)
    arguments = ("--model", tmp_path, "--prompt-file", tmp_path, "--policy", words)
    refused(run("generate", *arguments), expected)


# ---- generate


@needs_torch
def test_generate_streams_and_sums_up(run, model, prompt, tmp_path):
    picture = tmp_path / "report.png"
    arguments = ("--model", model, "--prompt-file", prompt, "--max-new-tokens", 8, "--ignore-eos")
    out = ok(run("generate", *arguments, "--compare-dense", "--report", picture))
    for text in ("time to first token", "tokens/s", "Density by layer", "omitted mass", "peak"):
        assert text in out
    for text in ("sdpa", "same token", "log-probability"):
        assert text in out
    assert picture.read_bytes().startswith(b"\x89PNG")


@needs_torch
def test_exact_generation_is_dense_generation(run, model, prompt):
    """A policy that omits next to nothing and reads everything exactly gives the dense text."""
    arguments = ("--model", model, "--prompt-file", prompt, "--max-new-tokens", 24, "--ignore-eos")
    exact = ("--policy", "epsilon=1e-7,exact=true")
    found = json.loads(ok(run("generate", *arguments, *exact, "--compare-dense", "--json")))
    assert found["hsr"]["tokens"] == found["dense"]["tokens"]
    assert len(found["hsr"]["tokens"]) == 24
    assert len(found["hsr"]["decode_seconds"]) == 23
    assert found["agreement"]["tokens"] == found["agreement"]["best"] == 24
    assert found["agreement"]["logprob_max"] < 1e-4
    assert found["prompt_tokens"] == 300
    density = found["hsr"]["certificate"]["density"]
    assert len(density) == 2
    assert len(density[0]) == 4
    assert 0 < found["hsr"]["certificate"]["omitted_mass"]["worst"] <= 1e-6


@needs_torch
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("words", ["top_r=8,tail=drop", "threshold=gaussian", "certify=false"])
def test_generate_by_every_rule(run, model, prompt, dtype, words):
    arguments = ("--model", model, "--prompt-file", prompt, "--max-new-tokens", 4, "--ignore-eos")
    found = json.loads(
        ok(run("generate", *arguments, "--policy", words, "--dtype", dtype, "--json"))
    )
    assert found["dtype"] == dtype
    assert found["dense"] is None
    assert len(found["hsr"]["tokens"]) == 4


@needs_torch
def test_chunks_of_the_prompt_change_nothing(run, model, prompt):
    arguments = ("--model", model, "--prompt-file", prompt, "--max-new-tokens", 6, "--json")
    whole, parts = (
        json.loads(ok(run("generate", *arguments, "--prefill-chunk", chunk)))
        for chunk in (512, 70)
    )
    assert whole["hsr"]["tokens"] == parts["hsr"]["tokens"]


@needs_torch
def test_one_new_token_has_no_decoding(run, model, prompt, tmp_path):
    arguments = ("--model", model, "--prompt-file", prompt, "--max-new-tokens", 1)
    found = json.loads(ok(run("generate", *arguments, "--json", "--compare-dense")))
    assert found["hsr"]["decode_tokens_per_second"] is None
    assert found["hsr"]["certificate"] is None
    assert "-" in ok(run("generate", *arguments, "--report", tmp_path / "r.png"))


@needs_torch
@pytest.mark.parametrize("extension", [("--rope-scaling", "yarn"), ("--max-context", 1024)])
def test_yarn_reaches_beyond_the_context(run, model, tmp_path, extension):
    import tiny

    path = tmp_path / "long.txt"
    path.write_text(tiny.words(tiny.CONTEXT + 100))
    arguments = ("--model", model, "--prompt-file", path, "--max-new-tokens", 3, "--json")
    refused(
        run("generate", *arguments),
        f"has {tiny.CONTEXT + 100} tokens",
        f"context is {tiny.CONTEXT}",
        f"--max-prompt-tokens {tiny.CONTEXT - 3}",
        "--max-context",
    )
    found = json.loads(ok(run("generate", *arguments, *extension)))
    assert found["context_before_yarn"] == tiny.CONTEXT
    assert found["prompt_tokens"] == tiny.CONTEXT + 100
    cut = json.loads(ok(run("generate", *arguments, "--max-prompt-tokens", tiny.CONTEXT - 3)))
    assert cut["prompt_tokens"] == tiny.CONTEXT - 3


@needs_torch
def test_bad_prompts(run, model, prompt, tmp_path):
    empty, broken = tmp_path / "empty.txt", tmp_path / "broken.txt"
    empty.write_text(" \n\n")
    broken.write_bytes(b"\xff\xfe\x00")

    def generate(*arguments):
        return run("generate", "--model", model, *arguments)

    refused(generate("--prompt-file", empty), "is empty")
    refused(generate("--report", tmp_path / "report.xyz"), "--report must end in .pdf, .png, .svg")
    refused(generate("--policy", "threshold=gauss"), "must be a number, gaussian or sqrt_log")
    refused(generate("--policy", "threshold=nan"), "threshold must not be NaN")
    refused(generate("--policy", ","), "--policy must hold a word")
    refused(generate("--prompt-file", broken), "must be UTF-8")
    refused(generate("--prompt-file", tmp_path / "nothing.txt"), "does not exist")
    refused(generate("--prompt-file", tmp_path), "is not a file")
    refused(generate(), "give one of --prompt-file and --essays")
    refused(generate("--prompt-file", prompt, "--essays", 5), "give one of")
    refused(generate("--prompt-file", prompt, "--max-new-tokens", 0), "--max-new-tokens")
    refused(generate("--prompt-file", prompt, "--max-new-tokens", -4), "--max-new-tokens")
    refused(generate("--prompt-file", prompt, "--dtype", "int8"), "--dtype")
    refused(generate("--prompt-file", prompt, "--report", tmp_path / "no" / "r.png"), "--report")


@needs_torch
def test_bad_models(run, prompt, tmp_path):
    no_config, bad_config, no_weights = (tmp_path / x for x in ("a", "b", "c"))
    for directory in (no_config, bad_config, no_weights):
        directory.mkdir()
    (bad_config / "config.json").write_text("{not json")
    import tiny

    tiny.config().save_pretrained(no_weights)
    tiny.tokenizer().save_pretrained(no_weights)
    broken, short = tmp_path / "broken.gguf", tmp_path / "short.gguf"
    broken.write_bytes(b"not a model")
    short.write_bytes(b"GGUF\x03\x00\x00\x00")

    def generate(name):
        return run("generate", "--model", name, "--prompt-file", prompt)

    refused(generate(tmp_path / "nothing"), "does not exist")
    refused(generate(tmp_path / "nothing.gguf"), "does not exist")
    refused(generate(prompt), "is none of them")
    refused(generate(no_config), "has no config.json")
    refused(generate(bad_config), "is broken")
    refused(generate(no_weights), "is broken", "weights")
    soft = tmp_path / "soft"
    tiny.tokenizer().save_pretrained(soft)
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 62}
    Gemma2ForCausalLM(Gemma2Config(**sizes, **heads)).save_pretrained(soft)
    refused(generate(soft), "soft-capped")
    refused(generate(broken), "does not start with 'GGUF'")
    refused(generate(short), "is broken")


@needs_torch
def test_the_relu_demo_runs_by_its_own_policy(run, tmp_path):
    pytest.importorskip("transformers")
    text = tmp_path / "text.txt"
    text.write_text("It was a dark and stormy night, and nobody wrote any software. " * 20)
    generate = ("generate", "--model", "relu-demo", "--prompt-file", text, "--threads", "1")
    found = json.loads(ok(run(*generate, "--max-new-tokens", "20", "--compare-dense", "--json")))
    assert found["policy"].startswith("ReLUPolicy(threshold=SqrtLog(")
    assert found["dense"]["path"].startswith("relu, ")
    assert found["agreement"]["tokens"] == found["agreement"]["of"]
    assert found["agreement"]["logprob_max"] < 1e-4
    score = ("evaluate", "perplexity", "--model", "relu-demo", "--prompt-file", text)
    sizes = ("--prefix", "100", "--tokens", "20", "--threads", "1")
    found = json.loads(ok(run(*score, *sizes, "--json")))
    assert abs(found["relative_change"]) < 1e-5
    for command in (generate, (*score, *sizes)):
        refused(run(*command, "--policy", "epsilon=0.1"), "was trained with ReLU attention")
    assert "was trained with" not in ok(
        run(*generate, "--max-new-tokens", "2", "--policy", "attention=relu,threshold=1", "--json")
    )


@needs_torch
def test_relu_attention_in_a_softmax_model_is_noted(run, model, prompt):
    words = ("--max-new-tokens", "2", "--policy", "attention=relu,threshold=0", "--json")
    code, out, err = run("generate", "--model", model, "--prompt-file", prompt, *words)
    assert code == 0 and json.loads(out)
    assert "note:" in err and "was trained with softmax attention" in err


@needs_torch
def test_out_of_memory_is_a_failure(run, model, prompt, monkeypatch):
    from hsr_attention.evaluation import generation

    arguments = ("generate", "--model", model, "--prompt-file", prompt)
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 TB")):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(generation, "prefill", fail)
        refused(run(*arguments), "out of memory", "--max-prompt-tokens", code=1)


# ---- capture and bench


@pytest.fixture(scope="module")
def heads(model, prompt, tmp_path_factory):
    path = tmp_path_factory.mktemp("heads") / "heads.safetensors"
    arguments = ["--model", model, "--prompt-file", prompt, "--tokens", "256", "--layers", "0,1"]
    assert main(["capture", *arguments, "--out", str(path), "--queries", "16"]) == 0
    return str(path)


@needs_torch
def test_capture_writes_heads(heads):
    from safetensors import safe_open

    with safe_open(heads, "pt") as file:
        assert set(file.keys()) == {f"{x}{layer}" for x in "qkv" for layer in (0, 1)}
        assert file.get_tensor("q0").shape == (4, 16, 16)
        assert file.get_tensor("k1").shape == file.get_tensor("v1").shape == (2, 256, 16)
        facts = file.metadata()
    assert facts["tokens"] == "256"
    assert facts["layers"] == "[0, 1]"
    assert float(facts["scale"]) == 0.25


@needs_torch
def test_bad_captures(run, model, prompt, tmp_path):
    def capture(*arguments, out=tmp_path / "x.safetensors"):
        return run("capture", "--model", model, "--prompt-file", prompt, "--out", out, *arguments)

    refused(capture("--layers", "0,two"), "--layers")
    refused(capture("--layers", "0,2"), "must lie in [0, 2)")
    refused(capture("--tokens", 301), "has 300 tokens")
    refused(capture("--tokens", 0), "--tokens")
    refused(capture(out=tmp_path / "no" / "x.safetensors"), "--out")


@needs_torch
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_bench_decode_on_captured_heads(run, heads, dtype, tmp_path):
    picture = tmp_path / "bench.png"
    arguments = ("--keys", heads, "--dtype", dtype, "--rounds", 2, "--plot", picture, "--json")
    found = json.loads(ok(run("bench", "decode", *arguments)))
    assert found["synthetic"] is False
    assert found["n"] == 256
    assert found["total"]["violations"] == 0
    assert found["total"]["rows_checked"] == 2 * 4 * 8
    for row in found["layers"]:
        assert row["relative_error_mean"] < 0.05
        assert len(row["dense_ms"]) == 4
        assert not any("," in name for name in row["dense_ms"])  # a table lists them with commas
        assert max(row["dense_relative_error"].values()) < 0.02
        assert row["hsr_ms"] > 0
        assert row["speedup"] == pytest.approx(min(row["dense_ms"].values()) / row["hsr_ms"])
    assert {"isa", "num_threads", "packages", "torch_threads"} <= set(found["machine"])
    assert picture.read_bytes().startswith(b"\x89PNG")


@needs_torch
def test_bench_decode_on_synthetic_heads_says_so(run):
    out = ok(run("bench", "decode", "--n", 500, "--shape", "4/2x24", "--rounds", 1))
    assert "synthetic heads (made up" in out
    assert "speed-up" in out


@needs_torch
def test_bench_decode_refuses_more_keys_than_captured(run, heads):
    arguments = ("bench", "decode", "--keys", heads, "--n", 600, "--rounds", 1, "--json")
    refused(run(*arguments), "holds 256 keys", "--tile")
    found = json.loads(ok(run(*arguments, "--tile")))
    assert found["n"] == 600
    assert "repeated to 600" in found["source"]


@needs_torch
def test_bad_benches(run, heads, tmp_path):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing")
    refused(run("bench", "decode", "--keys", tmp_path / "no"), "does not exist")
    refused(run("bench", "decode", "--keys", broken), "is broken")
    refused(run("bench", "decode", "--keys", heads, "--layers", "7"), "holds layers [0, 1]")
    refused(run("bench", "decode", "--shape", "9x64"), "--shape")
    refused(run("bench", "decode", "--shape", "9/2x64"), "multiple")
    refused(run("bench", "decode", "--policy", "attention=relu"), "relu")
    refused(run("bench", "decode", "--n", 0), "--n")


@needs_torch
def test_bench_append(run):
    arguments = ("bench", "append", "--small", 100, "--large", 2000)
    found = json.loads(ok(run(*arguments, "--json")))
    assert set(found["append_us"]) == {"100", "2000"}
    assert found["ratio"] > 0
    assert "ratio" in ok(run(*arguments))


# ---- evaluate


@needs_torch
def test_evaluate_perplexity(run, model, prompt):
    arguments = ("--model", model, "--prompt-file", prompt, "--prefix", 200, "--tokens", 40)
    found = json.loads(ok(run("evaluate", "perplexity", *arguments, "--json")))
    assert found["hsr"] == pytest.approx(found["dense"], rel=0.01)
    assert "perplexity, dense" in ok(run("evaluate", "perplexity", *arguments))
    refused(run("evaluate", "perplexity", *arguments[:-1], 200), "has 300 tokens")


@needs_torch
def test_generate_with_keys_and_values_on_disk(run, model, prompt, tmp_path):
    arguments = ("generate", "--model", model, "--prompt-file", prompt, "--json")
    arguments += ("--max-new-tokens", 8)
    disk = (*arguments, "--storage", "disk", "--storage-directory", tmp_path)
    memory, found = (json.loads(ok(run(*x))) for x in (arguments, disk))
    assert found["hsr"]["tokens"] == memory["hsr"]["tokens"]
    assert found["hsr"]["cache_bytes"] == memory["hsr"]["cache_bytes"]
    assert found["hsr"]["cache_bytes"]["rows"] > found["hsr"]["cache_bytes"]["codes"] > 0
    nowhere = ("--storage", "disk", "--storage-directory", tmp_path / "no")
    refused(run(*arguments, *nowhere), "directory must be an existing directory")
    refused(run(*arguments, "--storage-directory", tmp_path), "directory must be None")


@needs_torch
def test_bench_decode_on_several_documents(run, heads, tmp_path):
    arguments = ("bench", "decode", "--keys", heads, "--keys", heads, "--rounds", 1, "--json")
    single = json.loads(ok(run("bench", "decode", "--keys", heads, "--rounds", 1, "--json")))
    found = json.loads(ok(run(*arguments)))
    assert found["n"] == 2 * single["n"]
    assert "2 documents" in found["source"]
    assert found["total"]["violations"] == 0
    refused(run(*arguments, "--n", 2 * single["n"] + 1), "several --keys")


@needs_torch
def test_bench_generate(run, model, prompt, tmp_path):
    picture = tmp_path / "speed.png"
    arguments = ("bench", "generate", "--model", model, "--prompt-file", prompt, "--rounds", 1)
    arguments += ("--lengths", "64,200,300", "--policy", "epsilon=1e-9,exact=true")
    found = json.loads(ok(run(*arguments, "--json", "--plot", picture)))
    assert [row["n"] for row in found["lengths"]] == [64, 200, 300]
    for row in found["lengths"]:
        speeds = row["dense_tokens_per_second"]
        kinds = ("DynamicCache", "StaticCache")
        assert set(speeds) == {f"{a}, {c}" for a in ("sdpa", "eager") for c in kinds}
        assert speeds[row["fastest_dense"]] == max(speeds.values())
        assert row["speedup"] <= row["speedup_over_default"]
        assert row["logprob_difference_mean"] < 1e-4
        assert row["row_bytes"] == 2 * 2 * 2 * 16 * 4 * row["n"]
    assert picture.stat().st_size > 10_000
    printed = ok(run(*arguments, "--torch-linear"))
    assert "fastest dense" in printed and "Linear layers: by torch alone" in printed
    refused(run(*arguments, "--lengths", "64,301"), "the text has 300 tokens")
    refused(run(*arguments, "--lengths", "x"), "--lengths must be numbers")


@needs_torch
def test_linear_layers_are_split_where_that_is_faster(run, model, prompt, monkeypatch):
    from hsr_attention.integrations import parallel_linear

    monkeypatch.setattr(parallel_linear, "_faster", lambda layers, parts: True)
    generate = ("generate", "--model", model, "--prompt-file", prompt, "--max-new-tokens", 4)
    generate += ("--threads", 2, "--compare-dense")
    alone = json.loads(ok(run(*generate, "--torch-linear", "--json")))
    split = json.loads(ok(run(*generate, "--json")))
    assert alone["linear_parts"] == {}
    assert split["linear_parts"] == {"64 x 64": 2, "32 x 64": 2, "62 x 64": 2}
    for path in ("hsr", "dense"):
        assert split[path]["tokens"] == alone[path]["tokens"]
        assert split[path]["logprobs"] == pytest.approx(alone[path]["logprobs"], abs=1e-3)
    assert "Linear layers of one token in 2 parts, dense too: 64 x 64" in ok(run(*generate))


@needs_torch
def test_bench_length(run, heads, tmp_path):
    picture = tmp_path / "length.png"
    arguments = ("bench", "length", "--keys", heads, "--largest", 4096, "--rounds", 1)
    found = json.loads(ok(run(*arguments, "--json", "--plot", picture)))
    assert [row["n"] for row in found["lengths"]] == [1024, 2048, 4096]
    for row in found["lengths"]:
        assert row["relative_error"] < 0.1
        # The scan alone reads the first plane: half a byte a coordinate, and 4 bytes.
        assert row["scan_bytes"] == row["n"] * 2 * (16 / 2 + 4)
        assert row["decode_bytes"] > row["scan_bytes"]
    assert picture.stat().st_size > 10_000
    out = ok(run("bench", "length", "--shape", "4/1x24", "--largest", 2048, "--no-dense"))
    assert "made up" in out and "memory bandwidth" in out
    refused(run(*arguments, "--layer", 9), "holds layers")


@needs_torch
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bench_relu(run, dtype):
    arguments = ("bench", "relu", "--n", 4096, "--rounds", 1, "--dtype", dtype)
    found = json.loads(ok(run(*arguments, "--json")))
    assert found["relative_error"] <= 2 * found["dense_relative_error"]
    assert found["keys_kept"] == pytest.approx(found["keys_expected"], rel=0.15)
    assert found["keys_expected"] < 4096**0.8
    refused(run(*arguments, "--exponent", 1.0), "--exponent must lie in (0, 1)")
    assert "speed-up" in ok(run(*arguments))


@needs_torch
def test_bench_threads(run):
    found = json.loads(ok(run("bench", "threads", "--n", 2000, "--rounds", 2, "--json")))
    for name in ("matmul", "attend"):
        row = found[name]  # how large the number is, only a quiet machine can tell
        assert row["slowdown"] > 0
        assert row["slowdown"] == pytest.approx(row["in_turn_ms"] / row["alone_ms"])
    assert "slowdown" in ok(run("bench", "threads", "--n", 500, "--rounds", 1))


# ---- prompts


@pytest.fixture(scope="module")
def whole_heads(model, prompt, tmp_path_factory):
    """Heads with the queries of all positions."""
    path = tmp_path_factory.mktemp("heads") / "whole.safetensors"
    arguments = ["--model", model, "--prompt-file", prompt, "--tokens", "256", "--layers", "0,1"]
    assert main(["capture", *arguments, "--out", str(path), "--queries", "256"]) == 0
    return str(path)


@needs_torch
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("words", ["epsilon=0.03", "attention=relu,threshold=gaussian,power=2"])
def test_bench_prefill_on_captured_heads(run, whole_heads, dtype, words, tmp_path):
    picture = tmp_path / "prefill.png"
    arguments = ("--keys", whole_heads, "--n", "100,256", "--dtype", dtype, "--policy", words)
    arguments += ("--rounds", 1, "--plot", picture, "--json")
    found = json.loads(ok(run("bench", "prefill", *arguments)))
    assert [total["n"] for total in found["totals"]] == [100, 256]
    assert [row["layer"] for row in found["layers"]] == ["0", "1"] * 2
    for total in found["totals"]:
        assert total["violations"] == 0
        assert total["rows_checked"] == 2 * 4 * 48
    for row in found["layers"]:
        dense = row["dense_ms"]
        assert set(dense) == set(row["dense_relative_error"])
        assert len(dense) == (3 if words.startswith("epsilon") else 2)
        assert row["speedup"] == pytest.approx(dense[row["fastest_dense"]] / row["hsr_ms"])
        assert row["fastest_dense"] not in row["timed_once"]
        assert 0 < row["density"] <= 1
        assert 0 <= row["skipped_share"] <= 1
        assert row["relative_error_mean"] < 0.05
        assert row["integer_peak_share"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@needs_torch
def test_bench_prefill_prints_tables(run):
    arguments = ("--n", 200, "--shape", "4/2x24", "--rounds", 1, "--policy", "top_r=8")
    out = ok(run("bench", "prefill", *arguments))
    assert "synthetic heads (made up" in out
    assert "fastest dense path" in out


@needs_torch
def test_bench_prefill_of_a_model(run, model, prompt, tmp_path):
    picture = tmp_path / "first.png"
    arguments = ("--model", model, "--prompt-file", prompt, "--n", "100,300", "--rounds", 1)
    found = json.loads(ok(run("bench", "prefill", *arguments, "--json", "--plot", picture)))
    assert [row["n"] for row in found["prompts"]] == [100, 300]
    for row in found["prompts"]:
        assert row["same_first_token"]
        assert row["speedup"] == pytest.approx(row["dense_seconds"] / row["hsr_seconds"])
        assert row["code_bytes"] > 0
        assert row["divergence_nats"] == pytest.approx(0, abs=1e-2)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "time to first token" in ok(run("bench", "prefill", *arguments))


@needs_torch
def test_bad_prompt_benches(run, heads, whole_heads, model, prompt):
    def bench(*arguments):
        return run("bench", "prefill", *arguments)

    refused(bench("--keys", heads), "last 16 of 256 positions", "--queries 256")
    refused(bench("--keys", whole_heads, "--n", 300), "holds 256 positions")
    refused(bench("--keys", whole_heads, "--layers", 7), "holds layers [0, 1]")
    refused(bench("--keys", whole_heads, "--model", model), "give one of")
    refused(bench("--n", "0,5"), "at least 1")
    refused(bench("--n", "many"), "--n must be numbers")
    refused(bench("--model", model, "--prompt-file", prompt, "--n", 301), "has 300 tokens")
    refused(bench("--model", model, "--essays"), "--essays")


def test_bench_scaling(run, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("scipy")
    picture = tmp_path / "scaling.png"
    arguments = ("--dim", "2,3,16", "--n", "100,200,400", "--repeats", 1, "--plot", picture)
    found = json.loads(ok(run("bench", "scaling", *arguments, "--json")))
    assert [row["d"] for row in found["rows"]] == [2] * 3 + [3] * 3 + [16] * 3
    inside = {row["d"]: row["index"] for row in found["rows"]}
    assert inside == {2: "convex_layers", 3: "partition_tree", 16: "codes"}
    assert max(row["error"] for row in found["rows"]) < 1e-5
    for fit in found["exponents"]:
        assert fit["low"] <= fit["exponent"] <= fit["high"]
    times = [fit for fit in found["exponents"] if fit["quantity"] == "seconds"]
    assert [fit["theory"] for fit in times] == pytest.approx([1.8, 1.8, 1.875])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "Growth" in ok(run("bench", "scaling", *arguments, "--index", "auto"))
    refused(run("bench", "scaling", "--dim", "0"), "--dim")
    refused(run("bench", "scaling", "--n", "0"), "--n")
    refused(run("bench", "scaling", "--index", "tree"), "--index")


def test_bench_index(run):
    pytest.importorskip("scipy")
    found = json.loads(ok(run("bench", "index", "--dim", 3, "--n", 500, "--queries", 2, "--json")))
    assert {row["kind"] for row in found["rows"]} == {"partition_tree", "shallow_cutting"}
    assert {(row["d"], row["n"]) for row in found["rows"]} == {(3, 500)}
    assert [row["k"] for row in found["rows"]] == pytest.approx([100] * 2, abs=2)
    refused(run("bench", "index", "--dim", "x"), "--dim must be numbers")
    refused(run("bench", "index", "--n", "0"), "--n must be at least 1")
    refused(run("bench", "index", "--plot", "picture.txt"), "--plot must end in .pdf, .png, .svg")
    refused(run("bench", "index", "--n", "1.5"), "--n must be numbers")
    refused(run("bench", "index", "--data", "noise"), "--data must be among gaussian")


def test_bench_index_libraries(run, monkeypatch):
    pytest.importorskip("sklearn")
    pytest.importorskip("scipy")
    arguments = ("bench", "index-libraries", "--n", 500, "--k", 20, "--queries", 3)
    found = json.loads(ok(run(*arguments, "--repeats", 1, "--json")))
    names = {row["name"] for row in found["rows"]}
    assert {"partition_tree", "shallow_cutting", "scipy cKDTree"} < names
    assert {row["data"] for row in found["rows"]} == {"gaussian", "sphere"}
    assert all(min(row["build"], row["batch"], row["single"]) > 0 for row in found["rows"])
    times = {(row["name"], row["data"]): row["build"] for row in found["rows"]}
    for ratio in found["ratios"]:
        ours, theirs = ((ratio[name], ratio["data"]) for name in ("index", "library"))
        assert ratio["build"] == pytest.approx(times[theirs] / times[ours])
    assert "Faster by" in ok(run(*arguments, "--repeats", 1))
    refused(run(*arguments, "--data", "noise"), "--data must be among")
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.neighbors", None)
    refused(run(*arguments), "pip install 'hsr-attention[libraries]'", code=1)


def test_a_library_that_misses_a_key_is_not_timed(run, monkeypatch):
    pytest.importorskip("sklearn")
    pytest.importorskip("scipy")
    from hsr_attention.experiments import index_libraries

    whole = index_libraries._Ball.indices
    monkeypatch.setattr(
        index_libraries._Ball, "indices", lambda *a: [row[1:] for row in whole(*a)]
    )
    refused(run("bench", "index-libraries", "--n", 300, "--k", 20), "FlatIndex differ", code=1)


def test_bench_index_worst(run):
    arguments = ("bench", "index-worst", "--dim", "2,4", "--n", 600, "--repeats", 1)
    found = json.loads(ok(run(*arguments, "--data", "gaussian,boundary", "--json")))
    assert {row["k"] for row in found["rows"]} == {1, 10, 18, 37, 100, 150, 300, 450, 600}
    assert len(found["rows"]) == 2 * 2 * 9
    assert found["worst"]["slowdown"] == max(row["slowdown"] for row in found["rows"])
    assert "median of all" in ok(run(*arguments, "--data", "uniform"))
    refused(run(*arguments, "--kind", "flat"), "--kind must be among")
    for command in ("index-worst", "index-append", "index-libraries"):
        refused(run("bench", command, "--n", "1e3,1e4"), "--n must be one number, got '1e3,1e4'")


def test_bench_index_append(run):
    pytest.importorskip("scipy")
    arguments = ("bench", "index-append", "--dim", "2,3", "--n", 3000, "--block", "64,1")
    found = json.loads(ok(run(*arguments, "--json")))
    assert [(row["d"], row["block"]) for row in found["rows"]] == [(2, 1), (2, 64)] * 3 + [
        (3, 1),
        (3, 64),
    ] * 2
    assert all(row["append"] > 0 and row["delete"] > 0 for row in found["rows"])
    assert "amortised" in ok(run(*arguments))
    refused(run(*arguments, "--block", "0"), "--block must be at least 1")


@needs_torch
def test_perplexity_of_a_whole_prompt(run, model, prompt):
    arguments = ("--model", model, "--prompt-file", prompt)
    exact = ("--policy", "epsilon=1e-7,exact=true", "--json")
    found = json.loads(ok(run("evaluate", "prompt", *arguments, *exact)))
    assert found["tokens"] == 300
    assert found["scored"] == 299
    assert found["hsr"] == pytest.approx(found["dense"], rel=1e-4)
    assert found["logprob_difference_max"] < 1e-3
    assert "perplexity, half-space reporting" in ok(run("evaluate", "prompt", *arguments))
    refused(run("evaluate", "prompt", *arguments, "--tokens", 1), "--tokens")
