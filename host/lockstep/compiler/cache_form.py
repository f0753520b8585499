"""How keys and values lie in a cache: as int8, or as int4 in the words that MATRIX takes packed."""

from __future__ import annotations

from dataclasses import dataclass

from lockstep_isa.config import CoreConfig
from lockstep_isa.instructions import Weights
from lockstep_isa.sketch import GROUP
from lockstep_isa.weights import inputs_per_step, words_per_tile

from lockstep.errors import ModelError
from lockstep.graph import Attention, Graph

#: Words of a group of 32 inputs: multipliers, and two inputs a word.
GROUP_WORDS = words_per_tile(GROUP, GROUP)


@dataclass(frozen=True)
class CacheForm:
    """The form of keys, whose inputs are features, and of values, whose inputs are tokens.

    Attributes
    ----------
    bits : 8 or 4.
    """

    bits: int = 8

    def words(self, inputs: int) -> int:
        """Words of so many inputs; with 4 bits a multiple of 32."""
        return inputs if self.bits == 8 else inputs // GROUP * GROUP_WORDS

    def unit(self, rows: int) -> int:
        """Tokens that are met at least: what keys are counted in."""
        return rows if self.bits == 8 else max(rows, GROUP)

    @property
    def rate(self) -> int:
        """Inputs that the array takes in one step."""
        return 1 if self.bits == 8 else inputs_per_step(GROUP)

    @property
    def fields(self) -> dict[str, int]:
        """The fields of MATRIX that say so."""
        return {} if self.bits == 8 else {"weights": Weights.INT4_32}


#: Words of one input each.
INT8 = CacheForm()


def check_form(config: CoreConfig, graph: Graph, form: CacheForm) -> None:
    """Raise :class:`ModelError` where ``config`` cannot keep the keys and values of ``graph`` so."""
    if form.bits == 8:
        return
    if not config.packed:
        raise ModelError(
            f"core '{config.name}' takes no packed weights, so it cannot meet a cache of {form.bits} bits; use one of "
            "8, or another core"
        )
    if config.rows > GROUP // 2:
        raise ModelError(
            f"core '{config.name}' has {config.rows} rows, but the two int4 of a byte are joined in groups of {GROUP}: "
            f"a cache of {form.bits} bits takes a core of at most {GROUP // 2}"
        )
    for node in graph.of(Attention):
        if node.tile % GROUP:
            raise ModelError(
                f"{graph.source} meets keys in tiles of {node.tile}, which are no groups of {GROUP}; cores keep its "
                "cache in 8 bits only"
            )
