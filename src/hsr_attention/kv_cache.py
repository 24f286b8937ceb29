"""Keys, values and codes of one attention layer: what decoding attends over."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hsr_attention import _native, arguments
from hsr_attention.attention.certificate import Certificate
from hsr_attention.policies import Policy, ReLUPolicy, SoftmaxPolicy


class KVCache:
    """The growing cache of one layer: full-precision keys and values, and their codes.

    Rows stand token by token, ``[n, batch, kv_heads, head_dim]``, in the dtype they came in, so
    appending never moves a token. Every 16 keys become a block of codes (certified 8-bit keys in two
    planes, 4-bit values); the newest, uncoded keys are always read at full precision.

    Parameters
    ----------
    policy : SoftmaxPolicy or ReLUPolicy
        Decides for every ``attend``.
    storage : "memory" or "disk"
        Where full-precision keys and values stand. On disk they are in nameless files, mapped into
        memory, of which decoding reads the exact tier only; codes are in memory always. The files
        vanish with the cache. Answers are the same.
    directory : path, optional
        Of the files on disk; the system's directory for temporary files by default. Where that is
        a file system in memory (often ``/tmp`` or ``/dev/shm``), name another.

    Raises
    ------
    OSError
        If no file can be made in ``directory``, or, later, the disk is full; the cache is then
        unchanged.

    Examples
    --------
    >>> import numpy as np, hsr_attention as hsr
    >>> rng = np.random.default_rng(0)
    >>> layer = hsr.KVCache(hsr.SoftmaxPolicy(epsilon=0.05))
    >>> k, v = rng.standard_normal((2, 1, 2, 1000, 64), dtype=np.float32)
    >>> layer.append(k, v)
    >>> q = rng.standard_normal((1, 6, 1, 64), dtype=np.float32)  # 3 query heads share a key head
    >>> layer.attend(q).shape
    (1, 6, 1, 64)
    """

    def __init__(
        self,
        policy: Policy | None = None,
        *,
        storage: str = "memory",
        directory: str | os.PathLike[str] | None = None,
    ) -> None:
        self.policy: Policy = SoftmaxPolicy() if policy is None else policy
        if not isinstance(self.policy, SoftmaxPolicy | ReLUPolicy):
            raise TypeError(f"policy must be a SoftmaxPolicy or a ReLUPolicy, got {policy!r}")
        self._directory = storage_directory(storage, directory)
        self._layer: Any = None
        self._shape: tuple[int, ...] = ()  # of the native layer, quicker to ask: a step asks often
        self._dtype = arguments.Dtype.float32
        self._codes_values = _reads_value_codes(self.policy)
        self._settings, self._certifies = _native_settings(self.policy)

    def __len__(self) -> int:
        """Return the number of cached tokens."""
        return 0 if self._layer is None else len(self._layer)

    def __repr__(self) -> str:
        """Return the policy and the shapes."""
        place = "" if self.storage == "memory" else f"storage={self.storage!r}, "
        if self._layer is None:
            return f"KVCache({self.policy!r}, {place}empty)"
        layer = self._layer
        return (
            f"KVCache({self.policy!r}, {place}batch={layer.batch}, kv_heads={layer.kv_heads}, "
            f"n={len(self)}, head_dim={layer.key_dim})"
        )

    @property
    def storage(self) -> str:
        """Where full-precision keys and values stand: "memory" or "disk"."""
        return "disk" if self._directory else "memory"

    @property
    def kv_heads(self) -> int:
        """Key heads; 0 while nothing is cached."""
        return self._shape[1] if self._shape else 0

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and codes, in memory and on disk."""
        return self.row_nbytes + self.code_nbytes

    @property
    def row_nbytes(self) -> int:
        """Bytes of the full-precision keys and values; on disk with ``storage="disk"``."""
        return 0 if self._layer is None else self._layer.row_nbytes

    @property
    def code_nbytes(self) -> int:
        """Bytes of the codes with their steps and residuals, in memory."""
        return 0 if self._layer is None else self._layer.code_nbytes

    def append(self, keys: Any, values: Any) -> None:
        """Add tokens: keys [batch, kv_heads, t, head_dim], values [batch, kv_heads, t, value_dim].

        Raises
        ------
        TypeError
            If keys and values (or earlier ones) differ in dtype.
        ValueError
            If shapes disagree with each other or with what is cached, or a number is not finite; the
            cache is then unchanged.
        MemoryError, OSError
            If memory or disk is full; the cache is then unchanged.
        """
        self._append(keys, values, "keys", "values")

    def _append(self, keys: Any, values: Any, keys_name: str, values_name: str) -> None:
        k, v = arguments.heads(keys_name, keys), arguments.heads(values_name, values)
        if k.shape[:3] != v.shape[:3]:
            raise ValueError(
                f"{values_name} must have [batch, kv_heads, tokens] = {k.shape[:3]} like "
                f"{keys_name}, got {v.shape[:3]}"
            )
        if v.dtype is not k.dtype:
            raise TypeError(
                f"{values_name} must be {k.dtype.name} like {keys_name}, got {v.dtype.name}"
            )
        layer = self._layer
        if layer is None:
            if 0 in k.shape[:2]:
                raise ValueError(f"{keys_name} must have batch and kv_heads >= 1, got {k.shape}")
            layer = _native.LayerCache(
                k.shape[0],
                k.shape[1],
                k.shape[3],
                v.shape[3],
                int(k.dtype),
                self._codes_values,
                self._directory,
            )
        else:
            found = (*k.shape[:2], k.shape[3], v.shape[3])
            if found != self._shape:
                raise ValueError(
                    "keys and values must have (batch, kv_heads, head_dim, value_dim) = "
                    f"{self._shape} like the cache, got {found}"
                )
            if k.dtype is not self._dtype:
                raise TypeError(
                    f"keys must be {self._dtype.name} like the cache, got {k.dtype.name}"
                )
        layer.append(k.native, v.native, keys_name, values_name)
        if layer is not self._layer:
            self._layer, self._dtype = layer, k.dtype
            self._shape = (*k.shape[:2], k.shape[3], v.shape[3])

    def use_policy(self, policy: Policy) -> None:
        """Attend by another policy from now on; the tokens and their codes stay.

        Raises
        ------
        ValueError
            If the policy weighs keys from value codes (``tail="sketch"``) and this cache was filled
            under one that does not, so that it has none.
        """
        if not isinstance(policy, SoftmaxPolicy | ReLUPolicy):
            raise TypeError(f"policy must be a SoftmaxPolicy or a ReLUPolicy, got {policy!r}")
        if self._layer is None:
            self._codes_values = _reads_value_codes(policy)
        elif _reads_value_codes(policy) and not self._codes_values:
            raise ValueError(
                "policy must not have tail='sketch' here: the cache was filled under "
                f"{self.policy!r} and holds no codes of values; fill it under a sketching policy"
            )
        self.policy = policy
        self._settings, self._certifies = _native_settings(policy)

    def crop(self, n: int) -> None:
        """Keep the first n tokens (all of them if there are fewer)."""
        if isinstance(n, bool) or not isinstance(n, int | np.integer):
            raise TypeError(f"n must be an integer, got {n!r}")
        if n < 0:
            raise ValueError(f"n must be >= 0, got {n}")
        if self._layer is not None and n < len(self):
            self._layer.crop(int(n))

    def reorder(self, batch_indices: Any) -> None:
        """Make row i the former row ``batch_indices[i]``: permute, repeat or select batch rows."""
        if self._layer is None:
            return
        given = batch_indices.detach() if arguments.is_torch(batch_indices) else batch_indices
        rows = np.asarray(given)
        if rows.ndim != 1 or rows.size == 0 or rows.dtype.kind not in "iu":
            raise ValueError(
                f"batch_indices must be integers of shape [batch], got {rows.dtype} {rows.shape}"
            )
        if rows.min() < 0 or rows.max() >= self._layer.batch:
            raise ValueError(
                f"batch_indices must lie in [0, {self._layer.batch}), got {rows.min()}..{rows.max()}"
            )
        self._layer.reorder(np.ascontiguousarray(rows, dtype=np.int64))
        self._shape = (len(rows), *self._shape[1:])

    def rows(self) -> tuple[arguments.FloatArray, arguments.FloatArray]:
        """Return keys and values [batch, kv_heads, n, dim] as read-only views without a copy."""
        if self._layer is None:
            raise ValueError("the cache is empty")
        dtype = self._dtype
        views = self._layer.keys(), self._layer.values()
        for view in views:
            view.flags.writeable = False
        return arguments.FloatArray(views[0], dtype), arguments.FloatArray(views[1], dtype)

    def attend(
        self,
        q: Any,
        scale: float | None = None,
        *,
        mask: Any = None,
        return_certificate: bool = False,
        tokens: int | None = None,
    ) -> Any:
        """Attend from the newest m positions, causal among themselves.

        Parameters
        ----------
        q : [batch, heads, m, head_dim]
            heads must be a multiple of kv_heads; query head h reads key head h // (heads / kv_heads).
        scale : float, optional
            logit = scale * <q, k>; 1 / sqrt(head_dim) by default.
        mask : bool [batch or 1, m or 1, n], optional
            True where a key may be seen, besides causality (left padding, for example).
        return_certificate : bool
            Return ``(out, Certificate)``.
        tokens : int, optional
            Attend as if the cache held its first ``tokens`` tokens only, which is also the n of
            the mask.

        Returns
        -------
        [batch, heads, m, value_dim]
            Of the kind and dtype of q; with ``return_certificate`` a pair of it and a ``Certificate``.
            Rows that may see no key are zero.
        """
        queries = arguments.heads("q", q)
        return_certificate = arguments.flag("return_certificate", return_certificate)
        if self._layer is None:
            raise ValueError("the cache must hold keys before it can be attended to, got 0")
        m, n = queries.shape[2], len(self._layer)
        if tokens is not None:
            if not 0 <= tokens <= n:
                raise ValueError(f"tokens must lie in [0, {n}], got {tokens}")
            n = tokens
        if m > n:
            raise ValueError(f"q must have at most {n} positions (cached tokens), got {m}")
        visible = None if tokens is None else np.arange(n - m + 1, n + 1, dtype=np.int64)
        out, certificate = self._attend(q, queries, visible, scale, mask, return_certificate, n)
        return (out, certificate) if return_certificate else out

    def _attend(
        self,
        q: Any,
        queries: arguments.FloatArray,
        visible: NDArray[np.int64] | None,
        scale: float | None,
        mask: Any,
        certify: bool,
        n: int,
    ) -> tuple[Any, Certificate | None]:
        batch, heads, m, dim = queries.shape
        own_batch, kv_heads, key_dim, value_dim = self._shape
        if batch != own_batch:
            raise ValueError(f"q must have batch {own_batch} like the keys, got {batch}")
        if dim != key_dim:
            raise ValueError(f"q must have head_dim {key_dim} like the keys, got {dim}")
        if heads == 0 or heads % kv_heads:
            raise ValueError(f"q must have a multiple of kv_heads = {kv_heads} heads, got {heads}")
        scale = arguments.scale(scale, dim)
        seen = None if mask is None else self._key_mask(mask, batch, m, n)
        rows = (batch, heads, m, value_dim)
        out, address, rounds = arguments.place_for(q, queries, rows)
        answer, facts = self._layer.attend(
            queries.native,
            queries.dtype,
            address,
            rounds,
            visible,
            self._settings,
            scale,
            certify and self._certifies,
            certify,
            self._thresholds(queries, scale, visible, seen, n),
            seen,
        )
        if out is None:
            out = arguments.like(q, answer)
        if facts is None:
            return out, None
        if not address:
            bound = facts.number(0)
            bound += arguments.output_rounding(q, answer)
        return out, Certificate.of_call(facts)

    def _key_mask(self, mask: Any, batch: int, m: int, n: int) -> NDArray[np.uint8]:
        found = arguments.key_mask(mask, batch, m, n)
        behind = len(self) - n
        return np.pad(found, ((0, 0), (0, 0), (0, behind))) if behind > 0 else found

    def _thresholds(
        self,
        queries: arguments.FloatArray,
        scale: float,
        visible: NDArray[np.int64] | None,
        mask: NDArray[np.uint8] | None,
        n: int,
    ) -> NDArray[np.float64] | None:
        rule = self.policy.threshold
        if rule is None:
            return None
        shape = queries.shape[:3]
        if callable(rule):
            key_rms = self._layer.key_rms()
            group = shape[1] // self.kv_heads
            n_seen = keys_seen(n, shape[2], visible, mask)
            rule = rule(queries.to_float32(), np.repeat(key_rms, group, axis=1), n_seen, scale)
        return arguments.attention_thresholds(rule, shape)


