"""Programs: a list of instructions for one core configuration, their file format and their static checks."""

from __future__ import annotations

import struct
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .choices import Internal
from .config import ISA_VERSION, CoreConfig
from .instructions import (
    INDEX_ENTRIES,
    INSTRUCTION_BYTES,
    LOAD,
    MATRIX,
    OPERANDS,
    STORE,
    TABLE_ENTRIES,
    TABLE_ENTRY_BYTES,
    TABLE_SLOTS,
    VECTOR,
    Destination,
    FirstAdd,
    Function,
    Instruction,
    InstructionError,
    Mask,
    Maximum,
    Memory,
    SecondAdd,
    Source,
    Sparsity,
    ThirdMultiply,
    Unit,
    Weights,
    decode,
    disassemble,
    encode,
    resolve,
    selector,
)
from .packed import activation_group, depth_unit, is_packed, weight_words
from .selection import section_fault, selection_fault
from .weights import WeightError

#: First bytes of a program file.
FILE_MAGIC = b"LKSTPROG"
#: Longest name of an operand, in bytes of UTF-8.
OPERAND_NAME_BYTES = 44
# Magic, ISA version, configuration CRC, operand count, instruction count, body CRC; operands, then instructions follow.
_HEADER = struct.Struct("<8sIIIII")
_OPERAND = struct.Struct(f"<qq{OPERAND_NAME_BYTES}sI")  # least, greatest, name, step less one


class ProgramError(ValueError):
    """A program that must not run: the message names the instruction, what is wrong and what is legal."""


class Operand(NamedTuple):
    """A number that a program is given at each run: its name, the least and the greatest legal value, and how far legal
    values are apart.

    It is added modulo 2^width to fields that select it, so that a negative value counts down.
    """

    name: str
    least: int
    greatest: int
    step: int = 1


@dataclass(frozen=True)
class Program:
    """Instructions for the core whose configuration has ``config_crc``; their list order is their meaning.

    Operand n of an instruction is ``operands[n - 1]``.
    """

    config_crc: int
    instructions: tuple[Instruction, ...]
    operands: tuple[Operand, ...] = ()

    @property
    def least(self) -> tuple[int, ...]:
        """The least value of each operand."""
        return tuple(operand.least for operand in self.operands)

    @property
    def greatest(self) -> tuple[int, ...]:
        """The greatest value of each operand."""
        return tuple(operand.greatest for operand in self.operands)

    def encode(self) -> bytes:
        """The instructions as the core fetches them, 64 bytes each."""
        return b"".join(encode(i) for i in self.instructions)

    def to_bytes(self) -> bytes:
        """The content of a program file."""
        operands = b"".join(_OPERAND.pack(o.least, o.greatest, o.name.encode(), o.step - 1) for o in self.operands)
        body = operands + self.encode()
        counts = len(self.operands), len(self.instructions)
        return _HEADER.pack(FILE_MAGIC, ISA_VERSION, self.config_crc, *counts, zlib.crc32(body)) + body

    def save(self, path: Path | str) -> None:
        """Write a program file."""
        Path(path).write_bytes(self.to_bytes())

    @staticmethod
    def from_bytes(data: bytes) -> Program:
        """Read a program file's content; raises :class:`ProgramError` where it is not one, or damaged."""
        if len(data) < _HEADER.size or data[:8] != FILE_MAGIC:
            raise ProgramError("this is not a Lockstep program file (it does not begin with LKSTPROG)")
        _, version, config_crc, operand_count, count, crc = _HEADER.unpack_from(data)
        body = data[_HEADER.size :]
        if version != ISA_VERSION:
            raise ProgramError(f"the program is for instruction set {version}, this is {ISA_VERSION}; compile it again")
        start = operand_count * _OPERAND.size
        if len(body) != start + count * INSTRUCTION_BYTES:
            raise ProgramError(
                f"the program file is truncated: {len(body)} bytes of operands and instructions, "
                f"{start + count * INSTRUCTION_BYTES} announced"
            )
        if zlib.crc32(body) != crc:
            raise ProgramError("the program file is damaged: its checksum does not match; write it again")
        operands = tuple(
            Operand(name.rstrip(b"\0").decode(), least, greatest, steps + 1)
            for least, greatest, name, steps in _OPERAND.iter_unpack(body[:start])
        )
        instructions = []
        for n in range(count):
            first = start + n * INSTRUCTION_BYTES
            try:
                instructions.append(decode(body[first : first + INSTRUCTION_BYTES]))
            except InstructionError as error:
                raise ProgramError(f"instruction {n}: {error}") from None
        return Program(config_crc, tuple(instructions), operands)

    @staticmethod
    def load(path: Path | str) -> Program:
        """Read a program file."""
        return Program.from_bytes(Path(path).read_bytes())

    def disassemble(self) -> list[str]:
        """One line per instruction."""
        names = [operand.name for operand in self.operands]
        return [f"{n:6d}  {disassemble(i, names)}" for n, i in enumerate(self.instructions)]


