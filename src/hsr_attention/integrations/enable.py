"""``enable``: plain ``generate()``, pipelines and evaluation harnesses use an ``HSRCache``."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from hsr_attention.integrations.attention import NAME
from hsr_attention.integrations.cache import HSRCache
from hsr_attention.integrations.cache_argument import CACHE_ARGUMENTS, cache_argument
from hsr_attention.policies import Policy, ReLUPolicy

_PREPARE = "_prepare_cache_for_generation"


@contextmanager
def enable(
    model: PreTrainedModel,
    policy: Policy | None = None,
    *,
    storage: str = "memory",
    directory: str | os.PathLike[str] | None = None,
) -> Iterator[PreTrainedModel]:
    """Let ``model`` attend by ``policy`` inside the block, and leave it as it was after.

    ``model.generate(...)`` and ``model(...)`` without a cache get an ``HSRCache``; code that
    passes none (pipelines, lm-eval) needs no change. Only this model changes, nothing global.
    Blocks nest: the innermost policy holds. ``storage`` and ``directory`` are those of the caches.

    Raises
    ------
    ValueError
        If the model cannot use an ``HSRCache``, or its forward call takes no cache by a known name;
        inside, if another kind of cache is asked for.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be a transformers PreTrainedModel, got {type(model).__name__}"
        )
    new_cache = partial(HSRCache, model.config, policy, storage=storage, directory=directory)
    policy = new_cache().policy  # refuses what cannot work before anything changes
    with ExitStack() as undo:
        _use_hsr(model, undo)
        _prepare_hsr(model, new_cache, undo)
        hook = model.register_forward_pre_hook(
            _inject(model, policy, new_cache), with_kwargs=True, prepend=True
        )
        undo.callback(hook.remove)
        yield model


def _use_hsr(model: PreTrainedModel, undo: ExitStack) -> None:
    """Set attn_implementation="hsr" on the text part of the model."""
    text = model.config.get_text_config(decoder=True)
    for config in _configs(model):
        undo.callback(
            setattr, config, "_attn_implementation_internal", config._attn_implementation
        )
    part = [name for name in model.config.sub_configs if getattr(model.config, name, None) is text]
    model.set_attn_implementation({part[0]: NAME} if part else NAME)
    if text._attn_implementation != NAME:
        raise ValueError(
            f"{type(model).__name__} does not support other attention functions (transformers' "
            "AttentionInterface)"
        )


def _configs(model: PreTrainedModel) -> list[Any]:
    configs = {id(x.config): x.config for x in model.modules() if isinstance(x, PreTrainedModel)}
    waiting = list(configs.values())
    while waiting:
        config = waiting.pop()
        for name in getattr(config, "sub_configs", {}):
            part = getattr(config, name, None)
            if part is not None and id(part) not in configs:
                configs[id(part)] = part
                waiting.append(part)
    return list(configs.values())


def _prepare_hsr(
    model: PreTrainedModel, new_cache: Callable[[], HSRCache], undo: ExitStack
) -> None:
    """Let ``generate`` start from an ``HSRCache`` where it would make a dynamic one."""
    if not hasattr(model, _PREPARE):
        return  # a model without generate()
    outer = getattr(model, _PREPARE)

    def prepare(generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any) -> Any:
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation must be None inside hsr_attention.enable, got {kind!r}"
            )
        missing = [name for name in CACHE_ARGUMENTS if model_kwargs.get(name) is None]
        result = outer(generation_config, model_kwargs, *args, **kwargs)
        for name in missing:
            if model_kwargs.get(name) is not None:  # made just now
                model_kwargs[name] = new_cache()
        return result

    previous = model.__dict__.get(_PREPARE)
    model.__dict__[_PREPARE] = prepare
    if previous is None:
        undo.callback(model.__dict__.pop, _PREPARE, None)
    else:
        undo.callback(model.__dict__.__setitem__, _PREPARE, previous)


def _inject(
    model: PreTrainedModel, policy: Policy, new_cache: Callable[[], HSRCache]
) -> Callable[..., tuple[tuple, dict] | None]:
    """Return a hook that gives an ``HSRCache`` to a forward call that would make a dynamic one."""
    name = cache_argument(model)
    signature = inspect.signature(model.forward)
    default = getattr(model.config.get_text_config(decoder=True), "use_cache", True)

    def hook(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if isinstance(kwargs.get(name), HSRCache):
            return None
        kwargs = {k: v for k, v in kwargs.items() if k not in CACHE_ARGUMENTS or v is not None}
        call = signature.bind_partial(*args, **kwargs)
        given = kwargs | call.arguments  # by position too, and names that only **kwargs takes
        for other in CACHE_ARGUMENTS:  # the model may rename an old one
            if isinstance(given.get(other), HSRCache):
                return None
            if given.get(other) is not None:
                raise ValueError(
                    f"{other} must be an HSRCache (or none) inside hsr_attention.enable, got "
                    f"{type(given[other]).__name__}"
                )
        use_cache = given.get("use_cache")
        use_cache = default if use_cache is None else use_cache
        if use_cache and not _checkpoints(model):
            return _with(call, name, new_cache())
        if isinstance(policy, ReLUPolicy):
            raise ValueError("a ReLUPolicy attends through its cache, got use_cache=False")
        # Layers that are checkpointed take no cache; some versions of transformers make one anyway.
        return _with(call, "use_cache", False) if use_cache else None

    return hook


def _checkpoints(model: PreTrainedModel) -> bool:
    """Say whether layers are checkpointed; the model's own property has a name for each release."""
    return model.training and any(
        getattr(x, "gradient_checkpointing", False) for x in model.modules()
    )


def _with(call: inspect.BoundArguments, name: str, value: Any) -> tuple[tuple, dict]:
    """Return the arguments of a call with one of them set."""
    if name not in call.signature.parameters:  # only its **kwargs takes it
        return call.args, call.kwargs | {name: value}
    call.arguments[name] = value
    return call.args, call.kwargs
