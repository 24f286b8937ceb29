"""Every check of shape, dtype and range at the border, and the one form of message.

A message names the argument, the rule, and what was found:
``keys must have shape [n, head_dim], got (128,)``. Values and shapes raise ``ValueError``, types
raise ``TypeError``.

Arrays cross into the native code as numpy arrays without a copy of their data. numpy has no
bfloat16, so 16-bit floats travel as ``uint16`` bits beside a ``Dtype`` that says how to read them.
"""

from __future__ import annotations

import enum
import math
import numbers
import sys
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

MAX_HEAD_DIM = 512


class Dtype(enum.IntEnum):
    """Element types of keys, values and queries; the numbers are those of the native code."""

    float32 = 0
    bfloat16 = 1
    float16 = 2


class FloatArray:
    """A float array as the native code takes it: ``bits`` (float32 or uint16) and its ``dtype``."""

    __slots__ = ("bits", "dtype", "shape")

    def __init__(self, bits: NDArray[Any], dtype: Dtype) -> None:
        self.bits = bits
        self.dtype = dtype
        self.shape: tuple[int, ...] = bits.shape

    @property
    def native(self) -> Any:
        """What the calls of a cache take: the bits, or a tensor's address, shape and strides."""
        return self.bits

    def to_float32(self) -> NDArray[np.float32]:
        """Return the values as float32, exactly."""
        bits = self.bits
        if self.dtype is Dtype.float32:
            return bits
        if self.dtype is Dtype.float16:
            return bits.view(np.float16).astype(np.float32)
        return (bits.astype(np.uint32) << 16).view(np.float32)


class TensorArray(FloatArray):
    """The same of a torch tensor: its bits are made when they are asked for.

    A view in numpy, of a 16-bit dtype above all, takes several calls of torch, which a decoding
    step would pay for in every layer.
    """

    __slots__ = ("tensor",)

    def __init__(self, tensor: Any, dtype: Dtype) -> None:
        self.tensor = tensor
        self.dtype = dtype
        self.shape = tuple(tensor.shape)

    @property
    def bits(self) -> NDArray[Any]:
        """A view of the tensor's memory."""
        if self.dtype is Dtype.float32:
            return self.tensor.numpy()
        return self.tensor.view(sys.modules["torch"].int16).numpy().view(np.uint16)

    @property
    def native(self) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """Address, shape and strides in elements; the tensor must live as long as they are used."""
        tensor = self.tensor
        return tensor.data_ptr(), self.shape, tensor.stride()


def is_torch(array: Any) -> bool:
    """Say whether ``array`` is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def float_array(name: str, array: Any) -> FloatArray:
    """Take a numpy array or a torch CPU tensor of float32, bfloat16 or float16, without copying.

    Lists and float64 arrays are converted to float32.

    Raises
    ------
    TypeError
        If the element type is none of these, or a tensor is not on the CPU.
    ValueError
        If a float64 number is too large for float32.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        return _from_torch(torch, name, array)
    given, array = array, np.asarray(array)
    if array.dtype == np.float64:
        with np.errstate(over="ignore"):
            array = _fitting(name, array, array.astype(np.float32))
    if array.dtype == np.float32:
        return FloatArray(array, Dtype.float32)
    if array.dtype == np.float16:
        return FloatArray(array.view(np.uint16), Dtype.float16)
    if array.dtype.name == "bfloat16":  # ml_dtypes
        return FloatArray(array.view(np.uint16), Dtype.bfloat16)
    if array.dtype.kind in "iu":
        return FloatArray(array.astype(np.float32), Dtype.float32)
    raise TypeError(f"{name} must be float32, bfloat16 or float16, got {_kind(given, array)}")


def _kind(given: Any, array: NDArray[Any]) -> str:
    """Name what was given where numbers were expected: None, or the dtype that numpy makes of it."""
    return "None" if given is None else str(array.dtype)


def _fitting(name: str, wide: Any, narrow: Any) -> Any:
    """Return float32 ``narrow``, made of float64 ``wide``; refuse what became infinite by that."""
    lost = abs(narrow) == math.inf
    if lost.any():
        lost &= abs(wide) != math.inf
    if lost.any():
        place = tuple(int(i) for i in np.argwhere(np.asarray(lost))[0])
        raise ValueError(
            f"{name} must be at most 3.4e38 in size, the largest float32, got "
            f"{float(wide[place]):g} at {place}"
        )
    return narrow


_TORCH_DTYPES: dict[Any, Dtype] = {}


def _from_torch(torch: Any, name: str, tensor: Any) -> FloatArray:
    if not _TORCH_DTYPES:
        _TORCH_DTYPES.update({getattr(torch, dtype.name): dtype for dtype in Dtype})
    if not tensor.is_cpu:
        raise TypeError(f"{name} must be on the CPU, got a tensor on {tensor.device}")
    if tensor.layout is not torch.strided or tensor.is_neg():
        raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}, or a view")
    if tensor.requires_grad:
        tensor = tensor.detach()
    dtype = _TORCH_DTYPES.get(tensor.dtype)
    if dtype is not None:
        return TensorArray(tensor, dtype)
    if tensor.dtype is torch.float64:
        return TensorArray(_fitting(name, tensor, tensor.float()), Dtype.float32)
    kind = str(tensor.dtype).removeprefix("torch.")
    raise TypeError(f"{name} must be float32, bfloat16 or float16, got {kind}")


