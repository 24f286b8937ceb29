"""Time of prompt attention, half-space reporting against the dense causal paths of torch.

Nothing is timed that was not checked first: of every call that is timed, rows all over the prompt
are compared with float64. Building the index is part of our time. All paths run in one process in
alternation, on the same threads and dtype; medians are reported. A dense path that the check shows
to be far from the fastest is not timed again.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from hsr_attention import arguments
from hsr_attention.evaluation import decode_speed, output_error
from hsr_attention.evaluation.alternation import median_seconds
from hsr_attention.evaluation.capture import CapturedFile
from hsr_attention.evaluation.decode_speed import Heads
from hsr_attention.evaluation.errors import InputError
from hsr_attention.kv_cache import KVCache
from hsr_attention.policies import Policy, ReLUPolicy
from hsr_attention.prefill import attend_once

HSR = "hsr"
CHECKED = 48  # positions of a prompt whose rows, of all heads, are compared with float64
CONTENDERS = (
    1.3  # dense paths that the check shows to be slower than the fastest by this are not timed
)
ROWS_AT_ONCE = 128  # positions whose logits the chunked paths hold
KEYS_AT_ONCE = 2048  # keys of a tile that stays in the cache of the processor


def captured_heads(
    file: CapturedFile, n: int, dtype: str, layers: list[int] | None = None
) -> Iterator[Heads]:
    """Read the first ``n`` positions of captured heads, layer by layer."""
    check_captured(file, n, layers)
    return (_captured(file, layer, n, dtype) for layer in layers or file.layers)


def check_captured(file: CapturedFile, n: int, layers: list[int] | None = None) -> None:
    """Raise ``InputError`` where a file does not hold a whole prompt of ``n`` positions."""
    if n > file.n:
        raise InputError(f"{file.path} holds {file.n} positions, got n = {n}: capture more")
    if file.positions < file.n:
        raise InputError(
            f"{file.path} holds the queries of the last {file.positions} of {file.n} positions; a "
            f"prompt needs those of all: hsr capture --queries {file.n}"
        )
    unknown = sorted(set(layers or []) - set(file.layers))
    if unknown:
        raise InputError(f"{file.path} holds layers {file.layers}, got {unknown}")


def _captured(file: CapturedFile, layer: int, n: int, dtype: str) -> Heads:
    import torch

    q, k, v = (x[None, :, :n].to(getattr(torch, dtype)).contiguous() for x in file.layer(layer))
    return Heads(str(layer), q, k, v, file.scale(q.shape[3]))


def limits(heads: Heads, policy: Policy) -> Any:
    """Return the thresholds of a ReLU policy for every query, float64 [heads, n]; None without."""
    if not isinstance(policy, ReLUPolicy):
        return None
    cache = KVCache(policy)
    cache.append(heads.k, heads.v)
    n = len(cache)
    visible = np.arange(1, n + 1)
    found = cache._thresholds(arguments.heads("q", heads.q), heads.scale, visible, None, n)
    return found.reshape(heads.q.shape[1:3])  # type: ignore[union-attr]


def dense_paths(heads: Heads, policy: Policy, b: Any = None) -> dict[str, Callable[[], Any]]:
    """Return the dense causal paths of torch for these heads: functions that give [1, heads, n, d].

    ``b`` [heads, n] are the thresholds of a ReLU policy.
    """
    return _dense_softmax(heads) if b is None else _dense_relu(heads, b, policy.power)  # type: ignore[union-attr]


def _dense_softmax(heads: Heads) -> dict[str, Callable[[], Any]]:
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    q, k, v, scale, group = heads.q, heads.k, heads.v, heads.scale, heads.group

    def repeated() -> Any:
        many = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (k, v))
        return sdpa(q, *many, is_causal=True, scale=scale)

    def grouped() -> Any:
        return sdpa(q, k, v, is_causal=True, scale=scale, enable_gqa=True)

    def chunked() -> Any:
        packed, out = _packed(q, k.shape[1]), torch.empty_like(_packed(q, k.shape[1], v.shape[3]))
        for start, end, hidden in _chunks(q.shape[2]):
            logits = _logits(packed, k, start, end, 0, end, scale)
            logits[..., start:end].masked_fill_(hidden, -torch.inf)
            weights = torch.softmax(logits.flatten(1, 2), dim=-1)
            out[:, :, start:end] = torch.bmm(weights, v[0, :, :end]).view(*logits.shape[:3], -1)
        return out.flatten(0, 1)[None]

    return {
        "sdpa (keys repeated)": repeated,
        "sdpa (enable_gqa)": grouped,
        "matmul (chunks)": chunked,
    }


def _dense_relu(heads: Heads, b: Any, power: int) -> dict[str, Callable[[], Any]]:
    import torch

    q, k, v, scale = heads.q, heads.k, heads.v, heads.scale
    kv_heads, n, value_dim = k.shape[1], q.shape[2], v.shape[3]
    limit = torch.tensor(b).to(q.dtype).view(kv_heads, heads.group, n, 1)

    def weights(packed: Any, start: int, end: int, first: int, last: int) -> Any:
        logits = _logits(packed, k, start, end, first, last, scale)
        found = logits.sub_(limit[:, :, start:end]).relu_()
        return found.pow_(power) if power > 1 else found

    def answer(total: Any, mass: Any) -> Any:
        return total / torch.where(mass > 0, mass, 1.0)

    def chunked() -> Any:
        packed, out = _packed(q, kv_heads), torch.empty_like(_packed(q, kv_heads, value_dim))
        for start, end, hidden in _chunks(n):
            w = weights(packed, start, end, 0, end)
            w[..., start:end].masked_fill_(hidden, 0.0)
            total = torch.bmm(w.flatten(1, 2), v[0, :, :end]).view(*w.shape[:3], -1)
            out[:, :, start:end] = answer(total, w.sum(-1, keepdim=True, dtype=torch.float32))
        return out.flatten(0, 1)[None]

    def tiled() -> Any:  # the weights of a tile never leave the cache of the processor
        packed, out = _packed(q, kv_heads), torch.empty_like(_packed(q, kv_heads, value_dim))
        for start, end, hidden in _chunks(n):
            shape = (kv_heads, heads.group, end - start)
            total, mass = torch.zeros(*shape, value_dim), torch.zeros(*shape, 1)
            for first in range(0, end, KEYS_AT_ONCE):
                last = min(first + KEYS_AT_ONCE, end)
                w = weights(packed, start, end, first, last)
                if last > start:
                    own = max(start, first)
                    w[..., own - first :].masked_fill_(hidden[:, own - start : last - start], 0.0)
                total += torch.bmm(w.flatten(1, 2), v[0, :, first:last]).view(total.shape)
                mass += w.sum(-1, keepdim=True, dtype=torch.float32)
            out[:, :, start:end] = answer(total, mass)
        return out.flatten(0, 1)[None]

    return {"matmul (chunks)": chunked, "matmul (tiles)": tiled}


def _packed(q: Any, kv_heads: int, dim: int | None = None) -> Any:
    """Return q [kv_heads, group, n, d]; with ``dim`` a view of that shape but the last dimension."""
    _, heads, n, d = q.shape
    shape = (kv_heads, heads // kv_heads, n)
    return q[0].view(*shape, d) if dim is None else q.new_empty(1).expand(*shape, dim)


def _logits(packed: Any, k: Any, start: int, end: int, first: int, last: int, scale: float) -> Any:
    """Return logits [kv_heads, group, end - start, last - first]."""
    import torch

    rows = packed[:, :, start:end] * scale
    logits = torch.bmm(rows.flatten(1, 2), k[0, :, first:last].transpose(1, 2))
    return logits.view(*rows.shape[:3], last - first)


def _chunks(n: int) -> Iterator[tuple[int, int, Any]]:
    """Yield start, end, and what [end - start, end - start] is hidden on the diagonal."""
    import torch

    for start in range(0, n, ROWS_AT_ONCE):
        end = min(start + ROWS_AT_ONCE, n)
        yield start, end, torch.ones(end - start, end - start, dtype=torch.bool).triu(1)


def exact_rows(heads: Heads, positions: Any, b: Any = None, power: int = 1) -> Any:
    """Causal attention at some positions in float64, [heads, positions, d_v].

    ``b`` [heads, n]: ReLU^power at these thresholds; without, softmax.
    """
    q, k, v = (x[0].double().numpy() for x in (heads.q, heads.k, heads.v))
    outputs = []
    for h in range(q.shape[0]):
        logits = heads.scale * q[h, positions] @ k[h // heads.group].T
        seen = np.arange(k.shape[1]) <= np.asarray(positions)[:, None]
        if b is None:
            logits = np.where(seen, logits, -np.inf)
            weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        else:
            weights = np.where(seen, np.maximum(logits - b[h, positions, None], 0.0), 0.0)
            largest = weights.max(axis=1, keepdims=True)
            weights = (weights / np.where(largest > 0, largest, 1.0)) ** power
        mass = weights.sum(axis=1, keepdims=True)
        outputs.append(weights @ v[h // heads.group] / np.where(mass > 0, mass, 1.0))
    return np.stack(outputs)


def measure(
    heads: Heads,
    policy: Policy,
    rounds: int = 5,
    on_step: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Check one layer, then time it; return its row. ``rounds + 2`` steps are announced."""
    import torch

    def attend() -> Any:
        return attend_once(policy, heads.q, heads.k, heads.v, heads.scale, True, None, False)[0]

    with torch.inference_mode():
        on_step("check")
        b = limits(heads, policy)
        paths = dense_paths(heads, policy, b)
        row, first = _check(heads, policy, attend, paths, b)
        for (
            name,
            path,
        ) in paths.items():  # the first run of a path makes what torch keeps for later
            if first[name] > CONTENDERS * min(first.values()):
                first[name] = min(first[name], _seconds(path))
        kept = {x: paths[x] for x in paths if first[x] <= CONTENDERS * min(first.values())}
        calls = {
            HSR: attend,
            "append": lambda: _append(heads, policy),
            **kept,
            "scores": lambda: _score(heads),
        }
        seconds = median_seconds(calls, rounds, lambda: on_step("time"))
    dense = {name: seconds.get(name, first[name]) for name in paths}
    return row | _finish(heads, row, seconds, dense, sorted(set(paths) - set(kept)))


