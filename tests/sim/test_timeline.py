"""Timelines: the RTL and the fast core tell the same story of a program, and viewers can draw it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from lockstep_driver import Counters, Device, open_device
from lockstep_driver.builder import ProgramBuilder
from lockstep_isa.config import preset
from lockstep_isa.instructions import LOAD, MATRIX, STORE, VECTOR, Destination, Memory, Source, Unit
from lockstep_isa.program import Program
from lockstep_sim import perfetto
from lockstep_sim.recording import FETCH
from lockstep_sim.timeline import Interval, Section, Timeline, match_tokens

CONFIG = preset("tiny")
#: Without refresh, whose phase the fast core does not know.
OPTIONS = "memory=1M&refresh=0"
#: What the fast core leaves out where fetches and transfers begin to share the bus, in cycles.
FETCH_ERROR = 4


def vector_program() -> Program:
    builder = ProgramBuilder(CONFIG)
    for n in range(4):
        builder.emit(VECTOR, source=Source.VECTOR, destination=Destination.VECTOR, columns=32 + n, sum=n % 2, to=100)
    return builder.finish()


def matrix_program() -> Program:
    """More result tiles than the queue holds, taken by a pass that comes late."""
    builder = ProgramBuilder(CONFIG)
    builder.emit(VECTOR, source=Source.VECTOR, destination=Destination.NONE, columns=1500)
    for n in range(4):
        builder.emit(MATRIX, depth=40 + n, inner=8)
    builder.emit(VECTOR, source=Source.ACCUMULATOR, destination=Destination.NONE, columns=4 * 32)
    return builder.finish()


def mixed_program() -> Program:
    builder = ProgramBuilder(CONFIG)
    for n, memory in enumerate((Memory.WEIGHT, Memory.ACTIVATION)):
        builder.emit(LOAD, memory=memory, words=64, address=0x10000 + 0x1000 * n)
    builder.emit(MATRIX, depth=64)
    builder.emit(VECTOR, source=Source.ACCUMULATOR, destination=Destination.VECTOR, columns=4)
    builder.emit(STORE, memory=Memory.VECTOR, words=4, address=0x20000)
    return builder.finish()


def recorded(device: Device, program: Program, sections: tuple[Section, ...] = ()) -> tuple[Timeline, Counters]:
    found: list[Timeline] = []
    device.on_timeline = found.append
    loaded = device.load(program, sections=sections)
    counters = device.run(loaded)
    device.unload(loaded)
    return found[0], counters


def cycles(intervals: tuple[Interval, ...]) -> int:
    return sum(end - start for start, end in intervals)


@pytest.fixture(scope="module")
def fast() -> Iterator[Device]:
    with open_device(f"fast:tiny?{OPTIONS}") as device:
        yield device


@pytest.fixture(scope="module")
def rtl() -> Iterator[Device]:
    with open_device(f"rtl:tiny?{OPTIONS}") as device:
        yield device


# Where units meet, the dispatch of the second one may be a cycle off.
@pytest.mark.parametrize(("program", "error"), [(vector_program, 0), (matrix_program, 1)])
def test_without_transfers_every_instruction_takes_the_same_cycles_on_both(fast, rtl, program, error) -> None:
    (predicted, _), (counted, _) = recorded(fast, program()), recorded(rtl, program())
    assert [s.name for s in predicted.slices] == [s.name for s in counted.slices]
    shift = predicted.slices[0].start - counted.slices[0].start
    assert shift in (0, 1), "the doorbell is one cycle, counted or not"
    for a, b in zip(predicted.slices, counted.slices, strict=True):
        assert a.index == b.index
        assert abs(a.end - shift - b.end) <= error
    stalls = [[cycles(s.stalls) for s in t.of(Unit.MATRIX)] for t in (predicted, counted)]
    assert all(abs(a - b) <= error for a, b in zip(*stalls, strict=True))
    assert program is vector_program or sum(stalls[1]) > 500


#: Blocks of a STORE: one burst and many, rows of one word, bytes, and more bursts than may wait for their answers.
BLOCKS = [
    {"words": 1},
    {"words": 100, "address": 0x10014},
    {"words": 100, "bytes": 1},
    {"words": 20, "rows": 9, "stride": 0x800, "local": 3, "local_stride": 30},
    {"words": 1, "rows": 40, "stride": 0x400},
    {"words": 1, "rows": 40, "stride": 0x400, "bytes": 1},
]


def store_program(*blocks: dict[str, int]) -> Program:
    builder = ProgramBuilder(CONFIG)
    for block in blocks:
        builder.emit(STORE, memory=Memory.VECTOR, **({"address": 0x10000} | block))
    return builder.finish()


@pytest.mark.parametrize("block", BLOCKS)
def test_a_store_takes_the_same_cycles_on_both(fast, rtl, block) -> None:
    (predicted, a), (counted, b) = recorded(fast, store_program(block)), recorded(rtl, store_program(block))
    (one,), (other,) = predicted.slices, counted.slices
    shift = one.start - other.start
    assert shift in (0, 1)
    assert one.end - shift == other.end
    # States are counted a cycle behind.
    differences = np.array(one.stalls) - shift - np.array(other.stalls)
    assert np.abs(differences).max() <= 1
    for state in ("busy", "wait_token", "wait_data"):
        assert a.units["STORE"][state] == b.units["STORE"][state], state
    bursts = [
        [(burst.asked, burst.first, burst.end) for burst in t.bursts if burst.source == Unit.STORE]
        for t in (predicted, counted)
    ]
    assert [tuple(time - shift for time in burst) for burst in bursts[0]] == bursts[1]


def test_stores_overlap_on_both(fast, rtl) -> None:
    """One goes on while the ones before it wait for their answers; beats of instruction fetch come in between."""
    stores = [{"words": 60, "bytes": n % 2, "address": 0x10000 + 0x1000 * n} for n in range(6)]
    (predicted, _), (counted, _) = recorded(fast, store_program(*stores)), recorded(rtl, store_program(*stores))
    for found in (predicted, counted):
        slices = found.of(Unit.STORE)
        assert all(b.accepted < a.end for a, b in pairwise(slices))
    assert abs(predicted.cycles - counted.cycles) <= FETCH_ERROR


def transfer_program(order: str) -> Program:
    """LOADs and STOREs that wait for nothing but their unit and the bus."""
    builder = ProgramBuilder(CONFIG)
    for n in range(6):
        for kind in order:
            if kind == "L":
                builder.emit(LOAD, memory=Memory.WEIGHT, words=400, local=400 * n, address=0x10000 + 0x1000 * n)
            else:
                builder.emit(STORE, memory=Memory.VECTOR, words=60, address=0x20000 + 0x1000 * n)
    return builder.finish()


@pytest.mark.parametrize("order", ["L", "LS", "SL", "LSS", "LLS"])
def test_loads_and_stores_that_meet_on_the_bus_end_in_the_same_cycles_on_both(fast, rtl, order) -> None:
    (predicted, _), (counted, _) = recorded(fast, transfer_program(order)), recorded(rtl, transfer_program(order))
    ends = [np.array([each.end for each in t.slices]) for t in (predicted, counted)]
    assert np.abs(ends[0] - ends[1]).max() <= 1
    assert sum(b.beats for b in counted.bursts) > 0.96 * counted.cycles, "the bus is to be full"


def test_with_transfers_they_differ_by_what_the_prediction_leaves_out(fast, rtl) -> None:
    (predicted, _), (counted, _) = recorded(fast, mixed_program()), recorded(rtl, mixed_program())
    for a, b in zip(predicted.slices, counted.slices, strict=True):
        assert (a.name, a.waited_for) == (b.name, b.waited_for)
        assert abs(a.start - b.start) <= FETCH_ERROR
        assert abs(a.end - b.end) <= FETCH_ERROR
    assert predicted.tokens == counted.tokens
    for source in (*Unit, FETCH):
        beats = [[b.beats for b in t.bursts if b.source == source] for t in (predicted, counted)]
        assert beats[0] == beats[1]
    assert [n for _, n in predicted.tiles] == [n for _, n in counted.tiles] == [1, 0]


@pytest.mark.parametrize("program", [vector_program, matrix_program, mixed_program])
def test_stalls_and_waits_add_up_to_the_counters_of_the_rtl(rtl, program) -> None:
    found, counters = recorded(rtl, program())
    assert found.cycles == counters.cycles
    for unit in Unit:
        waits = sum(cycles(s.waits) for s in found.of(unit))
        stalls = sum(cycles(s.stalls) for s in found.of(unit))
        assert (waits, stalls) == (counters.units[unit.name]["wait_token"], counters.units[unit.name]["wait_data"])


@pytest.mark.parametrize("core", ["fast", "rtl"])
def test_slices_of_a_unit_follow_each_other_and_tokens_go_forward(core, request) -> None:
    found, counters = recorded(request.getfixturevalue(core), mixed_program())
    for unit in Unit:
        ends = 0
        for each in found.of(unit):
            assert ends <= each.start <= each.end <= found.cycles
            assert all(each.start <= start < end <= each.end for start, end in each.stalls)
            assert all(ends <= start < end <= each.start for start, end in each.waits)
            ends = each.end
    for giver, taker in found.tokens:
        assert found.slices[giver].end <= found.slices[taker].start
    assert {found.slices[t.taker].unit for t in found.tokens} == {Unit.MATRIX, Unit.STORE}
    assert sum(b.beats for b in found.bursts) == counters.read_beats + counters.write_beats


@pytest.mark.parametrize(("late", "giver"), [(8, Unit.VECTOR), (4096, Unit.LOAD)])
def test_who_gives_the_last_token_is_the_one_waited_for(fast: Device, late: int, giver: Unit) -> None:
    builder = ProgramBuilder(CONFIG)
    passed = {"source": Source.VECTOR, "destination": Destination.ACTIVATION}
    builder.emit(VECTOR, **passed, columns=1000)
    builder.emit(LOAD, memory=Memory.WEIGHT, words=late, address=0x10000)
    builder.emit(MATRIX, depth=8)
    builder.emit(VECTOR, source=Source.ACCUMULATOR, destination=Destination.NONE, columns=4)
    found, _ = recorded(fast, builder.finish())
    (product,) = found.of(Unit.MATRIX)
    assert sorted(found.slices[t.giver].unit for t in found.tokens) == [Unit.LOAD, Unit.VECTOR]
    assert product.waited_for == giver


@pytest.mark.parametrize("core", ["fast", "rtl"])
def test_bus_beats_of_all_windows_are_those_of_the_counters(core, request) -> None:
    found, counters = recorded(request.getfixturevalue(core), mixed_program())
    read, written = perfetto.beats_per_window(found, 64)
    assert (round(read.sum()), round(written.sum())) == (counters.read_beats, counters.write_beats)
    assert (read + written).max() <= 64.001


def test_recording_changes_nothing_and_is_off_without_a_listener(rtl: Device) -> None:
    _, counters = recorded(rtl, mixed_program())
    rtl.on_timeline = None
    assert rtl.run(mixed_program()) == counters
    assert len(rtl._core.events()) == 0


def test_a_trace_names_instructions_causes_and_flows(fast: Device, tmp_path: Path) -> None:
    found, _ = recorded(fast, mixed_program(), (Section(0, "loads"), Section(2, "product")))
    perfetto.write(tmp_path / "out.json", [found, found], "fast:tiny", ["first", "second"])
    trace = json.loads((tmp_path / "out.json").read_text())
    assert trace["otherData"]["scale"] == "1 cycle = 1 us"
    assert trace["otherData"]["cycles"] == 2 * found.cycles
    events = trace["traceEvents"]
    tracks = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    named = [(tracks[e["tid"]], e["name"]) for e in events if e["ph"] == "X"]
    assert named.count(("MATRIX", "MATRIX depth=64 1 tile")) == 2
    assert named.count(("MATRIX", "waits for LOAD")) == 2
    assert ("VECTOR", "stall: a result tile") in named
    assert [name for track, name in named if track == "layers"] == ["loads", "product"] * 2
    assert [name for track, name in named if track == "programs"] == ["first", "second"]
    assert not perfetto.slices_overlap(events)
    flows = {phase: [e for e in events if e["ph"] == phase] for phase in "sf"}
    assert [e["id"] for e in flows["s"]] == [e["id"] for e in flows["f"]] == list(range(2 * len(found.tokens)))
    assert all(a["ts"] <= b["ts"] for a, b in zip(flows["s"], flows["f"], strict=True))
    flying = [e["args"]["bytes"] for e in events if e["name"] == "bytes in flight"]
    assert min(flying) == flying[-1] == 0
    assert max(flying) >= 128


def test_overlapping_slices_are_noticed() -> None:
    def events(*spans: tuple[int, int]) -> list[dict[str, object]]:
        return [{"ph": "X", "tid": 1, "ts": start, "dur": end - start} for start, end in spans]

    assert not perfetto.slices_overlap(events((0, 10), (2, 4), (4, 10), (10, 12)))
    assert perfetto.slices_overlap(events((0, 10), (5, 12)))


def test_the_nth_token_between_two_units_goes_to_the_nth_taker() -> None:
    program = mixed_program()
    pairs = {(program.instructions[a].type.name, program.instructions[b].type.name) for a, b in match_tokens(program)}
    assert pairs == {("LOAD", "MATRIX"), ("VECTOR", "STORE")}
