"""Errors at the command line: one sentence on standard error, and an exit status that says whose turn it is."""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Callable
from typing import Any

import typer

from .output import messages, settings

#: What was compared differs, or what was asked for is not there.
DIFFERENT = 1
#: The user can put it right: a wrong name, file or input.
USER = 2
#: The machine lacks something: a compiler, Verilator, a device that answers.
ENVIRONMENT = 3
#: A mistake in Lockstep.
INTERNAL = 70
#: Ctrl-C, as shells number it.
INTERRUPTED = 130

#: Exit status of an exception by the first of its classes that is listed; names, so that nothing need be imported.
_STATUS = {
    "lockstep.errors.ModelError": USER,
    "lockstep_driver.errors.DeviceError": ENVIRONMENT,
    "lockstep_driver.errors.DeviceTimeout": ENVIRONMENT,
    "lockstep_driver.errors.DriverError": USER,
    "lockstep_hls.toolchain.ToolchainError": ENVIRONMENT,
    "lockstep_isa.config.ConfigurationError": USER,
    "lockstep_isa.instructions.InstructionError": USER,
    "lockstep_isa.program.ProgramError": USER,
    "lockstep_isa.weights.WeightError": USER,
    "lockstep_rtl.synthesis.SynthesisError": ENVIRONMENT,
    "lockstep_sim.core.RegisterError": ENVIRONMENT,
    "builtins.OSError": USER,
    "builtins.ImportError": ENVIRONMENT,
}


class UsageError(Exception):
    """Arguments that do not go together; the message says what to give instead."""


def explain(error: Exception) -> tuple[str, int]:
    """The sentence and the exit status for an exception."""
    if isinstance(error, UsageError):
        return str(error), USER
    for kind in type(error).__mro__:
        status = _STATUS.get(f"{kind.__module__}.{kind.__qualname__}")
        if status is None:
            continue
        if isinstance(error, OSError) and error.filename is not None:
            return f"{error.filename}: {error.strerror}", status
        if isinstance(error, ImportError):
            return f"a package cannot be imported ({error}); 'lockstep doctor' says what is missing", status
        return str(error), status
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"a mistake in Lockstep, {text}; please report it with what 'lockstep --debug ...' prints", INTERNAL


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """A command that turns exceptions into a sentence and an exit status."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            messages().print("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            if settings.debug:
                traceback.print_exc(file=sys.stderr)
            sentence, status = explain(error)
            messages().print(f"error: {sentence}", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(status) from None

    return run
