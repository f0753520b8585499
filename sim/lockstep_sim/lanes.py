"""The lanes of a core as loops, for its simulator: the Verilog that is synthesised has one module for each lane."""

from __future__ import annotations

import re

from .loops import PREFIX, Loops
from .netlist import read_netlist

#: Ports of a lane that lanes do not share, beside its outputs.
OWN = ("x", "y", "lane0", "lane1", "hidden", "other", "maximum_start")
_MODULE = re.compile(r"^module \\?(lockstep_lane_\d+)\b.*?^endmodule\n", re.MULTILINE | re.DOTALL)
_INSTANCE = re.compile(r"^  lockstep_lane_\d+ \\?lane(\d+)\S* +\(\n(.*?)\n  \);\n", re.MULTILINE | re.DOTALL)
_CONNECTION = re.compile(r"^    \.(?:\\(\S+) |(\w+))\((.*)\),?$", re.MULTILINE)
_SLICE = re.compile(r"(.+?)\[(\d+):(\d+)\]")


def with_lanes_in_loops(verilog: str) -> str:
    """``verilog`` of a core, with one module of loops in the place of all lanes that get the same control.

    Says the same cycle by cycle. Text without lanes stays as it is. Raises ValueError for lanes that it cannot read.
    """
    modules = list(_MODULE.finditer(verilog))
    if not modules:
        return verilog
    name = modules[0][1]
    netlist = read_netlist("".join(module[0] for module in modules), name)
    if missing := set(OWN) - set(netlist.inputs):
        raise ValueError(f"module '{name}' has no ports {sorted(missing)}")
    loops = Loops(netlist, f"{name}_loops", set(netlist.inputs) - set(OWN))

    # By what they share: with two columns a beat, lanes of each have their own control.
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    instances = list(_INSTANCE.finditer(verilog))
    if not instances or len(instances) != len(re.findall(rf"^  {name} ", verilog, re.MULTILINE)):
        raise ValueError(f"not every instance of '{name}' is written as Yosys writes it")
    for instance in sorted(instances, key=lambda found: int(found[1])):
        ports = {found[1] or found[2]: found[3] for found in _CONNECTION.finditer(instance[2])}
        groups.setdefault(tuple(ports[port] for port in netlist.inputs if port not in OWN), []).append(ports)
    lines = []
    for n, lanes in enumerate(groups.values()):
        connections = []
        for port in (*netlist.inputs, *netlist.outputs):
            several = port in OWN or port in netlist.outputs
            value = _side_by_side([lane[port] for lane in lanes]) if several else lanes[0][port]
            connections.append(f"    .{PREFIX}{port}({value})")
        lines += [f"  {loops.name} #(.LANES({len(lanes)})) lanes{n} (", ",\n".join(connections), "  );"]

    text, last = verilog, instances[-1]
    text = text[: last.start()] + "\n".join([*lines, ""]) + text[last.end() :]
    for instance in reversed(instances[:-1]):
        text = text[: instance.start()] + text[instance.end() :]
    return _MODULE.sub("", text) + loops.verilog()


def _side_by_side(parts: list[str]) -> str:
    """A concatenation, the first of ``parts`` lowest; neighbouring bits of one net are one part of it."""
    joined: list[str] = []
    for part in parts:
        before = _SLICE.fullmatch(joined[-1]) if joined else None
        here = _SLICE.fullmatch(part)
        if before and here and before[1] == here[1] and int(here[3]) == int(before[2]) + 1:
            joined[-1] = f"{here[1]}[{here[2]}:{before[3]}]"
        else:
            joined.append(part)
    return joined[0] if len(joined) == 1 else f"{{ {', '.join(reversed(joined))} }}"
