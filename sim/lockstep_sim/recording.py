"""Events of a simulated core: what happened in it and when, in the form in which the native code lists them."""

from __future__ import annotations

import ctypes
import enum
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Kind(enum.IntEnum):
    """Kinds of events; see native/recording.hpp."""

    ACCEPT = 0  #: a unit takes its next instruction
    END = 1  #: a unit is done with its oldest instruction
    SPAN = 2  #: a unit is in ``state`` for ``value`` cycles
    ASK = 3  #: a burst of ``value`` beats is asked for
    FIRST = 4  #: its first beat
    LAST = 5  #: behind its last beat
    TILES = 6  #: ``value`` complete tiles in the accumulator queue, from now on
    WRITE = 7  #: a beat is written to byte address ``value``; the RTL alone tells this


class State(enum.IntEnum):
    """What a unit does, as its counters name it."""

    BUSY = 0
    WAIT_TOKEN = 1
    WAIT_DATA = 2
    IDLE = 3


#: Who asks for bursts besides the units: instruction fetch.
FETCH = 4
#: One event; ``time`` is the value of the counter CYCLES, which counts while a program is under way.
EVENT = np.dtype([("time", "<u8"), ("value", "<u4"), ("kind", "u1"), ("unit", "u1"), ("state", "u1"), ("unused", "u1")])


class Recorder:
    """The recording of a native core.

    library : holds the functions. prefix : of their names. core : handle of the core.
    """

    def __init__(self, library: ctypes.CDLL, prefix: str, core: Any) -> None:
        self._core = core
        self._record, self._events = getattr(library, f"{prefix}_record"), getattr(library, f"{prefix}_events")
        self._record.restype, self._record.argtypes = None, [ctypes.c_void_p, ctypes.c_int]
        self._events.restype = ctypes.c_void_p
        self._events.argtypes = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint64)]

    def record(self, on: bool) -> None:
        """Forget what was recorded, and record from now on or not."""
        self._record(self._core, int(on))

    def events(self) -> NDArray[Any]:
        """``EVENT[n]``: what was recorded; in the order of time for each unit and kind."""
        count = ctypes.c_uint64()
        address = self._events(self._core, ctypes.byref(count))
        if not count.value:
            return np.zeros(0, EVENT)
        found = np.frombuffer(ctypes.string_at(address, count.value * EVENT.itemsize), EVENT)
        return found[np.argsort(found["time"], kind="stable")]
