"""The command ``lockstep`` itself: its global options, and its commands in the order in which help lists them."""

from __future__ import annotations

from typing import Annotated

import typer

from . import (
    bench,
    cache,
    demo,
    devices,
    doctor,
    explain,
    explore,
    generate,
    inspect,
    models,
    programs,
    quantize,
    report,
    run,
    synth,
)
from .output import settings

app = typer.Typer(
    help="An open transformer accelerator: one transformer, any silicon, the same bits.",
    epilog="Begin with: lockstep doctor, then lockstep demo.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(wanted: bool) -> None:
    if wanted:
        from lockstep import __version__

        typer.echo(f"lockstep {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the Python traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and leave.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    settings.debug = debug


_GROUPS = (
    *(demo, generate, models, run, explain, report, explore, inspect, quantize),
    *(devices, doctor, programs, bench, synth, cache),
)
for group in _GROUPS:
    group.register(app)
