"""``lockstep inspect``: what a model is made of, without running it."""

from __future__ import annotations

import dataclasses

import typer

from .failures import guarded
from .models import ModelArgument, fallbacks, open_model, show_fallbacks
from .output import JsonOption, Steps, emit, results, table


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: lockstep inspect tiny")(inspect)


@guarded
def inspect(model: ModelArgument, as_json: JsonOption = False) -> None:
    """Show the operations of a model, the memory that it takes, and what a core does not do of it."""
    with Steps() as steps:
        loaded = open_model(model, steps)
    report = loaded.report()
    if as_json:
        emit({"model": model, **dataclasses.asdict(report), "fallbacks": fallbacks(loaded)})
        return
    console = results()
    console.print(table(["operation", "count"], [[k, f"{n:,}"] for k, n in report.operations.items()], numbers=1))
    console.print()
    rows = [
        ["causal language model", "yes" if report.causal else "no"],
        ["longest sequence", f"{report.max_tokens:,} tokens"],
        ["parameters", f"{report.parameters:,}"],
        ["int8 weights", f"{report.int8_bytes:,} bytes"],
        ["other parameters", f"{report.other_bytes:,} bytes"],
    ]
    if report.causal:
        rows.append(["keys and values of a token", f"{report.cache_bytes:,} bytes"])
    rows.extend([f"weights stored as {format}", f"{count:,}"] for format, count in report.stored.items())
    if report.rounded_again:
        rows.append(["largest change of a stored weight, of its channel's largest", f"{report.rounded_again:.2%}"])
    rows.append(["quantise points with a pre-scale", f"{report.prescaled[0]:,} of {report.prescaled[1]:,}"])
    console.print(table(["", ""], rows, numbers=1))
    if not report.fallbacks:
        console.print("\nnothing falls back to PyTorch")
    show_fallbacks(loaded)
