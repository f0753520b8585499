"""``lockstep synth``: what a core takes of an FPGA, and how fast it runs there."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .failures import UsageError, guarded
from .output import JsonOption, Steps, emit, results, table

if TYPE_CHECKING:
    from lockstep_isa.config import CoreConfig
    from lockstep_rtl.synthesis import SynthesisReport


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: lockstep synth ulx3s --json")(synth)


@guarded
def synth(
    preset: Annotated[str, typer.Argument(metavar="PRESET", help="A core; 'lockstep devices' lists them.")],
    workdir: Annotated[
        Path | None,
        typer.Option(help="Folder for the files of the tools; a temporary one if not given."),
    ] = None,
    route: Annotated[
        bool,
        typer.Option(
            "--route/--no-route",
            help="Stop behind placement, in half the time, and estimate the clock from distances.",
        ),
    ] = True,
    added: Annotated[
        list[str] | None,
        typer.Option("--with", metavar="FEATURE", help="Give the core a feature that it lacks; may be given again."),
    ] = None,
    count: Annotated[
        bool, typer.Option("--count", help="Stop behind synthesis, in a third of the time, with no clock.")
    ] = False,
    seed: Annotated[
        int | None, typer.Option(min=1, help="Of the placement: another one than the unasked one gives another clock.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Synthesise a core with Yosys and nextpnr and show its resources and clock."""
    from lockstep_isa.config import preset as core

    config = with_features(core(preset), added or [])
    from lockstep_rtl.synthesis import SEED, synthesise

    with Steps() as steps:
        folder = workdir or Path(tempfile.mkdtemp(prefix="lockstep-synth-"))
        # Where a tool fails, its logs stay: the message names them.
        report = synthesise(config, folder, steps, place=not count, route=route, seed=SEED if seed is None else seed)
        if workdir is None:
            shutil.rmtree(folder)
    if as_json:
        emit(
            {
                "preset": preset,
                "features": [name for name in config.feature_names() if getattr(config, name)],
                "units": {name: dataclasses.asdict(used) for name, used in report.units.items()},
                "total": dataclasses.asdict(report.total),
                "used": dict(report.used),
                "utilisation": report.utilisation,
                "fits": report.fits,
                "fmax_mhz": report.fmax_mhz,
                "routed": report.routed,
                "critical_path": [{"cell": cell, "delay_ns": delay} for cell, delay in report.critical_path],
            }
        )
    else:
        _show(preset, report)


def with_features(config: CoreConfig, names: list[str]) -> CoreConfig:
    """The core with some features more; raises :class:`UsageError` for one that is none."""
    for name in names:
        if name not in config.feature_names():
            raise UsageError(f"'{name}' is no feature of a core; there are {', '.join(config.feature_names())}")
    return config.replace(**dict.fromkeys(names, True))


def _show(preset: str, report: SynthesisReport) -> None:
    console = results()
    kinds = [field.name for field in dataclasses.fields(report.total)]
    rows = [
        [name, *(f"{getattr(used, kind):,}" for kind in kinds)]
        for name, used in [*report.units.items(), ("total", report.total)]
    ]
    columns = ["unit", *(kind.replace("_", " ") for kind in kinds)]
    console.print(table(columns, rows, f"Core '{preset}' on an ECP5-85F", numbers=1))
    console.print()
    for name, part in report.utilisation.items():
        console.print(f"{name}: {report.used[name]:,} used, {part:.0%} of the device", highlight=False)
    console.print(f"it fits; {report.clock}" if report.fits else "it does not fit", highlight=False)
