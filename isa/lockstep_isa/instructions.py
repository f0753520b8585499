"""The instruction set: one table from which encoder, decoder, validator, disassembler, RTL and docs are derived.

A program is a list of instructions whose meaning is that of executing them one after the other. The core runs them
on four in-order units at once; the tokens in each header (``wait``, ``signal``) keep the order that matters.
Every instruction is one 512-bit word, little endian, header first.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from .choices import (
    Destination,
    FirstAdd,
    FirstMultiply,
    Function,
    Mask,
    Maximum,
    Memory,
    SecondAdd,
    SecondMultiply,
    Source,
    Sparsity,
    Tap,
    ThirdMultiply,
    Unit,
    Weights,
)

if TYPE_CHECKING:
    from .config import CoreConfig

#: Bytes of one encoded instruction.
INSTRUCTION_BYTES = 64
#: Entries of one function table, and tables that a core holds.
TABLE_ENTRIES = 128
TABLE_SLOTS = 4
#: Bytes of one table entry in device memory: c0, c1, c2 as fp32, then four bytes of zero.
TABLE_ENTRY_BYTES = 16
#: Entries of the index memory; VECTOR selects among as many columns at most.
INDEX_ENTRIES = 1024
#: Columns that VECTOR may take a maximum of, beside those of a whole row: a beat never has columns of two sections.
SECTIONS = (4, 8, 16, 32, 64)
#: Run-time operands of a program, 32-bit words; operand 0 is always zero.
OPERANDS = 64

#: Group of int4 weights along K, and pattern of sparsity, that a MATRIX instruction names.
WEIGHT_GROUPS: Mapping[Weights, int | None] = {
    Weights.INT8: None,
    Weights.INT4_32: 32,
    Weights.INT4_64: 64,
    Weights.INT4_128: 128,
}
PATTERNS: Mapping[Sparsity, tuple[int, int] | None] = {
    Sparsity.DENSE: None,
    Sparsity.TWO_OF_FOUR: (2, 4),
    Sparsity.ONE_OF_FOUR: (1, 4),
}


@dataclass(frozen=True)
class Field:
    """One field of an instruction: its name, width in bits, meaning, and its enumeration if it has one.

    ``minimum`` is the least legal value (counts of zero are malformed). Where ``operand`` is true, a selector field
    ``NAME_operand`` behind the others names a run-time operand that is added, modulo 2^width; 0 names none. An
    instruction whose count becomes zero by that does nothing but take and give its tokens. A ``signed`` field is in
    two's complement. A field with a ``feature`` is there on cores whose configuration has that flag; on others it must
    be 0.
    """

    name: str
    width: int
    doc: str
    choices: type[enum.IntEnum] | None = None
    minimum: int = 0
    operand: bool = False
    signed: bool = False
    feature: str | None = None


def selector(name: str) -> str:
    """The field that names the operand of field ``name``."""
    return f"{name}_operand"


@dataclass(frozen=True)
class InstructionType:
    """One row of the instruction table."""

    name: str
    opcode: int
    unit: Unit
    doc: str
    fields: tuple[Field, ...]

    @cached_property
    def variable(self) -> tuple[Field, ...]:
        """The fields that may have a run-time operand."""
        return tuple(f for f in self.fields if f.operand)

    def of(self, config: CoreConfig) -> InstructionType:
        """The same with the fields only that the core has; where their bits are, the whole type says."""
        fields = tuple(f for f in self.fields if f.feature is None or getattr(config, f.feature))
        return dataclasses.replace(self, fields=fields)

    @cached_property
    def encoded(self) -> tuple[Field, ...]:
        """All fields in the order of their bits: header, fields, operand selectors, then those of features."""
        bits = (OPERANDS - 1).bit_length()
        always, features = ([f for f in self.fields if (f.feature is None) == there] for there in (True, False))
        all_selectors = (
            [
                Field(selector(f.name), bits, f"operand that is added to {f.name}, 0: none", feature=f.feature)
                for f in fields
                if f.operand
            ]
            for fields in (always, features)
        )
        selectors, feature_selectors = all_selectors
        return (*HEADER, *always, *selectors, *features, *feature_selectors)

    @cached_property
    def layout(self) -> dict[str, tuple[int, Field]]:
        """Field name -> (first bit, field), header fields and operand selectors included."""
        offset, result = 0, {}
        for field in self.encoded:
            result[field.name] = (offset, field)
            offset += field.width
        assert offset <= 8 * INSTRUCTION_BYTES, f"{self.name} needs {offset} bits"
        return result

    @cached_property
    def width(self) -> int:
        """Bits used, header included."""
        return sum(f.width for f in self.encoded)


HEADER = (
    Field("opcode", 4, "which instruction"),
    Field("wait", 4, "units of which one token each is taken before the start"),
    Field("signal", 4, "units to which one token each is given at the end"),
)


def _address(name: str, doc: str) -> Field:
    return Field(name, 16, doc)


def _count(name: str, doc: str, operand: bool = False) -> Field:
    return Field(name, 16, doc, minimum=1, operand=operand)


_TRANSFER = (
    Field("memory", 3, "on-chip memory", Memory),
    _count("rows", "rows of the block", operand=True),
    _count("words", "on-chip words (TABLE: entries) per row", operand=True),
    Field("address", 32, "byte address in device memory, a multiple of the bus width", operand=True),
    Field("stride", 32, "bytes from one row to the next in device memory, a multiple of the bus width"),
    Field("local", 16, "first on-chip word", operand=True),
    Field("local_stride", 16, "on-chip words from one row to the next"),
)

LOAD = InstructionType(
    "LOAD",
    1,
    Unit.LOAD,
    "Copy a two-dimensional block from device memory on chip.",
    (
        *_TRANSFER,
        Field("gather", 1, "row r begins at address + INDEX[gather_from + r] * stride", feature="selection"),
        Field("gather_from", 16, "entry of the index memory for row 0", feature="selection"),
    ),
)
STORE = InstructionType(
    "STORE",
    4,
    Unit.STORE,
    "Copy a two-dimensional block of the VECTOR scratchpad to device memory.",
    (
        *_TRANSFER,
        Field("bytes", 1, "write only the low byte of each lane: words of `rows` bytes in device memory"),
        Field(
            "lane",
            6,
            "first lane that is written of the words of the first row; other rows are written whole",
            operand=True,
        ),
        Field("lane_only", 1, "of the words of the first row, no lane behind that one either", feature="selection"),
    ),
)
MATRIX = InstructionType(
    "MATRIX",
    2,
    Unit.MATRIX,
    "For o < outer, for i < inner: append the int32 tile sum_k A[a + o*a_outer + i*a_inner + k]^T "
    "W[w + o*w_outer + i*w_inner + k] over k < depth to the accumulator queue. Packed weights are the words from "
    "w + o*w_outer + i*w_inner on; depth counts what they stand for.",
    (
        _count("depth", "K: operand words per tile", operand=True),
        _count("outer", "outer loop count"),
        _count("inner", "inner loop count", operand=True),
        _address("a", "first ACTIVATION word"),
        _address("a_outer", "ACTIVATION words per outer step"),
        _address("a_inner", "ACTIVATION words per inner step"),
        _address("w", "first WEIGHT word"),
        _address("w_outer", "WEIGHT words per outer step"),
        _address("w_inner", "WEIGHT words per inner step"),
        Field("unsigned", 1, "activations are uint8 (probabilities) instead of int8"),
        Field("weights", 2, "how the words of W are packed", Weights, feature="packed"),
        Field("sparsity", 2, "which values of W are there", Sparsity, feature="packed"),
    ),
)
VECTOR = InstructionType(
    "VECTOR",
    3,
    Unit.VECTOR,
    "One fused pass over tiles x columns elements of `rows` lanes each; see the page on the machine.",
    (
        Field("source", 2, "where x comes from", Source),
        Field("destination", 3, "where the result goes", Destination),
        Field("add1", 2, "x1 = x + ...", FirstAdd),
        Field("mul1", 3, "x2 = x1 * ...", FirstMultiply),
        Field("mul2", 2, "x3 = x2 * ...", SecondMultiply),
        Field("add2", 2, "x4 = x3 + ...", SecondAdd),
        Field("function", 4, "x5 = f(x4)", Function),
        Field("table", 2, "function table slot"),
        Field("shift", 4, "k of the table of RELU_MINUS, ODD and SIGMOID: segments of width 2^-k"),
        Field("mul3", 2, "x6 = x5 * ...", ThirdMultiply),
        Field("tap", 1, "value that is written: x5 or x6", Tap),
        Field("sum", 1, "write the row sum of x5 to PARAMETER[sum_to + t]"),
        Field("maximum", 2, "write a row maximum to PARAMETER[max_to + t], or one for each section", Maximum),
        Field("max_continue", 1, "start the maximum from the word that stands there instead of from nothing"),
        _count("tiles", "row tiles t"),
        _count("columns", "columns j of each row tile", operand=True),
        _address("x", "first word of x (VECTOR or PARAMETER)"),
        _address("x_stride", "words of x per row tile"),
        _address("y", "first word of y (VECTOR)"),
        _address("y_stride", "words of y per row tile"),
        _address("to", "first word of the result"),
        _address("to_stride", "words of the result per row tile"),
        _address("to_group", "transposed: words from one group of columns to the next"),
        _address("lane0", "PARAMETER word of LANE0 for row tile 0; row tile t reads lane0 + t"),
        _address("lane1", "PARAMETER word of LANE1 for row tile 0"),
        _address("column0", "first PARAMETER word of COLUMN0: column j is value j mod rows of word j div rows"),
        _address("column1", "first PARAMETER word of COLUMN1"),
        _address("column2", "first PARAMETER word of COLUMN2"),
        _address("sum_to", "first PARAMETER word of the row sums"),
        _address("max_to", "first PARAMETER word of the maxima"),
        Field("immediate0", 32, "fp32"),
        Field("immediate1", 32, "fp32"),
        Field("mask", 1, "scores that SCORE hides", Mask),
        Field(
            "first_row",
            20,
            "position of row 0 of row tile 0 relative to column 0, two's complement",
            operand=True,
            signed=True,
        ),
        Field("window", 16, "columns that a row sees at most; 0: all up to its own"),
        Field(
            "select",
            16,
            "k: the numbers of the k columns with the greatest values go to the index memory, in ascending order; "
            "0: none",
            feature="selection",
        ),
        Field("select_to", 16, "first entry of the index memory for them", feature="selection"),
        Field("select_lane", 6, "first lane whose values count", operand=True, feature="selection"),
        Field("select_more_lanes", 6, "lanes behind it whose values count too", feature="selection"),
        Field("select_first", 8, "first columns that are selected whatever they hold", feature="selection"),
        Field("select_last", 8, "last columns that are selected whatever they hold", feature="selection"),
        Field(
            "max_columns",
            7,
            "columns of a section, 4 to 64, a power of two: a maximum of each section s of row tile t goes to "
            "PARAMETER[max_to + t * sections + s]; 0: one of the whole row",
            feature="selection",
        ),
    ),
)

#: The instruction table.
INSTRUCTION_TYPES: tuple[InstructionType, ...] = (LOAD, MATRIX, VECTOR, STORE)
BY_OPCODE: Mapping[int, InstructionType] = {t.opcode: t for t in INSTRUCTION_TYPES}
BY_NAME: Mapping[str, InstructionType] = {t.name: t for t in INSTRUCTION_TYPES}


class InstructionError(ValueError):
    """An instruction that cannot be encoded or decoded; the message names the field and the legal values."""


class Instruction:
    """One instruction: its type and the values of its fields, readable as attributes.

    Fields not given are zero (counts: one). Values are checked against width, minimum and enumeration.
    """

    __slots__ = ("type", "values")

    type: InstructionType
    values: Mapping[str, int]

    def __init__(self, type: InstructionType, **values: int) -> None:
        layout = type.layout
        unknown = set(values) - set(layout)
        if unknown:
            raise InstructionError(f"{type.name} has no field '{sorted(unknown)[0]}'")
        complete: dict[str, int] = {}
        for name, (_, field) in layout.items():
            minimum = 0 if field.operand and values.get(selector(name)) else field.minimum
            value = int(values.get(name, minimum))
            if not minimum <= value < 1 << field.width:
                raise InstructionError(f"{type.name}.{name} = {value} is outside {minimum}..{(1 << field.width) - 1}")
            if field.choices is not None:
                try:
                    value = field.choices(value)
                except ValueError:
                    names = ", ".join(c.name for c in field.choices)
                    raise InstructionError(f"{type.name}.{name} = {value} is none of {names}") from None
            complete[name] = value
        complete["opcode"] = type.opcode
        object.__setattr__(self, "type", type)
        object.__setattr__(self, "values", complete)

    def __getattr__(self, name: str) -> int:
        try:
            return self.values[name]
        except KeyError:
            raise AttributeError(f"{self.type.name} has no field '{name}'") from None

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("instructions are immutable; use replace()")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Instruction) and self.values == other.values

    def __hash__(self) -> int:
        return hash(tuple(self.values.items()))

    def __repr__(self) -> str:
        return f"<{disassemble(self)}>"

    def replace(self, **values: int) -> Instruction:
        """A copy with some fields changed."""
        return Instruction(self.type, **{k: v for k, v in self.values.items() if k != "opcode"} | values)


def resolve(instruction: Instruction, operands: Sequence[int]) -> Instruction | None:
    """The instruction that runs with these operands, or None where a count is zero and it only exchanges tokens.

    operands : as many values as the program has operands; operand n of an instruction is ``operands[n - 1]``.
    """
    changes: dict[str, int] = {}
    for field in instruction.type.variable:
        number = instruction.values[selector(field.name)]
        if number:
            changes[field.name] = (instruction.values[field.name] + operands[number - 1]) % (1 << field.width)
            changes[selector(field.name)] = 0
            if changes[field.name] < field.minimum:
                return None
    if not changes:
        return instruction
    # Every value is legal by now: checking them again would take most of a compilation's time.
    resolved = object.__new__(Instruction)
    object.__setattr__(resolved, "type", instruction.type)
    object.__setattr__(resolved, "values", {**instruction.values, **changes})
    return resolved


def encode(instruction: Instruction) -> bytes:
    """The 64 bytes of an instruction."""
    word = 0
    for name, (offset, _) in instruction.type.layout.items():
        word |= int(instruction.values[name]) << offset
    return word.to_bytes(INSTRUCTION_BYTES, "little")


def decode(data: bytes) -> Instruction:
    """The instruction in 64 bytes; raises :class:`InstructionError` for unknown opcodes, bad values, stray bits."""
    word = int.from_bytes(data, "little")
    opcode = word & 0xF
    if opcode not in BY_OPCODE:
        raise InstructionError(f"unknown opcode {opcode}")
    type = BY_OPCODE[opcode]
    if word >> type.width:
        raise InstructionError(f"{type.name} has bits set above bit {type.width - 1}")
    values = {n: (word >> o) & ((1 << f.width) - 1) for n, (o, f) in type.layout.items() if n != "opcode"}
    return Instruction(type, **values)


def _mask_names(mask: int) -> str:
    return "+".join(u.name for u in Unit if mask >> u & 1)


def disassemble(instruction: Instruction, operands: Sequence[str] = ()) -> str:
    """One line of text: name, then each field that is not at its default.

    operands : names of the program's operands; a field to which operand 1 is added reads ``columns=0+NAME``.
    """
    parts = [instruction.type.name]
    selectors = {selector(field.name) for field in instruction.type.variable}
    for name, (_, field) in instruction.type.layout.items():
        value = instruction.values[name]
        number = instruction.values[selector(name)] if field.operand else 0
        if name == "opcode" or name in selectors:
            continue
        if value == 0 and field.choices is None and not number:
            continue
        if name in ("wait", "signal"):
            text = _mask_names(value)
        elif field.choices is not None:
            if value == 0 and name not in ("memory", "source"):
                continue
            text = field.choices(value).name
        elif name in ("address", "stride", "immediate0", "immediate1"):
            text = f"{value:#x}"
        else:
            text = str(value)
        if number:
            text += "+" + (operands[number - 1] if number <= len(operands) else f"operand{number}")
        parts.append(f"{name}={text}")
    return " ".join(parts)
