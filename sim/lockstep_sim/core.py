"""What every simulated core offers to the driver: registers, device memory, and time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from lockstep_isa.config import CoreConfig
from numpy.typing import NDArray


@dataclass(frozen=True)
class MemoryTiming:
    """Timing of the memory model, in core cycles.

    The defaults are those of a DDR4 part at a core clock of 100 MHz: 400 ns from address to data, and a refresh of
    280 ns every 7.8 us, which takes 3.6 % of the bandwidth.
    """

    latency: int = 40
    refresh_interval: int = 780
    refresh_cycles: int = 28


class RegisterError(RuntimeError):
    """A register access that the core refused or did not answer."""


class SimulatedCore(Protocol):
    """A core with its memory, behind the same registers as a board.

    Attributes
    ----------
    config : the configuration of the core.
    memory : uint8[bytes], device memory, to be read and written while no program runs.
    """

    config: CoreConfig
    memory: NDArray[np.uint8]

    def read_register(self, address: int) -> int:
        """The 32-bit register at a byte address; raises :class:`RegisterError`."""

    def write_register(self, address: int, value: int) -> None:
        """Write the 32-bit register at a byte address; raises :class:`RegisterError`."""

    def run(self, cycles: int) -> int:
        """Let at most ``cycles`` pass, fewer if the core falls idle or stops; returns how many passed."""

    def record(self, on: bool) -> None:
        """Forget what was recorded, and record from now on or not; see :mod:`lockstep_sim.recording`."""

    def events(self) -> NDArray[Any]:
        """``EVENT[n]``: what was recorded, in the order of time."""

    def close(self) -> None:
        """Give everything back; the core must not be used afterwards."""
