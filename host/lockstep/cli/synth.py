"""``lockstep synth``: what a core takes of an FPGA, and how fast it runs there."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .failures import guarded
from .output import JsonOption, Steps, emit, results, table


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: lockstep synth ulx3s --json")(synth)


@guarded
def synth(
    preset: Annotated[str, typer.Argument(metavar="PRESET", help="A core; 'lockstep devices' lists them.")],
    workdir: Annotated[
        Path | None, typer.Option(help="Folder for the files of the tools; a temporary one if not given.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Synthesise a core with Yosys and nextpnr and show its resources and clock."""
    from lockstep_isa.config import preset as core

    config = core(preset)
    from lockstep_rtl.synthesis import synthesise

    with Steps() as steps:
        steps(f"synthesising '{preset}'")
        if workdir is None:
            with tempfile.TemporaryDirectory(prefix="lockstep-synth-") as folder:
                report = synthesise(config, Path(folder), steps)
        else:
            workdir.mkdir(parents=True, exist_ok=True)
            report = synthesise(config, workdir, steps)
    values = {"preset": preset, **dataclasses.asdict(report)}
    if as_json:
        emit(values)
    else:
        _show(values)


def _show(values: dict[str, Any]) -> None:
    """A table for what is given per unit, with the totals as its last row, and a line for each single figure."""
    console = results()
    units, totals = values.get("units"), values.get("totals")
    if isinstance(units, Mapping) and isinstance(totals, Mapping):
        kinds = list(totals)
        rows = [[name, *(_text(used.get(kind, 0)) for kind in kinds)] for name, used in units.items()]
        rows.append(["total", *(_text(totals[kind]) for kind in kinds)])
        console.print(table(["unit", *kinds], rows, f"Resources of '{values['preset']}'", numbers=1))
        console.print()
    for name, value in values.items():
        if not isinstance(value, Mapping | list | tuple) and name != "preset":
            console.print(f"{name.replace('_', ' ')}: {_text(value)}", markup=False, highlight=False)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
