"""``HSRLayer``: one full-attention layer of a transformers cache, held by a ``KVCache``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from hsr_attention.attention.certificate import Certificate
from hsr_attention.integrations import torch_ops
from hsr_attention.integrations.compiled import CompiledLayer
from hsr_attention.kv_cache import KVCache
from hsr_attention.policies import Policy

# What may be asked of cached keys without reading them.
_METADATA = frozenset(
    {
        torch.Tensor.size,
        torch.Tensor.dim,
        torch.Tensor.__len__,
        torch.Tensor.is_floating_point,
        *(
            getattr(torch.Tensor, name).__get__
            for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cpu", "layout")
        ),
    }
)


@cache
def _point(dtype: torch.dtype) -> torch.Tensor:
    return torch.empty((), dtype=dtype)


class CachedRows(torch.Tensor):
    """Keys or values that stand in a cache: shape and dtype of a tensor, but not its data.

    ``HSRLayer.update`` returns them in place of all the keys, so that a decoding step copies
    nothing that grows with the cache. Only the attention function "hsr" knows how to read them;
    any other operation is an error, never an answer over the wrong keys.
    """

    layer: HSRLayer
    tokens: int  # the third of its shape, quicker to ask
    new_tokens: int
    fresh: torch.Tensor | None

    @classmethod
    def of(cls, layer: HSRLayer, new: torch.Tensor, is_fresh: bool) -> CachedRows:
        """Stand for all rows of ``layer``: ``new`` are the newest or, fresh, the only ones."""
        batch, heads, new_tokens, dim = new.shape
        tokens = layer.get_seq_length()
        rows = _point(new.dtype).expand(batch, heads, tokens, dim).as_subclass(cls)
        rows.layer = layer
        rows.tokens = tokens
        rows.new_tokens = new_tokens
        rows.fresh = new if is_fresh else None
        return rows

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        """Return the shape and the layer."""
        return f"CachedRows(shape={tuple(self.shape)}, layer={self.layer!r})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Answer questions of shape and dtype; refuse everything else and undo the append."""
        kwargs = kwargs or {}
        if func in _METADATA:
            return super().__torch_function__(func, types, args, kwargs)
        if func is torch.Tensor.to:  # models that share keys between layers move them, to the CPU
            there = torch.empty(0, dtype=args[0].dtype).to(*args[1:], **kwargs)
            if there.dtype == args[0].dtype and there.device.type == "cpu":
                return args[0]
        for argument in (*args, *kwargs.values()):
            for rows in argument if isinstance(argument, list | tuple) else (argument,):
                if isinstance(rows, cls):
                    rows.layer.forget_newest(rows)
        raise ValueError(
            "the keys of an HSRCache can only be read by the attention function 'hsr', got "
            f"{getattr(func, '__name__', func)!r}; load the model with attn_implementation='hsr', "
            "or call model.set_attn_implementation('hsr')"
        )


@dataclass(frozen=True)
class LayerStatistics:
    """What decoding did in one layer; arrays are float32 [heads, queries], queries in order.

    Attributes
    ----------
    layer : int
        Index of the layer in the model.
    density, omitted_mass, error_bound, estimated_error
        As in ``Certificate``. Prompts are not recorded.
    value_max : float
        Largest absolute value cached: ``error_bound / value_max`` is the relative bound.
    work : dict
        Counters, summed over the calls; see ``Certificate.work``.
    """

    layer: int
    density: NDArray[np.float32]
    omitted_mass: NDArray[np.float32]
    error_bound: NDArray[np.float32]
    estimated_error: NDArray[np.float32]
    value_max: float
    work: dict[str, int]


class ModelShape:
    """What a cache was made for: raises when another model uses it.

    Parameters
    ----------
    config : PreTrainedConfig
        Of the text part of the model.
    """

    # Two configs that agree on these describe models that can share a cache.
    FIELDS = (
        "model_type",
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "relu_power",
        "relu_sigma",
    )

    def __init__(self, config: Any) -> None:
        self._config = self._checked = config

    def check(self, config: Any) -> None:
        """Raise ``ValueError`` if ``config``, of an attention module, describes another model."""
        if config is self._checked or config is None:
            return
        for name in self.FIELDS:
            expected, found = getattr(self._config, name, None), getattr(config, name, None)
            if expected != found:
                raise ValueError(
                    f"the cache was made for a model with {name} {expected!r}, got a model with "
                    f"{found!r}; make it from the config of the model that uses it"
                )
        self._checked = config


