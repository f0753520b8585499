"""Programs: a list of instructions for one core configuration, their file format and their static checks."""

from __future__ import annotations

import struct
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .config import ISA_VERSION, CoreConfig
from .instructions import (
    INSTRUCTION_BYTES,
    LOAD,
    MATRIX,
    STORE,
    TABLE_ENTRIES,
    TABLE_SLOTS,
    VECTOR,
    Destination,
    FirstAdd,
    Function,
    Instruction,
    InstructionError,
    Maximum,
    Memory,
    Source,
    ThirdMultiply,
    Unit,
    decode,
    disassemble,
    encode,
)

#: First bytes of a program file.
FILE_MAGIC = b"LKSTPROG"
_HEADER = struct.Struct("<8sIIII")  # magic, ISA version, configuration CRC, instruction count, body CRC


class ProgramError(ValueError):
    """A program that must not run: the message names the instruction, what is wrong and what is legal."""


@dataclass(frozen=True)
class Program:
    """Instructions for the core whose configuration has ``config_crc``; their list order is their meaning."""

    config_crc: int
    instructions: tuple[Instruction, ...]

    def encode(self) -> bytes:
        """The instructions as the core fetches them, 64 bytes each."""
        return b"".join(encode(i) for i in self.instructions)

    def to_bytes(self) -> bytes:
        """The content of a program file."""
        body = self.encode()
        return _HEADER.pack(FILE_MAGIC, ISA_VERSION, self.config_crc, len(self.instructions), zlib.crc32(body)) + body

    def save(self, path: Path | str) -> None:
        """Write a program file."""
        Path(path).write_bytes(self.to_bytes())

    @staticmethod
    def from_bytes(data: bytes) -> Program:
        """Read a program file's content; raises :class:`ProgramError` where it is not one, or damaged."""
        if len(data) < _HEADER.size or data[:8] != FILE_MAGIC:
            raise ProgramError("this is not a Lockstep program file (it does not begin with LKSTPROG)")
        _, version, config_crc, count, crc = _HEADER.unpack_from(data)
        body = data[_HEADER.size :]
        if version != ISA_VERSION:
            raise ProgramError(f"the program is for instruction set {version}, this is {ISA_VERSION}; compile it again")
        if len(body) != count * INSTRUCTION_BYTES:
            raise ProgramError(
                f"the program file is truncated: {len(body)} bytes of instructions, "
                f"{count * INSTRUCTION_BYTES} announced"
            )
        if zlib.crc32(body) != crc:
            raise ProgramError("the program file is damaged: its checksum does not match; write it again")
        instructions = []
        for n in range(count):
            try:
                instructions.append(decode(body[n * INSTRUCTION_BYTES : (n + 1) * INSTRUCTION_BYTES]))
            except InstructionError as error:
                raise ProgramError(f"instruction {n}: {error}") from None
        return Program(config_crc, tuple(instructions))

    @staticmethod
    def load(path: Path | str) -> Program:
        """Read a program file."""
        return Program.from_bytes(Path(path).read_bytes())

    def disassemble(self) -> list[str]:
        """One line per instruction."""
        return [f"{n:6d}  {disassemble(i)}" for n, i in enumerate(self.instructions)]


def table_shift(instruction: Instruction) -> int:
    """k of the function table that a VECTOR instruction reads: segments are 2^-k wide."""
    fixed = {Function.EXP2: 5, Function.SCORE: 5, Function.RECIP: 6, Function.RSQRT: 5}
    return fixed.get(Function(instruction.function), instruction.shift)


def tiles_pushed(instruction: Instruction) -> int:
    """Result tiles that an instruction appends to the accumulator queue."""
    return instruction.outer * instruction.inner if instruction.type is MATRIX else 0


