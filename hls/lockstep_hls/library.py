"""The compiled kernels as a library: built once, with the C types of every function."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from lockstep_isa.tables import FUNCTIONS, MAX_ENTRIES, TableFunction

from lockstep_hls.toolchain import FLAGS, Progress, compile_shared

SOURCES = ("kernels.cpp", "plan.cpp")
KINDS = ("exp2", "recip", "rsqrt", "relu_minus", "odd", "sigmoid")

_SIZE, _FLOAT, _INT, _LONG, _POINTER = (
    ctypes.c_size_t,
    ctypes.c_float,
    ctypes.c_int,
    ctypes.c_int64,
    ctypes.c_void_p,
)
_PAIRS = [_SIZE, _SIZE, _POINTER, _SIZE, _POINTER, _SIZE, _POINTER]
_ARGUMENTS = {
    "lockstep_set_threads": [_SIZE],
    "lockstep_threads": [],
    "lockstep_apply": [_POINTER, _SIZE, _POINTER, _POINTER],
    "lockstep_relu": [_SIZE, _POINTER, _POINTER],
    "lockstep_add": _PAIRS,
    "lockstep_multiply": _PAIRS,
    "lockstep_quantise_rows": [_POINTER, _SIZE, _SIZE] + 4 * [_POINTER],
    "lockstep_packed_bytes": [_SIZE, _SIZE],
    "lockstep_pack": [_SIZE, _SIZE, _POINTER, _POINTER],
    "lockstep_linear": 3 * [_SIZE] + 6 * [_POINTER],
    "lockstep_layer_norm": [_POINTER, _SIZE, _SIZE] + 3 * [_POINTER] + [_FLOAT, _FLOAT, _POINTER],
    "lockstep_rms_norm": [_POINTER, _SIZE, _SIZE] + 2 * [_POINTER] + [_FLOAT, _FLOAT, _POINTER],
    "lockstep_rotary": 4 * [_SIZE] + [_INT] + 4 * [_POINTER],
    "lockstep_attention": 2 * [_POINTER] + 6 * [_SIZE] + [_FLOAT, _INT, _LONG] + 10 * [_POINTER],
    "lockstep_run": [_POINTER] + 3 * [_SIZE],
}
_COUNTS = ("lockstep_threads", "lockstep_packed_bytes")


def prepare(progress: Progress = None, flags: Sequence[str] = FLAGS) -> Path:
    """Compile the kernels, if this machine has not done so yet; it takes some seconds.

    Raises :class:`lockstep_hls.toolchain.ToolchainError` where there is no compiler.
    """
    return compile_shared([Path(__file__).with_name(name) for name in SOURCES], flags=flags, progress=progress)


def load(path: Path) -> ctypes.CDLL:
    """The library of kernels at ``path``."""
    library = ctypes.CDLL(str(path))
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes = arguments
        function.restype = _SIZE if name in _COUNTS else None
    return library


@cache
def library() -> ctypes.CDLL:
    """The library of this machine, built if need be."""
    return load(prepare())


def address(array: npt.NDArray | None) -> int | None:
    """Where a contiguous array lies, or none."""
    return None if array is None else array.ctypes.data


def table_bytes(table: TableFunction) -> bytes:
    """The table in the layout of ``struct Table``."""
    header = np.array([KINDS.index(table.kind), table.k, table.base, table.entries], np.int32)
    columns = np.zeros((3, MAX_ENTRIES), np.float32)
    columns[:, : table.entries] = table.c0, table.c1, table.c2
    return header.tobytes() + columns.tobytes()


@cache
def table(name: str) -> ctypes.Array[ctypes.c_char]:
    """The table called ``name`` for a C function."""
    data = table_bytes(FUNCTIONS[name])
    return ctypes.create_string_buffer(data, len(data))
