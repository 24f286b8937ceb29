"""``HSRCache``: a transformers cache whose full-attention layers report half-spaces."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from hsr_attention.integrations import torch_threads
from hsr_attention.integrations.layer import (
    DenseSlidingLayer,
    HSRLayer,
    LayerStatistics,
    ModelShape,
)
from hsr_attention.integrations.relu_model import ReLULMConfig
from hsr_attention.policies import Policy, ReLUPolicy, SoftmaxPolicy

# Layers that hold a state, or nothing; by name, since older versions of transformers lack some.
_WITHOUT_KEYS = frozenset({"LinearAttentionLayer", "DummyLayer"})


class HSRCache(Cache):
    """Keys, values and codes of all layers of a model.

    Pass it as ``cache`` (``past_key_values`` before transformers 5.24) to a model with
    ``attn_implementation="hsr"``. Full-attention layers are ``HSRLayer``; sliding-window and linear
    layers stay as transformers has them.

    Parameters
    ----------
    config : PreTrainedConfig
        ``model.config``.
    policy : SoftmaxPolicy or ReLUPolicy, optional
        ``default_policy(config)`` if there is none: the model's own. Under a ``SoftmaxPolicy``
        every new token is answered by the policy, and so are prompts where that is faster than
        dense attention (from 1,024 keys on, or later: docs/limits.md); under a ``ReLUPolicy`` every
        position is exact ReLU attention.
    collect : bool
        Keep the certificate of every decoding step for ``statistics()``. Off, none is computed.
    storage : "memory" or "disk"
        Where full-precision keys and values stand; codes are in memory always. On disk, a context
        larger than memory can be decoded: see ``KVCache``.
    directory : path, optional
        Of the files on disk; the system's directory for temporary files by default.

    Raises
    ------
    OSError
        If ``directory`` cannot be written, or, later, the disk is full.
    ValueError
        If the model needs what reporting cannot do: soft-capped logits, an encoder, no
        full-attention layer, an unknown kind of layer; or if its attention is ReLU and the
        policy is not.

    Examples
    --------
    >>> cache = HSRCache(model.config, SoftmaxPolicy(top_r=64))  # doctest: +SKIP
    >>> model.generate(**inputs, cache=cache)  # doctest: +SKIP
    """

    def __init__(
        self,
        config: Any,
        policy: Policy | None = None,
        *,
        collect: bool = False,
        storage: str = "memory",
        directory: str | os.PathLike[str] | None = None,
    ) -> None:
        if not hasattr(config, "get_text_config"):
            raise TypeError(f"config must be the config of a model, got {config!r}")
        policy = default_policy(config) if policy is None else policy
        if not isinstance(policy, SoftmaxPolicy | ReLUPolicy):
            raise TypeError(f"policy must be a SoftmaxPolicy or a ReLUPolicy, got {policy!r}")
        self.config = config.get_text_config(decoder=True)
        self.policy = policy
        self.collect = collect
        self.storage = storage
        model = ModelShape(self.config)
        new = partial(HSRLayer, policy, model, collect, storage=storage, directory=directory)
        super().__init__(layers=_layers(config, self.config, policy, new))
        self._first = next(i for i, x in enumerate(self.layers) if isinstance(x, HSRLayer))
        torch_threads.follow_torch()

    def __repr__(self) -> str:
        """Return the policy, the layers and the number of tokens."""
        return (
            f"HSRCache({self.policy!r}, layers={len(self.layers)}, "
            f"hsr_layers={len(self.hsr_layers)}, n={self.get_seq_length(self._first)})"
        )

    @property
    def hsr_layers(self) -> dict[int, HSRLayer]:
        """The layers that report half-spaces, by their index in the model."""
        return {i: layer for i, layer in enumerate(self.layers) if isinstance(layer, HSRLayer)}

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and codes of the reporting layers, in memory and on disk."""
        return self.row_nbytes + self.code_nbytes

    @property
    def row_nbytes(self) -> int:
        """Bytes of their full-precision keys and values; on disk with ``storage="disk"``."""
        return sum(layer.rows.row_nbytes for layer in self.hsr_layers.values())

    @property
    def code_nbytes(self) -> int:
        """Bytes of their codes, in memory."""
        return sum(layer.rows.code_nbytes for layer in self.hsr_layers.values())

    def statistics(self) -> list[LayerStatistics]:
        """Return what decoding did, one entry a reporting layer; needs ``collect=True``."""
        if not self.collect:
            raise ValueError("statistics need HSRCache(..., collect=True), got collect=False")
        return [layer.statistics(i) for i, layer in self.hsr_layers.items()]

    def use_policy(self, policy: Policy) -> None:
        """Attend by another policy from now on; the tokens stay, the statistics start anew.

        Raises
        ------
        ValueError
            If the policy reads codes of values that the cache was filled without; see ``KVCache``.
        """
        for layer in self.hsr_layers.values():
            layer.use_policy(policy)
        self.policy = policy

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the new tokens of one layer; return what its attention function reads."""
        if layer_idx >= len(self.layers):
            raise ValueError(
                f"the cache was made for a model of {len(self.layers)} layers, got layer_idx "
                f"{layer_idx}; make it from the config of the model that uses it"
            )
        layer = self.layers[layer_idx]
        if not isinstance(layer, HSRLayer):
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        rows = layer.update(key_states, value_states)
        if layer_idx != self._first:
            found, expected = layer.get_seq_length(), self.get_seq_length(self._first)
            if found != expected:
                raise ValueError(
                    f"all layers of a cache must hold the same tokens, got {found} in layer "
                    f"{layer_idx} and {expected} in layer {self._first}; an earlier call failed "
                    "half-way or another model uses this cache: make a new one or call reset()"
                )
        return rows


def default_policy(config: Any) -> Policy:
    """Return what a model attends by if nothing is asked for: its own ReLU, or ``SoftmaxPolicy()``."""
    config = config.get_text_config(decoder=True)
    return config.relu_policy() if isinstance(config, ReLULMConfig) else SoftmaxPolicy()


def _layers(config: Any, decoder: Any, policy: Policy, new: Callable[[], HSRLayer]) -> list[Any]:
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"HSRCache serves decoder-only models, got {config.model_type!r}")
    for name in ("attn_logit_softcapping", "attn_logit_softcap"):
        if (cap := getattr(decoder, name, None)) is not None:
            raise ValueError(
                f"hsr attention does not support soft-capped logits, got {name}={cap} in config"
            )
    if getattr(decoder, "kv_lora_rank", None) is not None:
        raise ValueError(
            "hsr attention does not support multi-head latent attention, got "
            f"kv_lora_rank={decoder.kv_lora_rank} in config"
        )
    if isinstance(decoder, ReLULMConfig) and not isinstance(policy, ReLUPolicy):
        raise ValueError(
            f"policy must be a ReLUPolicy, or left out to use the model's own, for a "
            f"{decoder.model_type} model, got {policy!r}"
        )
    layers = [_layer(layer, new) for layer in DynamicCache(config=config).layers]
    kinds = {type(layer) for layer in layers}
    if HSRLayer not in kinds:
        window = getattr(decoder, "sliding_window", None)
        raise ValueError(
            "HSRCache needs a layer with full attention, got none "
            f"(sliding_window={window} in the config)"
        )
    if isinstance(policy, ReLUPolicy) and DenseSlidingLayer in kinds:
        raise ValueError(
            "a ReLUPolicy needs full attention in every layer, got sliding-window layers "
            "(they would stay softmax)"
        )
    return layers


def _layer(dense: Any, new: Callable[[], HSRLayer]) -> Any:
    if type(dense) is DynamicLayer:
        return new()
    if type(dense) is DynamicSlidingWindowLayer:
        return DenseSlidingLayer(dense.sliding_window)
    if type(dense).__name__ in _WITHOUT_KEYS:
        return dense
    raise ValueError(f"HSRCache does not know cache layers of type {type(dense).__name__}")
