"""``FlatIndex``: the blocked scan of the full-precision keys."""

from __future__ import annotations

from typing import Any

from hsr_attention import _native
from hsr_attention.indexes.native import NativeIndex


class FlatIndex(NativeIndex):
    """Half-space reporting by scoring every key, in blocks of 16 keys, dimension-major.

    Float32 scores with a derived bound of their rounding decide most keys; keys within the bound of
    the threshold, and all reported ones, are scored in float64. It is the oracle of the other
    indexes at native speed, and the honest baseline.

    Parameters
    ----------
    keys : float32, bfloat16 or float16 array or CPU tensor [n, head_dim]
        Copied once into blocks, in their own dtype. 1 <= head_dim <= 512, n >= 0.
    """

    kind = "flat"
    _native_class = _native.FlatIndex

    def __init__(self, keys: Any) -> None:  # of its own, so that a wrong call names this class
        super().__init__(keys)
