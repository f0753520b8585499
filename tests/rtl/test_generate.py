"""What a built simulator depends on."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from amaranth.hdl import CombinationalCycle, Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from lockstep_isa.config import preset
from lockstep_rtl import generate
from lockstep_rtl.core import Core

#: Prints every module of ours that generating a core loads.
LOADED = """
import sys
from lockstep_isa.config import preset
from lockstep_rtl.generate import core_verilog
import lockstep_rtl.generate as generate
generate._optimise = lambda text: text
core_verilog(preset("tiny"))
print(*sorted(n for n in sys.modules if n.split(".")[0] in ("lockstep_rtl", "lockstep_isa")))
"""


def test_everything_that_generating_a_core_loads_is_part_of_its_identity():
    loaded = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True).stdout.split()
    sources = generate.core_sources()
    assert set(loaded) <= set(sources)
    assert "lockstep_rtl.vector.lane" in loaded
    assert "lockstep_rtl.synthesis" not in sources, "synthesis uses the core and not the other way round"


def test_a_core_is_the_same_text_every_time():
    # Place and route hang on the order of the text: a clock that another run does not reach is no figure.
    script = "from lockstep_isa.config import preset; from lockstep_rtl.generate import core_verilog\n"
    script += "print(core_verilog(preset('tiny')))"
    texts = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(texts) == 1


def test_a_core_without_selection_has_nothing_of_it():
    # Its clock was measured: what other cores gain must not show in its text.
    def names(selection):
        core = Core(preset("ulx3s").replace(selection=selection))
        text = generate.component_verilog(core, generate.TOP)
        return set(re.findall(r"gather|row_starts|selection|index_write|select_\w+|sections|next_maximum", text))

    assert {"gather", "row_starts", "selection", "index_write", "select_more_lanes"} <= names(True)
    assert {"sections", "next_maximum"} <= names(True)
    assert not names(False)


def test_a_core_without_zero_skipping_has_nothing_of_it():
    def names(zero_skipping):
        core = Core(preset("ulx3s").replace(zero_skipping=zero_skipping))
        text = generate.component_verilog(core, generate.TOP)
        return set(re.findall(r"zero_words|zero_read|finder|skipped|SKIPPED|blind", text))

    assert {"zero_words", "zero_read", "finder", "skipped", "SKIPPED", "blind"} <= names(True)
    assert not names(False)


@pytest.mark.parametrize(
    ("module", "old", "new", "changes"),
    [
        ("lockstep_rtl.matrix.unit", "words == 2", "words == 3", True),
        ("lockstep_isa.errors", "= 1", "= 77", True),
        ("lockstep_rtl.matrix.unit", '"""', '"""Once more: ', False),
        ("lockstep_rtl.matrix.unit", "        # What is left", "        # What remains", False),
    ],
    ids=["logic", "number", "docstring", "comment"],
)
def test_the_identity_changes_with_code_and_not_with_words(tmp_path, monkeypatch, module, old, new, changes):
    sources = generate.core_sources()
    changed = Path(shutil.copy(sources[module], tmp_path))
    text = changed.read_text()
    assert old in text
    changed.write_text(text.replace(old, new, 1))
    before = generate.core_identity(preset("tiny"))
    monkeypatch.setattr(generate, "core_sources", lambda: sources | {module: changed})
    assert (generate.core_identity(preset("tiny")) != before) == changes


class Picker(wiring.Component):
    """z = byte ``which`` of a word whose bit 40 is bit ``back`` of z, if there is one."""

    which: In(3)
    z: Out(8)

    def __init__(self, back: int | None) -> None:
        self.back = back
        super().__init__()

    def elaborate(self, platform):
        m = Module()
        word = Signal(64)
        m.d.comb += [word[3:20].eq(self.which), self.z.eq(word.word_select(self.which, 8))]
        if self.back is not None:
            m.d.comb += word[40].eq(self.z[self.back])
        return m


@pytest.mark.parametrize("back", [0, 3, 7])
def test_combinational_loops_through_a_picked_word_are_found(back):
    with pytest.raises(CombinationalCycle):
        generate.component_verilog(Picker(back), "top")
    assert "module top" in generate.component_verilog(Picker(None), "top")


def test_only_zeros_of_whole_memories_are_left_out_of_the_text():
    given = """module m(clk);
  reg [7:0] zeros [1:0];
  initial begin
    zeros[0] = 8'h00;
    zeros[1] = 8'd0;
  end
  initial begin
    ones[0] = 8'h00;
    ones[1] = 8'h01;
  end
  always @* begin
    part[0] = 1'h0;
  end
endmodule
"""
    expected = given.replace("  initial begin\n    zeros[0] = 8'h00;\n    zeros[1] = 8'd0;\n  end\n", "")
    assert generate.without_zeros(given) == expected
