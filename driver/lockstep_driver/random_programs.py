"""Random programs: every instruction in every mode, on data with every kind of float, for comparing executors.

Where a field has a run-time operand, the program is made for the operand's greatest value and still makes sense with
every smaller one, so that its tokens and tiles are put to the test between the limits too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from lockstep_isa.choices import Internal
from lockstep_isa.config import CoreConfig
from lockstep_isa.executor import GoldenCore
from lockstep_isa.instructions import (
    LOAD,
    MATRIX,
    STORE,
    TABLE_ENTRIES,
    VECTOR,
    WEIGHT_GROUPS,
    Destination,
    FirstAdd,
    FirstMultiply,
    Function,
    Instruction,
    Mask,
    Maximum,
    Memory,
    SecondAdd,
    SecondMultiply,
    Source,
    Sparsity,
    Tap,
    ThirdMultiply,
    Weights,
    selector,
)
from lockstep_isa.packed import activation_group, depth_unit, is_packed, weight_words
from lockstep_isa.program import Program, Region, maxima_region, reads, writes
from lockstep_isa.tables import FUNCTIONS
from numpy.typing import NDArray

from .builder import ProgramBuilder
from .random_attention import random_softmax, random_weighing
from .random_sections import random_sections
from .random_selection import INDEX_USED, MOST_COLUMNS, fill_index, random_gather, random_selection, store_index
from .random_values import random_floats, random_operands

#: On-chip words that a random program uses of each memory.
_USED = {Memory.ACTIVATION: 256, Memory.WEIGHT: 256, Memory.VECTOR: 512, Memory.PARAMETER: 128}
#: The part of the PARAMETER memory that holds integers: exponents, and nothing else.
_INTEGERS = (120, 128)
#: The part of the VECTOR memory, behind the other, that holds bytes and nothing else.
_BYTES = (512, 640)
#: Device memory that random STOREs write.
_STORED_BYTES = 1 << 15
#: Formats of packed weights, and their greatest depth.
_FORMATS, _PACKED_DEPTH = [(w, s) for w in Weights for s in Sparsity if w or s], 128
#: Greatest values of the operands; the least is 0, but for POSITION.
_COUNT, _INNER, _LOCAL, _WHOLE, _LEAST_POSITION, _POSITION = 6, 2, 8, 32, -60, 120
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
    """A program, its operands, device memory before it (uint8[bytes], from address ``base``), and where that lies.

    Addresses in the program count from 0; ``base`` bytes in front are left to the driver.
    """

    seed: int
    base: int
    program: Program
    operands: dict[str, int]
    memory: NDArray[np.uint8]

    @property
    def result(self) -> slice:
        """The bytes of device memory that the program may read and write; all of them are compared."""
        return slice(self.base, self.base + self.memory.size)

    def golden(self, config: CoreConfig) -> tuple[NDArray[np.uint32], int]:
        """The words that the golden executor leaves in the result, and the chunks that MATRIX passes over."""
        memory = np.concatenate([np.zeros(self.base, np.uint8), self.memory])
        core = GoldenCore(config, memory)
        core.run(self.program, tuple(self.operands[operand.name] for operand in self.program.operands))
        return memory[self.result].view(np.uint32), core.skipped_chunks


def same_words(actual: NDArray[np.uint32], expected: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """Where two arrays of fp32 words agree; every NaN is the same."""
    nan = (actual & 0x7FFFFFFF > 0x7F800000) & (expected & 0x7FFFFFFF > 0x7F800000)
    return (actual == expected) | nan


class _Generator:
    def __init__(self, config: CoreConfig, seed: int, base: int) -> None:
        self.config, self.seed, self.base = config, seed, base
        self.rng = np.random.default_rng(seed)
        self.builder = ProgramBuilder(config)
        self.blocks: list[NDArray[np.uint8]] = []
        self.used = 0
        self.slots: dict[int, str] = {}
        self.values: dict[str, int] = {}
        self.count = self.operand("count", 0, _COUNT)
        self.inner = self.operand("inner", 0, _INNER)
        self.columns = self.operand("columns", 0, _INNER * config.columns, self.values["inner"] * config.columns)
        self.local = self.operand("local", 0, _LOCAL)
        self.lane = self.operand("lane", 0, config.rows - 1)
        self.position = self.operand("position", _LEAST_POSITION, _POSITION)
        self.whole = self.operand("whole", 0, _WHOLE, _WHOLE * self.number(0, 1), _WHOLE)
        beats = self.number(0, 4)
        self.offset = self.operand("offset", 0, 4 * config.bus_bytes, beats * config.bus_bytes)
        self.stores = self.place(self.rng.integers(0, 256, _STORED_BYTES).astype(np.uint8))

    def operand(self, name: str, least: int, greatest: int, value: int | None = None, step: int = 1) -> int:
        """Declare an operand with a random value, often one of its limits; returns its number."""
        if value is None:
            value = self.number(least, greatest) if self.number(0, 1) else (least, greatest)[self.number(0, 1)]
        self.values[name] = value
        return self.builder.operand(name, least, greatest, step)

    def vary(self, fields: dict[str, int], name: str, number: int, greatest: int, least: int = 0) -> None:
        """At times make a field variable: its value is then reached with the operand's ``greatest`` value.

        ``least`` is what remains of it at least without the operand.
        """
        if fields[name] - greatest >= least and self.number(0, 1):
            fields |= {name: fields[name] - greatest, selector(name): number}

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
        word = self.config.rows * (4 if memory in (Memory.VECTOR, Memory.PARAMETER) else 1)
        stride = -(-(words + gap) * word // self.config.bus_bytes) * self.config.bus_bytes
        gather, size = random_gather(self.rng, self.config, rows, stride)
        if memory in (Memory.VECTOR, Memory.PARAMETER):
            data: NDArray[np.generic] = random_floats(self.rng, size // 4)
        elif memory == Memory.ACTIVATION:
            data = random_operands(self.rng, self.config, -(-size // self.config.rows))
        else:
            data = self.rng.integers(-128, 128, size).astype(np.int8)
        end = _INTEGERS[0] if memory == Memory.PARAMETER else _USED[memory]
        local_stride = words + self.number(0, 2)
        room = np.zeros(4 * self.config.bus_bytes // data.itemsize, data.dtype)
        fields = {
            "memory": memory,
            "rows": rows,
            "words": words,
            "address": self.place(np.concatenate([room, data.reshape(-1)])) + room.nbytes,
            "stride": stride,
            "local": self.number(0, end - rows * local_stride),
            "local_stride": local_stride,
        } | gather
        self.vary_transfer(fields)
        self.builder.emit(LOAD, **fields)

    def store(self) -> None:
        """A random block of the VECTOR memory, as fp32 values or as bytes, from some lane of its first row on."""
        narrow = self.number(0, 1)
        first, end = _BYTES if narrow else (0, _USED[Memory.VECTOR])
        rows, words = self.number(1, 4), self.number(1, 24)
        word = self.config.rows * (1 if narrow else 4)
        local_stride, stride = words + self.number(0, 2), (words + self.number(0, 2)) * word
        stride = -(-stride // self.config.bus_bytes) * self.config.bus_bytes
        fields = {
            "memory": Memory.VECTOR,
            "rows": rows,
            "words": words,
            "address": self.stores
            + self.number(4, (_STORED_BYTES - rows * stride) // self.config.bus_bytes) * self.config.bus_bytes,
            "stride": stride,
            "local": self.number(first, end - rows * local_stride),
            "local_stride": local_stride,
            "bytes": narrow,
            "lane": (0, self.config.rows - 1, self.number(0, self.config.rows - 1))[self.number(0, 2)],
            "lane_only": int(self.config.selection and self.number(0, 1)),
        }
        self.vary_transfer(fields)
        self.vary(fields, "lane", self.lane, self.config.rows - 1)
        self.builder.emit(STORE, **fields)

    def vary_transfer(self, fields: dict[str, int]) -> None:
        self.vary(fields, "rows", self.inner, _INNER)
        self.vary(fields, "words", self.count, _COUNT)
        self.vary(fields, "address", self.offset, 4 * self.config.bus_bytes)
        self.vary(fields, "local", self.local, _LOCAL, _BYTES[0] if fields.get("bytes") else 0)

    def fill(self) -> None:
        """Every used word of every memory, once."""
        rows = self.config.rows
        for memory, words in _USED.items():
            if memory in (Memory.VECTOR, Memory.PARAMETER):
                data: NDArray[np.generic] = random_floats(self.rng, words * rows)
            elif memory == Memory.ACTIVATION:
                data = random_operands(self.rng, self.config, words)
            else:
                data = self.rng.integers(-128, 128, words * rows).astype(np.int8)
            if memory == Memory.PARAMETER:
                # Zero is an exponent; subnormal patterns of small integers would not survive a load.
                data[_INTEGERS[0] * rows : _INTEGERS[1] * rows] = 0
            self.builder.emit(LOAD, memory=memory, words=words, address=self.place(data), local=0)
        zeros = np.zeros((_BYTES[1] - _BYTES[0]) * rows, np.float32)
        self.builder.emit(
            LOAD, memory=Memory.VECTOR, words=_BYTES[1] - _BYTES[0], address=self.place(zeros), local=_BYTES[0]
        )
        if self.config.selection:
            fill_index(self.builder)

    def matrix(self) -> None:
        """A product, and the pass that takes its tiles."""
        most = 120 if self.config.zero_skipping and self.number(0, 1) else 40
        depth, weights, sparsity = self.number(1, most), Weights.INT8, Sparsity.DENSE
        if self.config.packed and self.number(0, 1):
            weights, sparsity = _FORMATS[self.number(0, len(_FORMATS) - 1)]
            unit = WEIGHT_GROUPS[weights] or 8 * sparsity
            depth = unit * self.number(1, _PACKED_DEPTH // unit)
        format = Instruction(MATRIX, depth=depth, weights=weights, sparsity=sparsity, unsigned=self.number(0, 1))
        words, aligned, own = weight_words(format), activation_group(format), depth
        if self.config.zero_skipping and not is_packed(format) and self.number(0, 2):
            # Tiles begin with a chunk.
            aligned, own = self.config.rows, -(-depth // self.config.rows) * self.config.rows
        # Row tiles in the outer loop and columns in the inner one, or the other way round.
        down, along = ("outer", "inner") if self.number(0, 3) else ("inner", "outer")
        counts = {"outer": self.number(1, 3), "inner": self.number(1, 3)}
        counts[down] = min(counts[down], _USED[Memory.ACTIVATION] // own)
        counts[along] = min(counts[along], _USED[Memory.WEIGHT] // words)
        # A pass has to have room for all tiles of it.
        counts["outer"] = min(counts["outer"], _USED[Memory.VECTOR] // (counts["inner"] * self.config.columns))
        outer, inner = counts["outer"], counts["inner"]
        fields = {name: value for name, value in format.values.items() if name != "opcode"} | {
            **counts,
            "a": self.number(0, (_USED[Memory.ACTIVATION] - counts[down] * own) // aligned) * aligned,
            f"a_{down}": own,
            "w": self.number(0, _USED[Memory.WEIGHT] - counts[along] * words),
            f"w_{along}": words,
        }
        size = self.config.columns
        # Without any column left there must be no tile either.
        columns = inner * size if inner == _INNER else self.number((inner - 1) * size + 1, inner * size)
        number, most, least = (self.whole, _WHOLE, depth_unit(format)) if is_packed(format) else (self.count, _COUNT, 1)
        if not most % least:
            self.vary(fields, "depth", number, most, least)
        self.vary(fields, "inner", self.inner, _INNER)
        self.builder.emit(MATRIX, **fields)
        self.vector(Source.ACCUMULATOR, outer, columns, fields["inner_operand"] != 0)

    def vector(
        self, source: Source | None = None, tiles: int = 0, columns: int = 0, variable_tiles: bool = False
    ) -> None:
        """A random pass that reads nothing which it writes elsewhere."""
        while True:
            instruction = self._random_pass(source, tiles, columns)
            if instruction is not None and not self._clashes(instruction):
                break
        if not variable_tiles:
            instruction = random_selection(self.rng, self.config, instruction)
        fields = {k: v for k, v in instruction.values.items() if k != "opcode"}
        if variable_tiles:
            fields["columns"] -= _INNER * self.config.columns
            fields["columns_operand"] = self.columns
        elif source is None:
            self.vary(fields, "columns", self.count, _COUNT, fields["select"])
        if fields["mask"] and self.number(0, 1):
            fields |= {"first_row": (fields["first_row"] - self.number(0, 40)) % (1 << 20)}
            fields["first_row_operand"] = self.position
        self.builder.emit(VECTOR, **fields)

    def softmax(self) -> None:
        """Masked scores and their weights; where zeros count, a product of these too."""
        passes = random_softmax(self.rng, self.config, _USED[Memory.VECTOR], _INTEGERS)
        if self.config.zero_skipping:
            passes += random_weighing(self.rng, self.config, passes[-1][1], _USED[Memory.ACTIVATION])
        for type, fields in passes:
            self.builder.emit(type, **fields)

    def _random_pass(self, source: Source | None, tiles: int, columns: int) -> Instruction | None:
        n = self.number
        chosen = Source(n(1, 3)) if source is None else source
        tiles = tiles or n(1, 3)
        columns = columns or n(1, {Source.PARAMETER: 12, Source.INTEGER: 8}.get(chosen, 100))
        function = Function(n(0, 8)) if n(0, 1) else (Function.NONE, Function.SCORE)[n(0, 3) == 0]
        table = 0
        if function in (Function.EXP2, Function.RECIP, Function.RSQRT):
            table = _TABLES[function][1]
        elif function >= Function.RELU_MINUS:
            name = str(self.rng.choice(_OTHER_TABLES[function]))
            table = 3
            if self.slots.get(3) != name:
                self.load_table(name, 3)
        shift = FUNCTIONS[self.slots[table]].k if function >= Function.RELU_MINUS else n(0, 15)
        destination = Destination(n(0, 7))
        mask = Mask(n(0, 2) > 0) if function == Function.SCORE else Mask.NONE
        maximum = Maximum(n(0, 2))
        if maximum == Maximum.EXPONENT and function != Function.SCORE:
            maximum = Maximum.ABSOLUTE
        integers = maximum == Maximum.EXPONENT
        start, used = {
            Destination.VECTOR: (0, _USED[Memory.VECTOR]),
            Destination.PARAMETER: (0, _INTEGERS[0]),
            Destination.ACTIVATION: (0, _USED[Memory.ACTIVATION]),
            Destination.BYTES: _BYTES,
            Destination.BYTES_TRANSPOSED: _BYTES,
        }.get(destination, (0, _USED[Memory.WEIGHT]))
        rows = self.config.rows
        transposed = destination in (Destination.WEIGHT_TRANSPOSED, Destination.BYTES_TRANSPOSED)
        group_words = rows if transposed else columns
        groups = -(-columns // rows)
        to_stride = group_words + (0 if transposed else n(0, 3))
        to_group = tiles * to_stride
        extent = groups * to_group if transposed else tiles * to_stride
        x_stride, y_stride = columns + n(0, 3), columns + n(0, 3)
        x_start, x_used = {Source.PARAMETER: (0, _INTEGERS[0]), Source.INTEGER: _INTEGERS}.get(
            chosen, (0, _USED[Memory.VECTOR])
        )
        words = _INTEGERS[0]
        if (
            start + extent > used
            or (x_start + tiles * x_stride > x_used and chosen != Source.ACCUMULATOR)
            or tiles * y_stride > _USED[Memory.VECTOR]
            or groups > words
        ):
            return None
        lane0 = n(*_INTEGERS) - tiles if function == Function.EXP2 else n(0, words - tiles)
        add1, mul2 = FirstAdd(n(0, 2)), SecondMultiply(n(0, 2))
        if function == Function.EXP2:
            lane0 = n(_INTEGERS[0], _INTEGERS[1] - tiles)
            add1 = FirstAdd.NONE if add1 == FirstAdd.LANE0 else add1
            mul2 = SecondMultiply.NONE if mul2 == SecondMultiply.LANE0 else mul2
        i = Instruction(
            VECTOR,
            source=chosen,
            destination=destination,
            add1=add1,
            mul1=FirstMultiply(n(0, 4)),
            mul2=mul2,
            add2=SecondAdd(n(0, 3)),
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
            x=0 if chosen == Source.ACCUMULATOR else n(x_start, x_used - tiles * x_stride),
            x_stride=x_stride,
            y=n(0, _USED[Memory.VECTOR] - tiles * y_stride),
            y_stride=y_stride,
            to=n(start, used - extent),
            to_stride=to_stride,
            to_group=to_group,
            lane0=lane0,
            lane1=n(0, words - tiles),
            column0=n(0, words - groups),
            column1=n(0, words - groups),
            column2=n(0, words - groups),
            sum_to=n(0, words - tiles),
            max_to=n(_INTEGERS[0], _INTEGERS[1] - tiles) if integers else n(0, words - tiles),
            immediate0=int(random_floats(self.rng, 1).view(np.uint32)[0]),
            immediate1=int(random_floats(self.rng, 1).view(np.uint32)[0]),
            mask=mask,
            first_row=n(-40, 120) % (1 << 20),
            window=n(1, 40) if n(0, 1) else 0,
        )
        return random_sections(self.rng, self.config, i, _INTEGERS if integers else (0, words))

    def _clashes(self, i: Instruction) -> bool:
        """Whether rows of a pass depend on each other, or two of its results fall on one word."""
        written = writes(self.config, i)
        memories: tuple[Memory | Internal, ...] = (*Memory, *Internal)
        words = {memory: np.zeros(1024, np.int64) for memory in memories}
        for region in written:
            for run in _runs(region):
                words[region.memory][run] += 1
        if any((w > 1).any() for w in words.values()):
            return True
        read = reads(self.config, i)
        if i.maximum and i.max_continue:
            read.remove(maxima_region(i))
        return any(words[region.memory][run].any() for region in read for run in _runs(region))

    def finish(self) -> RandomProgram:
        """Bring what the program left on chip to device memory."""
        rows = self.config.rows
        b = self.builder
        # The VECTOR memory first, then everything else through it.
        vector_bytes = _BYTES[1] * 4 * rows
        integers = _INTEGERS[1] - _INTEGERS[0]
        parameter_words = _USED[Memory.PARAMETER] + integers
        parameter_bytes = parameter_words * 4 * rows
        tiles = 2
        product_words = tiles * tiles * rows
        result_bytes = vector_bytes + parameter_bytes + product_words * 4 * rows
        result = self.place(np.zeros(result_bytes, np.uint8))
        b.emit(STORE, memory=Memory.VECTOR, words=_BYTES[1], address=result, local=0)
        b.emit(
            VECTOR,
            source=Source.PARAMETER,
            destination=Destination.VECTOR,
            columns=_USED[Memory.PARAMETER],
        )
        # Once more as fp32 values: negative integers are patterns of NaN, which all compare equal.
        b.emit(
            VECTOR,
            source=Source.INTEGER,
            destination=Destination.VECTOR,
            columns=integers,
            x=_INTEGERS[0],
            to=_USED[Memory.PARAMETER],
        )
        b.emit(STORE, memory=Memory.VECTOR, words=parameter_words, address=result + vector_bytes, local=0)
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
        if self.config.selection:
            numbers = self.place(np.repeat(np.arange(MOST_COLUMNS, dtype=np.float32), rows))
            store_index(b, numbers, self.place(np.zeros(INDEX_USED * rows, np.float32)))
        memory = np.concatenate(self.blocks)
        return RandomProgram(self.seed, self.base, b.finish(), self.values, memory)


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
        step = generator.number(0, 13)
        if step < 4:
            generator.matrix()
        elif step < 8:
            generator.vector()
        elif step < 10:
            generator.load()
        elif step < 13:
            generator.store()
        else:
            generator.softmax()
    return generator.finish()
