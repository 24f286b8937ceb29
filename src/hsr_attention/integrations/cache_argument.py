"""The name of the argument by which the forward call of a model takes its cache.

transformers calls it ``past_key_values`` up to 5.23, and ``cache`` from 5.24 on; models whose code
comes with their weights may keep the old name. So each model is asked, not the version.
"""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

CACHE_ARGUMENTS = ("past_key_values", "cache")


def cache_argument(model: Any) -> str:
    """Return what the forward call of ``model`` calls its cache: one of ``CACHE_ARGUMENTS``.

    Raises
    ------
    ValueError
        If it takes none by these names.
    """
    return _of_class(type(model))


@lru_cache  # a signature takes as long as a small operator, and every decoding step asks
def _of_class(model: type) -> str:
    parameters = inspect.signature(model.forward).parameters
    for name in CACHE_ARGUMENTS:
        if name in parameters:
            return name
    raise ValueError(
        f"the forward call of a model must take its cache as {' or '.join(CACHE_ARGUMENTS)}, got "
        f"{model.__name__}.forward with {', '.join(parameters)}"
    )


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """Return the keyword arguments that hand ``cache`` to ``model``: ``model(ids, **with_cache(...))``."""
    return {cache_argument(model): cache}