def keys_seen(
    n: int, m: int, visible: NDArray[np.int64] | None, mask: NDArray[np.uint8] | None
) -> NDArray[np.int64]:
    """Return how many of n keys each of m queries may see, [batch or 1, 1, m]."""
    if visible is None:
        visible = np.arange(n - m + 1, n + 1)
    if mask is None:
        return visible[None, None, :]
    if mask.shape[1] == 1:  # the same for all queries: padding
        until = np.concatenate([np.zeros((len(mask), 1), np.int64), mask[:, 0].cumsum(1)], axis=1)
        return until[:, visible][:, None, :]
    seen = [np.count_nonzero(mask[:, i, :end], axis=1) for i, end in enumerate(visible)]
    return np.stack(seen, axis=1)[:, None, :]


STORAGES = ("memory", "disk")


def storage_directory(storage: str, directory: str | os.PathLike[str] | None) -> str:
    """Return the directory for files, checked by making one; empty for storage in memory."""
    arguments.one_of("storage", storage, STORAGES)
    if storage == "memory":
        if directory is not None:
            raise ValueError(f'directory must be None with storage="memory", got {directory!r}')
        return ""
    path = os.path.abspath(tempfile.gettempdir() if directory is None else os.fspath(directory))
    if not os.path.isdir(path):
        raise ValueError(f"directory must be an existing directory, got {path!r}")
    try:
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        reason = f"directory must be writable to hold keys and values, got {error.strerror}"
        raise OSError(error.errno, reason, path) from None


def _native_settings(policy: Policy) -> tuple[Any, bool]:
    """Return what the native call needs of the policy, once, and whether it computes certificates."""
    softmax = isinstance(policy, SoftmaxPolicy)
    settings = _native.AttendSettings(
        rule=policy.rule,
        sketch_tail=_reads_value_codes(policy),
        epsilon=(policy.epsilon or policy.tail_epsilon) if softmax else 0.5,
        exact_share=policy.exact_share if softmax else 0.5,
        top_r=min(policy.top_r or 0, 2**62) if softmax else 0,
        power=1 if softmax else policy.power,
    )
    return settings, not softmax or policy.certify


def _reads_value_codes(policy: Policy) -> bool:
    return isinstance(policy, SoftmaxPolicy) and policy.tail == "sketch"
