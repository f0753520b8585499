"""The world around a block: clocked agents for streams, memory ports and AXI, and what drives them all.

A test builds a :class:`Bench`, adds agents and calls ``step``. In each cycle every agent first drives its inputs,
behind the falling edge; then the design settles; then every agent looks at the handshakes that the next rising edge
completes.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from amaranth.hdl import Value
from amaranth.lib import data
from cocotb.triggers import FallingEdge, ReadOnly
from lockstep_isa.config import CoreConfig, preset
from lockstep_isa.instructions import Instruction
from lockstep_rtl.interfaces import instruction_layout
from rtl.harness import stalls, start

Gap = Callable[[], bool]
never = stalls(0)
PAGE = 4096


def small(**changes: Any) -> CoreConfig:
    """The 4x4 core with memories small enough to look at."""
    sizes = dict(activation_words=64, weight_words=64, vector_words=64, parameter_words=16, accumulator_tiles=4)
    sizes |= {"zero_skipping": False}
    return preset("tiny").replace(**(sizes | changes))


def shape(rows: int, bus_bytes: int, lanes: int | None = None) -> dict[str, int]:
    """What of a small core's configuration a block's test varies."""
    return {"rows": rows, "columns": rows, "lanes": lanes or rows, "bus_bytes": bus_bytes}


def pack(layout: data.Layout, **fields: Any) -> int:
    """The bits of a structure."""
    return Value.cast(layout.const(fields)).value


def word_of(instruction: Instruction) -> int:
    """An instruction as a unit's stream carries it, in a core with all features.

    Fields of features come last there, so a unit of another core takes the same bits as far as it has them.
    """
    layout = instruction_layout(instruction.type, preset("tiny"))
    return pack(layout, **{name: int(instruction.values[name]) for name in layout.members})


def lanes(value: int, count: int, dtype: Any) -> np.ndarray:
    """A port's value as ``count`` numbers, lowest bits first."""
    dtype = np.dtype(dtype)
    return np.frombuffer(value.to_bytes(count * dtype.itemsize, "little"), dtype).copy()


def unlanes(values: np.ndarray) -> int:
    """The inverse of :func:`lanes`."""
    return int.from_bytes(np.ascontiguousarray(values).tobytes(), "little")


class Bench:
    """A design, its agents and the number of the cycle."""

    def __init__(self, dut: Any) -> None:
        self.dut, self.agents, self.cycle = dut, [], 0

    def add(self, agent: Any) -> Any:
        """Let ``agent`` take part; returns it."""
        agent.bench = self
        self.agents.append(agent)
        return agent

    def port(self, name: str) -> Any:
        """A port of the design, None where there is none."""
        return getattr(self.dut, name, None)

    async def step(self, cycles: int = 1) -> None:
        """Some clock cycles."""
        for _ in range(cycles):
            for agent in self.agents:
                agent.drive()
            await ReadOnly()
            for agent in self.agents:
                agent.sample()
            await FallingEdge(self.dut.clk)
            self.cycle += 1

    async def until(self, condition: Callable[[], bool], limit: int = 5000, what: str = "the end") -> None:
        """Cycles until ``condition()``; fails after ``limit``."""
        for _ in range(limit):
            if condition():
                return
            await self.step()
        raise AssertionError(f"{what} did not come within {limit} cycles")


async def bench(dut: Any) -> Bench:
    """Behind reset, all inputs zero."""
    await start(dut)
    return Bench(dut)


class Probe:
    """Reads ports in every cycle: ``values[name]`` lists them, ``cycles(name)`` tells when one was true."""

    def __init__(self, dut: Any, *names: str) -> None:
        self.ports = {n: getattr(dut, n) for n in names}
        self.values: dict[str, list[int]] = {n: [] for n in names}

    def drive(self) -> None:
        """Nothing to drive."""

    def sample(self) -> None:
        for name, port in self.ports.items():
            self.values[name].append(int(port.value))

    def cycles(self, name: str) -> list[int]:
        """Cycles, counted from the probe's first, in which the port was not zero."""
        return [n for n, v in enumerate(self.values[name]) if v]

    def count(self, name: str) -> int:
        """In how many cycles the port was not zero."""
        return len(self.cycles(name))


class Source:
    """Sends numbers into a stream; a number once shown stays until it is taken. ``presented`` and ``taken`` list the
    cycles of both.
    """

    def __init__(self, dut: Any, name: str, items: Sequence[int] = (), gap: Gap = never) -> None:
        self.valid, self.ready, self.payload = (getattr(dut, f"{name}_{p}") for p in ("valid", "ready", "payload"))
        self.items, self.gap, self.shown, self.taken = deque(items), gap, False, []
        self.presented: list[int] = []

    def drive(self) -> None:
        if not self.shown and self.items and not self.gap():
            self.shown = True
            self.presented.append(self.bench.cycle)
            self.payload.value = self.items[0]
        self.valid.value = self.shown

    def sample(self) -> None:
        if self.shown and int(self.ready.value):
            self.items.popleft()
            self.shown = False
            self.taken.append(self.bench.cycle)


