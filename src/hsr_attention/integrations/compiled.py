"""``HSRLayer`` inside ``torch.compile``: its tokens and answers go through ``torch.ops.hsr``.

Outside, ``HSRLayer.update`` returns handles that only eager code can read. While a graph is made,
it records ``torch.ops.hsr.append`` and returns the state that stands for the layer in place of the
keys; the attention function "hsr" knows it by its dtype and records ``torch.ops.hsr.attend``.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch

from hsr_attention.integrations import torch_ops
from hsr_attention.integrations.answering import attend_cached

if TYPE_CHECKING:
    from hsr_attention.integrations.layer import HSRLayer


class CompiledLayer:
    """What the operators call of one ``HSRLayer``."""

    def __init__(self, layer: HSRLayer) -> None:
        self._reference = weakref.ref(layer)
        self.state = torch_ops.cache_state(self)

    @property
    def _layer(self) -> HSRLayer:
        layer = self._reference()
        if layer is None:
            raise ValueError("the cache of this compiled model is gone")
        return layer

    def __len__(self) -> int:
        """Return the number of cached tokens."""
        return len(self._layer.rows)

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Append as eager decoding does."""
        self._layer.append(keys, values)

    def crop(self, n: int) -> None:
        """Keep the first n tokens."""
        self._layer.keep(n)

    def attend(
        self, q: torch.Tensor, scale: float | None, *, mask: torch.Tensor | None, tokens: int
    ) -> torch.Tensor:
        """Attend as eager decoding does: by the policy, or densely for several positions."""
        if mask is not None:
            mask = mask[:, None]
        return attend_cached(self._layer, q, mask, scale, causal=True, tokens=tokens)
