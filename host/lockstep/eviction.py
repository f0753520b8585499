"""Caches of a fixed size: which token makes room for the next one.

A cache with a policy has ``budget`` slots. The first tokens take them in order; every further token takes the slot of
one that the policy gives up, in all layers and heads alike. Queries see the keys that are there, in the order of their
slots. A key keeps the position that it was made for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from lockstep_isa.numerics import add

from lockstep.errors import InputError, ModelError, SequenceLengthError
from lockstep.graph import Attention, Graph, PositionBias


class EvictionPolicy(Protocol):
    """Decides which token leaves a full cache.

    Attributes
    ----------
    budget : slots of the cache.
    weighs : whether it asks how much attention keys have got; that costs a pass of VECTOR for each head.
    """

    @property
    def budget(self) -> int: ...

    @property
    def weighs(self) -> bool: ...

    def victim(self, positions: np.ndarray, importance: np.ndarray) -> int:
        """The slot that is given up.

        positions : int64[budget], where the token in each slot stands in its text. importance : float32[budget], the
        attention that it has got since it came, summed over queries, layers and heads; zeros unless ``weighs``.
        """
        ...


@dataclass(frozen=True)
class Streaming:
    """The first ``sinks`` tokens and the last ones stay (StreamingLLM, Xiao et al., 2023, arXiv:2309.17453)."""

    budget: int
    sinks: int = 4
    weighs = False

    def __post_init__(self) -> None:
        _check_kept("sinks", self.sinks, self.budget)

    def victim(self, positions: np.ndarray, importance: np.ndarray) -> int:
        return int(np.argmin(np.where(positions < self.sinks, np.iinfo(np.int64).max, positions)))


@dataclass(frozen=True)
class HeavyHitters:
    """The last ``recent`` tokens stay, and those others that have got most attention (H2O, Zhang et al., 2023,
    arXiv:2306.14048). Half of the budget is recent unless given.
    """

    budget: int
    recent: int | None = None
    weighs = True

    def __post_init__(self) -> None:
        _check_kept("recent", self.budget // 2 if self.recent is None else self.recent, self.budget)

    def victim(self, positions: np.ndarray, importance: np.ndarray) -> int:
        recent = self.budget // 2 if self.recent is None else self.recent
        return _least(positions, importance, positions > positions.max() - recent)


@dataclass(frozen=True)
class TokenPruning:
    """The token that has got least attention leaves, whenever it came; the newest one has not been looked at and stays
    (cascade token pruning of SpAtten, Wang et al., 2021, arXiv:2012.09852).
    """

    budget: int
    weighs = True

    def __post_init__(self) -> None:
        _check_kept("the newest token", 1, self.budget)

    def victim(self, positions: np.ndarray, importance: np.ndarray) -> int:
        return _least(positions, importance, positions == positions.max())


def _least(positions: np.ndarray, importance: np.ndarray, stays: np.ndarray) -> int:
    """The slot of least importance among those that may go; of equal ones, the oldest token's."""
    candidates = np.flatnonzero(~stays)
    return int(candidates[np.lexsort((positions[candidates], importance[candidates]))[0]])


