"""Random programs: every instruction in every mode, on data with every kind of float, for comparing executors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from lockstep_isa.config import CoreConfig
from lockstep_isa.executor import GoldenCore
from lockstep_isa.instructions import (
    LOAD,
    MATRIX,
    STORE,
    TABLE_ENTRIES,
    VECTOR,
    Destination,
    FirstAdd,
    FirstMultiply,
    Function,
    Instruction,
    Maximum,
    Memory,
    SecondAdd,
    SecondMultiply,
    Source,
    Tap,
    ThirdMultiply,
)
from lockstep_isa.program import Program, Region, reads, writes
from lockstep_isa.tables import FUNCTIONS
from numpy.typing import NDArray

from .builder import ProgramBuilder

#: On-chip words that a random program uses of each memory.
_USED = {Memory.ACTIVATION: 256, Memory.WEIGHT: 256, Memory.VECTOR: 512, Memory.PARAMETER: 128}
#: The part of the PARAMETER memory that holds integers: exponents, and nothing else.
_INTEGERS = (120, 128)
_TABLES = {
    Function.EXP2: ("exp2", 0),
    Function.RECIP: ("recip", 1),
    Function.RSQRT: ("rsqrt", 2),
    Function.RELU_MINUS: ("gelu_erf", 3),
}
_OTHER_TABLES = {
    Function.RELU_MINUS: ("gelu_erf", "gelu_tanh", "silu"),
    Function.ODD: ("tanh",),
    Function.SIGMOID: ("sigmoid",),
}


@dataclass(frozen=True)
class RandomProgram:
    """A program, device memory before it (uint8[bytes], from address ``base``), and where its results lie.

    Addresses in the program count from 0; ``base`` bytes in front are left to the driver.
    """

    seed: int
    base: int
    program: Program
    memory: NDArray[np.uint8]
    result: slice

    def expected(self, config: CoreConfig) -> NDArray[np.uint32]:
        """The words that the golden executor leaves in the result."""
        memory = np.concatenate([np.zeros(self.base, np.uint8), self.memory])
        core = GoldenCore(config, memory)
        core.run(self.program)
        return memory[self.result].view(np.uint32)


def same_words(actual: NDArray[np.uint32], expected: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """Where two arrays of fp32 words agree; every NaN is the same."""
    nan = (actual & 0x7FFFFFFF > 0x7F800000) & (expected & 0x7FFFFFFF > 0x7F800000)
    return (actual == expected) | nan


def _floats(rng: np.random.Generator, count: int) -> NDArray[np.float32]:
    """Mostly ordinary values; some tiny, huge, zero, infinite, NaN and subnormal."""
    kind = rng.random(count)
    values = rng.normal(0, 1, count) * np.exp2(rng.integers(-6, 7, count))
    values = np.where(kind < 0.02, values * 2.0**-120, values)
    values = np.where((kind >= 0.02) & (kind < 0.04), values * 2.0**118, values)
    floats = values.astype(np.float32)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-42, 2.0**-126, 1.0], np.float32)
    chosen = kind > 0.99
    floats[chosen] = rng.choice(special, int(chosen.sum()))
    return floats


class _Generator:
    def __init__(self, config: CoreConfig, seed: int, base: int) -> None:
        self.config, self.seed, self.base = config, seed, base
        self.rng = np.random.default_rng(seed)
        self.builder = ProgramBuilder(config)
        self.blocks: list[NDArray[np.uint8]] = []
        self.used = 0
        self.slots: dict[int, str] = {}

    def place(self, array: NDArray[np.generic]) -> int:
        """Put an array into device memory; returns its address."""
        raw = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        address = self.base + self.used
        padded = np.zeros(-(-raw.size // 256) * 256, np.uint8)
        padded[: raw.size] = raw
        self.blocks.append(padded)
        self.used += padded.size
        return address

    def number(self, low: int, high: int) -> int:
        """A random integer, both ends included."""
        return int(self.rng.integers(low, high + 1))

    def load_table(self, name: str, slot: int) -> None:
        function = FUNCTIONS[name]
        entries = np.zeros((TABLE_ENTRIES, 4), np.float32)
        for column, values in enumerate((function.c0, function.c1, function.c2)):
            entries[: function.entries, column] = values
        self.builder.emit(
            LOAD, memory=Memory.TABLE, words=TABLE_ENTRIES, address=self.place(entries), local=slot * TABLE_ENTRIES
        )
        self.slots[slot] = name

    def load(self) -> None:
        """A random two-dimensional block into any memory."""
        memory = Memory(self.number(0, 3))
        rows, words = self.number(1, 4), self.number(1, 24)
        gap = self.number(0, 3)
        per_word = self.config.rows
        count = rows * (words + gap) * per_word
        if memory in (Memory.VECTOR, Memory.PARAMETER):
            data: NDArray[np.generic] = _floats(self.rng, count)
            stride = (words + gap) * per_word * 4
        else:
            data = self.rng.integers(-128, 128, count).astype(np.int8)
            stride = (words + gap) * per_word
        end = _INTEGERS[0] if memory == Memory.PARAMETER else _USED[memory]
        local_stride = words + self.number(0, 2)
        self.builder.emit(
            LOAD,
            memory=memory,
            rows=rows,
            words=words,
            address=self.place(data),
            stride=stride,
            local=self.number(0, end - rows * local_stride),
            local_stride=local_stride,
        )

    def fill(self) -> None:
        """Every used word of every memory, once."""
        rows = self.config.rows
        for memory, words in _USED.items():
            if memory in (Memory.VECTOR, Memory.PARAMETER):
                data: NDArray[np.generic] = _floats(self.rng, words * rows)
            else:
                data = self.rng.integers(-128, 128, words * rows).astype(np.int8)
            if memory == Memory.PARAMETER:
                # Zero is an exponent; subnormal patterns of small integers would not survive a load.
                data[_INTEGERS[0] * rows : _INTEGERS[1] * rows] = 0
            self.builder.emit(LOAD, memory=memory, words=words, address=self.place(data), local=0)

    def matrix(self) -> None:
        """A product, and the pass that takes its tiles."""
        depth, outer, inner = self.number(1, 40), self.number(1, 3), self.number(1, 3)
        a_words, w_words = outer * depth, inner * depth
        self.builder.emit(
            MATRIX,
            depth=depth,
            outer=outer,
            inner=inner,
            a=self.number(0, _USED[Memory.ACTIVATION] - a_words),
            a_outer=depth,
            w=self.number(0, _USED[Memory.WEIGHT] - w_words),
            w_inner=depth,
            unsigned=self.number(0, 1),
        )
        columns = self.number((inner - 1) * self.config.columns + 1, inner * self.config.columns)
        self.vector(Source.ACCUMULATOR, outer, columns)

    def vector(self, source: Source | None = None, tiles: int = 0, columns: int = 0) -> None:
        """A random pass that reads nothing which it writes elsewhere."""
        while True:
            instruction = self._random_pass(source, tiles, columns)
            if instruction is not None and not self._clashes(instruction):
                self.builder.emit(VECTOR, **{k: v for k, v in instruction.values.items() if k != "opcode"})
                return

    def _random_pass(self, source: Source | None, tiles: int, columns: int) -> Instruction | None:
        n = self.number
        chosen = Source(n(1, 2)) if source is None else source
        tiles = tiles or n(1, 3)
        columns = columns or (n(1, 12) if chosen == Source.PARAMETER else n(1, 100))
        function = Function(n(0, 8)) if n(0, 1) else Function.NONE
        table = 0
        if function in (Function.EXP2, Function.RECIP, Function.RSQRT):
            table = _TABLES[function][1]
        elif function >= Function.RELU_MINUS:
            name = str(self.rng.choice(_OTHER_TABLES[function]))
            table = 3
            if self.slots.get(3) != name:
                self.load_table(name, 3)
        shift = FUNCTIONS[self.slots[table]].k if function >= Function.RELU_MINUS else n(0, 15)
        destination = Destination(n(0, 5))
        maximum = Maximum(n(0, 2))
        if maximum == Maximum.EXPONENT and function != Function.SCORE:
            maximum = Maximum.ABSOLUTE
        integers = maximum == Maximum.EXPONENT
        used = {
            Destination.VECTOR: _USED[Memory.VECTOR],
            Destination.PARAMETER: _INTEGERS[0],
            Destination.ACTIVATION: _USED[Memory.ACTIVATION],
        }.get(destination, _USED[Memory.WEIGHT])
        rows = self.config.rows
        group_words = rows if destination == Destination.WEIGHT_TRANSPOSED else columns
        groups = -(-columns // rows)
        to_stride = group_words + (0 if destination == Destination.WEIGHT_TRANSPOSED else n(0, 3))
        to_group = tiles * to_stride
        extent = groups * to_group if destination == Destination.WEIGHT_TRANSPOSED else tiles * to_stride
        x_stride, y_stride = columns + n(0, 3), columns + n(0, 3)
        x_used = _INTEGERS[0] if chosen == Source.PARAMETER else _USED[Memory.VECTOR]
        words = _INTEGERS[0]
        if extent > used or tiles * x_stride > x_used or tiles * y_stride > _USED[Memory.VECTOR] or groups > words:
            return None
        lane0 = n(*_INTEGERS) - tiles if function == Function.EXP2 else n(0, words - tiles)
        add1, mul2 = FirstAdd(n(0, 2)), SecondMultiply(n(0, 2))
        if function == Function.EXP2:
            lane0 = n(_INTEGERS[0], _INTEGERS[1] - tiles)
            add1 = FirstAdd.NONE if add1 == FirstAdd.LANE0 else add1
            mul2 = SecondMultiply.NONE if mul2 == SecondMultiply.LANE0 else mul2
        return Instruction(
            VECTOR,
            source=chosen,
            destination=destination,
            add1=add1,
            mul1=FirstMultiply(n(0, 4)),
            mul2=mul2,
            add2=SecondAdd(n(0, 2)),
            function=function,
            table=table,
            shift=shift,
            mul3=ThirdMultiply(n(0, 2)),
            tap=Tap(n(0, 1)),
            sum=n(0, 1),
            maximum=maximum,
            max_continue=n(0, 1),
            tiles=tiles,
            columns=columns,
            x=n(0, x_used - tiles * x_stride),
            x_stride=x_stride,
            y=n(0, _USED[Memory.VECTOR] - tiles * y_stride),
            y_stride=y_stride,
            to=n(0, used - extent),
            to_stride=to_stride,
            to_group=to_group,
            lane0=lane0,
            lane1=n(0, words - tiles),
            column0=n(0, words - groups),
            column1=n(0, words - groups),
            column2=n(0, words - groups),
            sum_to=n(0, words - tiles),
            max_to=n(_INTEGERS[0], _INTEGERS[1] - tiles) if integers else n(0, words - tiles),
            immediate0=int(_floats(self.rng, 1).view(np.uint32)[0]),
            immediate1=int(_floats(self.rng, 1).view(np.uint32)[0]),
        )

    def _clashes(self, i: Instruction) -> bool:
        """Whether rows of a pass depend on each other, or two of its results fall on one word."""
        written = writes(self.config, i)
        words: dict[Memory, NDArray[np.int64]] = {}
        for memory in Memory:
            words[memory] = np.zeros(max(1024, _USED.get(memory, 0) * 2), np.int64)
        for region in written:
            for run in _runs(region):
                words[region.memory][run] += 1
        if any((w > 1).any() for w in words.values()):
            return True
        read = reads(self.config, i)
        if i.maximum and i.max_continue:
            read.remove(Region(Memory.PARAMETER, i.max_to, i.tiles))
        return any(words[region.memory][run].any() for region in read for run in _runs(region))

    def finish(self) -> RandomProgram:
        """Bring what the program left on chip to device memory."""
        rows = self.config.rows
        b = self.builder
        # The VECTOR memory first, then everything else through it.
        vector_bytes = _USED[Memory.VECTOR] * 4 * rows
        parameter_bytes = _USED[Memory.PARAMETER] * 4 * rows
        tiles = 2
        product_words = tiles * tiles * rows
        result_bytes = vector_bytes + parameter_bytes + product_words * 4 * rows
        result = self.place(np.zeros(result_bytes, np.uint8))
        b.emit(STORE, memory=Memory.VECTOR, words=_USED[Memory.VECTOR], address=result, local=0)
        b.emit(
            VECTOR,
            source=Source.PARAMETER,
            destination=Destination.VECTOR,
            columns=_USED[Memory.PARAMETER],
        )
        b.emit(STORE, memory=Memory.VECTOR, words=_USED[Memory.PARAMETER], address=result + vector_bytes, local=0)
        depth = _USED[Memory.ACTIVATION] // tiles
        b.emit(MATRIX, depth=depth, outer=tiles, inner=tiles, a_outer=depth, w_inner=depth)
        b.emit(
            VECTOR,
            source=Source.ACCUMULATOR,
            destination=Destination.VECTOR,
            tiles=tiles,
            columns=tiles * rows,
            to_stride=tiles * rows,
        )
        b.emit(
            STORE, memory=Memory.VECTOR, words=product_words, address=result + vector_bytes + parameter_bytes, local=0
        )
        memory = np.concatenate(self.blocks)
        return RandomProgram(self.seed, self.base, b.finish(), memory, slice(result, result + result_bytes))


def _runs(region: Region) -> list[slice]:
    return [
        slice(region.start + n * region.stride, region.start + n * region.stride + region.words)
        for n in range(region.count)
    ]


def random_program(config: CoreConfig, seed: int, base: int = 0, length: int = 12) -> RandomProgram:
    """A random program of about ``length`` steps.

    config : the core. seed : the same seed gives the same program. base : first byte of device memory that it uses.
    """
    generator = _Generator(config, seed, base)
    for name, slot in _TABLES.values():
        generator.load_table(name, slot)
    generator.fill()
    for _ in range(length):
        step = generator.number(0, 9)
        if step < 4:
            generator.matrix()
        elif step < 8:
            generator.vector()
        else:
            generator.load()
    return generator.finish()
