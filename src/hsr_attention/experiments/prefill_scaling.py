"""Time of a ReLU prompt against n, the index built inside the call: exponents, a plot.

Theory (paper, Theorem 5.1; Algorithm 3): a causal prompt of n queries at a threshold that n^(4/5)
keys reach costs n^(2 - 1/floor(d/2)) + n^(9/5), where dense attention costs n^2. In few dimensions
geometry is inside (convex layers, partition trees); from d = 9 on a scan of codes, which is n^2
with a small constant. Every row is first compared with float64.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hsr_attention import _native
from hsr_attention.attention.relu import relu_attention
from hsr_attention.evaluation import output_error, prefill_speed
from hsr_attention.evaluation.decode_speed import Heads
from hsr_attention.evaluation.environment import native_machine
from hsr_attention.experiments import growth
from hsr_attention.indexes.choose import LARGEST_TREE_DIM, choose
from hsr_attention.policies import ReLUPolicy
from hsr_attention.thresholds import Gaussian

DIMS = (2, 3, 4, 8, 64)
SIZES = (1000, 2000, 4000, 8000, 16000)
CODES = "codes"  # what stands inside where no structure does
INDEXES = ("structure", "auto")
REPEATS = 3
LARGEST_ERROR = 1e-5  # of an output of Gaussian values, from float32 sums


@dataclass(frozen=True)
class Row:
    """One prompt of n positions and one head; seconds are medians of whole calls."""

    d: int
    n: int
    index: str
    kept: float  # keys a query attends to, mean
    density: float  # of the visible pairs
    error: float  # largest |out - exact| of the rows that were checked
    seconds: float
    dense_seconds: float  # torch, causal by chunks

    @property
    def speedup(self) -> float:
        """Dense time over ours."""
        return self.dense_seconds / self.seconds


@dataclass(frozen=True)
class Fit:
    """Growth ~ n^exponent over all sizes, with the 95 % confidence interval.

    ``last`` is the exponent between the two largest sizes: what is linear in n weighs less there.
    """

    d: int
    index: str
    quantity: str
    exponent: float
    low: float
    high: float
    last: float
    theory: float


def theory(d: int) -> float:
    """Return the exponent of a prompt: the larger of 2 - 1/floor(d/2) and 9/5."""
    return max(2.0 - 1.0 / max(1, d // 2), 1.8)


def index_of(d: int, n: int, index: str = "structure") -> str:
    """Return what answers at this dimension; ``auto`` compares it with a scan for this n."""
    if d > LARGEST_TREE_DIM:
        return CODES
    if index == "auto":
        return choose(n, d)[0]
    return "convex_layers" if d == 2 else "partition_tree"


def measure(
    dims: Sequence[int] = DIMS,
    sizes: Sequence[int] = SIZES,
    *,
    index: str = "structure",
    repeats: int = REPEATS,
    seed: int = 0,
    threads: int = 1,
    on_row: Callable[[str], None] = lambda what: None,
) -> list[Row]:
    """Measure a causal prompt of Gaussian keys and queries for each d and n."""
    import torch

    before = _native.num_threads(), torch.get_num_threads()
    _native.set_num_threads(threads)
    torch.set_num_threads(threads)
    try:
        rows = []
        for d in dims:
            for n in sorted(sizes):
                on_row(f"d = {d}, n = {n:,}")
                rows.append(_measure_one(d, n, index, repeats, seed))
        return rows
    finally:
        _native.set_num_threads(before[0])
        torch.set_num_threads(before[1])


def _measure_one(d: int, n: int, index: str, repeats: int, seed: int) -> Row:
    import torch

    generator = np.random.default_rng([seed, d, n])
    q, k, v = (
        torch.from_numpy(generator.standard_normal((1, 1, n, d), dtype=np.float32)) for _ in "qkv"
    )
    heads, rule, kind = Heads("", q, k, v, d**-0.5), Gaussian(), index_of(d, n, index)
    inside = None if kind == CODES else kind

    def attend(certify: bool = False) -> Any:
        return relu_attention(
            q, k, v, threshold=rule, is_causal=True, index=inside, return_certificate=certify
        )

    with torch.inference_mode():
        policy = ReLUPolicy(threshold=rule)
        b = prefill_speed.limits(heads, policy)
        dense = prefill_speed.dense_paths(heads, policy, b)["matmul (tiles)"]
        out, certificate = attend(certify=True)
        positions = np.unique(np.linspace(0, n - 1, min(n, 64)).astype(int))
        exact = prefill_speed.exact_rows(heads, positions, b)
        errors = [
            float(output_error.largest_error(x[0, :, positions].double().numpy(), exact).max())
            for x in (out, dense())
        ]
        # A float32 score decides differently at the threshold only where the weight is near zero.
        if errors[0] > LARGEST_ERROR or errors[1] > 0.1:
            raise AssertionError(f"attention is off by {max(errors):.2g} at d = {d}, n = {n}")
        seconds: dict[str, list[float]] = {"hsr": [], "dense": []}
        for _ in range(repeats):
            for name, call in (("hsr", attend), ("dense", dense)):
                start = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - start)
    visible = np.arange(1, n + 1, dtype=np.float64)
    kept = certificate.density[0, 0] * visible
    return Row(
        d, n, kind, float(kept.mean()), float(kept.sum() / visible.sum()), errors[0],
        statistics.median(seconds["hsr"]), statistics.median(seconds["dense"]),
    )  # fmt: skip


def exponents(rows: Sequence[Row]) -> list[Fit]:
    """Fit log quantity = a + e log n for each dimension that has three sizes."""
    fits = []
    for d in sorted({row.d for row in rows}):
        members = sorted((row for row in rows if row.d == d), key=lambda row: row.n)
        kinds = "/".join(dict.fromkeys(row.index for row in members))
        sizes = [row.n for row in members]
        for quantity, expected in (("seconds", theory(d)), ("kept", 0.8), ("dense_seconds", 2.0)):
            values = [getattr(row, quantity) for row in members]
            fit = growth.interval(sizes, values)
            if fit is None:
                continue
            last = growth.exponent(sizes[-2:], values[-2:])["exponent"]
            fits.append(Fit(d, kinds, quantity, *fit, last, expected))
    return fits


def run(**options: Any) -> dict[str, Any]:
    """Measure and fit; everything as plain values, with the machine."""
    rows = measure(**options)
    return {
        "machine": native_machine(options.get("threads", 1)),
        "rows": [{**asdict(row), "speedup": row.speedup} for row in rows],
        "exponents": [asdict(fit) for fit in exponents(rows)],
    }  # fmt: skip


def plot(result: dict[str, Any], path: str | Path) -> None:
    """Draw the time of a prompt against n, a column a dimension; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = result["rows"]
    dims = sorted({row["d"] for row in rows})
    size = (3.6 * len(dims), 4)
    figure, axes = plt.subplots(1, len(dims), figsize=size, squeeze=False, sharey=True)
    for column, d in zip(axes[0], dims, strict=True):
        members = [r for r in rows if r["d"] == d]
        n = np.array([r["n"] for r in members], float)
        fits = {f["quantity"]: f for f in result["exponents"] if f["d"] == d}
        for quantity, name, style in (("seconds", "hsr", "o-"), ("dense_seconds", "dense", "s-")):
            fit = fits.get(quantity)
            label = name if fit is None else f"{name}: n^{fit['exponent']:.2f}"
            column.loglog(n, [r[quantity] for r in members], style, markersize=4, label=label)
        line = members[-1]["seconds"] * (n / n[-1]) ** theory(d)
        column.loglog(n, line, "k:", label=f"theory: n^{theory(d):.2f}")
        column.set_title(f"d = {d}, {members[-1]['index'].replace('_', ' ')}", fontsize=10)
        column.set_xlabel("tokens of the prompt")
        column.minorticks_off()
        column.set_xticks(n, [f"{x:,.0f}" for x in n], rotation=40, fontsize=8)
        column.grid(alpha=0.3, which="both")
        column.legend(fontsize="small")
    axes[0][0].set_ylabel("seconds, one head")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
