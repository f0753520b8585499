"""Device URIs: ``rtl:laptop``, ``fast:laptop?memory=256M&latency=60``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import parse_qsl

from lockstep_hls.toolchain import Progress
from lockstep_isa.config import ConfigurationError, CoreConfig, preset
from lockstep_sim.core import MemoryTiming, SimulatedCore
from lockstep_sim.fast import FastCore
from lockstep_sim.rtl import RtlCore

from .device import Device
from .errors import DeviceNotFound

#: Device memory of a simulated core unless the URI says otherwise.
DEFAULT_MEMORY = 64 << 20
_SUFFIXES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class DeviceUri:
    """A parsed URI: scheme, core, and options."""

    scheme: str
    config: CoreConfig
    memory_bytes: int = DEFAULT_MEMORY
    timing: MemoryTiming = field(default_factory=MemoryTiming)
    wave: str | None = None
    window: tuple[int, int] = (0, 0)


def _open_rtl(uri: DeviceUri, progress: Progress) -> SimulatedCore:
    return RtlCore(uri.config, uri.memory_bytes, uri.timing, uri.wave, progress, uri.window)


def _open_fast(uri: DeviceUri, progress: Progress) -> SimulatedCore:
    return FastCore(uri.config, uri.memory_bytes, uri.timing, progress)


#: Scheme -> what opens it and one line about it. Adding a device is one entry.
SCHEMES: dict[str, tuple[Callable[[DeviceUri, Progress], SimulatedCore], str]] = {
    "rtl": (_open_rtl, "the RTL, simulated cycle by cycle by Verilator"),
    "fast": (_open_fast, "the same programs on C++ kernels, with predicted cycles"),
}


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMG]?)", text)
    if match is None or not 1 << 20 <= int(match[1]) * _SUFFIXES[match[2]] <= 2 << 30:
        raise ValueError
    return int(match[1]) * _SUFFIXES[match[2]]


def parse(text: str) -> DeviceUri:
    """Read a URI ``SCHEME:CORE[?memory=SIZE&latency=N&refresh=INTERVAL&without=FEATURE&wave=PATH]``; ``without`` may be
    given again, for the core as it is without a feature.

    Raises :class:`DeviceNotFound` naming what is unknown and what there is.
    """
    scheme, separator, rest = text.partition(":")
    if not separator or scheme not in SCHEMES:
        known = ", ".join(f"{s}:CORE" for s in SCHEMES)
        raise DeviceNotFound(f"unknown device '{text}': devices are {known} and cpu")
    core, _, query = rest.partition("?")
    try:
        config = preset(core)
    except ConfigurationError as error:
        raise DeviceNotFound(f"device '{text}': {error}") from None
    memory, timing, wave = DEFAULT_MEMORY, MemoryTiming(), None
    for key, value in parse_qsl(query, keep_blank_values=True):
        try:
            if key == "memory":
                memory = _size(value)
            elif key == "latency":
                timing = MemoryTiming(int(value), timing.refresh_interval, timing.refresh_cycles)
            elif key == "refresh":
                timing = MemoryTiming(timing.latency, int(value), timing.refresh_cycles)
            elif key == "without":
                config = _without(text, config, value)
            elif key == "wave" and scheme == "rtl" and value:
                wave = value
            else:
                raise DeviceNotFound(
                    f"device '{text}': unknown option '{key}'; options are memory, latency, refresh, without, and "
                    "wave for rtl"
                )
        except ValueError:
            raise DeviceNotFound(
                f"device '{text}': '{value}' is no value for {key}; write memory=256M (1M to 2G), latency=40, "
                "refresh=780"
            ) from None
    return DeviceUri(scheme, config, memory, timing, wave)


def _without(text: str, config: CoreConfig, feature: str) -> CoreConfig:
    """The core without a feature that it has."""
    there = [name for name in config.feature_names() if getattr(config, name)]
    if feature not in there:
        has = f"it has {', '.join(there)}" if there else "it has none"
        raise DeviceNotFound(f"device '{text}': core '{config.name}' has no feature '{feature}'; {has}")
    return config.replace(**{feature: False})


def open_device(
    uri: str, progress: Progress = None, wave: str | None = None, window: tuple[int, int] = (0, 0)
) -> Device:
    """The device behind a URI, ready to run programs.

    progress : told in one line when a simulator is built. wave, window : in place of a ``wave`` of the URI, the
    waveform to write and its part, as :class:`lockstep_sim.rtl.RtlCore` takes them. Raises :class:`DeviceNotFound`,
    :class:`lockstep_hls.toolchain.ToolchainError`, :class:`lockstep_isa.config.ConfigurationError`.
    """
    parsed = parse(uri)
    if wave is not None:
        parsed = dataclasses.replace(parsed, wave=wave, window=window)
    return open_parsed(parsed, uri, progress)


def open_parsed(parsed: DeviceUri, name: str, progress: Progress = None) -> Device:
    """The device that a parsed URI stands for, called ``name`` in messages; raises as :func:`open_device` does."""
    return Device(SCHEMES[parsed.scheme][0](parsed, progress), name)
