"""Hugging Face transformers: ``HSRCache``, ``enable``, and ``attn_implementation="hsr"``.

Importing this module registers the attention function "hsr" and its mask with transformers; asking
``hsr_attention`` for ``HSRCache`` or ``enable`` imports it.
"""

from hsr_attention.integrations.attention import hsr_attention, register
from hsr_attention.integrations.cache import HSRCache
from hsr_attention.integrations.enable import enable
from hsr_attention.integrations.layer import HSRLayer, LayerStatistics

register()

__all__ = ["HSRCache", "HSRLayer", "LayerStatistics", "enable", "hsr_attention"]