def check_operand(operand: Operand, earlier: Sequence[Operand] = ()) -> None:
    """Raise :class:`ProgramError` unless ``operand`` can be declared behind the ``earlier`` ones of a program."""
    name, least, greatest, step = operand
    if not name.isidentifier() or len(name.encode()) > OPERAND_NAME_BYTES:
        raise ProgramError(f"operand '{name}' needs an identifier of at most {OPERAND_NAME_BYTES} bytes as its name")
    if name in (other.name for other in earlier):
        raise ProgramError(f"operand '{name}' is declared twice; give each operand a name of its own")
    if not -(1 << 31) <= least <= greatest < 1 << 32:
        raise ProgramError(
            f"operand '{name}' has limits {least}..{greatest}; legal are -2^31 <= least <= greatest < 2^32"
        )
    if not 1 <= step <= 1 << 32 or (greatest - least) % step:
        raise ProgramError(
            f"operand '{name}' goes from {least} to {greatest} in steps of {step}, which do not come out even"
        )
    if len(earlier) >= OPERANDS - 1:
        raise ProgramError(f"operand '{name}' is one too many: a program has at most {OPERANDS - 1}")


def table_shift(instruction: Instruction) -> int:
    """k of the function table that a VECTOR instruction reads: segments are 2^-k wide."""
    fixed = {Function.EXP2: 5, Function.SCORE: 5, Function.RECIP: 6, Function.RSQRT: 5}
    return fixed.get(Function(instruction.function), instruction.shift)


def uses_y(instruction: Instruction) -> bool:
    """Whether a VECTOR instruction reads y."""
    return instruction.add1 == FirstAdd.Y or instruction.add2 == SecondAdd.Y or instruction.mul3 == ThirdMultiply.Y


def transposes(instruction: Instruction) -> bool:
    """Whether the result of a VECTOR instruction goes through the transposer."""
    return instruction.destination in (Destination.WEIGHT_TRANSPOSED, Destination.BYTES_TRANSPOSED)


def tiles_pushed(instruction: Instruction) -> int:
    """Result tiles that a resolved instruction appends to the accumulator queue."""
    return instruction.outer * instruction.inner if instruction.type is MATRIX else 0


