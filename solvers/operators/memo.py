"""Whose values do cached factors belong to, and when has a parameter changed?

They belong to the numbers of W and Λ at one moment. Every lookup compares those with the numbers
now, and where one differs a new memo begins.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from solvers.dependencies import (
    Sendable,
    Snapshot,
    are_identical,
    leave_modes,
    must_not_cache,
)

T_ = TypeVar("T_")


# Note [When a parameter has changed]
# A parameter has changed when its numbers have, bit by bit, however they were written (see
# Note [Values decide] of `solvers.dependencies`). A memo holds a snapshot of the numbers of W and
# Λ that its contents were computed from. W, Wᵀ and operators rebuilt on equal tensors share one
# memo, so the snapshot is of the tensors of W as first given. A lookup compares; where numbers
# differ, the operator starts a memo of its own. A solve looks often: it compares once, when it
# begins, and its lookups trust that nobody writes to W meanwhile (`settled`). Tensors of a
# transform, a trace or a capture end with it: there nothing is stored.
class Memoized(Sendable, ABC):
    """Something that stores what was computed from its tensors until their numbers change."""

    transposed: bool
    """Whether this is the transpose of the operator whose factors the memo holds."""
    _memo: dict[Hashable, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Give the operator a memo and an orientation, which fields of its class may replace."""
        made = super().__new__(cls)
        for name, value in (("_memo", {}), ("transposed", False)):
            if not isinstance(getattr(cls, name, None), property):
                object.__setattr__(made, name, value)
        return made

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the numbers are."""

    @abstractmethod
    def _given(self) -> tuple[Tensor, ...]:
        """Return the tensors of W as first given, whose transpose this may be."""

    @abstractmethod
    def _own_metric(self) -> Tensor:
        """Return the tensor that Λ is made of."""

    def _parts(self) -> tuple[Memoized, ...]:
        """Return the operators that this one is made of, which have memos of their own."""
        return ()

    def _shared(self) -> dict[Hashable, Any]:
        """Return the memo, a new one where the values are no longer those that it belongs to."""
        if id(self._memo) in _trusted.memos:
            return self._memo
        if must_not_cache():
            return {}
        self._settle()
        return self._memo

    def _settle(self) -> None:
        """Compare all values at once; where some changed, find out which memos end."""
        values = self._values()
        tensors: list[Tensor] = []
        copies: list[Tensor] = []
        for memo, key, own in values:
            if key in memo:
                tensors += own
                copies += memo[key].copies
        if len(tensors) != len(copies) or not are_identical(tensors, copies):
            return self._settle_apart()
        for memo, key, own in values:
            if key not in memo:
                memo[key] = Snapshot.take(own)
        return None

    def _values(self) -> list[tuple[dict[Hashable, Any], Hashable, tuple[Tensor, ...]]]:
        """Return the tensors of which memos hold snapshots: memo, key and tensors, of all parts."""
        found: list[tuple[dict[Hashable, Any], Hashable, tuple[Tensor, ...]]] = [
            (self._memo, "values of W", self._given()),
            (self._memo, ("values of Λ", self.transposed), (self._own_metric(),)),
        ]
        for part in self._parts():
            found += part._values()
        return found

    def _settle_apart(self) -> None:
        for part in self._parts():
            part._settle()
        for memo, key, tensors in self._values()[:2]:
            snapshot = memo.get(key)
            if snapshot is not None and not snapshot.fits(tensors):
                object.__setattr__(self, "_memo", {})
                return self._settle()
            if snapshot is None:
                memo[key] = Snapshot.take(tensors)
        return None

    def adopt(self, other: Memoized) -> None:
        """Take over the memo of another operator of this structure, as far as the values agree."""
        object.__setattr__(self, "_memo", other._memo)
        for own, theirs in zip(self._parts(), other._parts(), strict=True):
            own.adopt(theirs)

    def _memos(self) -> dict[int, dict[Hashable, Any]]:
        """Return the memos of this operator and of those that it is made of, by identity."""
        found = {id(self._memo): self._memo}
        for part in self._parts():
            found |= part._memos()
        return found

    def settled(self) -> AbstractContextManager[None]:
        """Compare all values with those that the memo is of; within the block trust the result.

        For this operator, those that it is made of, and their transposes, on this thread.
        """
        if id(self._memo) in _trusted.memos or must_not_cache():
            return nullcontext()
        self._settle()
        return _Trusting(self._memos())

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_memo": {}}

    def memo(self, key: Hashable, build: Callable[[], T_]) -> T_:
        """Return what `build` returned on the first call with `key`, here or on the transpose.

        Everything is built again after W or Λ have changed, however they were changed. Within a
        function transform, a trace or a capture nothing is stored.
        """
        trusts = id(self._memo) in _trusted.memos
        if not trusts:
            if must_not_cache():
                return build()
            self._settle()
        memo = self._memo
        if key not in memo:
            trusting = nullcontext() if trusts else _Trusting(self._memos())
            with trusting, leave_modes(self.device.type):
                value = build()
            # Of several threads that build at once, all return what the first has stored.
            return memo.setdefault(key, value)
        return memo[key]


class _Trusted(threading.local):
    """The memos, by identity, whose values were compared when what runs on this thread began."""

    def __init__(self) -> None:
        self.memos: dict[int, dict[Hashable, Any]] = {}


_trusted = _Trusted()


class _Trusting(AbstractContextManager[None]):
    def __init__(self, memos: dict[int, dict[Hashable, Any]]) -> None:
        self.memos = memos

    def __enter__(self) -> None:
        self.before = _trusted.memos
        _trusted.memos = self.before | self.memos

    def __exit__(self, *_: object) -> None:
        _trusted.memos = self.before
