"""Time of decoding attention, half-space reporting against every dense path of torch.

Nothing is timed that was not checked first: the very calls that are timed are compared with
float64. All paths run in one process in alternation, on the same threads and dtype; a pass of a
path goes through all layers in turn, as decoding a token does, so that no layer finds its keys in
the cache of the processor because it has just been asked. Medians are reported.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hsr_attention.evaluation import output_error
from hsr_attention.evaluation.capture import CapturedFile
from hsr_attention.evaluation.errors import InputError
from hsr_attention.kv_cache import KVCache
from hsr_attention.policies import SoftmaxPolicy

QUERIES = 8  # single-token queries that are checked and timed, the last positions of the capture


@dataclass(frozen=True)
class Heads:
    """One layer: q [1, heads, positions, d], k and v [1, kv_heads, n, d], torch of one dtype."""

    name: str
    q: Any
    k: Any
    v: Any
    scale: float

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.q.shape[1] // self.k.shape[1]


def captured_heads(
    files: list[CapturedFile], n: int, dtype: str, tile: bool, layers: list[int] | None = None
) -> list[Heads]:
    """Read heads from files: the newest ``n`` keys, or with ``tile`` all keys over and over.

    The keys of several files, of one model, stand one after another; queries are the last file's.
    """
    import torch

    have = sum(file.n for file in files)
    names = ", ".join(str(file.path) for file in files)
    if n > have and not tile:
        raise InputError(
            f"{names} holds {have} keys, got n = {n}: capture more (several --keys stand one "
            "after another), or repeat them by --tile"
        )
    last = files[-1]
    for file in files:
        unknown = sorted(set(layers or last.layers) - set(file.layers))
        if unknown:
            raise InputError(f"{file.path} holds layers {file.layers}, got {unknown}")
    result = []
    for layer in layers or last.layers:
        parts = [file.layer(layer) for file in files]
        shapes = {(q.shape[0], k.shape[0], k.shape[2]) for q, k, _ in parts}
        if len(shapes) > 1:
            raise InputError(f"{names} must hold heads of one model, got shapes {sorted(shapes)}")
        q = parts[-1][0][:, -QUERIES:]
        k, v = (_newest(torch.cat([part[i] for part in parts], dim=1), n) for i in (1, 2))
        q, k, v = (x.to(getattr(torch, dtype))[None].contiguous() for x in (q, k, v))
        result.append(Heads(str(layer), q, k, v, last.scale(q.shape[3])))
    return result


def _newest(x: Any, n: int) -> Any:
    have = x.shape[1]
    return x[:, have - n :] if n <= have else x.repeat(1, -(-n // have), 1)[:, -n:]


def synthetic_heads(
    heads: int,
    kv_heads: int,
    head_dim: int,
    n: int,
    dtype: str,
    layers: int = 4,
    seed: int = 0,
    queries: int = QUERIES,
) -> list[Heads]:
    """Make heads up: keys around 64 centres, queries that lean towards a few of them."""
    import torch

    made = []
    for layer in range(layers):
        rng = np.random.default_rng([seed, layer])
        centres = rng.standard_normal((kv_heads, 64, head_dim))
        which = rng.integers(0, 64, (kv_heads, n))
        k = np.take_along_axis(centres, which[..., None], axis=1)
        k = k + 0.7 * rng.standard_normal((kv_heads, n, head_dim))
        v = rng.standard_normal((kv_heads, n, head_dim))
        near = rng.integers(0, 64, (heads, queries))
        group = heads // kv_heads
        q = np.stack([centres[h // group, near[h]] for h in range(heads)])
        q = 0.6 * q + rng.standard_normal((heads, queries, head_dim))
        kind = getattr(torch, dtype)
        q, k, v = (torch.tensor(x[None], dtype=kind) for x in (q, k, v))
        made.append(Heads(f"synthetic {layer}", q, k, v, head_dim**-0.5))
    return made


def dense_paths(heads: Heads) -> dict[str, Callable[[Any], Any]]:
    """Return every dense path of torch over these keys: a function of q [1, heads, 1, d]."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    k, v, scale = heads.k, heads.v, heads.scale
    kv_heads, group = k.shape[1], heads.group
    shape = (1, kv_heads, group, k.shape[3])

    def unpack(out: Any) -> Any:
        return out.reshape(1, kv_heads * group, 1, v.shape[3])

    def repeated(q: Any) -> Any:  # what sdpa asks for without enable_gqa
        many = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (k, v))
        return sdpa(q, *many, scale=scale)

    def grouped(q: Any) -> Any:
        return sdpa(q, k, v, scale=scale, enable_gqa=True)

    def packed(q: Any) -> Any:
        return unpack(sdpa(q.view(shape), k, v, scale=scale))

    def matmul(q: Any) -> Any:
        logits = torch.matmul(q.view(shape), k.transpose(-1, -2)) * scale
        return unpack(torch.matmul(torch.softmax(logits, dim=-1), v))

    return {
        "sdpa (keys repeated)": repeated,
        "sdpa (enable_gqa)": grouped,
        "sdpa (packed queries)": packed,
        "matmul (packed queries)": matmul,
    }