class Sink:
    """Takes numbers from a stream; ``items`` with the ``cycles`` in which they came. Watches that none is withdrawn."""

    def __init__(self, dut: Any, name: str, gap: Gap = never) -> None:
        self.valid, self.ready, self.payload = (getattr(dut, f"{name}_{p}") for p in ("valid", "ready", "payload"))
        self.name, self.gap, self.items, self.cycles, self.waiting = name, gap, [], [], None

    def drive(self) -> None:
        self.open = not self.gap()
        self.ready.value = self.open

    def sample(self) -> None:
        valid = int(self.valid.value)
        value = int(self.payload.value) if valid else None
        assert self.waiting in (None, value), f"{self.name} showed {self.waiting:#x} and then {value}"
        self.waiting = value if valid and not self.open else None
        if valid and self.open:
            self.items.append(value)
            self.cycles.append(self.bench.cycle)


class ReadServer:
    """A memory behind a ReadPort: ``words``, answered one cycle later; words not asked for come out as ones."""

    def __init__(self, dut: Any, name: str, words: Sequence[int], ready: str | None = None, gap: Gap = never) -> None:
        self.enable, self.address, self.data = (getattr(dut, f"{name}_{p}") for p in ("enable", "address", "data"))
        self.ready = getattr(dut, ready) if ready else None
        self.words, self.gap, self.next, self.reads = words, gap, None, []
        self.width = len(self.data) // len(self.enable)

    def drive(self) -> None:
        if self.next is not None:
            self.data.value = self.next
            self.next = None
        self.open = not self.gap()
        if self.ready is not None:
            self.ready.value = self.open

    def sample(self) -> None:
        if self.open and (enable := int(self.enable.value)):
            address = int(self.address.value)
            count = enable.bit_length()
            assert enable == (1 << count) - 1, f"words {enable:#b} are enabled"
            assert count <= 2 or address % count == 0, f"{count} words are read from {address} on"
            found = sum(self.words[address + n] << n * self.width for n in range(count))
            self.next = found | (1 << len(self.data)) - (1 << count * self.width)
            self.reads.append((self.bench.cycle, address))


def check_burst(address: int, beats: int, bus_bytes: int) -> None:
    """AXI's rules for what the core asks: whole words, within one page."""
    assert address % bus_bytes == 0, f"burst at {address:#x} is not aligned to {bus_bytes} bytes"
    last = address + beats * bus_bytes - 1
    assert address // PAGE == last // PAGE, f"burst {address:#x}..{last:#x} crosses a border of 4 KiB"


class Stable:
    """Watches that a channel's payload stays while it waits."""

    def __init__(self, dut: Any, name: str, fields: Sequence[str]) -> None:
        self.name, self.fields, self.shown = name, [getattr(dut, f"{name}_{f}") for f in fields], None

    def see(self, valid: int, taken: bool) -> tuple[int, ...]:
        """The payload in this cycle."""
        value = tuple(int(f.value) for f in self.fields) if valid else ()
        assert self.shown in (None, value), f"{self.name} showed {self.shown} and then {value}"
        self.shown = value if valid and not taken else None
        return value


class ReadMemory:
    """An AXI memory's AR and R: answers in order, ``latency`` cycles behind the address at the earliest.

    ``stall_ar`` and ``stall_r`` hold the channels at random; ``bad`` holds addresses that answer with an error.
    ``bursts`` lists (cycle, address, beats), ``beats`` the cycles of the beats, ``flying`` what is not answered.
    """

    def __init__(
        self,
        dut: Any,
        name: str,
        memory: np.ndarray,
        bus_bytes: int,
        latency: int = 4,
        stall_ar: Gap = never,
        stall_r: Gap = never,
        bad: Sequence[int] = (),
    ) -> None:
        def get(port: str) -> Any:
            return getattr(dut, f"{name}_{port}")

        self.ar_valid, self.ar_ready, self.stable = (
            get("ar_valid"),
            get("ar_ready"),
            Stable(dut, f"{name}_ar", ("addr", "len")),
        )
        self.valid, self.ready, self.data = get("r_valid"), get("r_ready"), get("r_data")
        self.resp, self.last = get("r_resp"), get("r_last")
        self.id = getattr(dut, f"{name}_ar_id", None)
        self.r_id = getattr(dut, f"{name}_r_id", None)
        self.memory, self.bus_bytes, self.latency, self.bad = memory, bus_bytes, latency, set(bad)
        self.stall_ar, self.stall_r = stall_ar, stall_r
        self.pending: deque[tuple[int, int, bool, int]] = deque()  # earliest cycle, address, last, id
        self.bursts, self.beats, self.shown = [], [], False

    @property
    def flying(self) -> int:
        """Beats that are still to come."""
        return len(self.pending)

    def drive(self) -> None:
        self.open = not self.stall_ar()
        self.ar_ready.value = self.open
        if not self.shown and self.pending and self.pending[0][0] <= self.bench.cycle and not self.stall_r():
            self.shown = True
            _, address, last, identity = self.pending[0]
            self.data.value = unlanes(self.memory[address : address + self.bus_bytes])
            self.resp.value = 2 if address in self.bad else 0
            self.last.value = last
            if self.r_id is not None:
                self.r_id.value = identity
        self.valid.value = self.shown

    def sample(self) -> None:
        valid = int(self.ar_valid.value)
        payload = self.stable.see(valid, self.open)
        if valid and self.open:
            address, beats = payload[0], payload[1] + 1
            check_burst(address, beats, self.bus_bytes)
            identity = int(self.id.value) if self.id is not None else 0
            self.bursts.append((self.bench.cycle, address, beats))
            for n in range(beats):
                at = address + n * self.bus_bytes
                self.pending.append((self.bench.cycle + self.latency, at, n == beats - 1, identity))
        if self.shown and int(self.ready.value):
            self.pending.popleft()
            self.shown = False
            self.beats.append(self.bench.cycle)


