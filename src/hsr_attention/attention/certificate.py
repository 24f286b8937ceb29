"""The certificate returned with an answer: what it is off by at most, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Certificate:
    """Bounds for one call of attention; arrays are float32 [batch, heads, m].

    Attributes
    ----------
    error_bound
        Deterministic: |out - exact|_inf <= error_bound, in the units of the values. Derived in
        ``DESIGN.md``, "The certificate". ReLU: which keys lie above the threshold is decided in
        float64.
    estimated_error
        An *estimate* of the same error, for rounding errors of codes that are independent, never
        above the bound. Not a bound; usually several times the true error.
    omitted_mass
        Deterministic bound of the share of the softmax mass on keys that were left out.
    density
        Keys that entered the answer, as a share of those the query may see.
    lse
        log of the sum of exp(logit) over the kept keys (ReLU: log of the sum of weights).
    work
        Counters: pairs ``sketch_scored``, ``refined`` to 8 bits, ``full_scored``; pairs answered from
        codes (``sketched``); tiles of queries by kind of scan (``scanned_four``, ``scanned_eight``,
        ``scanned_full``); of prompts, ``panels`` of keys that a tile of queries met, and pairs
        ``skipped`` in words of 64 keys from which nothing was kept; selections repeated to meet
        epsilon (``selected_again``). Over an index: ``full_scored`` and ``nodes_visited``.
    """

    error_bound: NDArray[np.float32]
    estimated_error: NDArray[np.float32]
    omitted_mass: NDArray[np.float32]
    density: NDArray[np.float32]
    lse: NDArray[np.float32]
    work: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of_call(cls, facts: Any) -> Certificate:
        """Return that of a native call; a number becomes an array when it is first asked for."""
        certificate = object.__new__(cls)
        certificate.__dict__["_facts"] = facts  # the fields are missing: see __getattr__
        return certificate

    def __getattr__(self, name: str) -> Any:
        facts = self.__dict__.get("_facts")
        if facts is None or name not in _FIELDS:
            raise AttributeError(f"'Certificate' object has no attribute '{name}'")
        found = facts.work() if name == "work" else facts.number(_FIELDS.index(name))
        return self.__dict__.setdefault(name, found)

    def __reduce__(self) -> tuple[Any, ...]:
        return Certificate, tuple(getattr(self, name) for name in _FIELDS)


_FIELDS = tuple(Certificate.__dataclass_fields__)  # the native numbers stand in this order
