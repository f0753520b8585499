"""``lockstep explore``: many cores for one model, on the fast core."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .failures import UsageError, guarded
from .models import ModelArgument, check_texts
from .output import JsonOption, emit, messages, results, table
from .run import RunGenerateOption, RunTokensOption, TextsArgument

if TYPE_CHECKING:
    from lockstep.explore import Outcome


def register(app: typer.Typer) -> None:
    example = "Example: lockstep explore minilm --rows 8,16,32 --lanes 8,16 --bus 64,128,256 --results minilm.jsonl"
    app.command(epilog=example)(explore)


@guarded
def explore(
    model: ModelArgument,
    texts: TextsArgument = None,
    rows: Annotated[str, typer.Option(help="Rows and columns of the array, with commas between.")] = "8,16,32",
    lanes: Annotated[str, typer.Option(help="Vector lanes.")] = "8,16",
    bus: Annotated[str, typer.Option(help="Bits of the bus.")] = "64,128,256",
    tokens: RunTokensOption = 12,
    generate: RunGenerateOption = None,
    results_file: Annotated[
        Path | None,
        typer.Option("--results", help="JSON lines to which each outcome is added; what it has is not run again."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw cycles over logic here (.svg).")] = None,
    memories: Annotated[
        str, typer.Option(help="A preset: the memories on chip have as many bytes as its ones.")
    ] = "laptop",
    jobs: Annotated[int, typer.Option(help="Processes; as many as the machine has cores by default.", min=0)] = 0,
    as_json: JsonOption = False,
) -> None:
    """Predict a model on every combination of rows, lanes and bus, and show which cores are worth building.

    Cycles are predicted by the fast core, which is compiled once for each. Resources are estimates. Ctrl-C leaves the
    results that are there; the same command goes on from them.
    """
    check_texts(texts or [])
    if plot is not None and not plot.absolute().parent.is_dir():
        raise UsageError(f"there is no folder '{plot.parent}'; make it first")
    sizes = [_numbers(name, text) for name, text in (("rows", rows), ("lanes", lanes), ("bus", bus))]
    from lockstep.charts import pareto_chart
    from lockstep.explore import Task, pareto, points
    from lockstep.explore import explore as run

    wanted = points(sizes[0], sizes[1], sizes[2], memories)
    task = Task(model, memories, tuple(texts or ()), tokens, generate)
    with _bar(len(wanted)) as told:
        found = run(task, wanted, results_file, jobs or os.cpu_count() or 1, told)
    best = pareto(found)
    if plot is not None:
        plot.write_text(pareto_chart(found, best), encoding="utf-8")
    if as_json:
        emit(
            {
                "model": model,
                "texts": texts or [],
                "outcomes": [dataclasses.asdict(o) | {"pareto": o in best} for o in found],
                "results": None if results_file is None else str(results_file),
                "plot": None if plot is None else str(plot),
            }
        )
        return
    columns = ["", "array", "lanes", "bus", "cycles", "busy", "bytes", "logic", "mult", "RAM", "85F"]
    shown = [_row(outcome, outcome in best) for outcome in found]
    console = results()
    console.print(table(columns, shown, f"{model}: predicted cycles, estimated resources of an ECP5", numbers=1))
    console.print("* no other core is faster with less logic. 85F: an ECP5-85F has room for it.", highlight=False)
    for outcome in found:
        if outcome.cycles is None:
            console.print(f"{outcome.point}: {outcome.reason}", markup=False, highlight=False, soft_wrap=True)


def _numbers(name: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"'{text}' is no list of {name}; write numbers with commas between, such as 8,16") from None


def _row(outcome: Outcome, best: bool) -> list[str]:
    ran = outcome.cycles is not None
    return [
        "*" if best else "",
        *map(str, outcome.point),
        f"{outcome.cycles:,}" if ran else "-",
        f"{outcome.utilisation:.1%}" if ran else "",
        f"{outcome.bytes_moved:,}" if ran else "",
        f"{outcome.logic:,}",
        f"{outcome.multipliers:,}",
        f"{outcome.block_rams:,}",
        "yes" if outcome.fits else "no",
    ]


@contextmanager
def _bar(total: int) -> Iterator[Callable[[Outcome], None]]:
    """A bar on a terminal, a line for each core elsewhere."""
    console = messages()
    if console.is_terminal:
        from rich.progress import Progress

        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("cores", total=total)
            yield lambda _: progress.advance(task)
        return
    done = 0

    def line(outcome: Outcome) -> None:
        nonlocal done
        done += 1
        cycles = "does not run" if outcome.cycles is None else f"{outcome.cycles:,} cycles"
        console.print(f"{done} of {total}: {outcome.point}: {cycles}", markup=False, highlight=False)

    yield line