class WriteMemory:
    """An AXI memory's AW, W and B, with the same knobs as :class:`ReadMemory`; it writes into ``memory``."""

    def __init__(
        self,
        dut: Any,
        name: str,
        memory: np.ndarray,
        bus_bytes: int,
        latency: int = 4,
        stall_aw: Gap = never,
        stall_w: Gap = never,
        stall_b: Gap = never,
        bad: Sequence[int] = (),
    ) -> None:
        def get(port: str) -> Any:
            return getattr(dut, f"{name}_{port}")

        self.aw_valid, self.aw_ready, self.aw = (
            get("aw_valid"),
            get("aw_ready"),
            Stable(dut, f"{name}_aw", ("addr", "len")),
        )
        self.w_valid, self.w_ready, self.w = (
            get("w_valid"),
            get("w_ready"),
            Stable(dut, f"{name}_w", ("data", "strb", "last")),
        )
        self.b_valid, self.b_ready, self.b_resp = get("b_valid"), get("b_ready"), get("b_resp")
        self.memory, self.bus_bytes, self.latency, self.bad = memory, bus_bytes, latency, set(bad)
        self.stall_aw, self.stall_w, self.stall_b = stall_aw, stall_w, stall_b
        self.open_bursts: deque[tuple[int, int]] = deque()
        self.answers: deque[tuple[int, int]] = deque()
        self.bursts, self.beats, self.shown, self.beat = [], [], False, 0

    def drive(self) -> None:
        self.aw_open, self.w_open = not self.stall_aw(), not self.stall_w()
        self.aw_ready.value, self.w_ready.value = self.aw_open, self.w_open
        if not self.shown and self.answers and self.answers[0][0] <= self.bench.cycle and not self.stall_b():
            self.shown = True
            self.b_resp.value = self.answers[0][1]
        self.b_valid.value = self.shown

    def sample(self) -> None:
        valid = int(self.aw_valid.value)
        payload = self.aw.see(valid, self.aw_open)
        if valid and self.aw_open:
            address, beats = payload[0], payload[1] + 1
            check_burst(address, beats, self.bus_bytes)
            self.bursts.append((self.bench.cycle, address, beats))
            self.open_bursts.append((address, beats))
        valid = int(self.w_valid.value)
        payload = self.w.see(valid, self.w_open)
        if valid and self.w_open:
            assert self.open_bursts, "data before its address"
            address, beats = self.open_bursts[0]
            value, strobe, last = payload
            at = address + self.beat * self.bus_bytes
            strobed = [n for n in range(self.bus_bytes) if strobe >> n & 1]
            self.memory[at : at + self.bus_bytes][strobed] = lanes(value, self.bus_bytes, np.uint8)[strobed]
            self.beats.append(self.bench.cycle)
            self.beat += 1
            assert last == (self.beat == beats), f"w_last is {last} in beat {self.beat} of {beats}"
            if last:
                self.beat = 0
                self.open_bursts.popleft()
                self.answers.append((self.bench.cycle + self.latency, 2 if address in self.bad else 0))
        if self.shown and int(self.b_ready.value):
            self.answers.popleft()
            self.shown = False


def random_stalls(seed: int) -> dict[str, Gap]:
    """Stalls of every channel for the memories: a busy system's."""
    generator = random.Random(seed)
    names = ("ar", "r", "aw", "w", "b")
    return {f"stall_{n}": stalls(generator.choice((0.2, 0.5, 0.7)), seed + k) for k, n in enumerate(names)}
