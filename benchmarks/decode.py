"""Decoding attention on real keys of SmolLM2: capture once, then time every dtype."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

LAYERS = "1,7,13,19,25,29"


def hsr(*arguments, stdout=None):
    code = "import sys; from hsr_attention.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=stdout, text=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--layers", default=LAYERS, help=f"numbers with commas (default {LAYERS})")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--policy", default=None)
    parser.add_argument("--out", type=Path, default=Path("results"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    n = options.tokens
    keys = options.out / f"smollm2-{n}.safetensors"
    if not keys.exists():
        text = ("--model", "smollm2", "--essays", n, "--max-context", n, "--queries", 64)
        hsr("capture", *text, "--layers", options.layers, "--out", keys)
    policy = () if options.policy is None else ("--policy", options.policy)
    for dtype in options.dtypes:
        path = options.out / f"decode-{n}-{dtype}.json"
        arguments = ("--keys", keys, "--layers", options.layers, "--dtype", dtype, *policy)
        path.write_text(
            hsr("bench", "decode", *arguments, "--json", stdout=subprocess.PIPE).stdout
        )
        show(dtype, json.loads(path.read_text()))
    append = hsr("bench", "append", "--json", stdout=subprocess.PIPE).stdout
    (options.out / "append.json").write_text(append)
    print(f"append: {json.loads(append)['append_us']} µs")


def show(dtype, result):
    total = result["total"]
    print(
        f"{dtype}, n = {result['n']}: hsr {total['hsr_ms']:.2f} ms, fastest dense "
        f"{total['fastest_dense_ms']:.2f} ms, speed-up {total['speedup']:.2f} (least layer "
        f"{total['speedup_smallest']:.2f}), density {total['density']:.3f}, error "
        f"{total['relative_error_mean']:.4f}, certificates broken {total['violations']}"
    )


if __name__ == "__main__":
    main()
