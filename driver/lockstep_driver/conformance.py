"""One conformance suite that every device can run: simulated cores, boards, and whatever comes.

Each check is a function of a device; it raises :class:`AssertionError` with one sentence where the device is wrong.
Checks leave the device usable, and run in any order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from lockstep_isa import numerics
from lockstep_isa.config import CoreConfig
from lockstep_isa.errors import ErrorCode
from lockstep_isa.instructions import (
    INDEX_ENTRIES,
    LOAD,
    MATRIX,
    STORE,
    VECTOR,
    Destination,
    FirstMultiply,
    Instruction,
    Memory,
    SecondAdd,
    Source,
    Tap,
    ThirdMultiply,
    Unit,
    Weights,
    encode,
)
from lockstep_isa.program import Program

from .builder import ProgramBuilder
from .device import OPERAND_BYTES, Device, LoadedProgram, OperandValues
from .errors import DeviceError, DriverError
from .memory import Buffer
from .random_programs import random_program, same_words

#: Random programs of one run of the suite.
RANDOM_PROGRAMS = 20
#: Cycles without progress that the suite allows: far fewer than in normal work, so that a hang is found soon.
WATCHDOG_CYCLES = 5_000


@dataclass(frozen=True)
class CheckResult:
    """What one check said: its name, and nothing or the sentence that says what is wrong."""

    name: str
    failure: str | None


Check = Callable[[Device], None]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    """Register a check under its name."""
    CHECKS[function.__name__] = function
    return function


def run_conformance(device: Device, report: Callable[[CheckResult], None] | None = None) -> list[CheckResult]:
    """Run every check; ``report`` is told after each."""
    results = []
    for name, function in CHECKS.items():
        device.write("WATCHDOG", WATCHDOG_CYCLES)
        try:
            function(device)
            result = CheckResult(name, None)
        except (AssertionError, DriverError) as error:
            result = CheckResult(name, str(error))
        results.append(result)
        if report is not None:
            report(result)
    return results


def _copy_program(config: CoreConfig, source: Buffer, target: Buffer, words: int) -> Program:
    builder = ProgramBuilder(config)
    builder.emit(LOAD, memory=Memory.VECTOR, words=words, address=source.address)
    builder.emit(STORE, memory=Memory.VECTOR, words=words, address=target.address)
    return builder.finish()


def _expect_error(
    device: Device,
    program: Program,
    code: ErrorCode,
    unit: str,
    instruction: int,
    operands: OperandValues | None = None,
) -> None:
    """The program must stop with this error; afterwards the device must work."""
    try:
        device.write("WATCHDOG", WATCHDOG_CYCLES)
        device.run(program, operands, timeout=60, check=False)
    except DeviceError as error:
        found = (error.code, error.unit, error.instruction)
        if found != (code, unit, instruction):
            raise AssertionError(f"expected {code.name} from {unit} at {instruction}, got {error}") from None
    else:
        raise AssertionError(f"a program that must stop with {code.name} ran to its end")
    loads_and_stores_what_it_was_given(device)


@check
def loads_and_stores_what_it_was_given(device: Device) -> None:
    """A block goes through the VECTOR scratchpad unchanged, but for subnormals, which become zeros."""
    words, rows = 24, device.config.rows
    values = np.random.default_rng(7).normal(size=words * rows).astype(np.float32)
    values[:4] = [1e-40, -1e-40, np.inf, -0.0]
    source, target = device.allocate(values.nbytes), device.allocate(values.nbytes)
    source.write(values)
    target.write(np.zeros_like(values))
    device.run(_copy_program(device.config, source, target, words), timeout=60)
    expected = values.copy()
    expected[:2] = [0.0, -0.0]
    actual = target.data.view(np.uint32)
    wrong = np.flatnonzero(actual != expected.view(np.uint32))
    device.free(source)
    device.free(target)
    assert not wrong.size, f"value {wrong[0]} came back as {actual[wrong[0]]:#010x}"


@check
def runs_programs_in_order_and_raises_their_fences(device: Device) -> None:
    """Several programs in the ring: each sees what the one before it stored."""
    words = 4
    buffers = [device.allocate(words * device.config.vector_word_bytes) for _ in range(5)]
    values = np.arange(1, words * device.config.rows + 1, dtype=np.float32)
    buffers[0].write(values)
    programs = [device.load(_copy_program(device.config, a, b, words)) for a, b in pairwise(buffers)]
    fences = [device.submit(program) for program in programs]
    device.wait(fences[-1], timeout=60)
    assert all(device.reached(fence) for fence in fences), "an earlier fence is open behind a later one"
    result = buffers[-1].data.view(np.float32).copy()
    for program in programs:
        device.unload(program)
    for buffer in buffers:
        device.free(buffer)
    assert (result == values).all(), "the last program did not see what the first one stored"


@check
def adds_the_operands_of_each_run(device: Device) -> None:
    """One program in the ring several times, each time with another length; a length of zero does nothing."""
    most, rows = 9, device.config.rows
    values = np.random.default_rng(8).normal(size=most * rows).astype(np.float32)
    source, target = device.allocate(values.nbytes), device.allocate(6 * values.nbytes)
    source.write(values)
    target.write(np.zeros(6 * values.size, np.float32))
    builder = ProgramBuilder(device.config)
    length, place = builder.operand("length", 0, most), builder.operand("place", 0, 5 * values.nbytes)
    builder.emit(LOAD, memory=Memory.VECTOR, words=0, words_operand=length, address=source.address)
    passed = {"source": Source.VECTOR, "destination": Destination.VECTOR, "to": most}
    builder.emit(VECTOR, columns=0, columns_operand=length, **passed)
    stored = {"memory": Memory.VECTOR, "address": target.address, "local": most}
    builder.emit(STORE, words=0, words_operand=length, address_operand=place, **stored)
    loaded = device.load(builder.finish())
    lengths = (3, 0, most, 1, 0, most - 1)
    places = [n * values.nbytes for n in range(len(lengths))]
    fences = [device.submit(loaded, {"length": n, "place": at}) for n, at in zip(lengths, places, strict=True)]
    device.wait(fences[-1], timeout=60)
    found = target.data.view(np.float32).reshape(len(lengths), -1).copy()
    device.unload(loaded)
    device.free(source)
    device.free(target)
    for count, row in zip(lengths, found, strict=True):
        expected = np.where(np.arange(row.size) < count * rows, values, np.float32(0))
        assert (row == expected).all(), f"a run with length {count} left {np.count_nonzero(row)} values"


@check
def reads_column_words_up_to_the_end_of_their_memory(device: Device) -> None:
    """Words of three columns end with PARAMETER: rows of one group and of several, part of one, x from both sides."""
    config, tiles = device.config, 2
    rng = np.random.default_rng(10)
    for source in (Source.VECTOR, Source.PARAMETER):
        for columns in (1, config.rows, config.rows + 1, 3 * config.rows):
            groups, taken = -(-columns // config.rows), tiles * columns
            words = [rng.normal(size=(count, config.rows)).astype(np.float32) for count in (taken, 2 * groups)]
            buffers = [device.allocate(w.nbytes) for w in words]
            for buffer, values in zip(buffers, words, strict=True):
                buffer.write(values)
            result = device.allocate(words[0].nbytes)
            result.write(np.zeros_like(words[0]))
            end = config.parameter_words
            builder = ProgramBuilder(config)
            memory = Memory.VECTOR if source == Source.VECTOR else Memory.PARAMETER
            builder.emit(LOAD, memory=memory, words=taken, address=buffers[0].address)
            parameters = {"memory": Memory.PARAMETER, "words": 2 * groups, "local": end - 2 * groups}
            builder.emit(LOAD, address=buffers[1].address, **parameters)
            operands = {"column0": end - 2 * groups, "column1": end - groups, "column2": end - groups}
            steps = {"mul1": FirstMultiply.COLUMN0, "add2": SecondAdd.COLUMN1, "mul3": ThirdMultiply.COLUMN2}
            shape = {"source": source, "tiles": tiles, "columns": columns, "x_stride": columns}
            target = {"destination": Destination.VECTOR, "tap": Tap.AFTER, "to": taken, "to_stride": columns}
            builder.emit(VECTOR, **shape, **target, **operands, **steps)
            builder.emit(STORE, memory=Memory.VECTOR, words=taken, address=result.address, local=taken)
            device.run(builder.finish(), timeout=60)
            found = result.data.view(np.float32).reshape(words[0].shape).copy()
            for buffer in (*buffers, result):
                device.free(buffer)
            first, second = words[1].reshape(2, -1)[:, :columns, None]
            x = words[0].reshape(tiles, columns, config.rows)
            expected = numerics.mul(numerics.add(numerics.mul(x, first), second), second).reshape(found.shape)
            wrong = np.flatnonzero((found != expected).any(axis=1))
            assert not wrong.size, f"{columns} columns from {source.name}: word {wrong[0]} is wrong"


@check
def stores_bytes_from_a_lane_on(device: Device) -> None:
    """The low byte of each lane; lanes in front of the first one, in the first row, keep what memory held."""
    words, rows = 6, device.config.rows
    values = np.random.default_rng(9).integers(-128, 128, (words, rows))
    source, target = device.allocate(4 * values.size), device.allocate(256 * 2)
    source.write(values.astype(np.float32))
    target.write(np.full(512, 0xA5, np.uint8))
    builder = ProgramBuilder(device.config)
    builder.emit(LOAD, memory=Memory.VECTOR, words=words, address=source.address)
    builder.emit(VECTOR, source=Source.VECTOR, destination=Destination.BYTES, columns=words, to=words)
    stride = -(-words // 2 * rows // device.config.bus_bytes) * device.config.bus_bytes
    block = {"rows": 2, "words": words // 2, "stride": stride, "local": words, "local_stride": words // 2}
    builder.emit(STORE, memory=Memory.VECTOR, address=target.address, bytes=1, lane=rows - 1, **block)
    device.run(builder.finish(), timeout=60)
    expected = np.full(512, 0xA5, np.uint8)
    half = values.astype(np.uint8).reshape(2, -1)
    expected[stride : stride + half[1].size] = half[1]
    expected[rows - 1 : half[0].size : rows] = half[0][rows - 1 :: rows]
    wrong = np.flatnonzero(target.data != expected)
    found = target.data.copy()
    device.free(source)
    device.free(target)
    assert not wrong.size, f"byte {wrong[0]} is {found[wrong[0]]:#04x} instead of {expected[wrong[0]]:#04x}"


@check
def gives_the_golden_bits_on_random_programs(device: Device) -> None:
    """Every instruction in every mode; where the core passes over zeros, over the same chunks."""
    buffer = device.allocate(1 << 20)
    for seed in range(RANDOM_PROGRAMS):
        case = random_program(device.config, seed, buffer.address)
        buffer.write(case.memory)
        counters = device.run(case.program, case.operands, timeout=120)
        start = case.result.start - buffer.address
        actual = buffer.data[start : start + case.result.stop - case.result.start].view(np.uint32)
        expected, skipped = case.golden(device.config)
        same = same_words(actual, expected)
        if not same.all():
            first = int(np.flatnonzero(~same)[0])
            device.free(buffer)
            raise AssertionError(
                f"random program {seed}: {int((~same).sum())} of {same.size} words differ, first {first}: "
                f"{actual[first]:#010x} instead of {expected[first]:#010x}"
            )
        if counters.skipped_chunks != skipped:
            device.free(buffer)
            raise AssertionError(
                f"random program {seed}: {counters.skipped_chunks} chunks were passed over instead of {skipped}"
            )
    device.free(buffer)


@check
def counts_every_cycle_of_every_unit(device: Device) -> None:
    """Busy, waiting for a token, waiting for data and idle cycles sum up to the whole run."""
    buffer = device.allocate(1 << 20)
    case = random_program(device.config, 1, buffer.address)
    buffer.write(case.memory)
    counters = device.run(case.program, case.operands, timeout=120)
    device.free(buffer)
    assert counters.instructions == len(case.program.instructions), "instructions were counted wrongly"
    for unit, states in counters.units.items():
        total = sum(states.values())
        assert total == counters.cycles, f"{unit}: {total} cycles are accounted for, {counters.cycles} passed"


@check
def refuses_a_program_for_another_configuration(device: Device) -> None:
    """The hardware compares the CRC, whatever the driver did."""
    builder = ProgramBuilder(device.config)
    builder.emit(LOAD, memory=Memory.VECTOR, words=1, address=4096)
    program = dataclasses.replace(builder.finish(), config_crc=device.config.crc ^ 1)
    _expect_error(device, program, ErrorCode.WRONG_CONFIGURATION, "CONTROL", 0)


@check
def stops_at_transfers_outside_the_window(device: Device) -> None:
    """Reads and writes beyond device memory never reach the bus."""
    beyond = -(-device.memory_bytes // 4096) * 4096
    for kind, unit in ((LOAD, "LOAD"), (STORE, "STORE")):
        builder = ProgramBuilder(device.config)
        builder.emit(LOAD, memory=Memory.VECTOR, words=1, address=4096)
        builder.emit(kind, memory=Memory.VECTOR, words=4, address=beyond)
        _expect_error(device, builder.finish(), ErrorCode.OUT_OF_WINDOW, unit, 1)


@check
def stops_at_transfers_that_an_operand_moves_out_of_the_window(device: Device) -> None:
    """What counts is the address that runs."""
    beyond = -(-device.memory_bytes // 4096) * 4096
    for kind, unit in ((LOAD, "LOAD"), (STORE, "STORE")):
        builder = ProgramBuilder(device.config)
        address = builder.operand("address", 0, beyond)
        builder.emit(LOAD, memory=Memory.VECTOR, words=1, address=4096)
        builder.emit(kind, memory=Memory.VECTOR, words=4, address=0, address_operand=address)
        _expect_error(device, builder.finish(), ErrorCode.OUT_OF_WINDOW, unit, 1, {"address": beyond})


@check
def stops_at_operands_that_it_cannot_fetch(device: Device) -> None:
    """The block of operands is aligned, and inside the window."""
    builder = ProgramBuilder(device.config)
    builder.emit(LOAD, memory=Memory.VECTOR, words=1, address=4096)
    loaded = device.load(builder.finish())
    block = device.allocate(OPERAND_BYTES)
    beyond = -(-device.memory_bytes // 4096) * 4096
    for address, code in ((block.address + 4, ErrorCode.MISALIGNED), (beyond, ErrorCode.OUT_OF_WINDOW)):
        try:
            device.wait(device.enqueue(loaded, address), timeout=60)
        except DeviceError as error:
            if (error.code, error.unit, error.instruction) != (code, "CONTROL", 0):
                raise AssertionError(f"expected {code.name} from CONTROL, got {error}") from None
        else:
            raise AssertionError(f"operands at {address:#x} did not stop the core with {code.name}")
    device.free(block)
    device.unload(loaded)
    loads_and_stores_what_it_was_given(device)


@check
def stops_at_misaligned_transfers(device: Device) -> None:
    """Addresses are multiples of the bus width."""
    builder = ProgramBuilder(device.config)
    builder.emit(LOAD, memory=Memory.VECTOR, words=1, address=4096 + 1)
    _expect_error(device, builder.finish(), ErrorCode.MISALIGNED, "LOAD", 0)


@check
def stops_at_words_beyond_a_memory(device: Device) -> None:
    """On-chip addresses are checked against the memory's depth."""
    depth = device.config.parameter_words
    if depth > 65535:
        return
    builder = ProgramBuilder(device.config.replace(parameter_words=65536))
    builder.emit(VECTOR, source=Source.PARAMETER, destination=Destination.VECTOR, columns=1, x=depth)
    program = dataclasses.replace(builder.finish(), config_crc=device.config.crc)
    _expect_error(device, program, ErrorCode.LOCAL_BOUNDS, "VECTOR", 0)


