"""A device: a core with memory, run through its registers and its command ring."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType

import numpy as np
from lockstep_isa.config import ABI_VERSION, ISA_VERSION, CoreConfig
from lockstep_isa.errors import ErrorCode
from lockstep_isa.instructions import OPERANDS, Unit
from lockstep_isa.program import Operand, Program, ProgramError, validate
from lockstep_isa.registers import (
    BY_NAME,
    DESCRIPTOR_BYTES,
    DESCRIPTOR_FIELDS,
    MAGIC,
    UNIT_COUNTERS,
    Flags,
    Status,
    core_counters,
)
from lockstep_sim.core import SimulatedCore
from lockstep_sim.timeline import Section, Timeline, timeline
from numpy.typing import NDArray

from .errors import DeviceError, DeviceTimeout, DriverError, IncompatibleDevice
from .memory import Allocator, Buffer

#: Descriptors in the command ring.
RING_SLOTS = 16
#: Bytes of the operands of one run in device memory.
OPERAND_BYTES = 4 * OPERANDS
#: Cycles without progress after which the core stops itself.
WATCHDOG_CYCLES = 1_000_000
#: Cycles between two looks at the clock while waiting for a fence.
BATCH_CYCLES = 200_000


#: Values of a program's operands, by name or by number.
OperandValues = Mapping[str, int] | Mapping[int, int]


@dataclass(frozen=True)
class Counters:
    """The performance counters of a run.

    Attributes
    ----------
    cycles, instructions, read_beats, write_beats, mac_cycles : of the whole core.
    units : unit name -> cycles busy, wait_token, wait_data, idle; they sum up to ``cycles``.
    skipped_chunks : chunks of R steps that MATRIX passed over; 0 on cores without ``zero_skipping``.
    """

    cycles: int
    instructions: int
    read_beats: int
    write_beats: int
    mac_cycles: int
    units: dict[str, dict[str, int]]
    skipped_chunks: int = 0


@dataclass(frozen=True)
class LoadedProgram:
    """A program in device memory, ready to be submitted any number of times, with the operands that each run gives.

    ``program`` and its named ``sections`` are what a timeline shows of it.
    """

    code: Buffer
    count: int
    config_crc: int
    operands: tuple[Operand, ...] = ()
    program: Program | None = None
    sections: tuple[Section, ...] = ()


@dataclass(frozen=True)
class Fence:
    """A submitted program: reached once the device's fence counter is at least ``value``."""

    value: int


def operand_values(declared: tuple[Operand, ...], given: OperandValues) -> list[int]:
    """The value of each declared operand in the order of their numbers.

    given : operand name or number -> value. Raises :class:`DriverError` unless every declared operand, and nothing
    else, has a value inside its limits.
    """
    numbers = {operand.name: n for n, operand in enumerate(declared, 1)}
    known = ", ".join(numbers) or "none"
    values: dict[int, int] = {}
    for key, value in given.items():
        number = numbers.get(key) if isinstance(key, str) else key
        if number is None or not 1 <= number <= len(declared):
            raise DriverError(f"the program has no operand {key!r}; it declares: {known}")
        name, least, greatest, step = declared[number - 1]
        if number in values:
            raise DriverError(f"operand '{name}' is given twice, by name and by number")
        if not least <= value <= greatest:
            raise DriverError(f"operand '{name}' is {value}; this program takes {least}..{greatest}")
        if (value - least) % step:
            raise DriverError(f"operand '{name}' is {value}; this program takes every {step}th value from {least} on")
        values[number] = int(value)
    if missing := [name for name, number in numbers.items() if number not in values]:
        raise DriverError(f"the program needs a value for operand '{missing[0]}'; it declares: {known}")
    return [values[n] for n in range(1, len(declared) + 1)]


