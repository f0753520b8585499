"""The hierarchy of signals that files for viewers are made of."""

from __future__ import annotations

import json
from pathlib import Path

from lockstep_sim.signals import hierarchy, write_view

VERILOG = """
module lockstep_core(clk, \\port$1 , irq, wide);
  input clk;
  wire clk;
  input \\port$1 ;
  output irq;
  output [31:0] wide;
  \\lockstep_core.machine  machine (
    .clk(clk)
  );
  unknown #(
    .WIDTH(32'd4)
  ) other (
    .clk(clk)
  );
endmodule

module \\lockstep_core.machine (clk, done);
  input clk;
  output done;
endmodule
"""


def test_instances_have_the_ports_that_people_named() -> None:
    assert hierarchy(VERILOG) == {
        "": [("clk", 1), ("irq", 1), ("wide", 32)],
        "machine": [("clk", 1), ("done", 1)],
    }


def test_views_group_signals_and_leave_out_what_is_not_there(tmp_path: Path) -> None:
    signals = tmp_path / "signals.json"
    signals.write_text(json.dumps({"": [("irq", 1)], "machine.load": [("done", 1), ("address", 32)]}))
    gtkwave, surfer = write_view(tmp_path / "a.fst", signals, 600)
    lines = gtkwave.read_text().splitlines()
    assert lines[lines.index("-LOAD") :][: lines[lines.index("-LOAD") :].index("@1000200")] == [
        "-LOAD",
        "@200",
        "-machine.queue_load",
        "@200",
        "-machine.load",
        "@28",
        "TOP.lockstep_core.machine.load.done",
        "@22",
        "TOP.lockstep_core.machine.load.address[31:0]",
    ]
    assert "*-6.0 600 -1" in gtkwave.read_text()
    assert surfer.read_text().splitlines()[:3] == [
        "divider_add control",
        "variable_add TOP.lockstep_core.irq",
        "divider_add LOAD",
    ]