class HSRLayer(CacheLayerMixin):
    """A cache layer whose keys and values grow in native memory, with their codes.

    Parameters
    ----------
    policy : SoftmaxPolicy or ReLUPolicy
        Selects the keys of each decoding step.
    model : ModelShape
        The model the cache is for.
    collect : bool
        Compute the certificate of every decoding step and keep it for ``statistics``.
    storage, directory
        Of keys and values, as in ``KVCache``.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(
        self,
        policy: Policy,
        model: ModelShape,
        collect: bool = False,
        *,
        storage: str = "memory",
        directory: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.model = model
        self._place: Any = {"storage": storage, "directory": directory}
        self.rows = KVCache(policy, **self._place)
        self._certificates: list[Certificate] | None = [] if collect else None
        self._value_max = 0.0
        self.batch_rows = 0
        # Inside torch.compile: what stands for this layer.
        self._compiled = CompiledLayer(self)
        self._state = self._compiled.state
        self._numbers = self._state.numpy()  # the same memory, quicker to write
        self._tokens = 0  # as Python counts them

    def __repr__(self) -> str:
        """Return the policy and the length."""
        return f"HSRLayer({self.policy!r}, n={len(self.rows)})"

    def __deepcopy__(self, memo: dict) -> HSRLayer:
        """Copy the tokens (and code them again), for a prefix that serves several prompts."""
        collect = self._certificates is not None
        copy = HSRLayer(self.policy, self.model, collect, **self._place)
        if len(self.rows):
            copy.update(*self.tensors())
        return copy

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Note dtype and device of the first tokens; memory is taken as tokens come."""
        for name, states in (("keys", key_states), ("values", value_states)):
            if states.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise TypeError(
                    f"{name} of an HSRCache must be float32, bfloat16 or float16, got "
                    f"{states.dtype}; load the model with dtype=torch.float32 or torch.bfloat16"
                )
            if states.device.type != "cpu":
                raise TypeError(f"{name} of an HSRCache must be on the CPU, got {states.device}")
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values [batch, kv_heads, t, head_dim]; return handles to all of them.

        Costs O(t), whatever is cached already.
        """
        if torch.is_autocast_enabled("cpu"):  # rotary embeddings leave float32 keys beside values
            dtype = torch.get_autocast_dtype("cpu")
            key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        if torch.compiler.is_compiling():
            torch_ops.append(self._state, key_states, value_states)
            self._tokens += key_states.shape[2]
            return self._state, value_states
        self.append(key_states, value_states)
        self._count()
        is_fresh = self._tokens == key_states.shape[2]
        keys = CachedRows.of(self, key_states, is_fresh)
        if not is_fresh and value_states.shape == key_states.shape:  # nothing tells them apart
            return keys, keys
        return keys, CachedRows.of(self, value_states, is_fresh)

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Append keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self.rows.append(keys, values)
        self.batch_rows = keys.shape[0]
        if self._certificates is not None and values.numel():
            self._value_max = max(self._value_max, float(values.detach().abs().max()))

    def _count(self) -> None:
        """Tell compiled code, too, what eager code did to the rows."""
        self._tokens = self._numbers[1] = len(self.rows)

    def use_policy(self, policy: Policy) -> None:
        """Attend by another policy from now on, and forget the statistics of the old one."""
        self.rows.use_policy(policy)
        self.policy = policy
        if self._certificates is not None:
            self._certificates = []

    def forget_newest(self, rows: CachedRows) -> None:
        """Undo the append that returned ``rows``, if it was the last one."""
        length = torch.Tensor.size(rows, 2)
        if len(self.rows) == length:
            self.keep(length - rows.new_tokens)
            self._count()

    def attend(
        self,
        query: torch.Tensor,
        scale: float | None,
        mask: torch.Tensor | None,
        tokens: int | None = None,
        record: bool = True,
    ) -> torch.Tensor:
        """Attend from the newest m positions; query [batch, heads, m, head_dim].

        With ``record`` and ``collect`` the certificates are kept for ``statistics``.
        """
        if self._certificates is None or not record:
            return self.rows.attend(query, scale, mask=mask, tokens=tokens)
        out, certificate = self.rows.attend(
            query, scale, mask=mask, return_certificate=True, tokens=tokens
        )
        self._certificates.append(certificate)
        return out

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all keys and values [batch, kv_heads, n, dim] as views, not to be written to.

        While a view is held, growing the cache copies it.
        """
        native = (
            self.rows._layer
        )  # its arrays, unlike rows.rows(), are writable: torch warns otherwise
        keys, values = (
            torch.from_numpy(a if a.dtype == np.float32 else a.view(np.int16))
            for a in (native.keys(), native.values())
        )
        return keys.view(self.dtype), values.view(self.dtype)

    def statistics(self, layer_index: int) -> LayerStatistics:
        """Return what was collected."""
        found = self._certificates or []
        work: dict[str, int] = {}
        for certificate in found:
            for name, count in certificate.work.items():
                work[name] = work.get(name, 0) + count

        def gather(name: str) -> NDArray[np.float32]:
            # [batch, heads, m] of each call -> [heads, all queries]
            arrays = [getattr(c, name).transpose(1, 2, 0) for c in found]
            if not arrays:
                return np.empty((0, 0), np.float32)
            return np.concatenate([a.reshape(a.shape[0], -1) for a in arrays], axis=1)

        return LayerStatistics(
            layer_index,
            gather("density"),
            gather("omitted_mass"),
            gather("error_bound"),
            gather("estimated_error"),
            self._value_max,
            work,
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (number of keys after this step, position of the first).

        A model asks before its first layer, which torch would stop at if there is no token.
        """
        if not torch.compiler.is_compiling() and int(query_length) == 0:
            raise ValueError(
                "input_ids must hold at least one token, got a prompt of 0 tokens (a tokenizer "
                "that adds no start token makes one of an empty text)"
            )
        return self.get_seq_length() + int(query_length), 0

    def get_seq_length(self) -> int:
        """Return the number of cached tokens."""
        return self._tokens

    def get_max_length(self) -> int:
        """Return -1: no limit."""
        return -1

    def reset(self) -> None:
        """Forget all tokens and statistics."""
        self.rows = KVCache(self.policy, **self._place)
        self._value_max, self.batch_rows, self.is_initialized = 0.0, 0, False
        self._count()
        if self._certificates is not None:
            self._certificates = []

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest ``-tokens_to_remove`` tokens (0 or negative, as in transformers)."""
        if tokens_to_remove > 0:
            raise ValueError(
                "tokens_to_remove must be <= 0 (minus the number of tokens to remove), got "
                f"{tokens_to_remove}"
            )
        self.keep(max(len(self.rows) + int(tokens_to_remove), 0))
        self._count()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make batch row i the former row ``beam_idx[i]``."""
        if len(self.rows) and not torch.equal(beam_idx, torch.arange(self.batch_rows)):
            self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row ``repeats`` times."""
        if len(self.rows):
            self._select(torch.arange(self.batch_rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the batch rows ``indices``: integers or a boolean mask."""
        if len(self.rows):
            self._select(torch.arange(self.batch_rows)[indices])

    def keep(self, tokens: int) -> None:
        """Keep the first ``tokens`` tokens."""
        if tokens:
            self.rows.crop(tokens)
        else:  # an empty cache takes tokens of any shape
            self.rows = KVCache(self.policy, **self._place)

    def _select(self, batch_indices: torch.Tensor) -> None:
        self.rows.reorder(batch_indices)
        self.batch_rows = len(batch_indices)

    def offload(self) -> None:
        """Do nothing: the rows are on the CPU already."""

    def prefetch(self) -> None:
        """Do nothing: the rows are on the CPU already."""


class DenseSlidingLayer(DynamicSlidingWindowLayer):
    """A sliding-window layer: a few keys, attended to densely, marked so that "hsr" knows."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Update as transformers does, and mark the keys."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        keys.hsr_dense = True  # type: ignore[attr-defined]
        return keys, values
