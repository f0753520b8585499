"""What a core would take of an ECP5: an estimate from its sizes, fitted to cores that yosys counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lockstep_isa.config import CoreConfig
from lockstep_rtl.synthesis import Resources

#: On what the logic of each unit depends, by name.
TERMS: dict[str, dict[str, Callable[[CoreConfig], float]]] = {
    "LOAD": {"each": lambda c: 1, "row": lambda c: c.rows},
    "MATRIX": {"each": lambda c: 1, "element": lambda c: c.rows * c.columns},
    "VECTOR": {"each": lambda c: 1, "lane": lambda c: c.lanes, "row": lambda c: c.rows},
    "STORE": {"each": lambda c: 1, "row": lambda c: c.rows},
    "scratchpads": {"each": lambda c: 1, "row": lambda c: c.rows},
    "control": {"each": lambda c: 1, "bus byte": lambda c: c.bus_bytes},
}
#: Unit -> term -> LUT4 sites (carry chains and LUT RAM included) and flip-flops. That is the fit which
#: benchmarks/resource_fit.py makes to cores of 4 x 4 with 1, 2 and 4 lanes and of 8 x 8 with 2, without features; it is
#: off by 0.5 % at most there.
FIT: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "LOAD": {"each": (952.0, 456.0), "row": (4.0, 32.2)},
    "MATRIX": {"each": (689.3, 550.0), "element": (86.5, 66.7)},
    "VECTOR": {"each": (1906.7, 1607.0), "lane": (8036.9, 3861.0), "row": (485.1, 365.2)},
    "STORE": {"each": (882.0, 475.0), "row": (94.0, 72.0)},
    "scratchpads": {"each": (198.0, 77.0), "row": (81.7, 0.0)},
    "control": {"each": (7225.0, 5821.0), "bus byte": (69.0, -2.0)},
}
#: Feature -> unit -> term -> the same, of what the feature adds: cores of 4 x 4 and 8 x 8 with 2 lanes, with it and
#: without, counted as above. Lines of a few sites, which are the same logic written otherwise, are left out.
FEATURE_FIT: Mapping[str, Mapping[str, Mapping[str, tuple[float, float]]]] = {
    "packed": {
        "MATRIX": {"each": (782.0, 180.0), "element": (94.1, 59.5)},
        "scratchpads": {"each": (152.0, 3.0), "row": (44.0, 0.0)},
        "control": {"each": (0.0, 8.0)},
    },
    "selection": {
        "LOAD": {"each": (158.0, 166.0)},
        "VECTOR": {"each": (1628.0, 667.0)},
        "control": {"each": (240.0, 188.0)},
    },
    "zero_skipping": {"MATRIX": {"each": (380.0, 151.0)}, "control": {"each": (135.0, 56.0)}},
}
#: Feature -> the multipliers and block RAMs that it adds: second products of elements, and two multipliers of int4 for
#: each column; the index memory, with a copy of values beside it, and the product of an index with a stride; a bit
#: for each word of ACTIVATION.
FEATURE_BLOCKS: Mapping[str, Callable[[CoreConfig], tuple[int, int]]] = {
    "packed": lambda c: (c.macs_per_cycle + 2 * c.columns, 0),
    "selection": lambda c: (2, 3),
    "zero_skipping": lambda c: (0, 4),
}
#: Multipliers and block RAMs of a lane: its products, and its function tables and partial sums.
_LANE_MULTIPLIERS, _LANE_RAMS = 18, 7
#: Bits of a block RAM as a deep memory, and words and bits of one as a wide memory.
_RAM_BITS, _WIDE_WORDS, _WIDE_BITS = 16384, 512, 36


def estimate(config: CoreConfig) -> Resources:
    """The cells that a core would take.

    ``lut4`` are sites of logic, those of carry chains and LUT RAM included: ``carry`` and ``lut_rams`` are zero.
    Multipliers and block RAMs follow from the structure, the rest from the fit.
    """
    logic = flip_flops = 0.0
    for unit, terms in FIT.items():
        for name, (sites, registers) in terms.items():
            size = TERMS[unit][name](config)
            logic, flip_flops = logic + sites * size, flip_flops + registers * size
    features = [name for name in FEATURE_FIT if getattr(config, name)]
    for feature in features:
        for unit, terms in FEATURE_FIT[feature].items():
            for name, (sites, registers) in terms.items():
                size = TERMS[unit][name](config)
                logic, flip_flops = logic + sites * size, flip_flops + registers * size
    added = [FEATURE_BLOCKS[feature](config) for feature in features]
    words = (
        (config.activation_words, config.operand_word_bytes),
        (config.weight_words, config.operand_word_bytes),
        (config.vector_words, config.vector_word_bytes),
        (config.parameter_words, config.vector_word_bytes),
    )
    scratchpads = sum(_block_rams(depth, 8 * size) for depth, size in words)
    accumulators = config.rows * _block_rams(config.accumulator_tiles * config.columns, 32)
    return Resources(
        lut4=max(0, round(logic)),
        ff=max(0, round(flip_flops)),
        multipliers=config.macs_per_cycle + _LANE_MULTIPLIERS * config.lanes + sum(more for more, _ in added),
        block_rams=scratchpads + accumulators + _LANE_RAMS * config.lanes + sum(more for _, more in added),
    )


def _block_rams(words: int, bits: int) -> int:
    """Block RAMs of a memory: 512 x 36 bits each if it is shallow, else 16 Kbit each."""
    if words <= _WIDE_WORDS:
        return -(-bits // _WIDE_BITS)
    return -(-words * bits // _RAM_BITS)
