"""Cores that are no preset, and devices that have them: small ones of shapes that only large presets have."""

from __future__ import annotations

from lockstep_driver.device import Device
from lockstep_driver.uri import SCHEMES, DeviceUri, parse
from lockstep_isa.config import CoreConfig, preset
from lockstep_sim.core import MemoryTiming

#: By name: ``wide`` has two lanes per row and a bus of two operand words, as ``paper`` has them.
SHAPES: dict[str, CoreConfig] = {"wide": preset("tiny").replace(name="wide", lanes=8, bus_bytes=8)}


def open_core(scheme: str, core: str, memory_bytes: int = 8 << 20, timing: MemoryTiming | None = None) -> Device:
    """The device ``scheme:core``, where ``core`` is a preset or one of :data:`SHAPES`."""
    config = SHAPES[core] if core in SHAPES else parse(f"{scheme}:{core}").config
    uri = DeviceUri(scheme, config, memory_bytes, timing or MemoryTiming())
    return Device(SCHEMES[scheme][0](uri, None), f"{scheme}:{core}")
