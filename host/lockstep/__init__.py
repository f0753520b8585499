"""Lockstep: one transformer, any silicon, the same bits.

    import lockstep

    model = lockstep.load("minilm")
    with lockstep.executor("fast:laptop") as device:
        vectors = model.embed(["The cat sleeps.", "A kitten naps."], device)

    with lockstep.load("tiny", device="fast:laptop") as model:
        print(model.generate("def add(", max_new_tokens=40).text)

Names are fetched when they are first used: importing this package imports neither PyTorch nor a simulator.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lockstep_driver import DeviceError, DeviceNotFound, DriverError, OutOfDeviceMemory, open_device
    from lockstep_hls.toolchain import ToolchainError
    from lockstep_isa.config import ConfigurationError
    from lockstep_isa.program import Program, ProgramError

    from lockstep.compiler.allocation import CapacityError
    from lockstep.errors import ModelError
    from lockstep.executors import OpenExecutor, executor
    from lockstep.generation import Generation, Stream
    from lockstep.inspection import ModelReport
    from lockstep.model import Executor, Model, load
    from lockstep.run_report import Report
    from lockstep.verification import Difference, Verification, verify

__version__ = "0.1.0"

#: Public name -> the module that holds it.
_HOMES = {
    "CapacityError": "lockstep.compiler.allocation",
    "ConfigurationError": "lockstep_isa.config",
    "DeviceError": "lockstep_driver",
    "DeviceNotFound": "lockstep_driver",
    "Difference": "lockstep.verification",
    "DriverError": "lockstep_driver",
    "Executor": "lockstep.model",
    "Generation": "lockstep.generation",
    "Model": "lockstep.model",
    "ModelError": "lockstep.errors",
    "ModelReport": "lockstep.inspection",
    "OpenExecutor": "lockstep.executors",
    "OutOfDeviceMemory": "lockstep_driver",
    "Program": "lockstep_isa.program",
    "ProgramError": "lockstep_isa.program",
    "Report": "lockstep.run_report",
    "Stream": "lockstep.generation",
    "ToolchainError": "lockstep_hls.toolchain",
    "Verification": "lockstep.verification",
    "executor": "lockstep.executors",
    "load": "lockstep.model",
    "open_device": "lockstep_driver",
    "verify": "lockstep.verification",
}

__all__ = [
    "CapacityError",
    "ConfigurationError",
    "DeviceError",
    "DeviceNotFound",
    "Difference",
    "DriverError",
    "Executor",
    "Generation",
    "Model",
    "ModelError",
    "ModelReport",
    "OpenExecutor",
    "OutOfDeviceMemory",
    "Program",
    "ProgramError",
    "Report",
    "Stream",
    "ToolchainError",
    "Verification",
    "executor",
    "load",
    "open_device",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lockstep' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
