"""The driver of Lockstep: device URIs, buffers, command rings, fences and errors."""

from .device import Counters, Device, Fence, LoadedProgram
from .errors import DeviceError, DeviceNotFound, DeviceTimeout, DriverError, IncompatibleDevice, OutOfDeviceMemory
from .memory import Buffer
from .uri import SCHEMES, DeviceUri, open_device, open_parsed, parse

__all__ = [
    "SCHEMES",
    "Buffer",
    "Counters",
    "Device",
    "DeviceError",
    "DeviceNotFound",
    "DeviceTimeout",
    "DeviceUri",
    "DriverError",
    "Fence",
    "IncompatibleDevice",
    "LoadedProgram",
    "OutOfDeviceMemory",
    "open_device",
    "open_parsed",
    "parse",
]