@check
def stops_at_entries_beyond_the_index_memory(device: Device) -> None:
    """Lists that are written, lists that are read, and columns of which there are too many to be selected from."""
    if not device.config.selection:
        return
    end = INDEX_ENTRIES
    wrong = (
        Instruction(VECTOR, source=Source.PARAMETER, columns=4, select=3, select_to=end - 2),
        Instruction(VECTOR, source=Source.VECTOR, columns=end + 1, select=1),
        Instruction(LOAD, memory=Memory.VECTOR, rows=2, gather=1, gather_from=end - 1, address=4096),
    )
    for instruction in wrong:
        program = Program(device.config.crc, (Instruction(STORE, memory=Memory.VECTOR, address=4096), instruction))
        _expect_error(device, program, ErrorCode.LOCAL_BOUNDS, instruction.type.unit.name, 1)


@check
def stops_at_gathered_rows_outside_the_window(device: Device) -> None:
    """Whatever the list has, nothing outside the window is asked for."""
    if not device.config.selection:
        return
    rows = 3
    beyond = -(-device.memory_bytes // 4096) * 4096
    # The last columns: numbers 5 to 7, of which the last one leads out.
    select = Instruction(VECTOR, source=Source.VECTOR, columns=8, select=rows, select_last=rows, signal=1 << Unit.LOAD)
    fields = {"rows": rows, "address": 4096, "stride": (beyond - 4096) // 6 // 4096 * 4096, "wait": 1 << Unit.VECTOR}
    gather = Instruction(LOAD, memory=Memory.VECTOR, gather=1, **fields)
    _expect_error(device, Program(device.config.crc, (select, gather)), ErrorCode.OUT_OF_WINDOW, "LOAD", 1)


@check
def names_the_store_that_is_wrong(device: Device) -> None:
    """Though others are under way: in front of it unanswered ones, behind it one that waits for its turn."""
    config = device.config
    beyond = {ErrorCode.OUT_OF_WINDOW: {"address": -(-device.memory_bytes // 4096) * 4096}}
    if config.vector_words < 1 << 16:
        beyond[ErrorCode.LOCAL_BOUNDS] = {"local": config.vector_words - 1}
    for code, fields in beyond.items():
        for wrong in (0, 2, 7):
            builder = ProgramBuilder(config.replace(vector_words=1 << 16))
            for n in range(8):
                where = {"address": 1 << 16, "local": 0} | (fields if n == wrong else {})
                builder.emit(STORE, memory=Memory.VECTOR, words=16, **where)
            program = dataclasses.replace(builder.finish(), config_crc=config.crc)
            _expect_error(device, program, code, "STORE", wrong)


@check
def stops_at_malformed_instructions(device: Device) -> None:
    """Unknown opcodes, counts of zero, undefined values and stray bits are refused at dispatch; so are fields of
    features that a core lacks, and a selection in several row tiles.
    """
    good = encode(Instruction(MATRIX, depth=4, outer=1, inner=1))
    unknown = bytes([0x0F]) + bytes(63)
    stray = good[:-1] + b"\x80"
    offset, field = MATRIX.layout["depth"]
    without_depth = int.from_bytes(good, "little") & ~(((1 << field.width) - 1) << offset)
    undefined = int.from_bytes(encode(Instruction(VECTOR)), "little") | 0xF << VECTOR.layout["function"][0]
    undefined_sparsity = int.from_bytes(good, "little") | 3 << MATRIX.layout["sparsity"][0]
    packed = [Instruction(MATRIX, depth=32, weights=Weights.INT4_32), Instruction(MATRIX, depth=32, sparsity=1)]
    selecting = [
        Instruction(VECTOR, select=1, select_to=3),
        Instruction(LOAD, gather=1),
        Instruction(LOAD, gather_from=1),
    ]
    lacking = [] if device.config.packed else packed
    lacking += [Instruction(VECTOR, tiles=2, select=1)] if device.config.selection else selecting
    for code, expected in (
        *((encode(instruction), ErrorCode.BAD_FIELD) for instruction in lacking),
        (undefined_sparsity.to_bytes(64, "little"), ErrorCode.BAD_FIELD),
        (unknown, ErrorCode.BAD_OPCODE),
        (undefined.to_bytes(64, "little"), ErrorCode.BAD_FIELD),
        (encode(Instruction(STORE, memory=Memory.WEIGHT)), ErrorCode.BAD_FIELD),
        (stray, ErrorCode.BAD_FIELD),
        (without_depth.to_bytes(64, "little"), ErrorCode.BAD_FIELD),
    ):
        buffer = device.allocate(len(code))
        buffer.write(np.frombuffer(code, np.uint8))
        try:
            device.wait(device.submit(LoadedProgram(buffer, 1, device.config.crc)), timeout=60)
        except DeviceError as error:
            if (error.code, error.unit) != (expected, "CONTROL"):
                raise AssertionError(f"expected {expected.name}, got {error}") from None
        else:
            raise AssertionError(f"an instruction that must stop with {expected.name} ran")
        finally:
            device.free(buffer)
    loads_and_stores_what_it_was_given(device)


@check
def a_program_that_waits_for_itself_is_stopped_by_the_watchdog(device: Device) -> None:
    """A token that nobody gives, and result tiles that nobody makes."""
    starved = Instruction(VECTOR, source=Source.ACCUMULATOR, tiles=1, columns=1)
    _expect_error(device, Program(device.config.crc, (starved,)), ErrorCode.WATCHDOG, "VECTOR", 0)
    waiting = Instruction(VECTOR, source=Source.VECTOR, columns=1, wait=1 << Unit.LOAD)
    _expect_error(device, Program(device.config.crc, (waiting,)), ErrorCode.WATCHDOG, "VECTOR", 0)
