"""What a built simulator depends on."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
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
        return set(re.findall(r"gather|row_starts|selection|index_write|select_\w+", text))

    assert {"gather", "row_starts", "selection", "index_write", "select_more_lanes"} <= names(True)
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
