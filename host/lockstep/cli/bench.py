"""``lockstep bench``: measured cycles beside what no program can beat, and beside what others have published.

The commands are made from the registry of cases: the fields of a case's sizes are its options.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .failures import DIFFERENT, UsageError, explain, guarded
from .output import Steps, finite, messages, results, table

if TYPE_CHECKING:
    from lockstep.bench.case import Case
    from lockstep.bench.measure import Measurement

DeviceOption = Annotated[
    str | None,
    typer.Option(help="rtl:CORE counts cycles, fast:CORE predicts them; unasked, rtl: of the case's core."),
]
CoreOption = Annotated[str | None, typer.Option(help="Short for --device rtl:CORE.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print a list of JSON objects and nothing else.")]
PlotOption = Annotated[
    Path | None, typer.Option(help="A folder for a roofline and the cycles of the units, as PNG and SVG.")
]
WriteOption = Annotated[Path | None, typer.Option(help="A page to write, as docs/performance.md is one.")]
_COMMON = {
    "device": (DeviceOption, None),
    "core": (CoreOption, None),
    "plot": (PlotOption, None),
    "write": (WriteOption, None),
    "as_json": (JsonOption, False),
}


def register(app: typer.Typer) -> None:
    from lockstep.bench.registry import CASES

    group = typer.Typer(
        help="Measure a case on a core, beside its limit and published figures; every bit is compared with golden. "
        "Each case has options for its sizes, and --json.",
        epilog="Example: lockstep bench gemm --m 128 --n 128 --k 256 --device fast:laptop",
        no_args_is_help=True,
        rich_markup_mode="rich",
    )
    for case in CASES.values():
        example = f"Example: lockstep bench {case.name} --device fast:laptop"
        group.command(name=case.name, help=case.help, epilog=example)(_command(case.sizes, [case]))
    everything = "Every case with its own sizes; goes on behind one that fails, and exits with 1 then."
    group.command(name="all", help=everything, epilog="Example: lockstep bench all --json")(
        _command(None, list(CASES.values()))
    )
    app.add_typer(group, name="bench")


def _command(sizes: type | None, cases: list[Case]) -> Callable[..., None]:
    """A command whose options are the fields of ``sizes``, and those that all cases have."""
    options: dict[str, tuple[Any, Any]] = {}
    if sizes is not None:
        hints = typing.get_type_hints(sizes, include_extras=True)
        for field in dataclasses.fields(sizes):
            kind, help = typing.get_args(hints[field.name])
            least = 0 if field.name == "seed" else None
            options[field.name] = (Annotated[kind, typer.Option(help=help, min=least)], field.default)
    options |= _COMMON

    def command(**given: Any) -> None:
        common = {name: given.pop(name) for name in _COMMON}
        asked = [(case, case.sizes() if sizes is None else sizes(**given)) for case in cases]
        _run(asked, **common)

    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for name, (annotation, default) in options.items()
        ]
    )
    command.__annotations__ = {name: annotation for name, (annotation, _) in options.items()}
    return guarded(command)


def _run(
    asked: Sequence[tuple[Case, Any]],
    device: str | None,
    core: str | None,
    plot: Path | None,
    write: Path | None,
    as_json: bool,
) -> None:
    if device is not None and core is not None:
        raise UsageError("--core X is short for --device rtl:X; give one of them")
    from lockstep.executors import HOSTS, check_uri

    if device is not None:
        check_uri(device)
    if device in HOSTS:
        raise UsageError(f"'{device}' counts no cycles; give a core, such as rtl:laptop or fast:laptop")
    if plot is not None:
        from lockstep.bench.plots import check_matplotlib

        check_matplotlib()
    _check_places(plot, write)
    found: list[tuple[Case, list[Measurement]]] = []
    failed: list[dict[str, str]] = []
    with Steps() as steps:
        for case, sizes in asked:
            uri = device or f"rtl:{core or case.core}"
            try:
                check_uri(uri)
                found.append((case, list(_measurements(case, sizes, uri, steps))))
            except Exception as error:
                if len(asked) == 1:
                    raise
                text = explain(error)[0]
                failed.append({"case": case.name, "device": uri, "error": text})
                messages().print(f"error: {case.name}: {text}", markup=False, highlight=False)
    everything = [one for _, measured in found for one in measured]
    if as_json:
        objects = [one.as_dict(case.published) for case, measured in found for one in measured]
        objects += failed
        sys.stdout.write(json.dumps(finite(objects), allow_nan=False) + "\n")
    else:
        for case, measured in found:
            _show(case, measured)
    if plot is not None and everything:
        _plot(plot, everything)
    if write is not None and not failed:
        _write(write, found, plot)
    if failed or not all(one.identical for one in everything):
        raise typer.Exit(DIFFERENT)


def _check_places(plot: Path | None, write: Path | None) -> None:
    """Raise :class:`UsageError` for a folder of pictures or a page that cannot be one, before anything runs."""
    if plot is not None and plot.exists() and not plot.is_dir():
        raise UsageError(f"--plot {plot} is a file; give a folder")
    if write is not None and (write.is_dir() or not write.parent.is_dir()):
        what = "is a folder" if write.is_dir() else f"is in {write.parent}, which is no folder"
        raise UsageError(f"--write {write} {what}; give the name of a file in a folder that is there")


def _plot(folder: Path, measured: Sequence[Measurement]) -> None:
    from lockstep.bench.plots import write_plots

    for path in write_plots(folder, measured):
        messages().print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)


def _write(file: Path, found: Sequence[tuple[Case, Sequence[Measurement]]], plots: Path | None) -> None:
    from lockstep.bench.report import page

    pictures = {}
    if plots is not None:
        from lockstep.bench.plots import PICTURES

        folder = Path(os.path.relpath(plots, file.parent)).as_posix()
        pictures = {text: f"{folder}/{name}.svg" for name, text in PICTURES.items()}
    file.write_text(page(found, pictures), encoding="utf-8")
    messages().print(f"wrote {file}", markup=False, highlight=False, soft_wrap=True)


def _measurements(case: Case, sizes: Any, uri: str, steps: Steps) -> Iterator[Measurement]:
    from lockstep.bench.measure import Bench

    with steps.cycles() as watch, Bench(uri, steps, watch) as bench:
        yield from case.run(sizes, bench)


def _show(case: Case, measured: list[Measurement]) -> None:
    """A table with the limits below it, what they sum up to, the bar, and what others have published."""
    from lockstep.bench.summary import shown, sizes, summary, varying

    console, one = results(), measured[0]
    names, rows = varying(measured), shown(measured)
    kind = "counted" if one.counted else "predicted by the fast core"
    which = "" if len(rows) == len(measured) else f", the {len(rows)} that are farthest from their limits"
    title = " ".join(filter(None, (case.name, sizes(one, names, rest=True), "on", one.device)))
    console.print(title, style="bold", markup=False, highlight=False, soft_wrap=True)
    console.print(f"cycles {kind}{which}", highlight=False, soft_wrap=True)
    lines = [
        [
            *(str(m.parameters[name]) for name in names),
            f"{m.cycles:,}",
            f"{m.limit.cycles:,.0f}",
            f"{m.ratio:.3f}",
            f"{m.share:.1%}",
            f"{m.bytes:,}",
            *([f"{m.predicted_cycles:,}"] if m.counted else []),
            "same" if m.identical else f"[bold red]{m.differences:,} differ[/]",
        ]
        for m in rows
    ]
    columns = [*names, "cycles", "limit", "ratio", "of limit", "bytes", *(["predicted"] if one.counted else []), "bits"]
    console.print(table(columns, lines, numbers=0))
    text = [f"limit = {one.limit.formula}"]
    text += [f"  {' '.join(filter(None, (sizes(m, names), m.limit.numbers)))}" for m in rows]
    text += [*summary(case, measured), ""]
    for line in text:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
