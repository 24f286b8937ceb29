"""One cache and one index used from several threads at once: answers stay right, nothing crashes."""

import threading

import numpy as np

import hsr_attention as hsr


def test_readers_and_writers_of_one_cache_and_one_index():
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, 1, 2, 500, 32), dtype=np.float32)
    q = rng.standard_normal((1, 4, 1, 32), dtype=np.float32)
    cache, index = hsr.KVCache(), hsr.SketchIndex(k[0, 0])
    cache.append(k, v)
    stop, failures = threading.Event(), []

    def write():
        for _ in range(150):
            cache.append(k[:, :, :37], v[:, :, :37])
            index.append(k[0, 0, :41])
            if len(cache) > 3000:
                cache.crop(400)
        stop.set()

    def read():
        while not stop.is_set():
            out = cache.attend(q)
            found = index.report(q[0, :, 0], 8.0)
            if not np.isfinite(out).all() or (found.scores < 8.0).any():
                failures.append("wrong answer")
            cache.rows()[0].bits[0, 0, :16].sum()

    threads = [threading.Thread(target=f) for f in (write, read, read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not failures
    assert stop.is_set()
