"""Compiled stages on a device: the program, and the buffers of values that cross between host and device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from lockstep_driver import Buffer, Device, LoadedProgram
from lockstep_isa.program import Program
from lockstep_sim.timeline import Section
from numpy.typing import NDArray

from lockstep.graph import Value

from .shapes import Binding


class Compiler(Protocol):
    """What compiles one stage: its program, and the sections of it once that is there."""

    sections: list[Section]

    def compile(self) -> Program:
        """The program."""


C = TypeVar("C", bound=Compiler)


@dataclass(frozen=True)
class Placed:
    """One stage, compiled and on the device. Values are panels float32[row tiles, features, R] in their buffers."""

    device: Device
    program: Program
    loaded: LoadedProgram
    buffers: dict[Value, Buffer]
    bindings: dict[Value, Binding]

    def write(self, value: Value, panels: NDArray[np.generic]) -> None:
        """Hand a value over to the device."""
        self.buffers[value].write(panels)

    def read(self, value: Value) -> NDArray[np.float32]:
        """A view of what the device left of a value."""
        raw = self.buffers[value].data.view(np.float32)
        return raw.reshape(-1, self.bindings[value].features, self.device.config.rows)

    def close(self) -> None:
        """Free all of it."""
        self.device.unload(self.loaded)
        for buffer in self.buffers.values():
            self.device.free(buffer)


def place(
    device: Device, shapes: Mapping[Value, tuple[int, int]], compiler: Callable[[dict[Value, Binding]], C]
) -> tuple[Placed, C]:
    """Compile a stage and load it; returns that with its compiler.

    shapes : row tiles and features of each value that crosses. compiler : is made of where those lie.

    Raises what the compiler and the device raise; nothing is left in device memory then.
    """
    buffers: dict[Value, Buffer] = {}
    bindings: dict[Value, Binding] = {}
    try:
        for value, (tiles, features) in shapes.items():
            buffers[value] = device.allocate(tiles * features * device.config.vector_word_bytes)
            bindings[value] = Binding(buffers[value].address, features)
        made = compiler(bindings)
        program = made.compile()
        loaded = device.load(program, sections=tuple(made.sections))
    except Exception:
        for buffer in buffers.values():
            device.free(buffer)
        raise
    return Placed(device, program, loaded, buffers, bindings), made
