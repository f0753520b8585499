"""The register map behind AXI4-Lite, and the command ring's descriptor: declared here, used by RTL and driver."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from .config import CoreConfig
from .instructions import Unit

#: First register: "LKST" in ASCII, little endian.
MAGIC = 0x54534B4C
#: Bytes of one descriptor in the command ring.
DESCRIPTOR_BYTES = 64


@dataclass(frozen=True)
class Register:
    """One 32-bit register: byte address, access (``r``, ``rw`` or ``w``) and meaning.

    One with a ``feature`` is there on cores whose configuration has that flag.
    """

    name: str
    address: int
    access: str
    doc: str
    feature: str | None = None


class Status(enum.IntFlag):
    """Bits of the STATUS register."""

    BUSY = 1
    ERROR = 2


class Flags(enum.IntFlag):
    """Sticky bits of the FLAGS register; a write of ones clears them."""

    RECIPROCAL_OF_ZERO = 1
    RECIPROCAL_OF_NONFINITE = 2


#: Counters of each unit, in cycles; every cycle of a run counts in exactly one of a unit's first four.
UNIT_COUNTERS = (
    ("BUSY", "cycles in which it did its work"),
    ("WAIT_TOKEN", "cycles in which its next instruction waited for a token of another unit"),
    ("WAIT_DATA", "cycles in which an instruction waited for data or room (accumulators, bus, ports)"),
    ("IDLE", "cycles without an instruction"),
)
#: Counters of the whole core.
CORE_COUNTERS = (
    ("CYCLES", "cycles from the doorbell to the last fence"),
    ("INSTRUCTIONS", "instructions dispatched"),
    ("READ_BEATS", "bus beats read"),
    ("WRITE_BEATS", "bus beats written"),
    ("MAC_CYCLES", "cycles in which operands entered the array"),
)
#: Counters of the whole core, each with the feature that it needs.
FEATURE_COUNTERS = (
    ("SKIPPED_CHUNKS", "chunks of `rows` ACTIVATION words that MATRIX passed over: all zero", "zero_skipping"),
)


def _build() -> tuple[Register, ...]:
    fixed = [
        ("MAGIC", "r", "identifies a Lockstep core"),
        ("ABI_VERSION", "r", "layout of this map and of the command ring"),
        ("ISA_VERSION", "r", "instruction table and numeric contract"),
        ("CONFIG_CRC", "r", "CRC-32 of the core's configuration"),
        ("CONTROL", "w", "bit 0: soft reset, once the bus is quiet; bit 1: clear the counters"),
        ("STATUS", "r", "bit 0: busy, bit 1: stopped by an error"),
        ("FLAGS", "rw", "sticky numeric flags; write ones to clear"),
        ("ERROR_CODE", "r", "why the core stopped"),
        ("ERROR_INSTRUCTION", "r", "index of the instruction in its program"),
        ("ERROR_ADDRESS", "r", "offending address"),
        ("ERROR_UNIT", "r", "unit that reported it; 4 is control"),
        ("WINDOW_BASE", "rw", "first byte of device memory that the core may touch"),
        ("WINDOW_LIMIT", "rw", "first byte behind the window"),
        ("WATCHDOG", "rw", "cycles without progress that stop the core; 0 disables"),
        ("RING_BASE", "rw", "byte address of the command ring"),
        ("RING_SIZE", "rw", "descriptors in the ring, a power of two"),
        ("RING_TAIL", "rw", "doorbell: descriptors submitted, modulo 2^32"),
        ("RING_HEAD", "r", "descriptors completed, modulo 2^32"),
        ("FENCE", "r", "fence value of the last completed descriptor"),
    ]
    counters = [(f"COUNT_{n}", "r", d) for n, d in CORE_COUNTERS]
    counters += [(f"COUNT_{u.name}_{n}", "r", f"{u.name}: {d}") for u in Unit for n, d in UNIT_COUNTERS]
    always = [(n, a, d, None) for n, a, d in fixed + counters]
    of_features = [(f"COUNT_{n}", "r", d, feature) for n, d, feature in FEATURE_COUNTERS]
    return tuple(Register(n, 4 * i, a, d, f) for i, (n, a, d, f) in enumerate([*always, *of_features]))


REGISTERS: tuple[Register, ...] = _build()
BY_NAME: dict[str, Register] = {r.name: r for r in REGISTERS}
#: Bits of a register byte address.
ADDRESS_BITS = (4 * len(REGISTERS) - 1).bit_length()


def registers_of(config: CoreConfig) -> tuple[Register, ...]:
    """The registers that a core has."""
    return tuple(r for r in REGISTERS if r.feature is None or getattr(config, r.feature))


def core_counters(config: CoreConfig) -> tuple[str, ...]:
    """Names of the counters of the whole core that it has."""
    features = (name for name, _, feature in FEATURE_COUNTERS if getattr(config, feature))
    return (*(name for name, _ in CORE_COUNTERS), *features)


#: The descriptor, 32-bit little-endian words from its start.
DESCRIPTOR_FIELDS = (
    ("program", "byte address of the first instruction, a multiple of 64 and of the bus width"),
    ("count", "instructions"),
    ("config_crc", "CRC of the configuration for which the program was built"),
    ("fence", "value that FENCE takes when the program is complete"),
    (
        "operands",
        "byte address of the run-time operands, a multiple of 64 and of the bus width; 0: there are none, all are zero",
    ),
)
