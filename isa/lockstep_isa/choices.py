"""The units, the memories, and what fields of instructions choose from."""

from __future__ import annotations

import enum


class Unit(enum.IntEnum):
    """The four in-order units. The value is the bit in ``wait`` and ``signal`` masks."""

    LOAD = 0
    MATRIX = 1
    VECTOR = 2
    STORE = 3


class Memory(enum.IntEnum):
    """On-chip memories that LOAD fills and STORE empties."""

    ACTIVATION = 0  #: int8 operand words of ``rows`` bytes, left side of the array
    WEIGHT = 1  #: int8 operand words of ``columns`` bytes, top side of the array
    VECTOR = 2  #: words of ``rows`` fp32 values, one per lane
    PARAMETER = 3  #: like VECTOR; row statistics, scales, biases
    TABLE = 4  #: function tables, entries of 16 bytes


class Internal(enum.IntEnum):
    """On-chip memories that no transfer names; the values are none of :class:`Memory`."""

    INDEX = 8  #: lists of columns that VECTOR selects and by which LOAD gathers


class Source(enum.IntEnum):
    """Where a vector pass takes x from."""

    ACCUMULATOR = 0  #: result tiles in the order in which MATRIX produced them, converted to fp32
    VECTOR = 1
    PARAMETER = 2
    INTEGER = 3  #: PARAMETER words as int32, converted to fp32


class Destination(enum.IntEnum):
    """Where a vector pass puts its result."""

    NONE = 0
    VECTOR = 1
    PARAMETER = 2
    ACTIVATION = 3  #: rounded to 8 bits
    WEIGHT = 4  #: rounded to 8 bits
    WEIGHT_TRANSPOSED = 5  #: rounded to 8 bits; groups of ``columns`` columns become words of one row each
    BYTES = 6  #: rounded to 8 bits, in the low byte of each lane of a VECTOR word, the rest zero
    BYTES_TRANSPOSED = 7  #: like WEIGHT_TRANSPOSED, but into VECTOR words like BYTES


class FirstAdd(enum.IntEnum):
    """Operand of the first adder; NONE passes x through untouched."""

    NONE = 0
    LANE0 = 1
    Y = 2


class FirstMultiply(enum.IntEnum):
    """Operand of the first multiplier."""

    NONE = 0
    LANE1 = 1
    COLUMN0 = 2
    SELF = 3
    IMMEDIATE0 = 4


class SecondMultiply(enum.IntEnum):
    """Operand of the second multiplier."""

    NONE = 0
    LANE0 = 1
    COLUMN0 = 2


class SecondAdd(enum.IntEnum):
    """Operand of the second adder."""

    NONE = 0
    COLUMN1 = 1
    IMMEDIATE1 = 2
    Y = 3


class Function(enum.IntEnum):
    """What the function stage computes; all but NONE, RELU and SCORE read the table in ``table``."""

    NONE = 0
    RELU = 1  #: x where x > 0, else +0
    SCORE = 2  #: clamp to +-32000, masked: -inf; its exponent part feeds the EXPONENT maximum
    EXP2 = 3  #: 2^x scaled by 2^-N, N the integer in LANE0; +0 for -inf
    RECIP = 4
    RSQRT = 5
    RELU_MINUS = 6  #: relu(x) - g(min(|x|, limit)): gelu, silu
    ODD = 7  #: sign(x) g(min(|x|, limit)): tanh
    SIGMOID = 8  #: g(|x|) for x >= 0, else 1 - g(|x|)


class ThirdMultiply(enum.IntEnum):
    """Operand of the third multiplier, behind the function."""

    NONE = 0
    COLUMN2 = 1
    Y = 2


class Tap(enum.IntEnum):
    """Which value is written: that before or that after the third multiplier."""

    BEFORE = 0
    AFTER = 1


class Weights(enum.IntEnum):
    """How the top operand of MATRIX is packed in the WEIGHT memory; lockstep_isa.weights says what it means."""

    INT8 = 0
    INT4_32 = 1  #: two values in a byte, a multiplier for each 32 along K
    INT4_64 = 2
    INT4_128 = 3


class Sparsity(enum.IntEnum):
    """Which values of the top operand of MATRIX are there."""

    DENSE = 0
    TWO_OF_FOUR = 1  #: 2 of 4 along K, with their positions
    ONE_OF_FOUR = 2


class Mask(enum.IntEnum):
    """Which scores SCORE hides: they become -inf, with the least exponent."""

    NONE = 0
    CAUSAL = 1  #: row r of tile t sees columns up to p = first_row + t * rows + r, with a window the last ``window``


class Maximum(enum.IntEnum):
    """The row maximum that a vector pass keeps."""

    NONE = 0
    ABSOLUTE = 1  #: absmax of the value behind the third multiplier
    EXPONENT = 2  #: maximum of the integer exponents of SCORE
