"""Sparse attention by exact half-space reporting: few keys, bounded error, fast on CPUs."""

from hsr_attention.attention.certificate import Certificate
from hsr_attention.attention.relu import relu_attention
from hsr_attention.attention.softmax import softmax_attention
from hsr_attention.indexes.base import HalfspaceIndex
from hsr_attention.indexes.choose import halfspace_index
from hsr_attention.indexes.convex_layers import ConvexLayersIndex
from hsr_attention.indexes.flat import FlatIndex
from hsr_attention.indexes.partition_tree import PartitionTreeIndex
from hsr_attention.indexes.shallow_cutting import ShallowCuttingIndex
from hsr_attention.indexes.sketch import SketchIndex
from hsr_attention.kv_cache import KVCache
from hsr_attention.machine import info, set_num_threads
from hsr_attention.policies import ReLUPolicy, SoftmaxPolicy
from hsr_attention.report import Report, Work
from hsr_attention.thresholds import Gaussian, SqrtLog

__version__ = "0.1.0"

# These need torch and transformers, and are imported when first asked for.
_LAZY = {
    "HSRCache": "hsr_attention.integrations.transformers",
    "enable": "hsr_attention.integrations.transformers",
    "parallel_linear": "hsr_attention.integrations.parallel_linear",
}

__all__ = [
    "Certificate",
    "ConvexLayersIndex",
    "FlatIndex",
    "Gaussian",
    "HSRCache",
    "HalfspaceIndex",
    "KVCache",
    "PartitionTreeIndex",
    "ReLUPolicy",
    "Report",
    "ShallowCuttingIndex",
    "SketchIndex",
    "SoftmaxPolicy",
    "SqrtLog",
    "Work",
    "enable",
    "halfspace_index",
    "info",
    "parallel_linear",
    "relu_attention",
    "set_num_threads",
    "softmax_attention",
]


def __getattr__(name: str) -> object:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