def _check_kept(what: str, count: int, budget: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise InputError(f"{what} = {count!r} is no number of tokens; give 0 or more")
    if not count < budget:
        raise InputError(f"{what} = {count} leaves no slot of {budget} for others; give a greater budget")


#: Name -> policy, and the parameter that ``NAME:N`` gives.
POLICIES: dict[str, tuple[type, str | None]] = {
    "streaming": (Streaming, "sinks"),
    "h2o": (HeavyHitters, "recent"),
    "spatten": (TokenPruning, None),
}


def eviction(name: str, budget: int) -> EvictionPolicy:
    """The policy called ``name``: ``streaming``, ``h2o`` or ``spatten``, with its parameter as in ``streaming:4``.

    Raises :class:`InputError` for an unknown name, or numbers that leave nothing to give up.
    """
    base, _, number = name.partition(":")
    if base not in POLICIES:
        raise InputError(f"'{name}' is no eviction policy; there are {', '.join(POLICIES)}")
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 2:
        raise InputError(f"a cache of {budget!r} tokens is too small to give one up; give 2 or more")
    kind, parameter = POLICIES[base]
    if not number and ":" not in name:
        return kind(budget)
    if parameter is None:
        raise InputError(f"'{base}' has no parameter, but '{name}' gives one")
    if not number.isdigit():
        raise InputError(f"'{number}' in '{name}' is no number of tokens for {parameter}")
    return kind(budget, int(number))


def asked_eviction(name: str | None, budget: int | None) -> EvictionPolicy | None:
    """The policy that somebody asks for by name and budget; none if by neither. Raises as :func:`eviction` does."""
    if budget is None:
        if name is not None:
            raise InputError(f"'{name}' says which tokens leave the cache, but not how many stay; give keep as well")
        return None
    return eviction("streaming" if name is None else name, budget)


def check_eviction(graph: Graph, policy: EvictionPolicy) -> None:
    """Raise :class:`ModelError` where attention of ``graph`` hangs on more than which keys are there."""
    if graph.of(PositionBias):
        raise ModelError(f"{graph.source} adds a bias on positions to its scores; its cache can give up no tokens")
    for node in graph.of(Attention):
        if node.window is not None:
            raise ModelError(
                f"{graph.source} sees the last {node.window} tokens only; its cache needs no eviction policy"
            )
        if policy.weighs and policy.budget > node.tile:
            raise ModelError(
                f"a cache of {policy.budget} tokens is met in several tiles of {node.tile} keys, in which attention "
                f"cannot be weighed; give at most {node.tile}, or the policy 'streaming'"
            )


@dataclass(frozen=True)
class Piece:
    """New tokens that a session takes at once.

    Attributes
    ----------
    first, count : their positions. slot : of the first one; the others follow. seen : slots that are filled when the
    last one is there.
    """

    first: int
    count: int
    slot: int
    seen: int


class Slots:
    """Which token is in which slot of one sequence's cache.

    Parameters
    ----------
    capacity : most tokens of the sequence. policy : of its cache; none where it has a slot for each.

    Attributes
    ----------
    held : slots.
    """

    def __init__(self, capacity: int, policy: EvictionPolicy | None = None) -> None:
        self.policy = policy if policy is not None and policy.budget < capacity else None
        self.held = capacity if self.policy is None else self.policy.budget
        self._positions = np.zeros(self.held, np.int64)
        self._importance = np.zeros(self.held, np.float32)

    @property
    def weighs(self) -> bool:
        """Whether :meth:`credit` must be told of every token."""
        return self.policy is not None and self.policy.weighs

    def place(self, first: int, count: int) -> Piece:
        """A slot for the token at position ``first``, and for as many of the ``count`` from there on as can share its
        turn: all that fit, or one that takes another's place.
        """
        if first < self.held:
            count = min(count, self.held - first)
            at = np.arange(first, first + count)
            self._positions[at] = at
            self._importance[at] = 0
            return Piece(first, count, first, first + count)
        assert self.policy is not None
        slot = self.policy.victim(self._positions, self._importance)
        self._positions[slot], self._importance[slot] = first, 0
        return Piece(first, 1, slot, self.held)

    def restore(self, length: int, rows: int) -> None:
        """As if behind ``length`` tokens, of which the last ``rows`` are there, the oldest one in the first slot."""
        if rows != min(length, self.held):
            raise SequenceLengthError(f"{length} tokens leave {min(length, self.held)} in the cache, not {rows}")
        self._positions[:rows] = np.arange(length - rows, length)
        self._importance[:rows] = 0

    def credit(self, importance: np.ndarray) -> None:
        """Add what tokens gave to keys: float32[tokens, slots seen], in the order of the tokens."""
        seen = importance.shape[1]
        for row in importance:
            self._importance[:seen] = add(self._importance[:seen], row)

    def check_truncation(self, length: int, kept: int) -> None:
        """Raise :class:`SequenceLengthError` unless a sequence of ``length`` tokens can be cut to ``kept``."""
        if not 0 <= kept <= length:
            raise SequenceLengthError(f"cannot keep {kept} tokens of a session that has {length}")
        if kept not in (0, length) and not self.can_truncate(length):
            raise SequenceLengthError(
                f"cannot keep {kept} tokens of a session that has given up some of its {length}; keep all or none"
            )

    def can_truncate(self, length: int) -> bool:
        """Whether a sequence of ``length`` tokens can be cut to any length."""
        return length <= self.held and not self.weighs
