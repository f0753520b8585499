"""The fast core: the same programs on C++ kernels, behind the same registers, with predicted cycles."""

from __future__ import annotations

import ctypes
import struct
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from lockstep_hls.toolchain import FLAGS, INCLUDE, Progress, build_cached, compile_shared
from lockstep_isa.config import ABI_VERSION, ISA_VERSION, CoreConfig
from lockstep_isa.errors import CONTROL_UNIT, ErrorCode
from lockstep_isa.instructions import (
    INSTRUCTION_BYTES,
    OPERANDS,
    VECTOR,
    Instruction,
    InstructionError,
    Unit,
    selector,
)
from lockstep_isa.registers import (
    BY_NAME,
    CORE_COUNTERS,
    DESCRIPTOR_BYTES,
    DESCRIPTOR_FIELDS,
    FEATURE_COUNTERS,
    MAGIC,
    REGISTERS,
    UNIT_COUNTERS,
    Status,
    core_counters,
    registers_of,
)
from lockstep_rtl.vector.timing import column_cycles, row_cycles, tail_cycles
from numpy.typing import NDArray

from .core import MemoryTiming, RegisterError
from .native_header import instruction_header
from .recording import Recorder

NATIVE = Path(__file__).parent / "native"
_WRITABLE = {r.name for r in REGISTERS if "w" in r.access}
#: Fields of VECTOR on which its cycles depend.
_SHAPE_FIELDS = (
    "source",
    "destination",
    "add1",
    "mul1",
    "mul2",
    "add2",
    "function",
    "mul3",
    "sum",
    "maximum",
    "max_continue",
    "tiles",
    "columns",
    "select",
)
_COLUMNS = _SHAPE_FIELDS.index("columns")
_COLUMNS_MASK = (1 << VECTOR.layout["columns"][1].width) - 1
assert [f.name for f in VECTOR.variable if f.name in _SHAPE_FIELDS] == ["columns"]
#: Programs whose shapes are kept from one run to the next.
_KEPT_PROGRAMS = 64


class _Prediction(ctypes.Structure):
    _fields_ = [
        *((n.lower(), ctypes.c_uint64) for n, *_ in (*CORE_COUNTERS, *FEATURE_COUNTERS)),
        ("units", ctypes.c_uint64 * (len(Unit) * len(UNIT_COUNTERS))),
    ]


class _Outcome(ctypes.Structure):
    _fields_ = [(n, ctypes.c_uint32) for n in ("code", "instruction", "address", "unit", "flags", "unused")] + [
        ("prediction", _Prediction)
    ]


class _BusTiming(ctypes.Structure):
    _fields_ = [(n, ctypes.c_uint32) for n in ("latency", "refresh_interval", "refresh_cycles")]


@dataclass(frozen=True)
class _Shapes:
    """The distinct shapes among the VECTOR instructions of a program, whatever its operands.

    code : uint8[bytes], the program. rows : index of each VECTOR instruction. keys : int64[shapes, fields], shape
    fields and the operand of ``columns``. inverse : which key each VECTOR instruction has.
    """

    code: NDArray[np.uint8]
    rows: NDArray[np.int64]
    keys: NDArray[np.int64]
    inverse: NDArray[np.int64]


def build_fast_core(config: CoreConfig, progress: Progress = None) -> Path:
    """The shared library of the fast core for a configuration, from the cache or built now."""
    header = instruction_header(config)

    def write(folder: Path) -> None:
        (folder / "instructions.hpp").write_text(header)

    generated = build_cached(["fast core header", header], write)
    return compile_shared([NATIVE / "fast_core.cpp"], [INCLUDE, NATIVE, generated], FLAGS, progress)


