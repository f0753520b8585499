"""Error codes of the core, and what they mean for a user."""

from __future__ import annotations

import enum


class ErrorCode(enum.IntEnum):
    """Why a core stopped. The core latches the first error; a soft reset clears it."""

    NONE = 0
    BAD_OPCODE = 1
    BAD_FIELD = 2
    WRONG_CONFIGURATION = 3
    LOCAL_BOUNDS = 4
    OUT_OF_WINDOW = 5
    MISALIGNED = 6
    BUS_READ = 7
    BUS_WRITE = 8
    WATCHDOG = 9


#: One sentence each: what was wrong and what to do.
ERROR_TEXT: dict[ErrorCode, str] = {
    ErrorCode.NONE: "no error",
    ErrorCode.BAD_OPCODE: "the program holds an unknown opcode; rebuild it for this core",
    ErrorCode.BAD_FIELD: "an instruction is malformed (zero count, undefined value, stray bits, a feature "
    "that the core lacks); rebuild the program",
    ErrorCode.WRONG_CONFIGURATION: "the program was built for another core configuration; compile it for this one",
    ErrorCode.LOCAL_BOUNDS: "an instruction addresses an on-chip word beyond the end of its memory",
    ErrorCode.OUT_OF_WINDOW: "a transfer leaves the window of device memory that the driver opened",
    ErrorCode.MISALIGNED: "a transfer's address or stride is no multiple of the bus width, or a program's or its "
    "operands' of 64",
    ErrorCode.BUS_READ: "the memory bus answered a read with an error",
    ErrorCode.BUS_WRITE: "the memory bus answered a write with an error",
    ErrorCode.WATCHDOG: "no unit made progress for longer than the watchdog allows; the program waits for itself",
}

#: Unit number that the core reports for errors of its own control block.
CONTROL_UNIT = 4
