"""``softmax_attention``: softmax over the keys that matter, with a bound of the error."""

from __future__ import annotations

from typing import Any

from numpy.typing import ArrayLike

from hsr_attention.attention.call import attend
from hsr_attention.attention.certificate import Certificate
from hsr_attention.policies import SoftmaxPolicy


def softmax_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    top_r: int | None = None,
    epsilon: float | None = None,
    threshold: ArrayLike | None = None,
    tail: str = "sketch",
    exact: bool = False,
    scale: float | None = None,
    is_causal: bool = False,
    mask: Any = None,
    index: Any = None,
    return_certificate: bool = False,
) -> Any:
    """Softmax attention by half-space reporting, as torch's ``scaled_dot_product_attention``.

    out = sum_j w_j v_j / sum_j w_j with w_j = exp(scale <q, k_j>) over the keys a rule keeps (paper,
    Definition 1.1 and Theorem 4.2). Give one of the rules ``epsilon``, ``top_r`` and ``threshold``, or
    none for ``epsilon=0.04``.

    Parameters
    ----------
    q : [batch, heads, m, head_dim]
        numpy or torch (CPU); float32, bfloat16 or float16 (numpy float64 is read as float32). heads
        must be a multiple of kv_heads.
    k : [batch, kv_heads, n, head_dim]
        Keys. Query head h reads key head h // (heads / kv_heads).
    v : [batch, kv_heads, n, value_dim]
        Values, of the dtype of k.
    top_r : int >= 1, optional
        The r largest logits at full precision.
    epsilon : float in (0, 1), optional
        Keep enough keys that the omitted share of the mass is at most epsilon.
    threshold : number, [heads], or what broadcasts to [batch, heads, m], or a rule, optional
        Logits >= threshold at full precision.
    tail : "sketch" or "drop"
        Weigh the keys outside the exact set from their codes, or leave them out as the paper does.
    exact : bool
        Read everything that is kept at full precision (implies ``tail="drop"``).
    scale : float, optional
        1 / sqrt(head_dim) by default.
    is_causal : bool
        Query i sees keys 0 .. i (aligned at the start, as in torch).
    mask : bool [batch or 1, m or 1, n], or the same with a head axis of 1, optional
        True where a key may be seen.
    index : str, HalfspaceIndex, or [batch][kv_heads] of them, optional
        For heads of few dimensions: attend to what an index reports, at full precision, and drop
        the rest. One for each batch row and key head, holding ``k`` by position; or a kind of
        ``halfspace_index`` ("auto", "convex_layers", ...) to build inside the call (paper,
        Algorithm 3). Causality and masks filter what is reported. ``epsilon`` keeps the largest
        logits until T / (Z + T) <= epsilon, T = (n - r) e^b: Z is the mass of the r kept keys and b
        the least of their logits. Only reported rows of k and v are read, unless a certificate is
        asked for.
    return_certificate : bool
        Return ``(out, Certificate)``.

    Returns
    -------
    [batch, heads, m, value_dim]
        Of the kind and dtype of q; with ``return_certificate`` a pair of it and a ``Certificate``.
        Rows that may see no key are zero.

    Raises
    ------
    ValueError
        For shapes, ranges, two rules at once, numbers that are not finite, or tensors that require a
        gradient where torch would record one.
    TypeError
        For dtypes that differ or are not supported.
    """
    policy = SoftmaxPolicy(
        epsilon=epsilon,
        top_r=top_r,
        threshold=threshold,  # type: ignore[arg-type]
        tail=tail,
        exact=exact,
    )
    return attend(policy, q, k, v, scale, is_causal, mask, index, return_certificate)


__all__ = ["Certificate", "softmax_attention"]
