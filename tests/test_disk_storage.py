"""Keys and values in files: the same answers, small in memory, errors instead of crashes."""

import gc
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import hsr_attention as hsr
from attention_cases import make

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

POLICIES = {
    "default": hsr.SoftmaxPolicy(),
    "top_r, drop": hsr.SoftmaxPolicy(top_r=16, tail="drop"),
    "exact": hsr.SoftmaxPolicy(exact=True, epsilon=1e-9),
    "relu": hsr.ReLUPolicy(threshold=0.5),
}


def both(policy, directory):
    return hsr.KVCache(policy), hsr.KVCache(policy, storage="disk", directory=directory)


def run(code, *arguments):
    """Run ``code`` in a fresh process."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )


def open_files(directory):
    """Return the files of this process in ``directory``, nameless ones too."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            found.append(os.readlink(link))
        except OSError:
            continue
    return [name for name in found if name.startswith(str(directory))]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_history_gives_the_same_bits(policy, dtype, tmp_path):
    """Append, crop, reorder, append again: bit for bit what memory gives."""
    case = make("random", n=3000, m=2, batch=2, heads=4, kv_heads=2, dtype=dtype)
    caches = both(POLICIES[policy], tmp_path)
    outputs = []
    for cache in caches:
        found = []
        for first, last in ((0, 1000), (1000, 1001), (1001, 2500)):
            cache.append(case.k[:, :, first:last], case.v[:, :, first:last])
            found.append(cache.attend(case.q))
        cache.crop(1500)
        cache.append(case.k[:, :, 2500:], case.v[:, :, 2500:])
        found.append(cache.attend(case.q))
        cache.reorder([1, 1, 0])
        found.append(cache.attend(case.q[[1, 1, 0]]))
        outputs.append(found)
    for memory, disk in zip(*outputs, strict=True):
        np.testing.assert_array_equal(memory, disk)
    for memory, disk in zip(*(cache.rows() for cache in caches), strict=True):
        np.testing.assert_array_equal(memory.bits, disk.bits)
    memory, disk = caches
    assert (memory.storage, disk.storage) == ("memory", "disk")
    assert memory.row_nbytes == disk.row_nbytes and memory.code_nbytes == disk.code_nbytes
    assert "storage='disk'" in repr(disk) and "storage" not in repr(memory)


def test_files_have_no_names_and_go_with_the_cache(tmp_path):
    case = make("random", n=200)
    _, cache = both(None, tmp_path)
    cache.append(case.k, case.v)
    assert len(open_files(tmp_path)) == 2
    assert not any(Path(tmp_path).iterdir())
    view = cache.rows()[0].bits
    del cache
    gc.collect()
    np.testing.assert_array_equal(view, case.k)  # a view keeps its file
    assert len(open_files(tmp_path)) == 1
    del view
    gc.collect()
    assert not open_files(tmp_path)


def test_views_survive_growth_crop_and_reorder(tmp_path):
    case = make("random", 5, n=3000, batch=2, heads=2, kv_heads=2)
    _, cache = both(None, tmp_path)
    cache.append(case.k[:, :, :50], case.v[:, :, :50])
    first = cache.rows()[0].bits
    for n in range(50, 3000, 10):
        cache.append(case.k[:, :, n : n + 10], case.v[:, :, n : n + 10])
    again = cache.rows()[0].bits
    cache.crop(10)
    cache.append(-case.k[:, :, :54], case.v[:, :, :54])
    cache.reorder([1])
    np.testing.assert_array_equal(first, case.k[:, :, :50])
    np.testing.assert_array_equal(again, case.k)


