"""What a MATRIX instruction takes of packed weights: words, steps, and what its fields are multiples of."""

from __future__ import annotations

from .instructions import PATTERNS, WEIGHT_GROUPS, Instruction, Sparsity, Weights
from .weights import PER_INDEX_WORD, inputs_per_step, words_per_tile


def is_packed(i: Instruction) -> bool:
    """Whether a MATRIX instruction reads weights in another format than dense int8."""
    return i.weights != Weights.INT8 or i.sparsity != Sparsity.DENSE


def activation_group(i: Instruction) -> int:
    """ACTIVATION words that a MATRIX instruction takes at once, and to which its tiles are aligned: 1, 2 or 4."""
    if i.sparsity != Sparsity.DENSE:
        return 4
    return 1 if i.weights == Weights.INT8 else 2


def depth_unit(i: Instruction) -> int:
    """Of how many inputs the depth of a MATRIX instruction is a multiple, as its weights are packed."""
    group, pattern = WEIGHT_GROUPS[Weights(i.weights)], PATTERNS[Sparsity(i.sparsity)]
    # A group is a multiple of what an index word stands for.
    return group or (1 if pattern is None else pattern[1] // pattern[0] * PER_INDEX_WORD)


def weight_words(i: Instruction) -> int:
    """WEIGHT words of a tile of a resolved MATRIX instruction; ``WeightError`` for a depth that its format has not."""
    return words_per_tile(i.depth, WEIGHT_GROUPS[Weights(i.weights)], PATTERNS[Sparsity(i.sparsity)])


def matrix_steps(i: Instruction) -> int:
    """Steps in which a resolved MATRIX instruction multiplies: those of a tile times tiles."""
    group, pattern = WEIGHT_GROUPS[Weights(i.weights)], PATTERNS[Sparsity(i.sparsity)]
    return i.depth // inputs_per_step(group, pattern) * i.outer * i.inner
