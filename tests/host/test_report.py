"""``lockstep report``: a page that stands alone, and whose figures are those of the counters."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from command_line import Command
from lockstep.charts import BINS, timeline_chart
from lockstep.executors import executor
from lockstep.html_report import compare_bits
from lockstep.layers import layers
from lockstep.model import load
from lockstep.profile import Profile, profile
from lockstep.verification import random_inputs
from lockstep_isa.config import preset
from lockstep_isa.instructions import INSTRUCTION_BYTES


@pytest.fixture(scope="module")
def run(small_folder: Path) -> Profile:
    model = load(small_folder)
    with executor("fast:tiny") as device, profile(device, timelines=True) as found:
        device.run(model.graph, [random_inputs(model.graph, tokens, 0) for tokens in (3, 6)])
    return found


def test_report_is_one_file_that_loads_nothing(cli: Command, small_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    report = cli("report", small_folder, "a cat sleeps", "--device", "fast:tiny", "-o", path, "--json").json
    assert (report["identical"], report["values_compared"]) == (True, 5 * 32)
    page = path.read_text()
    for word in ("http", "<script", "<link", "<img", "@import", "url(", "src="):
        assert word not in page
    assert f"{report['cycles']:,}" in page
    assert all(sentence.split(" ")[0] in page for sentence in report["sentences"])
    charts = re.findall(r"<svg.*?</svg>", page, re.S)
    assert len(charts) == 2
    for chart in charts:
        ElementTree.fromstring(chart)
    rows = re.findall(r"<tr><td>(.*?)</td>", page)
    assert rows == [layer["name"] for layer in report["layers"]] + ["the whole run"]


def test_layers_add_up_to_the_counters(run: Profile) -> None:
    config, total, parts = preset("tiny"), run.total, layers(run.timelines)
    steps = total.mac_cycles + total.skipped_chunks * config.rows
    assert sum(layer.macs for layer in parts) == steps * config.macs_per_cycle
    # Every program begins with a descriptor, as long as an instruction.
    fetched = (total.instructions + len(run.runs)) * INSTRUCTION_BYTES
    moved = (total.read_beats + total.write_beats) * config.bus_bytes
    assert sum(layer.bytes_moved for layer in parts) == moved - fetched
    assert 0 <= total.cycles - sum(layer.cycles for layer in parts) <= 4 * len(run.runs)
    assert any(layer.name == "encoder.layer.0: feed forward" for layer in parts)


def test_the_drawing_shows_the_shares_of_the_counters(run: Profile) -> None:
    svg = ElementTree.fromstring(timeline_chart(run.timelines))
    for kind, name in (("busy", "MATRIX"), ("token", "MATRIX"), ("data", "VECTOR")):
        paths = [p.get("d", "") for p in svg.iter("path") if p.get("class") == kind]
        unit = ("LOAD", "MATRIX", "VECTOR", "STORE").index(name)
        points = [tuple(map(float, pair.split(","))) for pair in re.findall(r"[\d.]+,[\d.]+", paths[unit])]
        high, low = points[: 2 * BINS : 2], points[: 2 * BINS - 1 : -2]
        area = sum(b[1] - a[1] for a, b in zip(high, low, strict=True)) / 38 / BINS
        counted = {"busy": "busy", "token": "wait_token", "data": "wait_data"}[kind]
        assert area == pytest.approx(run.total.units[name][counted] / run.total.cycles, abs=0.01)


def test_a_bit_that_differs_is_counted_and_named() -> None:
    expected = [np.ones((2, 3), np.float32), np.ones((1, 3), np.float32)]
    actual = [array.copy() for array in expected]
    assert str(compare_bits("cpu", "fast:tiny", expected, actual)) == (
        "9 output values compared with cpu: the same bits."
    )
    actual[1].view(np.uint32)[0, 2] ^= 1
    found = compare_bits("cpu", "fast:tiny", expected, actual)
    assert (found.values, found.differences) == (9, 1)
    assert "1 of 9 output values differ from cpu, first sequence 1, token 0, feature 2" in str(found)


def test_report_refuses_a_folder_that_is_not_there(cli: Command, small_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "page.html"
    cli("report", small_folder, "--device", "fast:tiny", "-o", path).refused(2, "there is no folder", "nowhere")
