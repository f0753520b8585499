"""Random softmaxes, and products of what is left of their weights in 8 bits: where rows see little, chunks are zero."""

from __future__ import annotations

import numpy as np
from lockstep_isa.config import CoreConfig
from lockstep_isa.instructions import (
    MATRIX,
    VECTOR,
    Destination,
    FirstMultiply,
    Function,
    InstructionType,
    Mask,
    Maximum,
    Source,
)

#: Greatest word of PARAMETER that takes the sums.
_SUMS = 100
#: What weights are multiplied by before they become bytes: most of them are small, and become 0.
_BYTE_SCALE = 60.0


def random_softmax(
    rng: np.random.Generator, config: CoreConfig, vector_words: int, integers: tuple[int, int]
) -> list[tuple[InstructionType, dict[str, int]]]:
    """Masked scores and their weights; rows in front of the first position see nothing.

    vector_words : of the VECTOR memory: values come from the first half and weights go to the second one.
    integers : begin and end of the part of PARAMETER that holds exponents.
    """

    def number(low: int, high: int) -> int:
        return int(rng.integers(low, high + 1))

    tiles, columns = number(1, 3), number(1, 80 if config.zero_skipping else 40)
    words = tiles * columns
    x, to = (number(0, vector_words // 2 - words) for _ in range(2))
    powers = number(integers[0], integers[1] - tiles)
    shape = {"tiles": tiles, "columns": columns, "x_stride": columns, "to_stride": columns}
    shape |= {"source": Source.VECTOR, "destination": Destination.VECTOR}
    at = vector_words // 2 + to
    scores = shape | {
        "function": Function.SCORE,
        "maximum": Maximum.EXPONENT,
        "x": x,
        "to": at,
        "max_to": powers,
        "mask": Mask.CAUSAL,
        "first_row": number(-2 * config.rows, columns) % (1 << 20),
        "window": number(0, columns) if number(0, 1) else 0,
    }
    weights = shape | {"function": Function.EXP2, "x": at, "to": at, "lane0": powers, "sum": 1, "sum_to": to % _SUMS}
    return [(VECTOR, scores), (VECTOR, weights)]


def random_weighing(
    rng: np.random.Generator, config: CoreConfig, softmax: dict[str, int], operand_words: int
) -> list[tuple[InstructionType, dict[str, int]]]:
    """The weights of a softmax as bytes, their product with words of WEIGHT, and the pass that takes its tiles.

    softmax : fields of the last pass of :func:`random_softmax`. operand_words : of ACTIVATION and of WEIGHT.
    """
    rows, columns = config.rows, softmax["columns"]
    chunked = -(-columns // rows) * rows
    tiles = min(softmax["tiles"], operand_words // chunked)
    a = int(rng.integers(0, (operand_words - tiles * chunked) // rows + 1)) * rows
    inner = int(rng.integers(1, 3))
    to_bytes = {
        **{name: softmax[name] for name in ("source", "columns", "x_stride")},
        "tiles": tiles,
        "x": softmax["to"],
        "mul1": FirstMultiply.IMMEDIATE0,
        "immediate0": int(np.float32(_BYTE_SCALE).view(np.uint32)),
        "destination": Destination.ACTIVATION,
        "to": a,
        "to_stride": chunked,
    }
    product = {
        "depth": columns,
        "outer": tiles,
        "inner": inner,
        "a": a,
        "a_outer": chunked,
        "w": int(rng.integers(0, operand_words - inner * columns + 1)),
        "w_inner": columns,
        "unsigned": 1,
    }
    taken = {
        "source": Source.ACCUMULATOR,
        "destination": Destination.VECTOR,
        "tiles": tiles,
        "columns": inner * rows,
        "to_stride": inner * rows,
    }
    return [(VECTOR, to_bytes), (MATRIX, product), (VECTOR, taken)]