def test_a_forked_child_does_not_write_into_its_parents_cache(tmp_path):
    done = run(
        """
        import os, sys, numpy as np, hsr_attention as hsr
        rng = np.random.default_rng(0)
        k, v = rng.standard_normal((2, 1, 2, 500, 32), dtype=np.float32)
        cache = hsr.KVCache(storage="disk", directory=sys.argv[1])
        cache.append(k, v)
        child = os.fork()
        if child == 0:
            cache.append(-k, v)
            ok = np.array_equal(cache.rows()[0].bits, np.concatenate([k, -k], axis=2))
            os._exit(0 if ok else 3)
        status = os.waitpid(child, 0)[1]
        cache.append(k, v)
        assert np.array_equal(cache.rows()[0].bits, np.concatenate([k, k], axis=2))
        print(status)
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0"


def test_a_full_disk_is_an_error_and_loses_nothing(tmp_path):
    """A limit on the size of files stands for the full disk."""
    done = run(
        """
        import resource, sys, numpy as np, hsr_attention as hsr
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        rng = np.random.default_rng(0)
        k, v = rng.standard_normal((2, 1, 2, 1000, 32), dtype=np.float32)
        q = rng.standard_normal((1, 2, 1, 32), dtype=np.float32)
        cache = hsr.KVCache(storage="disk", directory=sys.argv[1])
        for refused in range(1000):
            before = (len(cache), cache.attend(q) if len(cache) else None)
            try:
                cache.append(k, v)
            except OSError as error:
                assert f"in directory {sys.argv[1]}" in str(error), error
                assert error.errno == 27, error  # EFBIG
                break
        assert 2 <= refused <= 5, refused
        assert len(cache) == before[0] == 1000 * refused
        assert np.array_equal(cache.attend(q), before[1])
        try:
            cache.reorder([0, 0, 0, 0])
            raise SystemExit("reorder was not refused")
        except OSError:
            pass
        assert np.array_equal(cache.attend(q), before[1])
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr


def test_directories_that_do_not_do(tmp_path):
    with pytest.raises(ValueError, match="directory must be an existing directory, got"):
        hsr.KVCache(storage="disk", directory=tmp_path / "none")
    with pytest.raises(ValueError, match='directory must be None with storage="memory"'):
        hsr.KVCache(directory=tmp_path)
    with pytest.raises(ValueError, match="storage must be one of 'memory', 'disk', got 'tape'"):
        hsr.KVCache(storage="tape")
    with pytest.raises(OSError, match="directory must be writable to hold keys and values"):
        hsr.KVCache(storage="disk", directory="/proc")
    # Gone after the check, before the first token.
    gone = tmp_path / "gone"
    gone.mkdir()
    cache = hsr.KVCache(storage="disk", directory=gone)
    gone.rmdir()
    case = make("random", n=20)
    with pytest.raises(FileNotFoundError, match=f"can be made in directory {gone}"):
        cache.append(case.k, case.v)


# Fills a cache with 3 key heads of 64 dimensions, 1,536 bytes a token in float32, piece by piece.
FILL_AND_ATTEND = """
    import hashlib, resource, sys
    import numpy as np, hsr_attention as hsr

    storage, tokens, limit = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    directory = sys.argv[4] if storage == "disk" else None

    def status(name):
        lines = open("/proc/self/status").read().splitlines()
        return 1024 * next(int(x.split()[1]) for x in lines if x.startswith(name + ":"))

    hsr.set_num_threads(2)
    cache = hsr.KVCache(storage=storage, directory=directory)
    # Threads and their stacks, which are no part of the cache.
    hsr.softmax_attention(*np.ones((3, 1, 4, 3000, 64), np.float32), epsilon=0.5, is_causal=True)
    if limit:
        resource.setrlimit(resource.RLIMIT_DATA, 2 * (status("VmData") + limit,))
    start = status("VmRSS")
    rng = np.random.default_rng(7)
    centres = 2 * rng.standard_normal((64, 64), dtype=np.float32)
    piece = 1024
    peak = 0
    for first in range(0, tokens, piece):
        k, v = rng.standard_normal((2, 1, 3, piece, 64), dtype=np.float32)
        k += centres[rng.integers(0, 64, (1, 3, piece))]
        cache.append(k, v)
        peak = max(peak, status("VmRSS"))
    digest, keys = hashlib.sha256(), 0
    for i in range(20):
        q = rng.standard_normal((1, 9, 1, 64), dtype=np.float32) + centres[i]
        cache.append(*rng.standard_normal((2, 1, 3, 1, 64), dtype=np.float32))
        out, certificate = cache.attend(q, return_certificate=True)
        digest.update(out.tobytes())
        keys += certificate.work["full_scored"]
        peak = max(peak, status("VmRSS"))
    assert keys > 20 * 9 * 16  # rows of the file were read, not the newest keys only
    print(digest.hexdigest(), cache.row_nbytes, peak - start)
"""


def test_a_cache_three_times_as_large_as_memory_decodes(tmp_path):
    """The data segment of the process may grow by a third of what keys and values take.

    The same program with everything in memory runs out of it; without a limit it gives the same
    bits. What becomes resident, mapped pages of the files included, stays below the limit as well.
    """
    tokens, limit = 128 * 4096, 256 << 20
    whole = run(FILL_AND_ATTEND, "memory", tokens, 0)
    assert whole.returncode == 0, whole.stderr
    expected, row_bytes, _ = whole.stdout.split()
    assert int(row_bytes) >= 3 * limit
    assert "MemoryError" in run(FILL_AND_ATTEND, "memory", tokens, limit).stderr
    disk = run(FILL_AND_ATTEND, "disk", tokens, limit, tmp_path)
    assert disk.returncode == 0, disk.stderr
    found, _, peak = disk.stdout.split()
    assert found == expected
    assert int(peak) < limit, f"{int(peak) >> 20} MiB became resident"