def _append(heads: Heads, policy: Policy) -> KVCache:
    cache = KVCache(policy)
    cache.append(heads.k, heads.v)
    return cache


def _score(heads: Heads) -> Any:
    """Build the index and score every visible pair, keeping none: a threshold nothing reaches."""
    nothing = ReLUPolicy(threshold=np.inf)
    return attend_once(nothing, heads.q, heads.k, heads.v, heads.scale, True, None, False)


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _check(
    heads: Heads, policy: Policy, attend: Callable[[], Any], paths: dict[str, Any], b: Any
) -> tuple[dict[str, Any], dict[str, float]]:
    """Compare every call with float64; return facts, and the time of a run of each dense path."""
    n = heads.q.shape[2]
    positions = np.unique(np.linspace(0, n - 1, min(n, CHECKED)).round().astype(int))
    exact = exact_rows(heads, positions, b, getattr(policy, "power", 1))
    out, certificate = attend_once(
        policy, heads.q, heads.k, heads.v, heads.scale, True, None, certify=True
    )
    assert certificate is not None
    if not bool((out == attend()).all()):
        raise RuntimeError("the answers with and without a certificate differ")
    rows = out[0, :, positions].double().numpy()
    bound, omitted = (
        x[0][:, positions] for x in (certificate.error_bound, certificate.omitted_mass)
    )
    error = output_error.relative_error(rows, exact)
    certified = bool(np.isfinite(bound).all())
    dense, first = {}, {}
    for name, path in paths.items():
        start = time.perf_counter()
        found = path()
        first[name] = time.perf_counter() - start
        found = found[0, :, positions].double().numpy()
        dense[name] = float(output_error.relative_error(found, exact).mean())
        if dense[name] > 0.1:
            raise RuntimeError(f"{name} is off by {dense[name]:.2g} of the output")
    visible = np.arange(1, n + 1, dtype=np.float64)
    work = dict(certificate.work)
    row = {
        "n": n,
        "layer": heads.name,
        "rows_checked": int(bound.size),
        "violations": int((output_error.largest_error(rows, exact) > bound).sum())
        if certified
        else None,
        "relative_error_mean": float(error.mean()),
        "relative_error_max": float(error.max()),
        "error_bound_median": float(np.median(bound)) if certified else None,
        "omitted_mass_max": float(omitted.max()) if certified else None,
        "dense_relative_error": dense,
        "density": float((certificate.density[0] * visible).sum(axis=1).mean() / visible.sum()),
        "skipped_share": work["skipped"] / work["sketch_scored"]
        if work["panels"] and work["sketch_scored"]
        else None,
        "work": work,
    }
    return row, first


