"""Top-r attention the slow way: all logits, a mask, softmax; in one pass over many tokens.

Shares nothing with the decoding path but the model and the prompt, and therefore checks it.
"""

from __future__ import annotations

from typing import Any

from hsr_attention.evaluation import generation
from hsr_attention.evaluation.prompt_state import PromptState
from hsr_attention.integrations.cache_argument import with_cache

_IMPLEMENTATION = "hsr_masked_top_r"


def top_r_nats(model: Any, state: PromptState, forced: list[int], r: int) -> list[float]:
    """Return the surprise of each forced token behind a prompt, in nats.

    The prompt is dense, each later token attends to the r largest of the logits it may see. The
    first token depends on the prompt alone.
    """
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def attend(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: Any = None, **rest: Any):
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        m, n, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
        hidden = torch.ones(m, n, dtype=torch.bool).triu(n - m + 1)
        out = torch.empty_like(q[..., : v.shape[3]])
        for head in range(q.shape[1]):
            logits = scale * (q[0, head] @ k[0, head // group].T)
            logits.masked_fill_(hidden, -torch.inf)
            top = logits.topk(min(r, n), dim=1)
            kept = torch.full_like(logits, -torch.inf).scatter(1, top.indices, top.values)
            out[0, head] = kept.softmax(dim=1) @ v[0, head // group]
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(_IMPLEMENTATION, attend)
    AttentionMaskInterface.register(_IMPLEMENTATION, sdpa_mask)
    before = model.config._attn_implementation
    cache = state.fill(generation.dense_cache(model))
    model.set_attn_implementation(_IMPLEMENTATION)
    try:
        with torch.no_grad():
            ids = torch.tensor([forced[:-1]])
            logits = model(ids, **with_cache(model, cache), use_cache=True).logits[0]
    finally:
        model.set_attn_implementation(before)
    every = torch.cat([state.logits[None], logits.float()])
    chosen = torch.log_softmax(every, dim=-1).gather(1, torch.tensor(forced)[:, None])
    return (-chosen[:, 0]).tolist()
