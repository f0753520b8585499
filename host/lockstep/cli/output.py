"""What a command shows: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

#: The option that every command has.
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


@dataclass
class Settings:
    """Options in front of the command."""

    debug: bool = False


settings = Settings()


def messages() -> Console:
    """Standard error, as it is now: tests replace it."""
    return Console(stderr=True)


def results() -> Console:
    """Standard output, as it is now."""
    return Console()


def emit(values: dict[str, Any]) -> None:
    """Print the one JSON object of a command, in one line; what is not finite becomes null."""
    sys.stdout.write(json.dumps(finite(values), allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """``value`` as JSON can hold it: numbers that are not finite become null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(columns: list[str], rows: list[list[str]], title: str | None = None, numbers: int | None = None) -> Table:
    """A table whose columns from ``numbers`` on stand to the right."""
    result = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    for position, column in enumerate(columns):
        right = numbers is not None and position >= numbers
        result.add_column(column, justify="right" if right else "left", overflow="fold")
    for row in rows:
        result.add_row(*row)
    return result


class Steps:
    """What a command is doing: a spinner or a bar on a terminal, a line for each step elsewhere."""

    def __init__(self) -> None:
        self._console = messages()
        self._status = self._console.status("") if self._console.is_terminal else None
        self._line = ""

    def __enter__(self) -> Steps:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def __call__(self, line: str) -> None:
        """The next step; this is the ``progress`` of everything that builds."""
        if self._status is None:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            self._line = line.replace("[", "\\[")
            self._status.update(self._line)

    @contextmanager
    def cycles(self) -> Iterator[Callable[[int, int], None] | None]:
        """What to tell, again and again, how many of how many cycles have passed: it stands behind the step's line.

        Without a terminal it gives none.
        """
        if self._status is None:
            yield None
            return
        status = self._status

        def tell(passed: int, total: int) -> None:
            done = min(1.0, passed / total)
            bar = "━" * round(30 * done) + " " * (30 - round(30 * done))
            status.update(f"{self._line} [cyan]{bar}[/] {passed:,} of {total:,} cycles")

        yield tell

    @contextmanager
    def bar(self, line: str, total: int, unit: str = "cycles") -> Iterator[Callable[[int], None] | None]:
        """A bar over ``total`` cycles, or another unit; gives what to tell how many have passed.

        Without a terminal, or where the total is not known (zero), it is a step like any other and gives none.
        """
        self(line)
        if self._status is None or total == 0:
            yield None
            return
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._status.stop()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f} of {task.total:,.0f} " + unit),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console, transient=True) as progress:
            task = progress.add_task(line, total=total)
            yield lambda cycles: progress.update(task, completed=cycles)
        self._status.start()
