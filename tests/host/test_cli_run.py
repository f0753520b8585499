"""``lockstep run``: counters of a model or a program, and its timeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Command

TEXT = "a cat sleeps on the sofa"


def layers(path: Path) -> list[str]:
    events = json.loads(path.read_text())["traceEvents"]
    tracks = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    return [e["name"] for e in events if e["ph"] == "X" and tracks[e["tid"]] == "layers"]


@pytest.mark.parametrize("device", ["fast:tiny", "rtl:tiny"])
def test_run_counts_and_writes_a_timeline(cli: Command, small_folder: Path, tmp_path: Path, device: str) -> None:
    path = tmp_path / "out.json"
    report = cli("run", small_folder, TEXT, "--device", device, "--timeline", path, "--json").json
    assert (report["programs"], report["device"]) == (1, device)
    for counts in report["units"].values():
        assert sum(counts.values()) == report["cycles"]
    trace = json.loads(path.read_text())
    assert trace["otherData"]["cycles"] == report["cycles"]
    assert "encoder.layer.0: feed forward" in layers(path)
    assert "encoder.layer.0.attention.self: attention" in layers(path)


def test_run_shows_a_row_for_each_unit(cli: Command, small_folder: Path) -> None:
    shown = cli("run", small_folder, "--tokens", 5, "--device", "fast:tiny").out
    for word in ("LOAD", "MATRIX", "VECTOR", "STORE", "wait token", "cycles"):
        assert word in shown


def test_run_takes_a_program_and_counts_what_the_model_counts(cli: Command, small_folder: Path, tmp_path: Path) -> None:
    program, path = tmp_path / "small.prog", tmp_path / "out.json"
    # The file holds no weights: what is multiplied is zeros, which a core may pass over.
    found = {}
    for device in ("fast:tiny?without=zero_skipping", "fast:tiny"):
        model = cli("run", small_folder, "--tokens", 7, "--device", device, "--json").json
        assert cli("compile", small_folder, "--device", device, "--tokens", 7, "-o", program).status == 0
        found[device] = cli("run", program, "--device", device, "--timeline", path, "--json").json
        assert found[device]["instructions"] == model["instructions"]
        assert layers(path) == []
        if device != "fast:tiny":
            assert found[device]["cycles"] == model["cycles"]
    assert found["fast:tiny"]["cycles"] < found["fast:tiny?without=zero_skipping"]["cycles"]
    assert found["fast:tiny"]["skipped_chunks"] > 0


def test_run_generates_with_one_program_behind_the_other(cli: Command, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    arguments = ("run", "tiny", "def ", "--generate", 3, "--device", "fast:laptop", "--timeline", path, "--json")
    report = cli(*arguments).json
    assert report["programs"] == 3
    trace = json.loads(path.read_text())
    assert trace["otherData"]["cycles"] == report["cycles"]
    assert max(e["ts"] + e["dur"] for e in trace["traceEvents"] if e["ph"] == "X") == report["cycles"]


def test_run_refuses_what_does_not_go_together(cli: Command, small_folder: Path, tmp_path: Path) -> None:
    cli("run", small_folder, "--device", "cpu").refused(2, "'cpu' runs without programs", "fast:laptop")
    cli("run", small_folder, "--device", "fast:tiny", "--operand", "n=1").refused(2, "--operand")
    program = tmp_path / "small.prog"
    cli("compile", small_folder, "--device", "fast:tiny", "--tokens", 3, "-o", program)
    cli("run", program, TEXT, "--device", "fast:tiny").refused(2, "takes no texts")
    cli("run", program, "--device", "fast:tiny", "--operand", "n").refused(2, "NAME=NUMBER")
    cli("run", program, "--device", "fast:laptop").refused(2, "compile it for this core")
