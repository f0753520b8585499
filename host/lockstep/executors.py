"""Executors by URI: the host itself, and every device that the driver opens.

PyTorch is imported when one is opened, not before: a URI can be checked without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from lockstep_driver import SCHEMES, Counters, Device, DeviceNotFound, open_device, parse
from lockstep_hls.toolchain import Progress
from lockstep_isa.config import CoreConfig

if TYPE_CHECKING:
    from lockstep_sim.timeline import Timeline

    from lockstep.cache_policy import CachePolicy
    from lockstep.graph import Graph
    from lockstep.model import Executor
    from lockstep.session import Session


def _cpu(progress: Progress) -> Executor:
    from lockstep_hls import kernels

    from lockstep.native import NativeExecutor

    kernels.prepare(progress)
    return NativeExecutor()


def _golden(progress: Progress) -> Executor:
    from lockstep_isa import operations

    from lockstep.model import HostExecutor

    return HostExecutor(operations)


#: Executors without a device: URI -> what opens it and one line about it.
HOSTS: dict[str, tuple[Callable[[Progress], Executor], str]] = {
    "cpu": (_cpu, "the contract's operations in C++ on this machine, without a program"),
    "golden": (_golden, "the contract itself in NumPy: slow, and what everything else is compared with"),
}


@dataclass(frozen=True)
class Totals:
    """What the counters of all programs of an executor add up to; bytes are those on the bus of device memory."""

    programs: int = 0
    cycles: int = 0
    mac_cycles: int = 0
    bytes_moved: int = 0

    def __sub__(self, earlier: Totals) -> Totals:
        return Totals(
            self.programs - earlier.programs,
            self.cycles - earlier.cycles,
            self.mac_cycles - earlier.mac_cycles,
            self.bytes_moved - earlier.bytes_moved,
        )


class OpenExecutor:
    """An executor together with what it holds open; use it as a context manager, or call :meth:`close`.

    Attributes
    ----------
    uri : as it was given.
    config : the core; none where the host executes.
    totals : the counters of every program that ran, added up.
    core_cycles, core_seconds : cycles that a core let pass, and the time that this took.
    watch : is told how many cycles have passed, now and then while a program runs.
    """

    def __init__(self, uri: str, executor: Executor | None = None, device: Device | None = None) -> None:
        self.uri = uri
        self.config: CoreConfig | None = None if device is None else device.config
        self.totals = Totals()
        self.core_cycles = 0
        self.core_seconds = 0.0
        self.watch: Callable[[int], None] | None = None
        self._device = device
        self._observer: Callable[[Counters], None] | None = None
        if device is not None:
            from lockstep.compiler.execute import DeviceExecutor

            device.watch = self._passed
            executor = DeviceExecutor(device, self._ran)
        assert executor is not None
        self._executor = executor

    def run(self, graph: Graph, sequences: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
        """``float32[tokens, features]`` for each sequence, given as arrays by input name without the batch."""
        return self._executor.run(graph, sequences)

    def open_session(self, graph: Graph, capacity: int, policy: CachePolicy | None = None) -> Session:
        """One sequence of a causal language model with its key-value cache, with room for ``capacity`` tokens.

        policy : how the cache is treated; every token stays and counts unless given.

        Raises ``ModelError`` if this executor keeps no caches, the graph cannot be run piece by piece, or its cache
        cannot be treated so, and ``SequenceLengthError`` if the model has no positions for so many tokens.
        """
        from lockstep.cache_policy import WHOLE
        from lockstep.errors import ModelError
        from lockstep.model import GeneratingExecutor

        if not isinstance(self._executor, GeneratingExecutor):
            raise ModelError(f"'{self.uri}' keeps no key-value cache; generate on {' or '.join(HOSTS)}")
        return self._executor.open_session(graph, capacity, policy or WHOLE)

    @property
    def cycles(self) -> int | None:
        """Cycles of all programs so far; none on the host, which counts none."""
        return None if self._device is None else self.totals.cycles

    def close(self) -> None:
        """Give the device back."""
        if self._device is not None:
            self._device.close()

    def __enter__(self) -> OpenExecutor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def observe(
        self, counters: Callable[[Counters], None] | None, timeline: Callable[[Timeline], None] | None = None
    ) -> None:
        """Give the counters of each program that runs from now on to ``counters``, and its timeline to ``timeline``."""
        self._observer = counters
        if self._device is not None:
            self._device.on_timeline = timeline

    def _ran(self, counters: Counters) -> None:
        assert self.config is not None
        if self._observer is not None:
            self._observer(counters)
        so_far, beats = self.totals, counters.read_beats + counters.write_beats
        self.totals = Totals(
            so_far.programs + 1,
            so_far.cycles + counters.cycles,
            so_far.mac_cycles + counters.mac_cycles,
            so_far.bytes_moved + beats * self.config.bus_bytes,
        )

    def _passed(self, cycles: int, seconds: float) -> None:
        self.core_cycles += cycles
        self.core_seconds += seconds
        if self.watch is not None:
            self.watch(self.core_cycles)


def check_uri(uri: str) -> None:
    """Raise :class:`DeviceNotFound` unless ``uri`` names an executor; nothing is opened or built."""
    if uri in HOSTS:
        return
    if uri.partition(":")[0] not in SCHEMES or ":" not in uri:
        known = ", ".join([*HOSTS, *(f"{scheme}:CORE" for scheme in SCHEMES)])
        raise DeviceNotFound(f"unknown device '{uri}': devices are {known}; 'lockstep devices' lists them all")
    parse(uri)


def executor(uri: str, progress: Progress = None, *, threads: int | None = None) -> OpenExecutor:
    """The executor behind a URI: ``cpu``, ``golden``, or a device such as ``fast:laptop`` or ``rtl:laptop``.

    Parameters
    ----------
    progress : told in one line when something is built.
    threads : of ``cpu``, in the whole process from now on; one for each core unless somebody said otherwise.

    Raises
    ------
    DeviceNotFound
        if the URI names none.
    ToolchainError
        if something has to be built and a tool is missing.
    ConfigurationError
        if the RTL does not build this core.
    """
    check_uri(uri)
    if uri in HOSTS:
        opened = OpenExecutor(uri, HOSTS[uri][0](progress))
        if uri == "cpu" and threads is not None:
            from lockstep_hls import kernels

            kernels.set_threads(threads)
        return opened
    return OpenExecutor(uri, device=open_device(uri, progress))