def _finish(
    heads: Heads,
    row: dict[str, Any],
    seconds: dict[str, float],
    dense: dict[str, float],
    timed_once: list[str],
) -> dict[str, Any]:
    fastest = min((name for name in dense if name in seconds), key=lambda name: seconds[name])
    operations = 2.0 * heads.q.shape[3] * row["work"]["sketch_scored"]
    peak = integer_dot_peak()
    scores = max(seconds["scores"] - seconds["append"], 1e-9)
    return {
        "hsr_ms": 1e3 * seconds[HSR],
        "dense_ms": {name: 1e3 * s for name, s in dense.items()},
        "timed_once": timed_once,
        "fastest_dense": fastest,
        "speedup": seconds[fastest] / seconds[HSR],
        "append_ms": 1e3 * seconds["append"],
        "scores_ms": 1e3 * scores,
        "integer_peak_gops": peak / 1e9,
        "integer_peak_share": operations / seconds[HSR] / peak,
        "integer_peak_share_of_scores": operations / scores / peak,
    }


def integer_dot_peak(n: int = 1024, seconds: float = 0.2) -> float:
    """Return 8-bit operations (multiplications and additions) a second of this machine.

    The best of the products of int8 matrices that torch ends within ``seconds``: what a tuned library
    reaches here, not the number of a data sheet.
    """
    multiply = _integer_product(n)
    end = time.perf_counter() + seconds
    best = _seconds(multiply)
    while time.perf_counter() < end:
        best = min(best, _seconds(multiply))
    return 2.0 * n**3 / best


