"""``relu_attention``: ReLU^alpha attention, where half-space reporting is exact."""

from __future__ import annotations

from typing import Any

from numpy.typing import ArrayLike

from hsr_attention.attention.call import attend
from hsr_attention.policies import ReLUPolicy
from hsr_attention.thresholds import ThresholdRule


def relu_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    threshold: ArrayLike | ThresholdRule,
    power: int = 1,
    scale: float | None = None,
    is_causal: bool = False,
    mask: Any = None,
    index: Any = None,
    return_certificate: bool = False,
) -> Any:
    """ReLU^power attention (paper, Definition 1.2): equal to dense, over the reported keys only.

    out = sum_j w_j v_j / sum_j w_j with w_j = max(scale <q, k_j> - threshold, 0)^power: only keys with
    scale <q, k_j> > threshold matter, and an exact report finds all of them. Logits of reported keys
    are computed in float64. A row without such a key is zero.

    Parameters
    ----------
    q : [batch, heads, m, head_dim]
        Queries; kinds and dtypes as in ``softmax_attention``.
    k : [batch, kv_heads, n, head_dim]
        Keys.
    v : [batch, kv_heads, n, value_dim]
        Values, of the dtype of k.
    threshold : number, [heads], anything that broadcasts to [batch, heads, m], or a rule
        b of the paper, in logit units; ``thresholds.Gaussian()`` keeps about n^(4/5) keys.
    power : int in [1, 16]
        alpha of the paper.
    scale : float, optional
        1 / sqrt(head_dim) by default.
    is_causal : bool
        Query i sees keys 0 .. i (aligned at the start, as in torch).
    mask : bool [batch or 1, m or 1, n], or the same with a head axis of 1, optional
        True where a key may be seen.
    index : str, HalfspaceIndex, or [batch][kv_heads] of them, optional
        For heads of few dimensions; see ``softmax_attention``.
    return_certificate : bool
        Return ``(out, Certificate)``.

    Returns
    -------
    [batch, heads, m, value_dim]
        Of the kind and dtype of q; with ``return_certificate`` a pair of it and a ``Certificate``.

    Raises
    ------
    ValueError
        For shapes, ranges, a threshold of -inf or NaN, numbers that are not finite, or tensors that
        require a gradient where torch would record one.
    TypeError
        For dtypes that differ or are not supported, or no threshold.
    """
    policy = ReLUPolicy(threshold=threshold, power=power)  # type: ignore[arg-type]
    return attend(policy, q, k, v, scale, is_causal, mask, index, return_certificate)
