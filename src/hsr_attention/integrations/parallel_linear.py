"""``parallel_linear``: the linear layers of a decoding step on all of torch's threads.

With one token a linear layer is a product of a matrix and a vector, as fast as its weights can be
read. torch leaves it to its BLAS, which on some machines (MKL on AMD processors) runs it on one
thread. The rows of the weight as a batch of as many matrices as there are threads run on all.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch.nn.functional import linear

_GAIN = 1.05  # what a split must gain to be kept: less is noise
_TIMED = 16  # layers of one size that are timed in turn, so that weights come from memory
_ROUNDS = 10


@contextmanager
def parallel_linear(model: torch.nn.Module) -> Iterator[dict[tuple[int, int], int]]:
    """Let the linear layers of ``model`` use all threads inside the block, where that is faster.

    ``x W^T + b`` of one token: the rows of ``W`` in as many equal parts as torch has threads, as one
    batched product. Each size of layer is timed both ways on its own weights, which takes about as
    long as fifty tokens. Products of several tokens, with gradients, inside ``torch.compile`` and on
    other devices stay as they are. A split product adds the same numbers in another order. Attention
    by half-space reporting and dense attention gain alike; after the block all is as it was.

    Yields
    ------
    dict
        ``{(out_features, in_features): parts}`` of the sizes that are split; empty where torch is as
        fast.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    sizes: dict[tuple[int, int], list[torch.nn.Linear]] = defaultdict(list)
    for layer in model.modules():
        # Another class, or a forward of its own, computes something else.
        if (
            type(layer) is torch.nn.Linear
            and "forward" not in layer.__dict__
            and _fits(layer.weight)
        ):
            sizes[layer.out_features, layer.in_features].append(layer)
    threads = torch.get_num_threads()
    split: dict[tuple[int, int], int] = {}
    with ExitStack() as undo:
        for size, layers in sizes.items():
            parts = next((p for p in range(threads, 1, -1) if size[0] % p == 0), 1)
            if parts > 1 and _faster(layers[:_TIMED], parts):
                split[size] = parts
                for layer in layers:
                    layer.__dict__["forward"] = _Forward(layer, parts)
                    undo.callback(layer.__dict__.pop, "forward", None)
        yield split


def _fits(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and weight.is_floating_point() and weight.is_contiguous()


class _Forward:
    """What stands in for the forward call of one layer; a step makes hundreds, so little is asked."""

    def __init__(self, layer: torch.nn.Linear, parts: int) -> None:
        self.layer = layer
        self.parts = parts
        # Of the weight that `columns` is a view of; while it is, no other can stand there.
        self.address = 0
        self.columns: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        parameters = self.layer._parameters
        weight, bias = parameters["weight"], parameters["bias"]
        assert weight is not None
        several = x.numel() != weight.shape[1]
        if several or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return linear(x, weight, bias)
        if weight.data_ptr() != self.address:
            self.address = weight.data_ptr()
            self.columns = columns(weight.detach(), self.parts) if _fits(weight) else None
        if self.columns is None:
            return linear(x, weight, bias)
        return in_parts(x, self.columns, bias)


def columns(weight: torch.Tensor, parts: int) -> torch.Tensor:
    """Return ``W`` [out, in] as a view [parts, in, out / parts]."""
    return weight.view(parts, -1, weight.shape[1]).mT


def in_parts(x: torch.Tensor, columns: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return ``x W^T + b`` of one row ``x`` [..., in] and the ``columns`` of ``W``."""
    row = x.reshape(1, 1, -1).expand(columns.shape[0], 1, -1)
    out = torch.bmm(row, columns).view(*x.shape[:-1], -1)
    return out if bias is None else out + bias


def _faster(layers: list[torch.nn.Linear], parts: int) -> bool:
    """Say whether one token passes these layers faster in parts, by the best of runs in turn."""
    weight = layers[0].weight
    x = torch.ones(1, 1, weight.shape[1], dtype=weight.dtype)

    def seconds(product: Callable[[torch.nn.Linear], torch.Tensor]) -> float:
        start = time.perf_counter()
        for layer in layers:
            product(layer)
        return time.perf_counter() - start

    whole, split = [], []
    with torch.no_grad():
        for _ in range(_ROUNDS):
            whole.append(seconds(lambda layer: linear(x, layer.weight)))
            split.append(seconds(lambda layer: in_parts(x, columns(layer.weight, parts), None)))
    return min(whole) > _GAIN * min(split)
