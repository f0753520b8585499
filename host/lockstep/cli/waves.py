"""The waveform of ``lockstep verify --wave``: around the first wrong value of a core."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .failures import UsageError
from .output import Steps, results

if TYPE_CHECKING:
    from lockstep.difference_wave import Wave, Work
    from lockstep.verification import Verification


def check_wave(path: Path, devices: list[str]) -> None:
    """Raise unless one of the devices can have a waveform and its folder is there."""
    if not any(uri.startswith("rtl:") for uri in devices):
        raise UsageError("only the RTL has waveforms; give a device such as rtl:tiny with --wave")
    if path.suffix != ".fst":
        raise UsageError(f"'{path}' must end in .fst; the files for viewers are called like it")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"there is no folder '{path.parent}'; make it first")


def write_difference(found: Verification, work: Work, path: Path, steps: Steps) -> tuple[Wave, None] | tuple[None, str]:
    """The waveform of the first RTL that differs, or why there is none."""
    if found.identical:
        return None, "nothing differs"
    differing = [uri for uri, count in found.differences.items() if count and uri.startswith("rtl:")]
    uri = differing[0] if differing else found.reference
    if not uri.startswith("rtl:"):
        return None, "no rtl device differs"
    from lockstep.difference_wave import first_wrong_write, write_wave

    wrong = first_wrong_write(uri, work, steps)
    if wrong is None:
        return None, (
            f"{uri} stores the same bytes as the fast core; the difference is in the programs or the host, not in this "
            "core"
        )
    return write_wave(uri, work, wrong, path, steps), None


def described(wave: Wave) -> dict[str, Any]:
    """A waveform as JSON has it."""
    wrong = wave.wrong
    return {
        "path": str(wave.waveform),
        "gtkwave": str(wave.gtkwave),
        "surfer": str(wave.surfer),
        "program": wrong.program,
        "instruction": wrong.instruction,
        "cycle": wrong.cycle,
        "address": wrong.address,
        "expected": wrong.expected,
        "actual": wrong.actual,
    }


def show_wave(wave: Wave) -> None:
    """Where the waveform is and how to look at it."""
    console = results()
    for line in (
        f"first wrong value: {wave.wrong}",
        f"{wave.waveform}: the cycles around it; gtkwave {wave.gtkwave}, or surfer --command-file {wave.surfer} "
        f"{wave.waveform}",
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