def tiles_popped(config: CoreConfig, instruction: Instruction) -> int:
    """Result tiles that an instruction takes from the accumulator queue."""
    if instruction.type is not VECTOR or instruction.source != Source.ACCUMULATOR:
        return 0
    return instruction.tiles * -(-instruction.columns // config.columns)


@dataclass(frozen=True)
class Region:
    """Words of one on-chip memory that an instruction touches: ``count`` runs of ``words``, ``stride`` apart."""

    memory: Memory
    start: int
    words: int
    count: int = 1
    stride: int = 0

    @property
    def end(self) -> int:
        """First word behind the region."""
        return self.start + self.words + max(0, self.count - 1) * self.stride


def reads(config: CoreConfig, i: Instruction) -> list[Region]:
    """On-chip regions that an instruction reads."""
    if i.type is STORE:
        return [Region(Memory(i.memory), i.local, i.words, i.rows, i.local_stride)]
    if i.type is MATRIX:
        return [
            Region(memory, base + o * outer, i.depth, i.inner, inner)
            for memory, base, outer, inner in (
                (Memory.ACTIVATION, i.a, i.a_outer, i.a_inner),
                (Memory.WEIGHT, i.w, i.w_outer, i.w_inner),
            )
            for o in range(i.outer if outer else 1)
        ]
    if i.type is not VECTOR:
        return []
    parameter = Memory.PARAMETER
    regions = []
    if i.source != Source.ACCUMULATOR:
        memory = Memory.VECTOR if i.source == Source.VECTOR else parameter
        regions.append(Region(memory, i.x, i.columns, i.tiles, i.x_stride))
    if i.add1 == FirstAdd.Y or i.mul3 == ThirdMultiply.Y:
        regions.append(Region(Memory.VECTOR, i.y, i.columns, i.tiles, i.y_stride))
    if i.add1 == FirstAdd.LANE0 or i.mul2 == 1 or i.function == Function.EXP2:
        regions.append(Region(parameter, i.lane0, i.tiles))
    if i.mul1 == 1:
        regions.append(Region(parameter, i.lane1, i.tiles))
    column_words = -(-i.columns // config.rows)
    if i.mul1 == 2 or i.mul2 == 2:
        regions.append(Region(parameter, i.column0, column_words))
    if i.add2 == 1:
        regions.append(Region(parameter, i.column1, column_words))
    if i.mul3 == ThirdMultiply.COLUMN2:
        regions.append(Region(parameter, i.column2, column_words))
    if i.maximum and i.max_continue:
        regions.append(Region(parameter, i.max_to, i.tiles))
    if i.function in (Function.EXP2, *range(Function.RECIP, Function.SIGMOID + 1)):
        regions.append(Region(Memory.TABLE, i.table * TABLE_ENTRIES, TABLE_ENTRIES))
    return regions


def writes(config: CoreConfig, i: Instruction) -> list[Region]:
    """On-chip regions that an instruction writes."""
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
    }.get(Destination(i.destination))
    if memory is not None:
        regions.append(Region(memory, i.to, i.columns, i.tiles, i.to_stride))
    if i.destination == Destination.WEIGHT_TRANSPOSED:
        for group in range(-(-i.columns // config.columns)):
            regions.append(Region(Memory.WEIGHT, i.to + group * i.to_group, config.rows, i.tiles, i.to_stride))
    if i.sum:
        regions.append(Region(Memory.PARAMETER, i.sum_to, i.tiles))
    if i.maximum:
        regions.append(Region(Memory.PARAMETER, i.max_to, i.tiles))
    return regions


def depth_of(config: CoreConfig, memory: Memory) -> int:
    """Words of an on-chip memory."""
    return {
        Memory.ACTIVATION: config.activation_words,
        Memory.WEIGHT: config.weight_words,
        Memory.VECTOR: config.vector_words,
        Memory.PARAMETER: config.parameter_words,
        Memory.TABLE: TABLE_SLOTS * TABLE_ENTRIES,
    }[memory]


def validate(config: CoreConfig, program: Program) -> None:
    """Raise :class:`ProgramError` unless ``program`` can run on ``config`` to its end.

    Checks the configuration, bounds of every on-chip access, alignment of transfers, that no token is taken
    before it is given, that every result tile is consumed, and that the program does not wait for itself.
    """
    if program.config_crc != config.crc:
        raise ProgramError(
            f"the program was built for configuration {program.config_crc:#010x}, "
            f"core '{config.name}' is {config.crc:#010x}; compile it for this core"
        )
    for n, i in enumerate(program.instructions):
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
        if i.type is VECTOR and i.maximum == Maximum.EXPONENT and i.function != Function.SCORE:
            raise ProgramError(f"instruction {n}: the EXPONENT maximum needs the SCORE function")
    _check_progress(config, program.instructions)


def _check_progress(config: CoreConfig, instructions: Sequence[Instruction]) -> None:
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
                    remaining[unit] = tiles_pushed(i) + tiles_popped(config, i)
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
