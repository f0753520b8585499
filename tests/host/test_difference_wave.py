"""``lockstep verify --wave``: a core with a corrupted weight, its first wrong value, and the waveform around it."""

from __future__ import annotations

from pathlib import Path

import fst
import pytest
from command_line import Command
from lockstep.compiler.execute import DeviceExecutor
from lockstep.difference_wave import BEFORE, WINDOW, first_wrong_write
from lockstep.model import Model, load
from lockstep.verification import random_inputs, replay
from lockstep_driver import SCHEMES, Device
from lockstep_isa.config import preset
from lockstep_isa.instructions import LOAD, STORE, Memory, Unit
from lockstep_isa.program import Program
from lockstep_isa.registers import BY_NAME
from lockstep_sim.fast import FastCore
from lockstep_sim.rtl import RtlCore

TOKENS = 6
MEMORY = 64 << 20


class CorruptedRtl(RtlCore):
    """A core in whose memory a bit at ``address`` flips when program number ``at_start`` is started."""

    address = 0
    at_start = 2
    starts = 0

    def write_register(self, address: int, value: int) -> None:
        if address == BY_NAME["RING_TAIL"].address and value:
            self.starts += 1
            if self.starts == self.at_start:
                self.memory[self.address] ^= 0x40
        super().write_register(address, value)


@pytest.fixture(scope="module")
def model(small_folder: Path) -> Model:
    return load(small_folder)


@pytest.fixture(scope="module")
def program(model: Model) -> Program:
    with Device(FastCore(preset("tiny"), MEMORY), "fast:tiny") as device:
        return DeviceExecutor(device).program(model.graph, (TOKENS,))


@pytest.fixture
def corrupted(program: Program, monkeypatch: pytest.MonkeyPatch) -> int:
    """The address of the weight that flips in every ``rtl:`` device."""
    weights = [i for i in program.instructions if i.type is LOAD and i.memory == Memory.WEIGHT]
    monkeypatch.setattr(CorruptedRtl, "address", weights[-1].address + 5)

    def open_corrupted(uri, progress):
        return CorruptedRtl(uri.config, uri.memory_bytes, uri.timing, uri.wave, progress, uri.window)

    monkeypatch.setitem(SCHEMES, "rtl", (open_corrupted, "a core with a wrong weight"))
    return CorruptedRtl.address


def stored_bytes(model: Model, program: Program, flipped: int | None) -> dict[int, int]:
    """What the fast core stores, by address, with a bit of its memory flipped as in the corrupted core."""
    inputs = [random_inputs(model.graph, TOKENS, 0)]
    with Device(FastCore(preset("tiny"), MEMORY), "fast:tiny") as device:
        executor = DeviceExecutor(device)
        executor.run(model.graph, inputs)
        if flipped is not None:
            device.memory_at(flipped, 1)[0] ^= 0x40
        executor.run(model.graph, inputs)
        blocks = [
            (i.address + row * i.stride, 16 * i.words)
            for i in program.instructions
            if i.type is STORE
            for row in range(i.rows)
        ]
        return {start + n: int(device.memory_at(start + n, 1)[0]) for start, size in blocks for n in range(size)}


def twice(model: Model):
    work = replay(model.graph, [random_inputs(model.graph, TOKENS, 0)], None)
    return lambda device: [work(device), work(device)]


def test_the_first_wrong_value_is_where_a_flipped_weight_shows(model, program, corrupted) -> None:
    right, wrong = (stored_bytes(model, program, flipped) for flipped in (None, corrupted))
    differing = {address for address in right if right[address] != wrong[address]}
    assert differing
    found = first_wrong_write("rtl:tiny", twice(model))
    assert found is not None
    assert found.program == 1
    assert found.address in differing
    assert (found.expected, found.actual) == (right[found.address], wrong[found.address])
    assert program.instructions[found.instruction].type.unit == Unit.STORE
    # No wrong byte lies in an earlier beat: the panel is written in the order of its addresses.
    assert min(differing) // 4 == found.address // 4


def test_a_core_that_is_right_has_no_wrong_value(model: Model) -> None:
    assert first_wrong_write("rtl:tiny", twice(model)) is None


@pytest.mark.slow
def test_verify_writes_the_cycles_around_the_first_wrong_value(
    cli: Command, small_folder: Path, tmp_path: Path, corrupted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CorruptedRtl, "at_start", 1)
    path = tmp_path / "wrong.fst"
    report = cli("verify", small_folder, "--device", "rtl:tiny", "--tokens", TOKENS, "--wave", path, "--json")
    assert report.status == 1
    wave = report.json["wave"]
    first, last = fst.times(path)
    assert last - first <= 2 * WINDOW
    assert first <= 2 * wave["cycle"] <= last
    assert first == 2 * max(0, wave["cycle"] - BEFORE)
    known = fst.signals(path)
    shown = [line for line in Path(wave["gtkwave"]).read_text().splitlines() if line.startswith("TOP.")]
    assert len(shown) > 300
    for line in shown:
        name, _, bits = line.partition("[")
        assert known[name] == (int(bits.split(":")[0]) + 1 if bits else 1), line
    commands = Path(wave["surfer"]).read_text().splitlines()
    assert [c.split(" ")[1] for c in commands if c.startswith("variable_add")] == [s.split("[")[0] for s in shown]
    groups = [c.split(" ")[1] for c in commands if c.startswith("divider_add")]
    assert groups == ["control", "LOAD", "MATRIX", "VECTOR", "STORE", "scratchpads"]


def test_verify_writes_nothing_where_nothing_differs(cli: Command, small_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "none.fst"
    report = cli("verify", small_folder, "--device", "rtl:tiny", "--tokens", 4, "--wave", path, "--json").json
    assert (report["wave"], report["no_wave"]) == (None, "nothing differs")
    assert list(tmp_path.iterdir()) == []


def test_wave_wants_an_rtl_device_and_a_name_that_ends_in_fst(cli: Command, small_folder: Path, tmp_path: Path) -> None:
    for device, name, said in (("fast:tiny", "a.fst", "only the RTL"), ("rtl:tiny", "a.vcd", "must end in .fst")):
        cli("verify", small_folder, "--device", device, "--wave", tmp_path / name).refused(2, said)