def tiles_popped(config: CoreConfig, instruction: Instruction) -> int:
    """Result tiles that a resolved instruction takes from the accumulator queue."""
    if instruction.type is not VECTOR or instruction.source != Source.ACCUMULATOR:
        return 0
    return instruction.tiles * -(-instruction.columns // config.columns)


@dataclass(frozen=True)
class Region:
    """Words of one on-chip memory that an instruction touches: ``count`` runs of ``words``, ``stride`` apart."""

    memory: Memory | Internal
    start: int
    words: int
    count: int = 1
    stride: int = 0

    @property
    def end(self) -> int:
        """First word behind the region."""
        return self.start + self.words + max(0, self.count - 1) * self.stride


def row_maxima(i: Instruction) -> int:
    """Maxima of each row tile of a resolved VECTOR instruction that has any: its sections."""
    return -(-i.columns // i.max_columns) if i.max_columns else 1


def maxima_region(i: Instruction) -> Region:
    """The words that a resolved VECTOR instruction with a maximum writes, and where it continues reads, for them."""
    return Region(Memory.PARAMETER, i.max_to, i.tiles * row_maxima(i))


def reads(config: CoreConfig, i: Instruction) -> list[Region]:
    """On-chip regions that a resolved instruction reads."""
    if i.type is STORE:
        return [Region(Memory(i.memory), i.local, i.words, i.rows, i.local_stride)]
    if i.type is MATRIX:
        return [
            Region(memory, base + o * outer, words, i.inner, inner)
            for memory, words, base, outer, inner in (
                (Memory.ACTIVATION, i.depth, i.a, i.a_outer, i.a_inner),
                (Memory.WEIGHT, weight_words(i), i.w, i.w_outer, i.w_inner),
            )
            for o in range(i.outer if outer else 1)
        ]
    if i.type is LOAD and i.gather:
        return [Region(Internal.INDEX, i.gather_from, i.rows)]
    if i.type is not VECTOR:
        return []
    parameter = Memory.PARAMETER
    regions = []
    if i.source != Source.ACCUMULATOR:
        memory = Memory.VECTOR if i.source == Source.VECTOR else parameter
        regions.append(Region(memory, i.x, i.columns, i.tiles, i.x_stride))
    if uses_y(i):
        regions.append(Region(Memory.VECTOR, i.y, i.columns, i.tiles, i.y_stride))
    if i.add1 == FirstAdd.LANE0 or i.mul2 == 1 or i.function == Function.EXP2:
        regions.append(Region(parameter, i.lane0, i.tiles))
    if i.mul1 == 1:
        regions.append(Region(parameter, i.lane1, i.tiles))
    column_words = -(-i.columns // config.rows)
    if i.mul1 == 2 or i.mul2 == 2:
        regions.append(Region(parameter, i.column0, column_words))
    if i.add2 == SecondAdd.COLUMN1:
        regions.append(Region(parameter, i.column1, column_words))
    if i.mul3 == ThirdMultiply.COLUMN2:
        regions.append(Region(parameter, i.column2, column_words))
    if i.maximum and i.max_continue:
        regions.append(maxima_region(i))
    if i.function in (Function.EXP2, *range(Function.RECIP, Function.SIGMOID + 1)):
        regions.append(Region(Memory.TABLE, i.table * TABLE_ENTRIES, TABLE_ENTRIES))
    return regions


def writes(config: CoreConfig, i: Instruction) -> list[Region]:
    """On-chip regions that a resolved instruction writes."""
    if i.type is LOAD:
        return [Region(Memory(i.memory), i.local, i.words, i.rows, i.local_stride)]
    if i.type is not VECTOR:
        return []
    regions = []
    memory = {
        Destination.VECTOR: Memory.VECTOR,
        Destination.PARAMETER: Memory.PARAMETER,
        Destination.ACTIVATION: Memory.ACTIVATION,
        Destination.WEIGHT: Memory.WEIGHT,
        Destination.WEIGHT_TRANSPOSED: Memory.WEIGHT,
        Destination.BYTES: Memory.VECTOR,
        Destination.BYTES_TRANSPOSED: Memory.VECTOR,
    }.get(Destination(i.destination))
    if memory is not None and transposes(i):
        for group in range(-(-i.columns // config.columns)):
            regions.append(Region(memory, i.to + group * i.to_group, config.rows, i.tiles, i.to_stride))
    elif memory is not None:
        regions.append(Region(memory, i.to, i.columns, i.tiles, i.to_stride))
    if i.sum:
        regions.append(Region(Memory.PARAMETER, i.sum_to, i.tiles))
    if i.maximum:
        regions.append(maxima_region(i))
    if i.select:
        regions.append(Region(Internal.INDEX, i.select_to, i.select))
    return regions


def transfer_bytes(config: CoreConfig, i: Instruction) -> int:
    """Bytes of one word in device memory, as a LOAD or STORE transfers it."""
    if i.memory == Memory.TABLE:
        return TABLE_ENTRY_BYTES
    wide = i.memory in (Memory.VECTOR, Memory.PARAMETER) and not (i.type is STORE and i.bytes)
    return config.vector_word_bytes if wide else config.rows


def depth_of(config: CoreConfig, memory: Memory | Internal) -> int:
    """Words of an on-chip memory."""
    depths: dict[Memory | Internal, int] = {
        Memory.ACTIVATION: config.activation_words,
        Memory.WEIGHT: config.weight_words,
        Memory.VECTOR: config.vector_words,
        Memory.PARAMETER: config.parameter_words,
        Memory.TABLE: TABLE_SLOTS * TABLE_ENTRIES,
        Internal.INDEX: INDEX_ENTRIES,
    }
    return depths[memory]


def validate(config: CoreConfig, program: Program) -> None:
    """Raise :class:`ProgramError` unless ``program`` can run on ``config`` to its end.

    Checks the configuration, bounds of every on-chip access, alignment of transfers, that no token is taken
    before it is given, that every result tile is consumed, and that the program does not wait for itself. All of
    that holds with all operands at their least and with all at their greatest value, and no field wraps between.
    """
    if program.config_crc != config.crc:
        raise ProgramError(
            f"the program was built for configuration {program.config_crc:#010x}, "
            f"core '{config.name}' is {config.crc:#010x}; compile it for this core"
        )
    for n, operand in enumerate(program.operands):
        check_operand(operand, program.operands[:n])
    for n, i in enumerate(program.instructions):
        _check_selectors(program, n, i)
    for values in dict.fromkeys((program.least, program.greatest)):
        resolved = [resolve(i, values) for i in program.instructions]
        try:
            for n, instruction in enumerate(resolved):
                if instruction is not None:
                    _check_instruction(config, n, instruction)
            _check_progress(config, program.instructions, resolved)
        except ProgramError as error:
            if not values:
                raise
            given = ", ".join(f"{o.name} = {v}" for o, v in zip(program.operands, values, strict=True))
            raise ProgramError(f"with {given}: {error}") from None


def _check_selectors(program: Program, n: int, i: Instruction) -> None:
    """Operands are declared, no field wraps between their limits, a depth varies by what suits the weights, and there
    are always enough columns to select from."""
    for field in i.type.variable:
        number = i.values[selector(field.name)]
        if not number:
            continue
        if number > len(program.operands):
            raise ProgramError(
                f"instruction {n} ({i.type.name}): {field.name} has operand {number}, "
                f"the program declares {len(program.operands)}"
            )
        name, least, greatest, _ = program.operands[number - 1]
        base = i.values[field.name] + (1 << field.width - 1 if field.signed else 0)
        if (base + least) >> field.width != (base + greatest) >> field.width:
            raise ProgramError(
                f"instruction {n} ({i.type.name}): {field.name} has {field.width} bits and wraps between the limits "
                f"{least}..{greatest} of operand '{name}'; narrow them"
            )
    if i.type is MATRIX and i.depth_operand:
        operand, unit = program.operands[i.depth_operand - 1], depth_unit(i)
        if operand.step % unit:
            raise ProgramError(
                f"instruction {n} (MATRIX): depth goes by operand '{operand.name}' in steps of {operand.step}, but its "
                f"weights come in groups of {unit} inputs; declare it in steps of {unit}"
            )
    if i.type is VECTOR and i.columns_operand:
        fewest = i.columns + program.operands[i.columns_operand - 1].least
        if fewest % (1 << 16) < i.select:
            raise ProgramError(f"instruction {n} (VECTOR): it selects {i.select} columns, but may have only {fewest}")


def _check_instruction(config: CoreConfig, n: int, i: Instruction) -> None:
    """Bounds, alignment and combinations of one resolved instruction."""
    if i.type is MATRIX and is_packed(i):
        _check_packed(config, n, i)
    if fault := selection_fault(config, i) or section_fault(config, i):
        raise ProgramError(f"instruction {n} ({i.type.name}): {fault}")
    for region in reads(config, i) + writes(config, i):
        depth = depth_of(config, region.memory)
        if region.end > depth:
            raise ProgramError(
                f"instruction {n} ({i.type.name}) reaches word {region.end - 1} of the {region.memory.name} "
                f"memory, which has {depth}"
            )
    if i.type in (LOAD, STORE):
        for name in ("address", "stride"):
            if i.values[name] % config.bus_bytes:
                raise ProgramError(
                    f"instruction {n} ({i.type.name}): {name} {i.values[name]:#x} is not a multiple of the bus "
                    f"width, {config.bus_bytes} bytes"
                )
    if i.type is STORE and i.memory != Memory.VECTOR:
        raise ProgramError(f"instruction {n}: STORE reads the VECTOR memory only, not {Memory(i.memory).name}")
    if i.type is STORE and i.lane >= config.rows:
        raise ProgramError(f"instruction {n} (STORE): lane {i.lane} does not exist, a word has {config.rows}")
    if i.type is VECTOR and i.maximum == Maximum.EXPONENT and i.function != Function.SCORE:
        raise ProgramError(f"instruction {n}: the EXPONENT maximum needs the SCORE function")
    if i.type is VECTOR and i.mask != Mask.NONE and i.function != Function.SCORE:
        raise ProgramError(f"instruction {n}: a mask needs the SCORE function")


def _check_packed(config: CoreConfig, n: int, i: Instruction) -> None:
    """A MATRIX instruction with packed weights suits the core, its depth the format, and its tiles the word groups."""
    if not config.packed:
        raise ProgramError(
            f"instruction {n} (MATRIX): the weights are {Weights(i.weights).name}, {Sparsity(i.sparsity).name}; core "
            f"'{config.name}' takes INT8, DENSE only: expand them"
        )
    try:
        weight_words(i)
    except WeightError as error:
        raise ProgramError(
            f"instruction {n} (MATRIX): a depth of {i.depth} does not suit its weights: {error}"
        ) from None
    together = activation_group(i)
    for name in ("a", "a_outer", "a_inner"):
        if i.values[name] % together:
            raise ProgramError(
                f"instruction {n} (MATRIX): {name} = {i.values[name]} is not a multiple of the {together} ACTIVATION "
                f"words that {Weights(i.weights).name}, {Sparsity(i.sparsity).name} takes at once"
            )


def _check_progress(
    config: CoreConfig, instructions: Sequence[Instruction], resolved: Sequence[Instruction | None]
) -> None:
    """Execute tokens, queues and accumulator tiles without time; the outcome does not depend on the order chosen."""
    queues: dict[Unit, deque[int]] = {u: deque() for u in Unit}
    tokens = {(a, b): 0 for a in Unit for b in Unit}
    tiles = 0  # complete tiles in the accumulator queue
    remaining: dict[Unit, int] = {u: -1 for u in Unit}  # tiles still to push or pop by the running instruction
    dispatched = completed = 0
    while completed < len(instructions):
        progress = False
        while dispatched < len(instructions):
            unit = instructions[dispatched].type.unit
            if len(queues[unit]) >= config.queue_depth + 1:
                break
            queues[unit].append(dispatched)
            dispatched += 1
            progress = True
        for unit in Unit:
            while queues[unit]:
                i = instructions[queues[unit][0]]
                if remaining[unit] < 0:
                    sources = [u for u in Unit if i.wait >> u & 1]
                    if any(not tokens[s, unit] for s in sources):
                        break
                    for s in sources:
                        tokens[s, unit] -= 1
                    running = resolved[queues[unit][0]]
                    remaining[unit] = tiles_pushed(running) + tiles_popped(config, running) if running else 0
                    progress = True
                if i.type is MATRIX:
                    step = min(remaining[unit], config.accumulator_tiles - tiles)
                    tiles += step
                else:
                    step = min(remaining[unit], tiles)
                    tiles -= step
                remaining[unit] -= step
                progress = progress or step > 0
                if remaining[unit]:
                    break
                remaining[unit] = -1
                for target in Unit:
                    if i.signal >> target & 1:
                        tokens[unit, target] += 1
                queues[unit].popleft()
                completed += 1
                progress = True
        if not progress:
            stuck = min(q[0] for q in queues.values() if q)
            raise ProgramError(
                f"the program waits for itself: instruction {stuck} ({disassemble(instructions[stuck])}) can never run"
            )
    if tiles:
        raise ProgramError(f"the program leaves {tiles} result tiles in the accumulator queue")
    for (a, b), count in tokens.items():
        if count:
            raise ProgramError(f"the program leaves {count} tokens from {a.name} to {b.name}")
