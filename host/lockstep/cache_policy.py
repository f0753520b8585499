"""What a session keeps of its keys and values, and which of them a query attends to."""

from __future__ import annotations

from dataclasses import dataclass

from lockstep_isa.selectors import Blocks, Selector
from lockstep_isa.sketch import GROUP

from lockstep.errors import InputError, ModelError
from lockstep.eviction import EvictionPolicy, asked_eviction, check_eviction
from lockstep.graph import Attention, Graph, PositionBias


@dataclass(frozen=True)
class CachePolicy:
    """How a session treats its cache; without anything, every token stays and counts.

    Attributes
    ----------
    eviction : which tokens stay in a cache of fewer slots than tokens; none: all.
    selector : chooses the keys that each query attends to; none: all that it sees.
    """

    eviction: EvictionPolicy | None = None
    selector: Selector | None = None


#: Everything stays and counts.
WHOLE = CachePolicy()


def asked_policy(evict: str | None = None, keep: int | None = None, select: int | None = None) -> CachePolicy:
    """The policy that somebody asks for.

    evict, keep : as for :func:`lockstep.eviction.asked_eviction`.
    select : keys that a query attends to, in blocks of 16 that the core chooses; none for all.

    Raises :class:`InputError` for what makes no sense.
    """
    eviction = asked_eviction(evict, keep)
    if select is None:
        return CachePolicy(eviction)
    if eviction is not None:
        raise InputError("keys are either given up (keep) or chosen anew for each token (select); give one of them")
    try:
        return CachePolicy(selector=Blocks(select))
    except ValueError as error:
        raise InputError(f"{error}; give select a greater number of whole blocks") from None


def check_policy(graph: Graph, policy: CachePolicy) -> None:
    """Raise :class:`ModelError` where the attention of ``graph`` cannot be treated so."""
    if policy.eviction is not None:
        check_eviction(graph, policy.eviction)
    if policy.selector is None:
        return
    if policy.eviction is not None:
        raise ModelError("a cache that gives up tokens cannot be chosen from: the sketch of its keys would not last")
    if graph.of(PositionBias):
        raise ModelError(f"{graph.source} adds a bias on positions to its scores; its keys cannot be chosen")
    for node in graph.of(Attention):
        if isinstance(policy.selector, Blocks) and node.head_dim % GROUP:
            raise ModelError(
                f"{graph.source} has heads of {node.head_dim} features, which are no groups of {GROUP}; keys are "
                "chosen by a sketch that has one multiplier for each"
            )
