"""What decoding takes beside keys, values and codes."""

import subprocess
import sys
import textwrap

import pytest

DECODE = """
    import sys
    import numpy as np, hsr_attention as hsr

    dtype, tokens = sys.argv[1], int(sys.argv[2])

    def status(name):
        lines = open("/proc/self/status").read().splitlines()
        return 1024 * next(int(x.split()[1]) for x in lines if x.startswith(name + ":"))

    rng = np.random.default_rng(7)
    centres = 2 * rng.standard_normal((64, 64), dtype=np.float32)

    def piece(count):
        k, v = rng.standard_normal((2, 1, 3, count, 64), dtype=np.float32)
        return (k + centres[rng.integers(0, 64, (1, 3, count))]).astype(dtype), v.astype(dtype)

    hsr.softmax_attention(np.ones((1, 9, 1, 64), dtype), *piece(4096))  # threads, numpy's memory
    start = status("VmRSS")
    layers = [hsr.KVCache() for _ in range(2)]
    for layer in layers:
        for _ in range(0, tokens, 4096):
            layer.append(*piece(4096))
    for i in range(64):
        q = (rng.standard_normal((1, 9, 1, 64), dtype=np.float32) + centres[i]).astype(dtype)
        for layer in layers:
            layer.append(*piece(1))
            layer.attend(q, return_certificate=True)
    rows, codes = (sum(getattr(x, name) for x in layers) for name in ("row_nbytes", "code_nbytes"))
    print(rows, codes, status("VmHWM") - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_peak_memory_is_keys_values_codes_and_64_mib(dtype):
    """Two layers of 131,072 tokens, 3 key heads, d = 64; growing them is part of it."""
    code = [sys.executable, "-c", textwrap.dedent(DECODE), dtype, str(131_072)]
    done = subprocess.run(code, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr
    rows, codes, peak = map(int, done.stdout.split())
    assert rows >= 2 * 131_072 * 2 * 3 * 64 * (4 if dtype == "float32" else 2)
    assert codes <= (0.22 if dtype == "float32" else 0.45) * rows
    assert rows < peak < rows + codes + (64 << 20), f"{(peak - rows - codes) >> 20} MiB beside"
