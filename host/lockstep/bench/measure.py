"""Measurements, and the device that they are taken on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import TracebackType
from typing import Any

import numpy as np
from lockstep_driver import Counters, Device, DeviceUri, open_parsed, parse
from lockstep_hls.toolchain import Progress
from lockstep_isa.config import CoreConfig

from lockstep.errors import ModelError

from .case import Published
from .limits import Limit


class BenchError(ModelError):
    """Sizes or a device that a case cannot do; the message says what to give instead."""


@dataclass(frozen=True)
class Measurement:
    """One run of one case.

    Attributes
    ----------
    case, parameters : what ran. device : where. counted : whether ``cycles`` were counted; otherwise predicted.
    cycles : from doorbell to fence. limit : see :class:`Limit`.
    bytes : moved on the bus of device memory, instructions included. mac_cycles : cycles in which operands entered
    the array. skipped_chunks : chunks of zeros that it passed over. units : the cycles of each unit by what it did.
    reference : what the values are compared with. values, differences : compared, and of other bits.
    predicted_cycles : of the fast core with the same memory. cycles_per_second : of the simulation.
    figures : what only this case has, by name.
    """

    case: str
    parameters: dict[str, Any]
    device: str
    counted: bool
    cycles: int
    limit: Limit
    bytes: int
    mac_cycles: int
    skipped_chunks: int
    units: dict[str, dict[str, int]]
    reference: str
    values: int
    differences: int
    predicted_cycles: int
    cycles_per_second: float
    figures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def core(self) -> str:
        """The preset that it ran on."""
        return parse(self.device).config.name

    @property
    def identical(self) -> bool:
        return self.differences == 0

    @property
    def ratio(self) -> float:
        """Cycles over those of the limit: 1 is the best."""
        return self.cycles / self.limit.cycles

    @property
    def share(self) -> float:
        """The part of the limit that is reached: 1 is the best."""
        return self.limit.cycles / self.cycles

    def as_dict(self, published: Sequence[Published] = ()) -> dict[str, Any]:
        """What ``--json`` prints, with what others have published for the case."""
        return {
            "case": self.case,
            "parameters": self.parameters,
            "device": self.device,
            "cycles": self.cycles,
            "cycles_are": "counted" if self.counted else "predicted",
            "limit_cycles": self.limit.cycles,
            "limit_formula": self.limit.formula,
            "limit_numbers": self.limit.numbers,
            "ratio": self.ratio,
            "share_of_limit": self.share,
            "bytes": self.bytes,
            "mac_cycles": self.mac_cycles,
            "skipped_chunks": self.skipped_chunks,
            "units": self.units,
            "identical": self.identical,
            "reference": self.reference,
            "values_compared": self.values,
            "differences": self.differences,
            "cycles_per_second": self.cycles_per_second,
            "predicted_cycles": self.predicted_cycles,
            "published": [asdict(one) for one in published],
            **self.figures,
        }


@dataclass(frozen=True)
class Ran:
    """What a piece of work left: its values, and the counters of the program that is measured."""

    values: Sequence[np.ndarray]
    counters: Counters


Work = Callable[[Device], Ran]


class Bench:
    """The device of a run of ``lockstep bench``; use it as a context manager.

    Devices are opened once. What runs on ``rtl:`` runs on the fast core of the same memory first, for the prediction.

    Parameters
    ----------
    uri : with a core. progress : told in one line what happens. bar : opens a bar over a number of cycles.

    Raises ``DeviceNotFound`` for a URI that names no core.
    """

    def __init__(self, uri: str, progress: Progress = None, watch: Callable[[int, int], None] | None = None) -> None:
        self.uri = uri
        self.parsed: DeviceUri = parse(uri)
        self.counted = self.parsed.scheme == "rtl"
        self.progress = progress
        self._watch = watch
        self._open: dict[str, Device] = {}

    @property
    def config(self) -> CoreConfig:
        """The core."""
        return self.parsed.config

    def __enter__(self) -> Bench:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for device in self._open.values():
            device.close()
        self._open.clear()

    def say(self, line: str) -> None:
        """Tell what happens."""
        if self.progress is not None:
            self.progress(line)

    def measure(
        self,
        case: str,
        parameters: dict[str, Any],
        limit: Limit,
        work: Work,
        expected: Sequence[np.ndarray],
        reference: str = "golden",
        memory_bytes: int = 0,
        figures: Callable[[int], Mapping[str, Any]] | None = None,
    ) -> Measurement:
        """Do ``work`` on the device and compare what it leaves with ``expected``, bit for bit.

        memory_bytes : device memory that the work needs; a larger one than the URI's is opened where it must be.
        figures : what the case says about so many cycles, beside the limit.
        """
        predicted, rate = self._run(work, "fast", memory_bytes)
        ran, differences = predicted, _differences(expected, predicted.values)
        if self.counted:
            ran, rate = self._run(work, self.parsed.scheme, memory_bytes, predicted.counters.cycles)
            differences += _differences(expected, ran.values)
        counters = ran.counters
        return Measurement(
            case=case,
            parameters=parameters,
            device=self.uri,
            counted=self.counted,
            cycles=counters.cycles,
            limit=limit,
            bytes=(counters.read_beats + counters.write_beats) * self.config.bus_bytes,
            mac_cycles=counters.mac_cycles,
            skipped_chunks=counters.skipped_chunks,
            units=counters.units,
            reference=reference,
            values=sum(array.size for array in expected),
            differences=differences,
            predicted_cycles=predicted.counters.cycles,
            cycles_per_second=rate,
            figures={} if figures is None else figures(counters.cycles),
        )

    def _run(self, work: Work, scheme: str, memory_bytes: int, total: int = 0) -> tuple[Ran, float]:
        device = self._device(scheme, memory_bytes)
        passed, seconds = 0, 0.0

        def watch(cycles: int, took: float) -> None:
            nonlocal passed, seconds
            passed, seconds = passed + cycles, seconds + took
            if self._watch is not None and total:
                self._watch(passed, total)

        device.watch = watch
        ran = work(device)
        return ran, passed / max(seconds, 1e-9)

    def _device(self, scheme: str, memory_bytes: int) -> Device:
        least = self.parsed.memory_bytes
        while least < memory_bytes:
            least *= 2
        if least > 2 << 30:
            raise BenchError(
                f"{memory_bytes:,} bytes of device memory are needed and a device has at most 2 GiB; ask for less, "
                "such as fewer layers"
            )
        known = self._open.get(scheme)
        if known is not None and known.memory_bytes >= least:
            return known
        wave = self.parsed.wave if scheme == "rtl" else None
        wanted = replace(self.parsed, scheme=scheme, memory_bytes=least, wave=wave)
        if known is not None:
            self._open.pop(scheme).close()
        self._open[scheme] = open_parsed(wanted, self.uri, self.progress)
        return self._open[scheme]


def _differences(expected: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> int:
    """Values of float32 or integers that are not the same bits."""
    from lockstep.verification import differing

    total = 0
    for wanted, got in zip(expected, found, strict=True):
        if wanted.dtype != got.dtype or wanted.shape != got.shape:
            raise ValueError(f"{got.dtype}{list(got.shape)} cannot be {wanted.dtype}{list(wanted.shape)}")
        total += int((differing(wanted, got) if wanted.dtype == np.float32 else wanted != got).sum())
    return total
