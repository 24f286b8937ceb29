"""Threads, processes, the environment's settings."""

import os
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

import hsr_attention as hsr
from hsr_attention import _native


def run(code, **environment):
    """Run ``code`` in a fresh process."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


USE = """
    import numpy as np, hsr_attention as hsr
    index = hsr.FlatIndex(np.eye(40, dtype=np.float32))
    print(index.count(np.eye(40, dtype=np.float32), 1.0).sum(), hsr.info()["isa"],
          hsr.info()["num_threads"])
"""


@pytest.mark.parametrize("level", _native.isa_available())
def test_hsr_isa_forces_a_level(level):
    done = run(USE, HSR_ISA=level)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:2] == ["40", level]


def test_an_unknown_level_is_an_error():
    done = run(USE, HSR_ISA="avx3")
    assert done.returncode != 0
    assert "unknown isa 'avx3'; expected one of scalar" in done.stderr
    with pytest.raises(ValueError, match="unknown isa 'avx3'; expected one of scalar"):
        _native.use_isa("avx3")
    assert _native.isa_in_use() in _native.isa_available()


def test_an_unsupported_level_is_an_error():
    missing = {"scalar", "avx2", "avxvnni", "avx512"} - set(_native.isa_available())
    if not missing:
        pytest.skip("this machine has every level")
    done = run(USE, HSR_ISA=missing.pop())
    assert done.returncode != 0 and "isa" in done.stderr


def test_the_best_level_is_the_default():
    done = run(USE, HSR_ISA="")
    assert done.stdout.split()[1] == _native.isa_available()[-1]


@pytest.mark.parametrize("count", [1, 3, 16])
def test_hsr_num_threads(count):
    done = run(USE, HSR_NUM_THREADS=str(count))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[::2] == ["40", str(count)]


@pytest.mark.parametrize("value", ["0", "-2", "many", "1.5", "100000"])
def test_bad_hsr_num_threads(value):
    done = run(USE, HSR_NUM_THREADS=value)
    assert done.returncode != 0
    assert f"HSR_NUM_THREADS must be an integer in [1, 1024], got '{value}'" in done.stderr


@pytest.mark.parametrize(
    "count, error, message",
    [
        (0, ValueError, "count must be >= 1, got 0"),
        (-1, ValueError, "count must be >= 1, got -1"),
        (2.0, TypeError, "count must be an integer, got 2.0"),
        (2000, ValueError, "count must be <= 1024, got 2000"),
        (2**40, ValueError, "count must be <= 1024, got 1099511627776"),
        ("2", TypeError, "count must be an integer, got '2'"),
    ],
)
def test_bad_set_num_threads(count, error, message):
    with pytest.raises(error, match=message):
        hsr.set_num_threads(count)


def test_fork_after_use():
    """A child has no worker threads; it starts its own."""
    done = run(
        """
        import os, numpy as np, hsr_attention as hsr
        hsr.set_num_threads(4)
        rng = np.random.default_rng(0)
        q = rng.standard_normal((1, 4, 2, 32), dtype=np.float32)
        k, v = rng.standard_normal((2, 1, 2, 6000, 32), dtype=np.float32)
        expected = hsr.softmax_attention(q, k, v)
        child = os.fork()
        if child == 0:
            ok = np.array_equal(expected, hsr.softmax_attention(q, k, v))
            os._exit(0 if ok else 3)
        assert np.array_equal(expected, hsr.softmax_attention(q, k, v))
        print(os.waitpid(child, 0)[1])
        """
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0"


def test_calls_from_several_threads():
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((3000, 32), dtype=np.float32)
    q = rng.standard_normal((1, 4, 3, 32), dtype=np.float32)
    k, v = rng.standard_normal((2, 1, 2, 3000, 32), dtype=np.float32)
    index = hsr.SketchIndex(keys)
    expected = index.report(keys[:20], 8.0).indices
    answer = hsr.softmax_attention(q, k, v)
    wrong = []

    def work():
        try:
            for _ in range(10):
                if not np.array_equal(index.report(keys[:20], 8.0).indices, expected):
                    wrong.append("report")
                if not np.array_equal(hsr.softmax_attention(q, k, v), answer):
                    wrong.append("attention")
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_gil_is_released():
    """Python goes on while a long native call runs."""
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((60_000, 64), dtype=np.float32)
    index = hsr.FlatIndex(keys)
    queries = keys[:600]
    ticks, done = [], threading.Event()

    def tick():
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    other = threading.Thread(target=tick)
    other.start()
    start = time.perf_counter()
    index.count(queries, 30.0)
    end = time.perf_counter()
    done.set()
    other.join()
    inside = [t for t in ticks if start < t < end]
    assert len(inside) >= 3, f"{len(inside)} ticks in {end - start:.3f} s"


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_a_query_that_cannot_be_prepared_ends_the_call_and_nobody_waits_for_it(threads):
    rng = np.random.default_rng(0)
    keys, values = rng.standard_normal((2, 1, 8, 3000, 32), dtype=np.float32)
    keys[0, 5, 100] *= 1e20
    cache = hsr.KVCache()
    cache.append(keys, values)
    before = _native.num_threads()
    _native.set_num_threads(threads)
    try:
        q = rng.standard_normal((1, 8, 1, 32), dtype=np.float32)
        expected = cache.attend(q)
        q[0, 5] *= 1e20
        for _ in range(20):
            with pytest.raises(ValueError, match=r"must be below 1e30, got [0-9.]+e\+4"):
                cache.attend(q)
        q[0, 5] /= 1e20
        np.testing.assert_allclose(cache.attend(q), expected, rtol=1e-5, atol=1e-5)
    finally:
        _native.set_num_threads(before)
