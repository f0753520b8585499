"""The Verilated core: truth, cycle by cycle."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
from lockstep_hls.toolchain import Progress
from lockstep_isa.config import CoreConfig

from .core import MemoryTiming, RegisterError
from .recording import Recorder
from .verilate import build_core


class RtlCore:
    """The RTL of a configuration, simulated by Verilator with a memory model in C++.

    Parameters
    ----------
    config : any configuration that the RTL builds.
    memory_bytes : size of device memory.
    timing : of the memory model.
    wave : path of an FST waveform to write; needs a build of its own.
    window : its first cycle and how many, as CYCLES would count them if nobody cleared it; everything if not given.
    progress : told in one line when something is built.
    """

    def __init__(
        self,
        config: CoreConfig,
        memory_bytes: int,
        timing: MemoryTiming | None = None,
        wave: Path | str | None = None,
        progress: Progress = None,
        window: tuple[int, int] = (0, 0),
    ) -> None:
        timing = timing or MemoryTiming()
        self.config = config
        self._library = _bind(build_core(config, trace=wave is not None, progress=progress))
        self._core = self._library.lockstep_rtl_create(
            memory_bytes, timing.latency, timing.refresh_interval, timing.refresh_cycles
        )
        recorder = Recorder(self._library, "lockstep_rtl", self._core)
        self.record, self.events = recorder.record, recorder.events
        pointer = self._library.lockstep_rtl_memory(self._core)
        self.memory = np.ctypeslib.as_array(pointer, (memory_bytes,))
        if wave is not None and self._library.lockstep_rtl_trace_open(self._core, str(wave).encode(), *window):
            raise RegisterError("this build of the core cannot write waveforms")

    def read_register(self, address: int) -> int:
        """The 32-bit register at a byte address."""
        value = ctypes.c_uint32()
        self._check(self._library.lockstep_rtl_read_register(self._core, address, ctypes.byref(value)), address)
        return value.value

    def write_register(self, address: int, value: int) -> None:
        """Write the 32-bit register at a byte address."""
        self._check(self._library.lockstep_rtl_write_register(self._core, address, value & 0xFFFFFFFF), address)

    def run(self, cycles: int) -> int:
        """Let at most ``cycles`` pass, fewer if the core falls idle or stops; returns how many passed."""
        return self._library.lockstep_rtl_run(self._core, cycles)

    def close(self) -> None:
        """Free the core and finish its waveform."""
        if self._core is not None:
            self.memory = np.zeros(0, np.uint8)
            self._library.lockstep_rtl_destroy(self._core)
            self._core = None

    @staticmethod
    def _check(status: int, address: int) -> None:
        if status:
            what = "did not answer" if status == -1 else "refused"
            raise RegisterError(f"the core {what} an access to register {address:#x}")


def _bind(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    handle, u32, u64 = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64
    signatures: dict[str, tuple[object, list[object]]] = {
        "create": (handle, [u64, u32, u32, u32]),
        "destroy": (None, [handle]),
        "memory": (ctypes.POINTER(ctypes.c_uint8), [handle]),
        "write_register": (ctypes.c_int, [handle, u32, u32]),
        "read_register": (ctypes.c_int, [handle, u32, ctypes.POINTER(u32)]),
        "run": (u64, [handle, u64]),
        "trace_open": (ctypes.c_int, [handle, ctypes.c_char_p, u64, u64]),
        "trace_close": (None, [handle]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, f"lockstep_rtl_{name}")
        function.restype, function.argtypes = result, arguments
    return library
