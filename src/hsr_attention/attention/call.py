"""What ``softmax_attention`` and ``relu_attention`` share: checks, and the way over codes or an index."""

from __future__ import annotations

from typing import Any

from hsr_attention import arguments
from hsr_attention.attention.indexed import attend_over
from hsr_attention.policies import Policy
from hsr_attention.prefill import attend_once


def attend(
    policy: Policy,
    q: Any,
    k: Any,
    v: Any,
    scale: float | None,
    is_causal: bool,
    mask: Any,
    index: Any,
    return_certificate: bool,
) -> Any:
    """Return the output, with ``return_certificate`` a pair of it and the ``Certificate``."""
    arguments.without_gradients(q=q, k=k, v=v)
    arguments.flag("is_causal", is_causal)
    arguments.flag("return_certificate", return_certificate)
    options = (policy, q, k, v, scale, is_causal, mask, return_certificate)
    out, certificate = attend_once(*options) if index is None else attend_over(index, *options)
    return (out, certificate) if return_certificate else out
