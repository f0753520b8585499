"""Which signals a waveform of a core has, and files that show them by unit in GTKWave and Surfer."""

from __future__ import annotations

import json
import re
from pathlib import Path

from lockstep_rtl.generate import TOP

#: Signals below an instance: name and bits of each port.
Ports = list[tuple[str, int]]
#: Where Verilator puts the top module.
_ROOT = "TOP"
#: Group -> instances whose ports it shows, by path from the top.
GROUPS: dict[str, tuple[str, ...]] = {
    "control": ("", "supervisor", "machine.sequencer", "machine.tokens"),
    "LOAD": ("machine.queue_load", "machine.load"),
    "MATRIX": ("machine.queue_matrix", "machine.matrix", "machine.matrix.accumulators"),
    "VECTOR": ("machine.queue_vector", "machine.vector", "machine.vector.issue", "machine.vector.writer"),
    "STORE": ("machine.queue_store", "machine.store"),
    "scratchpads": ("machine.activation", "machine.weight", "machine.vectors", "machine.parameter"),
}
_MODULE = re.compile(r"^module (?:\\(\S+) |(\w+)) ?\(", re.M)
_PORT = re.compile(r"^  (?:input|output) (?:\[(\d+):0\] )?(?:\\(\S+) |(\w+));", re.M)
_INSTANCE = re.compile(r"^  (?:\\(\S+) |(\w+)) +(?:#\([^;]*?\) )?(?:\\(\S+) |(\w+)) \($", re.M)


def hierarchy(verilog: str) -> dict[str, Ports]:
    """Ports of every instance by its path from the top, whose own path is empty; names that tools made are left out."""
    starts = list(_MODULE.finditer(verilog))
    ends = [m.start() for m in starts[1:]] + [len(verilog)]
    bodies = {m[1] or m[2]: verilog[m.start() : end] for m, end in zip(starts, ends, strict=True)}
    ports = {
        name: [(p[2] or p[3], int(p[1] or 0) + 1) for p in _PORT.finditer(body) if "$" not in (p[2] or p[3])]
        for name, body in bodies.items()
    }
    found: dict[str, Ports] = {}

    def visit(module: str, path: str) -> None:
        found[path] = ports[module]
        for instance in _INSTANCE.finditer(bodies[module]):
            child = instance[1] or instance[2]
            if child in bodies:
                visit(child, f"{path}.{instance[3] or instance[4]}".lstrip("."))

    visit(TOP, "")
    return found


def write_view(wave: Path, signals: Path, marker: int) -> tuple[Path, Path]:
    """Write what shows a waveform by unit: a save file of GTKWave and a command file of Surfer, both beside it.

    signals : JSON of a :func:`hierarchy`. marker : time in the waveform at which GTKWave's marker stands. Returns both
    paths.
    """
    known: dict[str, Ports] = json.loads(signals.read_text())
    gtkwave, surfer = wave.with_suffix(".gtkw"), wave.with_suffix(".sucl")
    save = [f'[dumpfile] "{wave.absolute()}"', f'[savefile] "{gtkwave.absolute()}"']
    save += [f"[timestart] {max(0, marker - 200)}", f"*-6.0 {marker}" + 26 * " -1", "[treeopen] TOP."]
    commands = []
    for group, instances in GROUPS.items():
        save += ["@800200", f"-{group}"]
        commands.append(f"divider_add {group}")
        for instance in instances:
            path = ".".join(part for part in (_ROOT, TOP, instance) if part)
            save += ["@200", f"-{instance or TOP}"]
            for name, bits in known.get(instance, []):
                save += ["@28", f"{path}.{name}"] if bits == 1 else ["@22", f"{path}.{name}[{bits - 1}:0]"]
                commands.append(f"variable_add {path}.{name}")
        save += ["@1000200", f"-{group}"]
    gtkwave.write_text("\n".join(save) + "\n", encoding="utf-8")
    surfer.write_text("\n".join([*commands, "zoom_fit"]) + "\n", encoding="utf-8")
    return gtkwave, surfer