def like(example: Any, values: NDArray[np.float32]) -> Any:
    """Return float32 ``values`` as an array or tensor of the kind and dtype of ``example``."""
    if is_torch(example):
        return sys.modules["torch"].from_numpy(values).to(example.dtype)
    dtype = np.asarray(example).dtype
    return values.astype(dtype) if dtype.kind == "f" or dtype.name == "bfloat16" else values


def place_for(example: Any, taken: FloatArray, shape: tuple[int, ...]) -> tuple[Any, int, bool]:
    """Return an empty tensor for an answer like ``example``, its address, and whether it is bfloat16.

    ``taken`` is ``example`` as ``float_array`` took it. (None, 0, False) where the native code does
    not write the dtype of ``example``, or it is no tensor: the answer then comes back as a numpy
    array of float32, for ``like``.
    """
    dtype = taken.dtype
    if (
        dtype is Dtype.float16
        or not isinstance(taken, TensorArray)
        or example.dtype is not taken.tensor.dtype  # float64, taken as float32
    ):
        return None, 0, False
    torch = sys.modules["torch"]
    if taken.shape == shape:  # two thirds of the other's time, when nothing of it is in a cache
        out = torch.empty_like(taken.tensor, memory_format=torch.contiguous_format)
    else:
        out = torch.empty(shape, dtype=example.dtype)
    return out, out.data_ptr(), dtype is Dtype.bfloat16


def output_rounding(example: Any, values: NDArray[np.float32]) -> NDArray[np.float32] | float:
    """Bound what ``like(example, values)`` rounds away, over the last axis."""
    dtype = str(getattr(example, "dtype", "")).removeprefix("torch.")
    if dtype not in ("bfloat16", "float16"):
        return 0.0
    relative, smallest, largest = {
        "bfloat16": (2.0**-8, 2.0**-133, 3.38e38),
        "float16": (2.0**-11, 2.0**-25, 65504.0),
    }[dtype]
    size = np.abs(values).max(axis=-1, initial=0.0)
    return np.where(size <= largest, np.maximum(relative * size, smallest), np.inf)


def matrix(name: str, array: Any, head_dim: int | None = None) -> FloatArray:
    """Check ``[rows, head_dim]`` with 1 <= head_dim <= 512; rows may be 0."""
    rows = {"keys": "n", "queries": "m"}.get(name, "rows")
    result = float_array(name, array)
    if len(result.shape) != 2:
        raise ValueError(f"{name} must have shape [{rows}, head_dim], got {result.shape}")
    found = result.shape[1]
    if head_dim is None and not 1 <= found <= MAX_HEAD_DIM:
        raise ValueError(f"{name} must have head_dim in [1, {MAX_HEAD_DIM}], got {found}")
    if head_dim is not None and found != head_dim:
        raise ValueError(f"{name} must have head_dim {head_dim}, got {found}")
    return result


def heads(name: str, array: Any) -> FloatArray:
    """Check ``[batch, heads, sequence, head_dim]`` with 1 <= head_dim <= 512."""
    result = float_array(name, array)
    if len(result.shape) != 4:
        raise ValueError(
            f"{name} must have shape [batch, heads, sequence, head_dim], got {result.shape}"
        )
    if not 1 <= result.shape[3] <= MAX_HEAD_DIM:
        raise ValueError(
            f"{name} must have head_dim in [1, {MAX_HEAD_DIM}], got {result.shape[3]}"
        )
    return result


def finite(name: str, array: FloatArray) -> None:
    """Refuse NaN and infinity."""
    values = array.to_float32()
    bad = ~np.isfinite(values)
    if bad.any():
        place = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(f"{name} must be finite, got {values[place]} at {place}")


def thresholds(array: ArrayLike, m: int) -> NDArray[np.float64]:
    """Check a scalar or ``[m]`` of thresholds; -inf and +inf are allowed, NaN is not."""
    values = np.asarray(array)
    if values.dtype.kind not in "fiu":
        raise TypeError(f"thresholds must be real numbers, got {_kind(array, values)}")
    if values.shape not in ((), (m,)):
        raise ValueError(f"thresholds must be a scalar or have shape [{m}], got {values.shape}")
    values = np.ascontiguousarray(np.broadcast_to(values.astype(np.float64), (m,)))
    if np.isnan(values).any():
        raise ValueError("thresholds must not be NaN")
    return values


def threshold_setting(value: Any) -> None:
    """Check what a policy is given as a threshold, as far as it can be known without queries."""
    if value is None or isinstance(value, (str, bytes)):
        raise TypeError(
            "threshold must be a number, an array or a rule such as hsr_attention.Gaussian(), "
            f"got {value!r}"
        )
    if callable(value):
        return
    if np.isnan(_real_thresholds(value)).any():
        raise ValueError("threshold must not be NaN")


