"""Combinational logic moved behind the enables of the registers that it feeds.

Yosys writes every net as a continuous assignment and every register as a block of its own. A simulator then works all
nets out in every cycle, those of idle pipeline stages too. Here registers with the same enable become one block, and a
net that nothing but this block reads is computed inside it, as a variable: an idle stage costs one branch. The text
means the same to synthesis.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field

_IDENTIFIER = re.compile(r"\\\S+|\d*'s?[bodh][0-9a-fxz_?]+|[A-Za-z_][\w$]*")
_ASSIGN = re.compile(r"  assign (\\\S+ |\w[\w$]*) = (.*);")
_WIRE = re.compile(r"  wire (\[[^\]]*\] )?(\\\S+ |\w[\w$]*);")
_RESET = re.compile(r"    if \(rst\) (.+?) <= (.*);")
_ENABLED = re.compile(r"    (?:else )?if \(([^()]*)\) (.+?) <= (.*);")
_CLOCKED = "  always @(posedge clk)"

#: The nets that read a net, in the order of the text: what is written must not hang on the hashes of names.
_Feeds = dict[str, dict[str, None]]


@dataclass
class _Register:
    """``target`` takes ``value`` where enabled, ``reset`` where there is one and ``rst`` is high."""

    target: str
    value: str
    reset: str | None


@dataclass
class _Module:
    """The statements of a module. ``rest`` keeps what is left as it is, in order."""

    rest: list[str] = field(default_factory=list)
    wires: dict[str, str] = field(default_factory=dict)  # name -> its declaration
    assigned: dict[str, str] = field(default_factory=dict)  # name -> expression
    groups: dict[str, list[_Register]] = field(default_factory=lambda: defaultdict(list))  # enable -> registers


def gate(text: str) -> str:
    """``text``, Verilog as Yosys writes it, with its logic behind enables."""
    parts = re.split(r"^(module .*?^endmodule$)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(_rewritten(part) if part.startswith("module ") else part for part in parts)


def _names(text: str) -> set[str]:
    return {name for name in _IDENTIFIER.findall(text) if "'" not in name or name.startswith("\\")}


def _parsed(text: str) -> _Module:
    # The list of ports may take several lines.
    header, _, body = text.partition(");\n")
    module, lines = _Module([f"{header});"]), body.split("\n")
    ports = _names(header)
    n = 0
    while n < len(lines):
        line = lines[n]
        if (found := _WIRE.fullmatch(line)) and found[2].strip() not in ports:
            module.wires[found[2].strip()] = found[1] or ""
        elif found := _ASSIGN.fullmatch(line):
            module.assigned[found[1].strip()] = found[2]
        elif line == _CLOCKED:
            reset = _RESET.fullmatch(lines[n + 1])
            taken = _ENABLED.fullmatch(lines[n + (2 if reset else 1)])
            behind = lines[n + (3 if reset else 2)]
            if taken and taken[1] != "rst" and (not reset or reset[1] == taken[2]) and not behind.startswith("    "):
                module.groups[taken[1]].append(_Register(taken[2], taken[3], reset[2] if reset else None))
                n += 2 if reset else 1
            else:
                module.rest.append(line)
        else:
            module.rest.append(line)
        n += 1
    return module


def _places(module: _Module) -> dict[str, str | None]:
    """For each net the enable of the one block that reads it, or none; nets that nothing reads are left out."""
    readers: dict[str, set[str | None]] = defaultdict(set)  # by blocks and by everything else
    feeds: _Feeds = defaultdict(dict)  # by other nets
    for name in _names("\n".join([*module.rest, *module.groups])):
        readers[name].add(None)
    for enable, registers in module.groups.items():
        for register in registers:
            for name in _names(f"{register.target} {register.value}"):
                readers[name].add(enable)
    for target, value in module.assigned.items():
        if target not in module.wires:
            # A port, or a part of a net.
            for name in _names(value):
                readers[name].add(None)
        for name in _names(value):
            feeds[name][target] = None

    places: dict[str, str | None] = {}
    used: dict[str, set[str | None]] = {}
    for name in _outermost_first(module, feeds):
        used[name] = readers[name].union(*(used.get(target, {None}) for target in feeds[name]))
        if used[name]:
            places[name] = next(iter(used[name])) if len(used[name]) == 1 else None
    return places


def _outermost_first(module: _Module, feeds: _Feeds) -> list[str]:
    """The nets, each behind all nets that read it."""
    order: list[str] = []
    seen: set[str] = set()
    for start in module.assigned:
        stack = [(start, False)]
        while stack:
            name, done = stack.pop()
            if done:
                order.append(name)
            elif name not in seen and name in module.wires and name in module.assigned:
                seen.add(name)
                stack.append((name, True))
                stack += [(target, False) for target in feeds[name]]
    return order


def _rewritten(text: str) -> str:
    module = _parsed(text)
    places = _places(module)
    inside: dict[str, list[str]] = defaultdict(list)
    for name in reversed(places):  # innermost first
        if (enable := places[name]) is not None:
            inside[enable].append(name)
    moved = {name for names in inside.values() for name in names}
    dead = {name for name in module.assigned if name in module.wires and name not in places}

    head, *rest = module.rest
    lines = [head]
    for name, width in module.wires.items():
        if name not in dead:
            lines.append(f"  {'reg' if name in moved else 'wire'} {width}{_spelled(name)};")
    # What is declared comes before what uses it; everything else of the module stays in its order.
    lines += rest[:-1]
    for name, value in module.assigned.items():
        if name not in moved and name not in dead:
            lines.append(f"  assign {_spelled(name)} = {value};")
    for enable, registers in module.groups.items():
        lines += [f"{_CLOCKED} begin", f"    if ({enable}) begin"]
        lines += [f"      {_spelled(name)} = {module.assigned[name]};" for name in inside[enable]]
        lines += [f"      {register.target} <= {register.value};" for register in registers]
        lines.append("    end")
        cleared = [register for register in registers if register.reset is not None]
        if cleared:
            lines.append("    if (rst) begin")
            lines += [f"      {register.target} <= {register.reset};" for register in cleared]
            lines.append("    end")
        lines.append("  end")
    return "\n".join([*lines, rest[-1]])


def _spelled(name: str) -> str:
    """An escaped name ends with a space."""
    return f"{name} " if name.startswith("\\") else name
