"""``lockstep explain``: what it says follows from counters and from predictions that anybody can repeat."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import Command
from lockstep.explain import Change, Explanation, causes
from lockstep.profile import Profile, total
from lockstep_driver import Counters

#: A memory so slow that nothing but its latency counts.
SLOW = "fast:tiny?latency=3000&refresh=0"


@pytest.fixture(scope="module")
def counters() -> Counters:
    states = {"busy": 10, "wait_token": 20, "wait_data": 30, "idle": 40}
    units = {name: dict(states) for name in ("LOAD", "MATRIX", "VECTOR", "STORE")}
    units["MATRIX"] |= {"busy": 70, "idle": 0, "wait_token": 0}
    return Counters(100, 5, 40, 20, 60, units)


def test_explain_names_what_helps_and_predicts_what_run_counts(cli: Command, small_folder: Path) -> None:
    report = cli("explain", small_folder, "--tokens", 6, "--device", SLOW, "--json").json
    changes = {change["name"]: change["cycles"] for change in report["changes"]}
    assert report["changes"][0]["name"] == "a memory without latency"
    for name, device in (("a memory without latency", "fast:tiny?latency=0&refresh=0"),):
        assert changes[name] == cli("run", small_folder, "--tokens", 6, "--device", device, "--json").json["cycles"]
    assert report["predicted"] == report["cycles"]
    (best,) = (s for s in report["sentences"] if s.startswith("What would help most is a memory without latency"))
    assert f"{changes['a memory without latency']:,} cycles (-" in best
    assert {"a bus of 64 bit", "8 vector lanes", "an array of 8 x 8", "a memory without refresh"} <= changes.keys()


def test_explain_finds_the_bound_and_adds_causes_up(cli: Command, small_folder: Path) -> None:
    report = cli("explain", small_folder, "--tokens", 6, "--device", "fast:tiny", "--json").json
    assert report["bound"] == max(report["busy"], key=report["busy"].get)
    assert report["busy"]["bus"] == report["read_beats"] + report["write_beats"]
    assert any(f"{report['cycles']:,} cycles" in sentence for sentence in report["sentences"])
    matrix = [c for c in report["causes"] if c["unit"] == "MATRIX"]
    counted = report["units"]["MATRIX"]
    assert sum(c["cycles"] for c in matrix) == counted["wait_token"] + counted["wait_data"]
    assert {c["cause"] for c in matrix} <= {"LOAD", "VECTOR", "STORE", "room for a result tile"}


def test_sentences_give_the_best_change_first_and_leave_out_what_brings_nothing(counters: Counters) -> None:
    changes = (Change("two", 500), Change("one", 900), Change("none", 999), Change("never", None, "no room"))
    found = Explanation("fast:tiny", 1, counters, {"MATRIX": 70, "bus": 60, "VECTOR": 10}, (), 1000, changes)
    said = "\n".join(found.sentences)
    assert "MATRIX bounds it: it works in 70.0% of the cycles; the bus in 60.0%, VECTOR in 10.0%." in said
    assert "What would help most is two: 500 cycles (-50.0%)" in said
    assert "Then one, 900 cycles (-10.0%)." in said
    assert "Less than 0.5% would bring: none." in said
    assert "Not predicted: never (no room)." in said


def test_counters_of_programs_add_up(counters: Counters) -> None:
    twice = total([counters, counters])
    assert (twice.cycles, twice.units["MATRIX"]["busy"]) == (200, 140)
    assert sum(twice.units["LOAD"].values()) == 200
    assert causes(Profile([counters], [])) == []


def test_explain_refuses_a_device_without_a_core(cli: Command, small_folder: Path) -> None:
    cli("explain", small_folder, "--device", "golden").refused(2, "'golden' runs without programs")
