"""``lockstep devices``: what there is to run on, and what keeps it from running here."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import typer

from .failures import guarded
from .output import JsonOption, emit, results, table

if TYPE_CHECKING:
    from lockstep_isa.config import CoreConfig


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: lockstep devices --json")(devices)


@guarded
def devices(as_json: JsonOption = False) -> None:
    """List the devices, their cores, and whether they can run on this machine."""
    from lockstep_isa.config import PRESETS

    found = _hosts() + _simulated()
    presets = {name: {**dataclasses.asdict(config), "crc": f"{config.crc:#010x}"} for name, config in PRESETS.items()}
    if as_json:
        emit({"devices": found, "presets": presets})
        return
    console = results()
    rows = [[d["uri"], d["description"], "yes" if d["available"] else f"no: {d['reason']}"] for d in found]
    console.print(table(["device", "what it is", "runs here"], rows))
    console.print()
    kib = {name: [_kib(config, field) for field in _MEMORIES] for name, config in PRESETS.items()}
    rows = [
        [name, f"{c.rows} x {c.columns}", str(c.lanes), f"{8 * c.bus_bytes} bit", *kib[name]]
        for name, c in PRESETS.items()
    ]
    columns = ["core", "array", "lanes", "bus", *(field.removesuffix("_words") for field in _MEMORIES)]
    console.print(table(columns, rows, "Cores, with the KiB of their memories", numbers=1))
    console.print("\nOptions go behind a question mark: fast:laptop?memory=256M&latency=60, rtl:tiny?wave=run.fst")


#: Memory -> bytes of one element; a word has one element per row of the array.
_MEMORIES = {"activation_words": 1, "weight_words": 1, "vector_words": 4, "parameter_words": 4}


def _kib(config: CoreConfig, field: str) -> str:
    return str(getattr(config, field) * config.rows * _MEMORIES[field] // 1024)


def _entry(uri: str, description: str, core: str | None, reason: str | None) -> dict[str, Any]:
    return {"uri": uri, "description": description, "core": core, "available": reason is None, "reason": reason}


def _hosts() -> list[dict[str, Any]]:
    from lockstep.executors import HOSTS

    return [
        _entry(uri, description, None, _no_compiler() if uri == "cpu" else None)
        for uri, (_, description) in HOSTS.items()
    ]


def _simulated() -> list[dict[str, Any]]:
    from lockstep_driver import SCHEMES
    from lockstep_isa.config import PRESETS

    compiler, verilator = _no_compiler(), _no_verilator()
    found = []
    for scheme, (_, description) in SCHEMES.items():
        for name, config in PRESETS.items():
            reason = compiler
            if scheme == "rtl":
                reason = compiler or verilator or _not_built(config)
            found.append(_entry(f"{scheme}:{name}", description, name, reason))
    return found


def _no_compiler() -> str | None:
    from lockstep_hls.toolchain import ToolchainError, find_compiler

    try:
        find_compiler()
    except ToolchainError as error:
        return str(error)
    return None


def _no_verilator() -> str | None:
    from lockstep_hls.toolchain import ToolchainError
    from lockstep_sim.verilate import find_verilator

    try:
        find_verilator()
    except ToolchainError as error:
        return str(error)
    return None


def _not_built(config: CoreConfig) -> str | None:
    """Why the RTL does not build a core."""
    from lockstep_isa.config import ConfigurationError
    from lockstep_rtl.generate import require_buildable

    try:
        require_buildable(config)
    except ConfigurationError as error:
        return str(error)
    return None
