"""``SketchIndex``: the certified quantised scan, for heads of dimension 16 and more."""

from __future__ import annotations

from typing import Any

from hsr_attention import _native
from hsr_attention.indexes.native import NativeIndex


class SketchIndex(NativeIndex):
    """Half-space reporting over compact codes with certified bounds.

    Keys are centred, rotated and coded with 8 bits per coordinate in two planes of 4. With s the
    step of a key, c its code and e >= |k - s c| stored beside it,

        <q, k> in  s <q', c> +- (|q| e + |q - q'| |k|)        (q' the 8- or 16-bit query)

    The first plane is scanned for all keys, the second read where the first leaves a doubt, and
    what is reported or still in doubt is scored from the full-precision key in float64: no key is
    missed, whatever the data.

    Parameters
    ----------
    keys : float32, bfloat16 or float16 array or CPU tensor [n, head_dim]
        Copied once, in their own dtype; codes take about one byte a coordinate.
    """

    kind = "sketch"
    _native_class = _native.SketchIndex

    def __init__(self, keys: Any) -> None:  # of its own, so that a wrong call names this class
        super().__init__(keys)
