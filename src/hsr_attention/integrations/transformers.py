"""Hugging Face transformers: ``HSRCache``, ``enable``, and ``attn_implementation="hsr"``.

Importing this module registers the attention function "hsr" and its mask with transformers, and
the ReLU model; asking ``hsr_attention`` for ``HSRCache`` or ``enable`` imports it.
"""

from hsr_attention.integrations import attention, relu_model
from hsr_attention.integrations.attention import hsr_attention
from hsr_attention.integrations.cache import HSRCache
from hsr_attention.integrations.enable import enable
from hsr_attention.integrations.layer import HSRLayer, LayerStatistics
from hsr_attention.integrations.relu_model import ReLULMConfig, ReLULMForCausalLM

attention.register()
relu_model.register()

__all__ = [
    "HSRCache",
    "HSRLayer",
    "LayerStatistics",
    "ReLULMConfig",
    "ReLULMForCausalLM",
    "enable",
    "hsr_attention",
]