class Device:
    """One core, through registers, memory and command ring; the same for simulations and boards.

    Use it as a context manager, or call :meth:`close`. Programs complete in the order of their submission.

    Parameters
    ----------
    core : registers and memory. uri : what it is called in messages and reports.

    Attributes
    ----------
    watch : if set, is told while waiting how many cycles have passed since it was last told, and in how many seconds.
    on_timeline : if set, is given the timeline of each program that :meth:`run` runs.
    """

    def __init__(self, core: SimulatedCore, uri: str) -> None:
        self._core = core
        self.uri = uri
        self.config: CoreConfig = core.config
        self._identify()
        self._allocator = Allocator(core.memory)
        self._ring = self._allocator.allocate(RING_SLOTS * DESCRIPTOR_BYTES)
        self._operands = self._allocator.allocate(RING_SLOTS * OPERAND_BYTES)
        self._submitted = 0
        self.watch: Callable[[int, float], None] | None = None
        self.on_timeline: Callable[[Timeline], None] | None = None
        self._configure()

    def __enter__(self) -> Device:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the device back."""
        self._core.close()

    # --- Registers ---------------------------------------------------------------------------------------------

    def read(self, register: str) -> int:
        """A register of the map, by name."""
        return self._core.read_register(BY_NAME[register].address)

    def write(self, register: str, value: int) -> None:
        """Write a register of the map, by name."""
        self._core.write_register(BY_NAME[register].address, value)

    def _identify(self) -> None:
        if (magic := self.read("MAGIC")) != MAGIC:
            raise IncompatibleDevice(f"'{self.uri}' is no Lockstep core: its magic is {magic:#010x}")
        for register, expected in (("ABI_VERSION", ABI_VERSION), ("ISA_VERSION", ISA_VERSION)):
            if (found := self.read(register)) != expected:
                raise IncompatibleDevice(
                    f"'{self.uri}' has {register} {found}, this driver needs {expected}; update one"
                )
        if (crc := self.read("CONFIG_CRC")) != self.config.crc:
            raise IncompatibleDevice(
                f"'{self.uri}' is not core '{self.config.name}': its configuration is {crc:#010x}, "
                f"that one's {self.config.crc:#010x}"
            )

    def _configure(self) -> None:
        self.write("WINDOW_BASE", 0)
        self.write("WINDOW_LIMIT", self._core.memory.size)
        self.write("WATCHDOG", WATCHDOG_CYCLES)
        self.write("RING_BASE", self._ring.address)
        self.write("RING_SIZE", RING_SLOTS)

    # --- Memory ------------------------------------------------------------------------------------------------

    @property
    def memory_bytes(self) -> int:
        """Size of device memory."""
        return self._core.memory.size

    def allocate(self, size: int) -> Buffer:
        """Device memory of ``size`` bytes, aligned; raises :class:`OutOfDeviceMemory`."""
        return self._allocator.allocate(size)

    def free(self, buffer: Buffer) -> None:
        """Give a buffer back."""
        self._allocator.free(buffer)

    def memory_at(self, address: int, size: int) -> NDArray[np.uint8]:
        """uint8[size]: a view of device memory, whoever allocated it."""
        return self._core.memory[address : address + size]

    # --- Programs ----------------------------------------------------------------------------------------------

    def load(self, program: Program, check: bool = True, sections: tuple[Section, ...] = ()) -> LoadedProgram:
        """Copy a program to device memory; :meth:`unload` gives the memory back.

        Raises :class:`DriverError` for a program that is not for this core, or not valid. ``check=False`` leaves
        that to the hardware, which stops with an error where the check would have refused.
        """
        if check:
            try:
                validate(self.config, program)
            except ProgramError as error:
                raise DriverError(str(error)) from None
        code = program.encode()
        buffer = self.allocate(len(code))
        buffer.write(np.frombuffer(code, np.uint8))
        count = len(program.instructions)
        return LoadedProgram(buffer, count, program.config_crc, program.operands, program, sections)

    def unload(self, loaded: LoadedProgram) -> None:
        """Free a program's memory; it must not be running."""
        self.free(loaded.code)

    def submit(self, loaded: LoadedProgram, operands: OperandValues | None = None) -> Fence:
        """Put a program in the command ring and ring the doorbell.

        operands : a value for each operand that the program declares, by name or number. Raises
        :class:`DriverError` where one is missing, unknown or outside its limits, and where the ring is full.
        """
        values = operand_values(loaded.operands, operands or {})
        if not values:
            return self.enqueue(loaded, 0)
        self._check_room()
        block = np.zeros(OPERANDS, np.uint32)
        block[1 : len(values) + 1] = [value & 0xFFFFFFFF for value in values]
        start = self._submitted % RING_SLOTS * OPERAND_BYTES
        self._operands.write(block, start)
        return self.enqueue(loaded, self._operands.address + start)

    def enqueue(self, loaded: LoadedProgram, operands_address: int) -> Fence:
        """Like :meth:`submit`, with operands that the caller placed in device memory; 0: there are none.

        Nothing is checked; the core stops with an error where the address is not a multiple of 64 and of the bus width.
        """
        self._check_room()
        fence = Fence((self._submitted + 1) & 0xFFFFFFFF)
        words = {
            "program": loaded.code.address,
            "count": loaded.count,
            "config_crc": loaded.config_crc,
            "fence": fence.value,
            "operands": operands_address,
        }
        descriptor = struct.pack(f"<{len(DESCRIPTOR_FIELDS)}I", *(words[name] for name, _ in DESCRIPTOR_FIELDS))
        self._ring.write(np.frombuffer(descriptor, np.uint8), self._submitted % RING_SLOTS * DESCRIPTOR_BYTES)
        self._submitted += 1
        self.write("RING_TAIL", self._submitted & 0xFFFFFFFF)
        return fence

    def _check_room(self) -> None:
        if self._submitted - self.read("RING_HEAD") >= RING_SLOTS:
            raise DriverError(f"the command ring is full: {RING_SLOTS} programs wait; wait for a fence first")

    def wait(self, fence: Fence, timeout: float = 600.0) -> None:
        """Return once the fence is reached.

        Raises :class:`DeviceError` where the core stopped, :class:`DeviceTimeout` after ``timeout`` seconds. The
        device is reset in both cases, and also where somebody interrupts the wait, and can be used again.
        """
        try:
            self._wait(fence, time.monotonic() + timeout, timeout)
        except BaseException:
            # An interrupt may come between any two steps; a program that is left running would run into the next one.
            self.reset()
            raise

    def _wait(self, fence: Fence, deadline: float, timeout: float) -> None:
        while not self.reached(fence):
            if self.read("STATUS") & Status.ERROR:
                raise DeviceError(
                    ErrorCode(self.read("ERROR_CODE")),
                    self.read("ERROR_INSTRUCTION"),
                    self.read("ERROR_ADDRESS"),
                    self.read("ERROR_UNIT"),
                )
            if time.monotonic() > deadline:
                raise DeviceTimeout(f"'{self.uri}' did not reach fence {fence.value} in {timeout:g} s; it was reset")
            start = time.monotonic()
            cycles = self._core.run(BATCH_CYCLES)
            if self.watch is not None:
                self.watch(cycles, time.monotonic() - start)

    def reached(self, fence: Fence) -> bool:
        """Whether the program behind the fence is complete."""
        return (self.read("FENCE") - fence.value) & 0xFFFFFFFF < 1 << 31

    def run(
        self,
        program: Program | LoadedProgram,
        operands: OperandValues | None = None,
        timeout: float = 600.0,
        check: bool = True,
    ) -> Counters:
        """Run one program to its end and return what the counters say of it; ``operands`` as in :meth:`submit`."""
        loaded = self.load(program, check) if isinstance(program, Program) else program
        try:
            self.clear_counters()
            if self.on_timeline is not None:
                self._core.record(True)
            self.wait(self.submit(loaded, operands), timeout)
            counters = self.counters()
            if self.on_timeline is not None:
                self._tell(loaded, operands or {}, counters.cycles)
        finally:
            if self.on_timeline is not None:
                self._core.record(False)
            if loaded is not program:
                self.unload(loaded)
        return counters

    def _tell(self, loaded: LoadedProgram, operands: OperandValues, cycles: int) -> None:
        """Give the timeline of a run that was recorded."""
        assert self.on_timeline is not None
        if loaded.program is None:
            raise DriverError("a program of which only the code is known has no timeline")
        values = operand_values(loaded.operands, operands)
        events = self._core.events()
        if not len(events):
            raise DriverError(f"'{self.uri}' records nothing, so its programs have no timelines")
        self.on_timeline(timeline(self.config, loaded.program, values, events, cycles, loaded.sections))

    def reset(self) -> None:
        """Stop whatever runs and make the core ready again; device memory keeps its content."""
        self.write("RING_TAIL", 0)
        self.write("CONTROL", 1)
        for _ in range(1000):
            self._core.run(100)
            if self.read("STATUS") == 0 and self.read("RING_HEAD") == 0:
                break
        else:
            raise DriverError(f"'{self.uri}' does not answer a reset; its memory bus hangs")
        self._submitted = 0
        self._configure()

    # --- Counters ----------------------------------------------------------------------------------------------

    def clear_counters(self) -> None:
        """Start counting from zero."""
        self.write("CONTROL", 2)

    def counters(self) -> Counters:
        """The counters since they were cleared."""
        core = {name.lower(): self.read(f"COUNT_{name}") for name in core_counters(self.config)}
        units = {
            unit.name: {name.lower(): self.read(f"COUNT_{unit.name}_{name}") for name, _ in UNIT_COUNTERS}
            for unit in Unit
        }
        return Counters(**core, units=units)

    def take_flags(self) -> Flags:
        """The sticky numeric flags, cleared by looking at them."""
        flags = Flags(self.read("FLAGS"))
        self.write("FLAGS", int(flags))
        return flags
