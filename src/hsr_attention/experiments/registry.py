"""All experiments, in the order of the report.

To add one: a module with what ``workbench.Experiment`` lists, and its line here.
"""

from __future__ import annotations

from hsr_attention.experiments import (
    activations,
    atlas,
    cost,
    error_bound,
    perplexity,
    pipelines,
    relu_model,
    retrieval,
    running_time,
    sparsity,
)
from hsr_attention.experiments.workbench import Experiment

_MODULES: tuple[Experiment, ...] = (
    activations,
    pipelines,
    sparsity,
    error_bound,
    perplexity,
    running_time,
    cost,
    atlas,
    retrieval,
    relu_model,
)
EXPERIMENTS: dict[str, Experiment] = {module.NAME: module for module in _MODULES}