def _integer_product(n: int) -> Callable[[], Any]:
    """Return a product of two matrices [n, n] of 8 bits: oneDNN's, which is fast without VNNI too."""
    import torch

    weight = torch.ones(n, n, dtype=torch.int8)
    if not torch.backends.mkldnn.is_available():
        return lambda: torch.ops.aten._int_mm(weight, weight)
    onednn, x = torch.ops.onednn, torch.ones(n, n, dtype=torch.uint8)
    packed = onednn.qlinear_prepack(weight, [n, n])
    scales, zeros = torch.ones(n), torch.zeros(n, dtype=torch.int32)
    plain = (
        None,
        1.0,
        0,
        torch.float32,
        "none",
        [],
        "",
    )  # no bias, no scale, nothing after the sums
    return lambda: onednn.qlinear_pointwise(x, 1.0, 0, packed, scales, zeros, *plain)


def total(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Sum the layers of one n."""
    hsr = sum(row["hsr_ms"] for row in rows)
    dense = sum(row["dense_ms"][row["fastest_dense"]] for row in rows)
    broken = [row["violations"] for row in rows if row["violations"] is not None]
    skipped = [row["skipped_share"] for row in rows if row["skipped_share"] is not None]
    return {
        "n": rows[0]["n"],
        "hsr_ms": hsr,
        "fastest_dense_ms": dense,
        "speedup": dense / hsr,
        "speedup_smallest": min(row["speedup"] for row in rows),
        "append_ms": sum(row["append_ms"] for row in rows),
        "scores_ms": sum(row["scores_ms"] for row in rows),
        "density": statistics.fmean(row["density"] for row in rows),
        "skipped_share": statistics.fmean(skipped) if skipped else None,
        "relative_error_mean": statistics.fmean(row["relative_error_mean"] for row in rows),
        "dense_relative_error_mean": statistics.fmean(
            row["dense_relative_error"][row["fastest_dense"]] for row in rows
        ),
        "rows_checked": sum(row["rows_checked"] for row in rows),
        "violations": sum(broken) if broken else None,
        "integer_peak_share": statistics.fmean(row["integer_peak_share"] for row in rows),
        "integer_peak_share_of_scores": statistics.fmean(
            row["integer_peak_share_of_scores"] for row in rows
        ),
    }


def synthetic_heads(
    heads: int, kv_heads: int, head_dim: int, n: int, dtype: str, layers: int = 2, seed: int = 0
) -> Iterator[Heads]:
    """Make whole prompts up, as ``decode_speed.synthetic_heads``."""
    return iter(
        decode_speed.synthetic_heads(heads, kv_heads, head_dim, n, dtype, layers, seed, queries=n)
    )
