"""Devices by URI, their memory, and what they say when something is wrong."""

from __future__ import annotations

import numpy as np
import pytest
from lockstep_driver import DeviceNotFound, DriverError, OutOfDeviceMemory, open_device, parse
from lockstep_driver.builder import ProgramBuilder
from lockstep_driver.memory import Allocator
from lockstep_isa.config import preset
from lockstep_isa.instructions import LOAD, STORE, Memory
from lockstep_isa.program import Program, ProgramError


def test_a_uri_names_scheme_core_and_options() -> None:
    uri = parse("rtl:tiny?memory=8M&latency=7&refresh=0&wave=out.fst")
    assert (uri.scheme, uri.config.name, uri.memory_bytes, uri.wave) == ("rtl", "tiny", 8 << 20, "out.fst")
    assert (uri.timing.latency, uri.timing.refresh_interval) == (7, 0)


def test_a_core_can_lack_a_feature() -> None:
    config = parse("fast:tiny?without=packed&without=selection").config
    assert config == preset("tiny").replace(packed=False, selection=False)
    with open_device("fast:tiny?without=zero_skipping") as device:
        assert device.config == preset("tiny").replace(zero_skipping=False)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("laptop", "unknown device 'laptop': devices are"),
        ("gpu:laptop", "unknown device 'gpu:laptop'"),
        ("rtl:huge", "unknown core 'huge': presets are tiny, laptop"),
        ("rtl:tiny?memory=lots", "'lots' is no value for memory"),
        ("rtl:tiny?memory=9G", "'9G' is no value for memory"),
        ("rtl:tiny?colour=red", "unknown option 'colour'"),
        ("fast:tiny?without=wings", "core 'tiny' has no feature 'wings'; it has packed, selection, zero_skipping"),
        ("fast:ulx3s?without=packed", "core 'ulx3s' has no feature 'packed'; it has none"),
        ("fast:tiny?without=packed&without=packed", "core 'tiny' has no feature 'packed'; it has selection"),
        ("fast:tiny?wave=x.fst", "unknown option 'wave'"),
    ],
)
def test_a_wrong_uri_says_what_there_is(uri: str, message: str) -> None:
    with pytest.raises(DeviceNotFound, match=message.replace("?", r"\?")):
        parse(uri)


def test_memory_is_given_back_and_merged() -> None:
    allocator = Allocator(np.zeros(4096, np.uint8))
    pieces = [allocator.allocate(1000) for _ in range(4)]
    with pytest.raises(OutOfDeviceMemory, match="1024 bytes are missing"):
        allocator.allocate(1000)
    for piece in (pieces[2], pieces[0], pieces[1]):
        allocator.free(piece)
    assert allocator.allocate(3000).address == 0
    with pytest.raises(DriverError, match="freed before"):
        allocator.free(pieces[1])


def test_a_program_for_another_core_is_refused_before_it_runs() -> None:
    builder = ProgramBuilder(preset("laptop"))
    builder.emit(LOAD, memory=Memory.VECTOR, words=1, address=0)
    with open_device("fast:tiny?memory=1M") as device, pytest.raises(DriverError, match="compile it for this core"):
        device.run(builder.finish())


def test_program_files_survive_and_damage_is_found(tmp_path) -> None:
    builder = ProgramBuilder(preset("tiny"))
    builder.emit(LOAD, memory=Memory.VECTOR, words=3, address=64, local=5)
    program = builder.finish()
    path = tmp_path / "program.lockstep"
    program.save(path)
    assert Program.load(path) == program
    data = bytearray(path.read_bytes())
    for damaged, message in (
        (data[:-10], "truncated"),
        (data[:-1] + b"\x55", "damaged"),
        (b"PK" + data[2:], "not a Lockstep program"),
        (data[:8] + b"\x63\x00\x00\x00" + data[12:], "instruction set 99"),
    ):
        with pytest.raises(ProgramError, match=message):
            Program.from_bytes(bytes(damaged))


@pytest.mark.parametrize(
    ("operands", "message"),
    [
        ({}, "needs a value for operand 'words'; it declares: words, place"),
        ({"words": 1}, "needs a value for operand 'place'"),
        ({"words": 9, "place": 0}, "operand 'words' is 9; this program takes 0..8"),
        ({1: 1, 2: -1}, "operand 'place' is -1; this program takes 0..64"),
        ({"words": 1, "size": 1}, "has no operand 'size'; it declares: words, place"),
        ({1: 1, 3: 1}, "has no operand 3"),
        ({"words": 1, 1: 1}, "'words' is given twice"),
    ],
)
def test_operands_are_checked_before_a_program_runs(operands, message: str) -> None:
    builder = ProgramBuilder(preset("tiny"))
    words, place = builder.operand("words", 0, 8), builder.operand("place", 0, 64)
    builder.emit(LOAD, memory=Memory.VECTOR, words=0, words_operand=words, address=0, local=0, local_operand=place)
    with open_device("fast:tiny?memory=1M") as device:
        loaded = device.load(builder.finish())
        with pytest.raises(DriverError, match=message):
            device.submit(loaded, operands)
        assert device.run(loaded, {"words": 8, "place": 64}).units["LOAD"]["busy"] == 32
        assert device.run(loaded, {words: 0, place: 64}).units["LOAD"]["busy"] < 8


def test_a_device_works_after_a_timeout() -> None:
    from lockstep_driver import DeviceTimeout
    from lockstep_isa.instructions import VECTOR, Instruction, Source

    with open_device("rtl:tiny?memory=1M") as device:
        device.write("WATCHDOG", 0)
        stuck = device.load(
            Program(device.config.crc, (Instruction(VECTOR, source=Source.ACCUMULATOR, columns=1),)), check=False
        )
        with pytest.raises(DeviceTimeout, match="it was reset"):
            device.wait(device.submit(stuck), timeout=0.05)
        builder = ProgramBuilder(device.config)
        builder.emit(LOAD, memory=Memory.VECTOR, words=1, address=0)
        assert device.run(builder.finish(), timeout=30).instructions == 1


@pytest.mark.parametrize("scheme", ["rtl", "fast"])
def test_after_an_interrupt_the_next_run_gives_the_right_bits(scheme: str) -> None:
    """Ctrl-C comes while a program copies one block of memory; another copies another block afterwards."""
    words = 256
    with open_device(f"{scheme}:tiny?memory=1M") as device:
        size = words * device.config.vector_word_bytes
        source, target = device.allocate(2 * size), device.allocate(2 * size)
        values = np.arange(1, 2 * size // 4 + 1, dtype=np.float32)
        source.write(values)

        def copy(block: int, times: int) -> Program:
            builder = ProgramBuilder(device.config)
            for _ in range(times):
                at = block * size
                builder.emit(LOAD, memory=Memory.VECTOR, words=words, address=source.address + at)
                builder.emit(STORE, memory=Memory.VECTOR, words=words, address=target.address + at)
            return builder.finish()

        def interrupt(cycles: int, seconds: float) -> None:
            raise KeyboardInterrupt

        device.watch = interrupt
        loaded = device.load(copy(0, 6400))
        with pytest.raises(KeyboardInterrupt):
            device.run(loaded)
        device.watch = None
        assert device.read("STATUS") == 0
        assert device.read("RING_HEAD") == device.read("RING_TAIL") == 0
        target.write(np.zeros(2 * size, np.uint8))
        counters = device.run(copy(1, 1))
        assert counters.instructions == 2
        found = target.data.view(np.float32)
        assert (found[: size // 4] == 0).all()
        assert (found[size // 4 :] == values[size // 4 :]).all()
