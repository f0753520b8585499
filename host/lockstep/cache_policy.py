"""What a session keeps of its keys and values, and which of them a query attends to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from lockstep_isa.selectors import Blocks, Greedy, Predicted, Rounds, Selector, SignHashes, Sinks
from lockstep_isa.sketch import GROUP

from lockstep.errors import InputError, ModelError
from lockstep.eviction import EvictionPolicy, asked_eviction, check_eviction
from lockstep.graph import Attention, Graph, PositionBias

#: What a number of a cache may take.
BITS = (8, 4)


@dataclass(frozen=True)
class CachePolicy:
    """How a session treats its cache; without anything, every token stays and counts.

    Attributes
    ----------
    eviction : which tokens stay in a cache of fewer slots than tokens; none: all.
    selector : chooses the keys that each query attends to; none: all that it sees.
    bits : of a key or value, one of :data:`BITS`; 4 as :mod:`lockstep_isa.int4_cache` says.
    """

    eviction: EvictionPolicy | None = None
    selector: Selector | None = None
    bits: int = 8


#: Everything stays and counts.
WHOLE = CachePolicy()


#: Keys at the beginning that ``sinks`` keeps.
SINKS = 4
#: Name -> what is made of the number behind it, and what that is.
SELECTORS: dict[str, tuple[Callable[[float], Selector], str]] = {
    "blocks": (lambda keys: Blocks(int(keys)), "keys, in blocks of 16"),
    "sinks": (lambda keys: Sinks(SINKS, int(keys) - SINKS), f"keys, the first {SINKS} and the last ones"),
    "a3": (lambda rounds: Greedy(int(rounds)), "greatest and least products that are looked at"),
    "elsa": (SignHashes, "exponents of two below the best estimated score"),
    "sanger": (Predicted, "least predicted probability, 0 to 1"),
    "energon": (lambda alpha: Rounds(((2, alpha), (4, alpha))), "border between mean and greatest score, 0 to 1"),
}


def selector(name: str) -> Selector:
    """The selector called ``NAME:NUMBER``, one of :data:`SELECTORS`; a number alone is that of ``blocks``.

    Raises :class:`InputError` for an unknown name, or a number that makes no sense.
    """
    base, _, number = name.rpartition(":")
    base = base or "blocks"
    if base not in SELECTORS or name in SELECTORS:
        raise InputError(f"'{name}' selects no keys; give how many, or one of {', '.join(SELECTORS)} with its number")
    make, meaning = SELECTORS[base]
    try:
        value = float(number)
    except ValueError:
        raise InputError(f"'{number}' is no number for '{base}'; give {base}:NUMBER, the {meaning}") from None
    whole, share = base in ("blocks", "sinks", "a3"), base in ("sanger", "energon")
    least = {"sinks": SINKS + 1, "a3": 1}.get(base, 0)
    if not least <= value <= (1 if share else math.inf) or math.isinf(value) or (whole and value != int(value)):
        raise InputError(f"'{number}' makes no sense for '{base}'; give {base}:NUMBER, the {meaning}")
    try:
        return make(value)
    except ValueError as error:
        raise InputError(f"{error}; give select a greater number of whole blocks") from None


def asked_policy(
    evict: str | None = None,
    keep: int | None = None,
    select: int | str | None = None,
    cache_bits: int | None = None,
) -> CachePolicy:
    """The policy that somebody asks for.

    evict, keep : as for :func:`lockstep.eviction.asked_eviction`.
    select : keys that a query attends to; see :func:`selector`; none for all.
    cache_bits : of a key or value, 8 or 4; none for 8.

    Raises :class:`InputError` for what makes no sense.
    """
    eviction = asked_eviction(evict, keep)
    if cache_bits is not None and cache_bits not in BITS:
        raise InputError(f"{cache_bits!r} is no number of bits for keys and values; give {' or '.join(map(str, BITS))}")
    bits = WHOLE.bits if cache_bits is None else cache_bits
    if select is None:
        return CachePolicy(eviction, bits=bits)
    if eviction is not None:
        raise InputError("keys are either given up (keep) or chosen anew for each token (select); give one of them")
    return CachePolicy(selector=selector(str(select)), bits=bits)


def hosted(policy: CachePolicy) -> tuple[tuple[str, str], ...]:
    """What runs on the host where a model runs on a core, with the reason."""
    chosen, reason = policy.selector, None
    if chosen is not None and not (isinstance(chosen, Blocks) and chosen.block == Blocks.block):
        reason = f"cores choose blocks of {Blocks.block} keys, not by {chosen}"
    elif chosen is not None and policy.bits == 4:
        reason = "cores make sketches of keys of 8 bits, not of 4"
    elif policy.eviction is not None and policy.bits == 4:
        reason = "cores give up no token of a cache of 4 bits, in which two share a byte"
    return () if reason is None else (("attention", reason),)


def check_policy(graph: Graph, policy: CachePolicy) -> None:
    """Raise :class:`ModelError` where the attention of ``graph`` cannot be treated so."""
    if policy.bits == 4:
        _check_int4(graph)
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


def _check_int4(graph: Graph) -> None:
    for node in graph.of(Attention):
        if node.head_dim % GROUP:
            raise ModelError(
                f"{graph.source} has heads of {node.head_dim} features, which are no groups of {GROUP}; a cache of 4 "
                "bits has one multiplier for each"
            )
