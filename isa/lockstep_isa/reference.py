"""The reference pages, written from the instruction table, the register map and the error codes.

``python -m lockstep_isa.reference`` writes the pages into ``docs/`` of the current folder, or of the folder that is
given; a test holds the committed pages to what this file says.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from .config import ABI_VERSION, ISA_VERSION, PRESETS
from .errors import CONTROL_UNIT, ERROR_TEXT, ErrorCode
from .instructions import (
    HEADER,
    INSTRUCTION_BYTES,
    INSTRUCTION_TYPES,
    TABLE_ENTRIES,
    TABLE_ENTRY_BYTES,
    TABLE_SLOTS,
    Field,
    InstructionType,
    Unit,
)
from .registers import DESCRIPTOR_BYTES, DESCRIPTOR_FIELDS, MAGIC, REGISTERS, Flags, Register, Status

#: Lines of ``errors.md`` between which the table of error codes stands.
ERRORS_BEGIN, ERRORS_END = "<!-- begin: error codes -->", "<!-- end: error codes -->"

_NOTICE = "<!-- Written by python -m lockstep_isa.reference; change the tables in isa/lockstep_isa, not this page. -->"

#: What the members of the enumerations mean where the names alone do not say it.
_MEANINGS: dict[str, dict[str, str]] = {
    "Memory": {
        "ACTIVATION": "words of `rows` int8, left side of the array",
        "WEIGHT": "words of `columns` int8, top side of the array",
        "VECTOR": "words of `rows` fp32 values",
        "PARAMETER": "words of `rows` fp32 values: row statistics, scales, biases",
        "TABLE": "function tables, one entry a word",
    },
    "Source": {
        "ACCUMULATOR": "the oldest result tiles, int32 converted to fp32",
        "VECTOR": "words from `x` on",
        "PARAMETER": "words from `x` on",
        "INTEGER": "PARAMETER words from `x` on, int32 converted to fp32",
    },
    "Destination": {
        "NONE": "nowhere; for sums and maxima alone",
        "VECTOR": "fp32 words",
        "PARAMETER": "fp32 words",
        "ACTIVATION": "rounded to 8 bits",
        "WEIGHT": "rounded to 8 bits",
        "WEIGHT_TRANSPOSED": "rounded to 8 bits; each group of `columns` columns becomes `rows` words of one row each",
        "BYTES": "rounded to 8 bits, in the low byte of each lane of a VECTOR word; the other bits are zero",
        "BYTES_TRANSPOSED": "like WEIGHT_TRANSPOSED, into VECTOR words like BYTES",
    },
    "FirstAdd": {"NONE": "x untouched", "LANE0": "+ LANE0", "Y": "+ y"},
    "FirstMultiply": {
        "NONE": "untouched",
        "LANE1": "* LANE1",
        "COLUMN0": "* COLUMN0",
        "SELF": "* itself",
        "IMMEDIATE0": "* `immediate0`",
    },
    "SecondMultiply": {"NONE": "untouched", "LANE0": "* LANE0", "COLUMN0": "* COLUMN0"},
    "SecondAdd": {"NONE": "untouched", "COLUMN1": "+ COLUMN1", "IMMEDIATE1": "+ `immediate1`", "Y": "+ y"},
    "Function": {
        "NONE": "untouched",
        "RELU": "x where x > 0, else +0",
        "SCORE": "held inside +-32000, hidden: -inf; its integer exponent feeds the EXPONENT maximum",
        "EXP2": "2^x, scaled by 2^-N with the integer N in LANE0; +0 for -inf",
        "RECIP": "1 / x",
        "RSQRT": "1 / sqrt(x)",
        "RELU_MINUS": "relu(x) - g(abs(x)): gelu, silu",
        "ODD": "sign(x) * g(abs(x)): tanh",
        "SIGMOID": "g(x), or 1 - g(-x) for x < 0",
    },
    "ThirdMultiply": {"NONE": "untouched", "COLUMN2": "* COLUMN2", "Y": "* y"},
    "Tap": {"BEFORE": "x5", "AFTER": "x6"},
    "Weights": {
        "INT8": "a word holds one value of each channel",
        "INT4_32": "a word holds two values, and multipliers stand in front of each 32 along K",
        "INT4_64": "the same, in front of each 64",
        "INT4_128": "the same, in front of each 128",
    },
    "Sparsity": {
        "DENSE": "all of them",
        "TWO_OF_FOUR": "2 of 4 along K, positions in front of each 4 kept values",
        "ONE_OF_FOUR": "1 of 4 along K, positions in front of each 4 kept values",
    },
    "Mask": {
        "NONE": "all scores are seen",
        "CAUSAL": "row r of row tile t sees columns up to `first_row + t rows + r`, with a window the last `window` of "
        "them",
    },
    "Maximum": {
        "NONE": "none",
        "ABSOLUTE": "absolute maximum of x6",
        "EXPONENT": "maximum of the integer exponents of SCORE",
    },
}


def _table(head: Sequence[str], rows: Iterable[Iterable[object]]) -> list[str]:
    lines = [head, ["---"] * len(head), *([_escaped(str(cell)) for cell in row] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def _escaped(text: str) -> str:
    """``text`` with its multiplication signs safe from being taken for emphasis."""
    return text.replace("*", r"\*")


def _field_rows(type: InstructionType) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for name, (offset, field) in type.layout.items():
        if field in HEADER:
            continue
        rows.append((f"`{name}`", f"{offset + field.width - 1}:{offset}", field.width, _legal(field), field.doc))
    return rows


def _legal(field: Field) -> str:
    legal = "any"
    if field.choices is not None:
        name = field.choices.__name__
        legal = f"[{name}](#{name.lower()})"
    elif field.minimum:
        legal = f"from {field.minimum}" + ("; any with an operand" if field.operand else "")
    return legal + (f"; 0 without `{field.feature}`" if field.feature else "")


def _described(register: Register) -> str:
    return register.doc + (f"; with `{register.feature}` only" if register.feature else "")


def _enumerations() -> list[type[enum.IntEnum]]:
    found = [field.choices for type in INSTRUCTION_TYPES for field in type.fields if field.choices is not None]
    return list(dict.fromkeys(found))


def instructions_page() -> str:
    """The text of ``docs/reference/instructions.md``."""
    lines = [
        "# Instructions",
        "",
        _NOTICE,
        "",
        f"Instruction set {ISA_VERSION}. An instruction is one word of {INSTRUCTION_BYTES} bytes, little endian. Bits "
        "count from the lowest. Bits behind the last field must be zero. What the fields do together is on the page "
        "[How the machine works](../machine.md), and so are the [operands](../machine.md#operands-of-a-run) that "
        "`NAME_operand` adds to the field NAME.",
        "",
        *_table(
            ("instruction", "opcode", "unit", "bits used", "what it does"),
            ((f"[{t.name}](#{t.name.lower()})", t.opcode, t.unit.name, t.width, t.doc) for t in INSTRUCTION_TYPES),
        ),
        "## Header",
        "",
        "Every instruction begins with these fields. Bits of `wait` and `signal` are units: "
        + ", ".join(f"{unit.value} {unit.name}" for unit in Unit)
        + ".",
        "",
    ]
    offset = 0
    rows: list[tuple[object, ...]] = []
    for field in HEADER:
        rows.append((f"`{field.name}`", f"{offset + field.width - 1}:{offset}", field.width, field.doc))
        offset += field.width
    lines += _table(("field", "bits", "width", "meaning"), rows)
    for type in INSTRUCTION_TYPES:
        lines += [f"## {type.name}", "", _escaped(type.doc), ""]
        lines += _table(("field", "bits", "width", "legal values", "meaning"), _field_rows(type))
    lines += ["## Values of fields", ""]
    for choices in _enumerations():
        meanings = _MEANINGS[choices.__name__]
        lines += [f"### {choices.__name__}", ""]
        lines += _table(("value", "name", "meaning"), ((c.value, f"`{c.name}`", meanings[c.name]) for c in choices))
    lines += [
        "## Function tables",
        "",
        f"The TABLE memory has {TABLE_SLOTS} slots of {TABLE_ENTRIES} entries. In device memory an entry takes "
        f"{TABLE_ENTRY_BYTES} bytes: c0, c1 and c2 as fp32, then four bytes of zero. On chip it takes 72 bits: c0, the "
        "high 24 bits of c1, the high 16 bits of c2. See [The numeric contract](../numerics.md#function-tables).",
        "",
    ]
    return "\n".join(lines)


def registers_page() -> str:
    """The text of ``docs/reference/registers.md``."""
    lines = [
        "# Registers and the command ring",
        "",
        _NOTICE,
        "",
        f"Layout {ABI_VERSION}. Registers have 32 bits and are reached over AXI4-Lite, one access at a time. An "
        "address behind the last register is answered with DECERR. Writes to registers that are only read are ignored.",
        "",
        "## Registers",
        "",
        *_table(
            ("address", "register", "access", "meaning"),
            ((f"`{r.address:#05x}`", f"`{r.name}`", r.access, _described(r)) for r in REGISTERS),
        ),
        f"MAGIC reads {MAGIC:#010x}, the letters LKST. Counters have 32 bits and wrap. The four cycle counters of a "
        "unit sum up to CYCLES.",
        "",
        "| bit of STATUS | name |",
        "| --- | --- |",
        *(f"| {bit.value.bit_length() - 1} | {bit.name} |" for bit in Status),
        "",
        "| bit of FLAGS | name |",
        "| --- | --- |",
        *(f"| {bit.value.bit_length() - 1} | {bit.name} |" for bit in Flags),
        "",
        "ERROR_CODE is one of the codes on the page [Errors](../errors.md).",
        "",
        "## Descriptor",
        "",
        f"The command ring is an array of RING_SIZE descriptors of {DESCRIPTOR_BYTES} bytes. A descriptor begins with "
        "these 32-bit words; the rest is not read.",
        "",
        *_table(
            ("byte", "word", "meaning"), ((4 * n, f"`{name}`", doc) for n, (name, doc) in enumerate(DESCRIPTOR_FIELDS))
        ),
        "## Configurations",
        "",
        "CONFIG_CRC is over the instruction set's version and every field but the name. A feature that a core lacks "
        "does not count.",
        "",
        *_table(
            (
                "core",
                "CONFIG_CRC",
                "array",
                "lanes",
                "bus bytes",
                "ACTIVATION",
                "WEIGHT",
                "VECTOR",
                "PARAMETER",
                "tiles",
                "packed",
                "selection",
                "zero_skipping",
            ),
            (
                (
                    *(f"`{c.name}`", f"`{c.crc:#010x}`", f"{c.rows} x {c.columns}", c.lanes, c.bus_bytes),
                    *(c.activation_words, c.weight_words, c.vector_words, c.parameter_words, c.accumulator_tiles),
                    *("yes" if feature else "no" for feature in (c.packed, c.selection, c.zero_skipping)),
                )
                for c in PRESETS.values()
            ),
        ),
        "Memories are given in words: `rows` bytes in ACTIVATION and WEIGHT, `rows` fp32 values in VECTOR and "
        "PARAMETER. Tiles are those of the accumulator queue. `packed` cores take weights of fewer than 8 bits and "
        "sparse ones; those with `selection` select columns and gather rows by them. The others refuse such programs. "
        "Those with `zero_skipping` pass over activations that are zero, in the same programs.",
        "",
    ]
    return "\n".join(lines)


def error_table() -> str:
    """The table of error codes in ``docs/errors.md``."""
    rows = ((code.value, f"`{code.name}`", ERROR_TEXT[code]) for code in ErrorCode)
    return "\n".join(_table(("code", "name", "what was wrong, and what to do"), rows))


def unit_table() -> str:
    """The table of unit numbers in ``docs/errors.md``."""
    rows: list[tuple[object, ...]] = [(unit.value, unit.name) for unit in Unit]
    return "\n".join(_table(("unit", "name"), [*rows, (CONTROL_UNIT, "CONTROL")]))


def errors_page(page: str) -> str:
    """``docs/errors.md`` with the tables between its two marks replaced."""
    before, begin, rest = page.partition(ERRORS_BEGIN)
    _, end, after = rest.partition(ERRORS_END)
    if not begin or not end:
        raise ValueError(f"the page has no lines '{ERRORS_BEGIN}' and '{ERRORS_END}'")
    return f"{before}{begin}\n\n{error_table()}\n{unit_table()}\n{end}{after}"


def write(docs: Path) -> None:
    """Write every generated page under ``docs``."""
    (docs / "reference").mkdir(parents=True, exist_ok=True)
    (docs / "reference" / "instructions.md").write_text(instructions_page(), encoding="utf-8")
    (docs / "reference" / "registers.md").write_text(registers_page(), encoding="utf-8")
    errors = docs / "errors.md"
    errors.write_text(errors_page(errors.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else ".") / "docs")