def _real_thresholds(array: Any) -> NDArray[Any]:
    values = np.asarray(array.detach() if is_torch(array) else array)
    if values.dtype.kind not in "fiu":
        raise TypeError(f"threshold must be real numbers, got {_kind(array, values)}")
    return values


def attention_thresholds(array: Any, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Check thresholds in logit units and spread them over ``shape`` = (batch, heads, m).

    A scalar, one for each head ``[heads]``, or one for each query: anything that broadcasts to
    ``[batch, heads, m]``.
    """
    values = _real_thresholds(array)
    given = values.shape
    if given == (shape[1],) and shape[1] != 1:
        values = values[:, None]
    try:
        values = np.broadcast_to(values.astype(np.float64), shape)
    except ValueError:
        raise ValueError(
            f"threshold must be a scalar, have shape [heads] = [{shape[1]}], or broadcast to "
            f"[batch, heads, m] = {list(shape)}, got {given}"
        ) from None
    if np.isnan(values).any():
        raise ValueError("threshold must not be NaN")
    return np.ascontiguousarray(values).reshape(-1)


def key_mask(mask: Any, batch: int, m: int, n: int) -> NDArray[np.uint8]:
    """Check a boolean mask (true: may be seen), ``[batch or 1, m or 1, n]``, or ``[batch or 1, 1, ...]``."""
    values = np.asarray(mask.detach() if is_torch(mask) else mask)
    if values.ndim == 4 and values.shape[1] == 1:
        values = values[:, 0]
    if values.dtype != np.bool_:
        raise TypeError(f"mask must be boolean, got {_kind(mask, values)}")
    fits = values.ndim == 3 and values.shape[0] in (1, batch) and values.shape[1] in (1, m)
    if not fits or values.shape[2] != n:
        raise ValueError(
            f"mask must have shape [{_or_one(batch)}, {_or_one(m)}, {n}] (batch, queries, keys), "
            f"got {values.shape}"
        )
    if values.strides[2] != 1:
        values = np.ascontiguousarray(values)
    return values.view(np.uint8)


def _or_one(size: int) -> str:
    return "1" if size == 1 else f"{size} or 1"


def flag(name: str, value: Any) -> bool:
    """Check a truth value."""
    if isinstance(value, bool):
        return value
    if not isinstance(value, np.bool_):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def without_gradients(**arrays: Any) -> None:
    """Refuse tensors that want a gradient where torch would record one: there is none."""
    for name, array in arrays.items():
        if is_torch(array) and array.requires_grad and sys.modules["torch"].is_grad_enabled():
            raise ValueError(
                f"{name} must not require a gradient, for this attention has none, got a tensor that "
                "does; call it under torch.no_grad(), or detach the tensor"
            )


def positive_integer(name: str, value: Any) -> int:
    """Check an integer >= 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be >= 1, got {value}")
    return int(value)


def bounded_integer(name: str, value: Any, largest: int) -> int:
    """Check an integer in [1, largest]."""
    if positive_integer(name, value) > largest:
        raise ValueError(f"{name} must be <= {largest}, got {value}")
    return int(value)


def open_unit(name: str, value: Any) -> float:
    """Check a number strictly between 0 and 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0.0 < float(value) < 1.0:
        raise ValueError(f"{name} must lie in (0, 1), got {value}")
    return float(value)


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    """Check membership in a short list of words."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def scale(value: float | None, head_dim: int) -> float:
    """Return ``scale``, by default 1 / sqrt(head_dim); it must be finite and positive."""
    if value is None:
        return 1.0 / math.sqrt(head_dim)
    if type(value) is not float and (
        isinstance(value, bool) or not isinstance(value, numbers.Real)
    ):
        raise TypeError(f"scale must be a number, got {value!r}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"scale must be finite and > 0, got {value}")
    return float(value)


def key_ids(name: str, array: ArrayLike) -> NDArray[np.int64]:
    """Check a list of key ids: integers, one dimension, no id twice."""
    values = np.atleast_1d(np.asarray(array))
    if values.size == 0:
        return np.empty(0, np.int64)
    if values.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, got {_kind(array, values)}")
    if values.ndim != 1:
        raise ValueError(f"{name} must have shape [count], got {values.shape}")
    values = np.ascontiguousarray(values, dtype=np.int64)
    unique, counts = np.unique(values, return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"{name} must not repeat, got id {unique[counts > 1][0]} twice")
    return values


def served_dimension(index: str, head_dim: int, served: range) -> None:
    """Check that a structure serves this dimension; the message names the ones that do."""
    if head_dim in served:
        return
    others = "PartitionTreeIndex, FlatIndex and SketchIndex serve any"
    if head_dim <= 4 and index == "ConvexLayersIndex" and head_dim > 1:
        others = "ShallowCuttingIndex serves 2 to 4, " + others
    span = str(served[0]) if len(served) == 1 else f"{served[0]} to {served[-1]}"
    raise ValueError(f"{index} serves head_dim {span}, got {head_dim}; {others}")
