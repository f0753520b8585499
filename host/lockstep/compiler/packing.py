"""How weights lie in the WEIGHT memory: packed where the core and the shape allow it, else as dense int8."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from lockstep_isa.config import CoreConfig
from lockstep_isa.instructions import PATTERNS, WEIGHT_GROUPS, Sparsity, Weights
from lockstep_isa.weights import PER_INDEX_WORD, WeightError, inputs_per_step, pack, words_per_tile

from lockstep.graph import Graph
from lockstep.quantisation.formats import Format, QuantisedWeight

_WEIGHTS = {group: weights for weights, group in WEIGHT_GROUPS.items()}
_SPARSITY = {pattern: sparsity for sparsity, pattern in PATTERNS.items()}


@dataclass(frozen=True)
class Packing:
    """The form of a weight int8[N, K] on a core.

    Attributes
    ----------
    words : WEIGHT words of a panel. weights, sparsity : what MATRIX is told.
    """

    words: int
    weights: Weights = Weights.INT8
    sparsity: Sparsity = Sparsity.DENSE

    @property
    def fields(self) -> dict[str, int]:
        """The fields of MATRIX that say how its weights are packed."""
        return {"weights": self.weights, "sparsity": self.sparsity}

    @property
    def rate(self) -> int:
        """Inputs that the array takes in one step."""
        return inputs_per_step(WEIGHT_GROUPS[self.weights], PATTERNS[self.sparsity])

    @property
    def unit(self) -> int:
        """Inputs whose words are whole: where K can be cut."""
        group, pattern = WEIGHT_GROUPS[self.weights], PATTERNS[self.sparsity]
        if group is not None or pattern is None:
            return group or 1
        return pattern[1] * PER_INDEX_WORD // pattern[0]


def activation_unit(config: CoreConfig) -> int:
    """To multiples of how many ACTIVATION words the left operands of products are aligned: chunks that may be zero
    begin with them."""
    if config.zero_skipping:
        return config.rows
    return 4 if config.packed else 1


def reason_to_expand(config: CoreConfig, format: Format, length: int) -> str | None:
    """Why weights of ``format`` with K = ``length`` become dense int8 on a core; none where they are packed."""
    if not config.packed:
        return f"core '{config.name}' takes no packed weights"
    try:
        words_per_tile(length, format.group, format.pattern)
    except WeightError as error:
        return str(error)
    return None


def packing(config: CoreConfig, length: int, stored: QuantisedWeight | None) -> Packing:
    """The form of a weight with K = ``length``; ``stored`` is what it came as, if in fewer bits than int8[N, K]."""
    if stored is None or reason_to_expand(config, stored.format, length):
        return Packing(length)
    group, pattern = stored.format.group, stored.format.pattern
    return Packing(words_per_tile(length, group, pattern), _WEIGHTS[group], _SPARSITY[pattern])


def packed_panels(stored: QuantisedWeight, first: int, end: int, rows: int) -> np.ndarray:
    """uint8[panels, words, rows] of the output channels ``first`` to ``end``."""
    k = None if stored.multipliers is None else stored.multipliers[first:end]
    return pack(stored.values[first:end], rows, k, stored.pattern)


def expanded(graph: Graph, config: CoreConfig | None) -> tuple[tuple[str, str], ...]:
    """The weights of ``graph`` that came in fewer bits but are dense int8 on a core, and why; none on the host."""
    if config is None:
        return ()
    reasons = {
        name: reason_to_expand(config, stored.format, stored.values.shape[1]) for name, stored in graph.stored.items()
    }
    return tuple((name.replace(".int8", ""), reason) for name, reason in reasons.items() if reason is not None)
