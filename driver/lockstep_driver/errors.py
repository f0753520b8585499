"""What can go wrong between a program and a device."""

from __future__ import annotations

from lockstep_isa.errors import CONTROL_UNIT, ERROR_TEXT, ErrorCode
from lockstep_isa.instructions import Unit


class DriverError(RuntimeError):
    """Anything that the driver reports; the message says what was wrong and what to do."""


class DeviceNotFound(DriverError):
    """A URI that names no device."""


class OutOfDeviceMemory(DriverError):
    """A buffer that does not fit; the message says how many bytes are missing."""


class DeviceTimeout(DriverError):
    """A fence that was not reached in the time allowed; the device has been reset."""


class IncompatibleDevice(DriverError):
    """A device that is no Lockstep core, or one of another version."""


class DeviceError(DriverError):
    """The core stopped itself.

    Attributes
    ----------
    code : why. instruction : index in its program. address : offending address. unit : name of the unit.
    """

    def __init__(self, code: ErrorCode, instruction: int, address: int, unit: int) -> None:
        self.code = code
        self.instruction = instruction
        self.address = address
        self.unit = "CONTROL" if unit == CONTROL_UNIT else Unit(unit).name
        super().__init__(
            f"the core stopped with {code.name} in unit {self.unit}, instruction {instruction}, "
            f"address {address:#x}: {ERROR_TEXT[code]}"
        )