@dataclass
class _Layer:
    heads: Heads
    cache: KVCache
    queries: list[Any]
    paths: dict[str, Callable[[Any], Any]]
    row: dict[str, Any]


HSR = "hsr"
CERTIFIED = "hsr, with certificate"
OURS = (HSR, CERTIFIED)


def measure(
    layers: list[Heads],
    policy: SoftmaxPolicy,
    rounds: int = 15,
    on_step: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Check, then time; return a row for every layer and the sums over them."""
    import torch

    with torch.inference_mode():
        ready = []
        for heads in layers:
            on_step("check")
            ready.append(_prepare(heads, policy))
        _time(ready, rounds, on_step)
        for layer in ready:
            layer.row["append_us"] = 1e6 * append_seconds(
                layer.cache, layer.heads.k, layer.heads.v
            )
    bandwidth = memory_bandwidth()
    rows = [_finish(layer, bandwidth) for layer in ready]
    return {"layers": rows, "total": _total(rows), "memory_bandwidth_gb_s": bandwidth / 1e9}


def _prepare(heads: Heads, policy: SoftmaxPolicy) -> _Layer:
    cache = KVCache(policy)
    start = time.perf_counter()
    cache.append(heads.k, heads.v)
    build = time.perf_counter() - start
    queries = [heads.q[:, :, i : i + 1].contiguous() for i in range(heads.q.shape[2])]

    def attend(q: Any) -> Any:
        return cache.attend(q, heads.scale)

    def certified(q: Any) -> Any:
        return cache.attend(q, heads.scale, return_certificate=True)

    # Ours stand apart, so that neither finds the codes in the cache because the other just read them.
    dense = dense_paths(heads)
    first = next(iter(dense))
    paths = {HSR: attend, first: dense.pop(first), CERTIFIED: certified, **dense}
    row = {"layer": heads.name, "build_ms": 1e3 * build, **_check(heads, queries, paths, cache)}
    return _Layer(heads, cache, queries, paths, row)


def _check(
    heads: Heads, queries: list[Any], paths: dict[str, Any], cache: KVCache
) -> dict[str, Any]:
    q, k, v = (x[0].double().numpy() for x in (heads.q, heads.k, heads.v))
    exact = output_error.exact_attention(q, k, v, heads.scale)  # [heads, QUERIES, d_v]
    certificates, outputs = [], []
    for query in queries:
        out, certificate = paths[CERTIFIED](query)
        if not np.array_equal(out.double().numpy(), paths[HSR](query).double().numpy()):
            raise RuntimeError("the answers with and without a certificate differ")
        outputs.append(out[0, :, 0].double().numpy())
        certificates.append(certificate)
    out = np.stack(outputs, axis=1)
    bound = np.stack([c.error_bound[0, :, 0] for c in certificates], axis=1)
    omitted = np.stack([c.omitted_mass[0, :, 0] for c in certificates])
    error = output_error.relative_error(out, exact)
    work = {name: sum(c.work[name] for c in certificates) for name in certificates[0].work}
    work = {name: count / len(queries) for name, count in work.items()}
    certified = bool(np.isfinite(bound).all())
    return {
        "n": heads.k.shape[2],
        "rows_checked": int(bound.size),
        "violations": int((output_error.largest_error(out, exact) > bound).sum())
        if certified
        else None,
        "relative_error_mean": float(error.mean()),
        "relative_error_max": float(error.max()),
        "error_bound_median": float(np.median(bound)) if certified else None,
        "error_bound_max": float(bound.max()) if certified else None,
        "omitted_mass_median": float(np.median(omitted)) if certified else None,
        "values_largest": float(np.abs(v).max()),
        "density": float(np.mean([c.density.mean() for c in certificates])),
        "work": work,
        "dense_relative_error": {
            name: _dense_error(path, queries, exact)
            for name, path in paths.items()
            if name not in OURS
        },
        "bytes_hsr": bytes_read(work, heads),
        "bytes_dense": sum(x.numel() * x.element_size() for x in (heads.k, heads.v)),
        "code_bytes": cache.code_nbytes,
    }


def _dense_error(path: Any, queries: list[Any], exact: Any) -> float:
    out = np.stack([path(q)[0, :, 0].double().numpy() for q in queries], axis=1)
    return float(output_error.relative_error(out, exact).mean())


def bytes_read(work: dict[str, float], heads: Heads) -> float:
    """Return the bytes one call reads, from its work counters.

    A 4-bit plane of a key has d/2 bytes and 2 to 4 of parameters; queries that share a key head
    read it once. Rows and value codes are counted for each query that keeps the key, so keys that
    several queries keep are counted more than once: the result is an upper estimate.
    """
    d, d_v, size = heads.k.shape[3], heads.v.shape[3], heads.k.element_size()
    planes = work["sketch_scored"] * (d / 2 + 4) + work["refined"] * (d / 2 + 2)
    rows = work["full_scored"] * (d + d_v) * size
    return planes / heads.group + rows + work["sketched"] * (d_v / 2 + d_v / 8)


def _time(layers: list[_Layer], rounds: int, on_step: Callable[[str], None]) -> None:
    names = list(layers[0].paths)
    for layer in layers:
        layer.row["seconds"] = {name: [] for name in names}
    for i in range(rounds + 1):  # round 0 warms up
        on_step("time")
        first = i % len(names)
        for name in names[first:] + names[:first]:
            for layer in layers:
                query, path = layer.queries[i % len(layer.queries)], layer.paths[name]
                start = time.perf_counter()
                path(query)
                seconds = time.perf_counter() - start
                if i:
                    layer.row["seconds"][name].append(seconds)


def _finish(layer: _Layer, bandwidth: float) -> dict[str, Any]:
    row = layer.row
    seconds = {name: statistics.median(s) for name, s in row.pop("seconds").items()}
    fastest = min((name for name in seconds if name not in OURS), key=lambda name: seconds[name])
    return row | {
        "hsr_ms": 1e3 * seconds[HSR],
        "certified_ms": 1e3 * seconds[CERTIFIED],
        "dense_ms": {name: 1e3 * s for name, s in seconds.items() if name not in OURS},
        "fastest_dense": fastest,
        "speedup": seconds[fastest] / seconds[HSR],
        "bandwidth_share_hsr": row["bytes_hsr"] / seconds[HSR] / bandwidth,
        "bandwidth_share_dense": row["bytes_dense"] / seconds[fastest] / bandwidth,
    }


def _total(rows: list[dict[str, Any]]) -> dict[str, Any]:
    hsr = sum(row["hsr_ms"] for row in rows)
    dense = sum(row["dense_ms"][row["fastest_dense"]] for row in rows)
    violations = [row["violations"] for row in rows if row["violations"] is not None]
    return {
        "hsr_ms": hsr,
        "certified_ms": sum(row["certified_ms"] for row in rows),
        "fastest_dense_ms": dense,
        "speedup": dense / hsr,
        "speedup_smallest": min(row["speedup"] for row in rows),
        "rows_checked": sum(row["rows_checked"] for row in rows),
        "violations": sum(violations) if violations else None,
        "relative_error_mean": statistics.fmean(row["relative_error_mean"] for row in rows),
        "dense_relative_error_mean": statistics.fmean(
            row["dense_relative_error"][row["fastest_dense"]] for row in rows
        ),
        "density": statistics.fmean(row["density"] for row in rows),
        "bytes_hsr": sum(row["bytes_hsr"] for row in rows),
        "bytes_dense": sum(row["bytes_dense"] for row in rows),
        "append_us": statistics.fmean(row["append_us"] for row in rows),
    }


def append_seconds(cache: KVCache, k: Any, v: Any, tokens: int = 256, repeats: int = 3) -> float:
    """Return the time of appending one token: the mean over ``tokens``, the median of ``repeats``.

    Every 16th token closes a block of codes and costs more, so the mean is what decoding pays. The
    cache is cropped back.
    """
    n = len(cache)
    newest = [x[:, :, -1:].contiguous() for x in (k, v)]
    means = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(tokens):
            cache.append(*newest)
        means.append((time.perf_counter() - start) / tokens)
        cache.crop(n)
    return statistics.median(means)


def append_by_length(
    lengths: list[int], kv_heads: int, head_dim: int, dtype: str, seed: int = 0
) -> dict[int, float]:
    """Return the time of appending one token behind each number of random keys."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    kind = getattr(torch, dtype)
    caches = {}
    for n in lengths:
        k, v = (torch.randn(1, kv_heads, n, head_dim, generator=generator).to(kind) for _ in "kv")
        cache = KVCache(SoftmaxPolicy())
        cache.append(k, v)
        caches[n] = (cache, k, v)
    seconds: dict[int, list[float]] = {n: [] for n in caches}
    for _ in range(5):  # alternating, so that a busy moment does not fall on one of them only
        for n, (cache, k, v) in caches.items():
            seconds[n].append(append_seconds(cache, k, v, repeats=1))
    return {n: statistics.median(s) for n, s in seconds.items()}


def memory_bandwidth(megabytes: int = 256) -> float:
    """Return bytes a second when reading memory in order, on torch's threads."""
    import torch

    x = torch.ones(megabytes * 1_000_000 // 4)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        x.sum()
        seconds.append(time.perf_counter() - start)
    return x.numel() * x.element_size() / min(seconds[1:])