class FastCore:
    """Executes what is in the command ring as soon as time passes; its counters are predictions.

    Parameters
    ----------
    config : any configuration; what the RTL does not build yet runs here all the same.
    memory_bytes : size of device memory.
    timing : of the memory whose effect is predicted.
    progress : told in one line when something is built.
    """

    def __init__(
        self, config: CoreConfig, memory_bytes: int, timing: MemoryTiming | None = None, progress: Progress = None
    ) -> None:
        timing = timing or MemoryTiming()
        self.config = config
        self._bus = _BusTiming(timing.latency, timing.refresh_interval, timing.refresh_cycles)
        self._library = _bind(build_fast_core(config, progress))
        self._core = self._library.lockstep_fast_create(memory_bytes)
        recorder = Recorder(self._library, "lockstep_fast", self._core)
        self.record, self.events = recorder.record, recorder.events
        self.memory: NDArray[np.uint8] = np.ctypeslib.as_array(
            self._library.lockstep_fast_memory(self._core), (memory_bytes,)
        )
        self._shapes_at: OrderedDict[int, _Shapes] = OrderedDict()
        self._names = {r.address: r.name for r in registers_of(config)}
        self._registers = dict.fromkeys(self._names.values(), 0)
        self._registers |= {
            "MAGIC": MAGIC,
            "ABI_VERSION": ABI_VERSION,
            "ISA_VERSION": ISA_VERSION,
            "CONFIG_CRC": config.crc,
        }

    def read_register(self, address: int) -> int:
        """The 32-bit register at a byte address."""
        return self._registers[self._name(address)]

    def write_register(self, address: int, value: int) -> None:
        """Write the 32-bit register at a byte address; registers that cannot be written ignore it."""
        name, registers = self._name(address), self._registers
        if name == "FLAGS":
            registers[name] &= ~value
        elif name == "CONTROL":
            if value & 1:
                registers |= dict.fromkeys(("ERROR_CODE", "ERROR_INSTRUCTION", "ERROR_ADDRESS", "ERROR_UNIT"), 0)
                registers |= {"RING_HEAD": 0, "FENCE": 0, "STATUS": 0}
            if value & 3:
                registers |= {n: 0 for n in registers if n.startswith("COUNT_")}
        elif name in _WRITABLE:
            registers[name] = value & 0xFFFFFFFF
            if name == "RING_TAIL" and not registers["STATUS"] & Status.ERROR:
                registers["STATUS"] = int(Status.BUSY) if value != registers["RING_HEAD"] else 0

    def run(self, cycles: int) -> int:
        """Execute all descriptors in the ring; returns the cycles that were predicted for them."""
        registers, before = self._registers, self._registers["COUNT_CYCLES"]
        while registers["RING_HEAD"] != registers["RING_TAIL"] and not registers["ERROR_CODE"]:
            self._execute()
        return registers["COUNT_CYCLES"] - before

    def close(self) -> None:
        """Free the core."""
        if self._core is not None:
            self.memory = np.zeros(0, np.uint8)
            self._library.lockstep_fast_destroy(self._core)
            self._core = None

    def _name(self, address: int) -> str:
        try:
            return self._names[address]
        except KeyError:
            raise RegisterError(f"the core refused an access to register {address:#x}") from None

    def _execute(self) -> None:
        registers = self._registers
        slot = registers["RING_HEAD"] & (registers["RING_SIZE"] - 1)
        start = registers["RING_BASE"] + slot * DESCRIPTOR_BYTES
        if not self._inside(start, DESCRIPTOR_BYTES):
            return self._fail(ErrorCode.OUT_OF_WINDOW, 0, start, CONTROL_UNIT)
        words = struct.unpack_from(
            f"<{len(DESCRIPTOR_FIELDS)}I", self.memory[start : start + DESCRIPTOR_BYTES].tobytes()
        )
        descriptor = dict(zip((name for name, _ in DESCRIPTOR_FIELDS), words, strict=True))
        if descriptor["config_crc"] != self.config.crc:
            return self._fail(ErrorCode.WRONG_CONFIGURATION, 0, start, CONTROL_UNIT)
        program, count = descriptor["program"], descriptor["count"]
        readable = max(0, min(count, (self.memory.size - program) // INSTRUCTION_BYTES))
        operands = None
        if block := descriptor["operands"]:
            if block % max(INSTRUCTION_BYTES, self.config.bus_bytes):
                return self._fail(ErrorCode.MISALIGNED, 0, block, CONTROL_UNIT)
            if not self._inside(block, 4 * OPERANDS):
                return self._fail(ErrorCode.OUT_OF_WINDOW, 0, block, CONTROL_UNIT)
            operands = self.memory[block : block + 4 * OPERANDS].view(np.uint32).copy()
            operands[0] = 0
        shapes = self._shapes(program, program + readable * INSTRUCTION_BYTES, operands)
        outcome = _Outcome()
        self._library.lockstep_fast_execute(
            self._core,
            program,
            count,
            shapes.ctypes.data,
            None if operands is None else operands.ctypes.data,
            registers["WINDOW_BASE"],
            min(registers["WINDOW_LIMIT"], self.memory.size),
            self._bus,
            ctypes.byref(outcome),
        )
        self._count(outcome.prediction)
        registers["FLAGS"] |= outcome.flags
        if outcome.code:
            return self._fail(ErrorCode(outcome.code), outcome.instruction, outcome.address, outcome.unit)
        registers["FENCE"] = descriptor["fence"]
        registers["RING_HEAD"] = (registers["RING_HEAD"] + 1) & 0xFFFFFFFF
        if registers["RING_HEAD"] == registers["RING_TAIL"]:
            registers["STATUS"] = 0
        return None

    def _inside(self, start: int, size: int) -> bool:
        limit = min(self._registers["WINDOW_LIMIT"], self.memory.size)
        return self._registers["WINDOW_BASE"] <= start and start + size <= limit

    def _fail(self, code: ErrorCode, instruction: int, address: int, unit: int) -> None:
        self._registers |= {
            "STATUS": int(Status.ERROR),
            "ERROR_CODE": int(code),
            "ERROR_INSTRUCTION": instruction,
            "ERROR_ADDRESS": address,
            "ERROR_UNIT": unit,
        }

    def _count(self, prediction: _Prediction) -> None:
        values = {f"COUNT_{n}": getattr(prediction, n.lower()) for n in core_counters(self.config)}
        numbers = iter(prediction.units)
        values |= {f"COUNT_{u.name}_{n}": next(numbers) for u in Unit for n, _ in UNIT_COUNTERS}
        for name, value in values.items():
            assert name in BY_NAME
            self._registers[name] = (self._registers[name] + value) & 0xFFFFFFFF

    def _shapes(self, start: int, end: int, operands: NDArray[np.uint32] | None) -> NDArray[np.int32]:
        """int32[instructions, 4]: cycles of first row, other rows, tail and column of each VECTOR instruction."""
        code = self.memory[start:end]
        known = self._shapes_at.get(start)
        if known is None or not np.array_equal(known.code, code):
            known = self._shapes_at[start] = _distinct_shapes(code)
            if len(self._shapes_at) > _KEPT_PROGRAMS:
                self._shapes_at.popitem(last=False)
        self._shapes_at.move_to_end(start)
        shapes = np.zeros((len(code) // INSTRUCTION_BYTES, 4), np.int32)
        if len(known.rows):
            keys = known.keys[:, :-1].copy()
            if operands is not None:
                keys[:, _COLUMNS] = (keys[:, _COLUMNS] + operands[known.keys[:, -1]]) & _COLUMNS_MASK
            table = np.array([_shape(self.config, tuple(key)) for key in keys.tolist()], np.int32)
            shapes[known.rows] = table[known.inverse]
        return shapes


def _distinct_shapes(code: NDArray[np.uint8]) -> _Shapes:
    words = np.frombuffer(code.tobytes(), np.uint64).reshape(-1, INSTRUCTION_BYTES // 8)
    rows = np.flatnonzero((words[:, 0] & np.uint64(15)) == VECTOR.opcode)
    fields = [_field(words[rows], name) for name in (*_SHAPE_FIELDS, selector("columns"))]
    keys, inverse = np.unique(np.stack(fields, axis=1).astype(np.int64), axis=0, return_inverse=True)
    return _Shapes(code.copy(), rows, keys, inverse.reshape(-1))


def _field(words: NDArray[np.uint64], name: str) -> NDArray[np.uint64]:
    """One field of VECTOR instructions given as uint64[n, 8]."""
    offset, field = VECTOR.layout[name]
    part, shift = divmod(offset, 64)
    value = words[:, part] >> np.uint64(shift)
    if shift + field.width > 64:
        value = value | words[:, part + 1] << np.uint64(64 - shift)
    return value & np.uint64((1 << field.width) - 1)


@lru_cache(maxsize=1 << 16)
def _shape(config: CoreConfig, key: tuple[int, ...]) -> tuple[int, int, int, int]:
    try:
        i = Instruction(VECTOR, **dict(zip(_SHAPE_FIELDS, key, strict=True)))
    except InstructionError:  # malformed, or nothing to do: no time of it matters
        return (0, 0, 0, 0)
    first, other = 1 + row_cycles(config, i, True), row_cycles(config, i, False)
    return first, other, tail_cycles(config, i), column_cycles(config, i)


def _bind(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    handle, u32, u64 = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64
    library.lockstep_fast_create.restype, library.lockstep_fast_create.argtypes = handle, [u64]
    library.lockstep_fast_destroy.restype, library.lockstep_fast_destroy.argtypes = None, [handle]
    library.lockstep_fast_memory.restype = ctypes.POINTER(ctypes.c_uint8)
    library.lockstep_fast_memory.argtypes = [handle]
    library.lockstep_fast_execute.restype = None
    library.lockstep_fast_execute.argtypes = [
        handle,
        u32,
        u32,
        ctypes.c_void_p,
        ctypes.c_void_p,
        u64,
        u64,
        _BusTiming,
        ctypes.POINTER(_Outcome),
    ]
    return library
