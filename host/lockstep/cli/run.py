"""``lockstep run``: a model or a program on one device, with its counters and its timeline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .failures import UsageError, guarded
from .models import as_expanded, check_texts, fallbacks, open_model, show_expanded, show_fallbacks
from .output import JsonOption, Steps, emit, results, table
from .prune_options import Leaving, PruneHeadsOption, PruneOption

if TYPE_CHECKING:
    from lockstep_driver import Counters
    from lockstep_isa.config import CoreConfig
    from lockstep_isa.program import Program

    from lockstep.executors import OpenExecutor
    from lockstep.explain import Work
    from lockstep.model import Model
    from lockstep.profile import Profile

RunDeviceOption = Annotated[str, typer.Option(help="A device with a core; 'lockstep devices' lists them.")]
RunTokensOption = Annotated[int, typer.Option(help="Length of the random input that runs without a text.", min=1)]
RunGenerateOption = Annotated[
    int | None, typer.Option("--generate", help="Generate so many tokens behind each input, one by one.", min=1)
]
TextsArgument = Annotated[list[str] | None, typer.Argument(metavar="[TEXT]...", help="Texts to run.")]


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: lockstep run minilm 'The cat sleeps.' --device fast:laptop --timeline out.json")(run)


@guarded
def run(
    target: Annotated[
        str,
        typer.Argument(metavar="MODEL|PROGRAM", help="A model as for embed, or a file that 'lockstep compile' wrote."),
    ],
    texts: TextsArgument = None,
    device: RunDeviceOption = "fast:laptop",
    timeline: Annotated[
        Path | None, typer.Option(help="A file to write for ui.perfetto.dev: what each unit did, cycle by cycle.")
    ] = None,
    tokens: RunTokensOption = 12,
    generate: RunGenerateOption = None,
    prune: PruneOption = None,
    prune_heads: PruneHeadsOption = None,
    operand: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE for each operand that a program declares.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run a model or a program on one device and show what its counters say.

    Without a text, a model runs on a random input. Weights that a program file does not hold are zeros; a core that
    passes over those takes fewer cycles than with a model's own, so compile and run for CORE?without=zero_skipping.
    """
    require_core(device)
    check_texts(texts or [])
    leaving = Leaving(prune, prune_heads)
    program = is_program(target)
    if program and (texts or generate or prune or prune_heads):
        raise UsageError(
            f"{target} is a program, which takes no texts, generates nothing and prunes nothing; leave them out"
        )
    if operand and not program:
        raise UsageError("operands are those of a program file; leave --operand out for a model")
    names: list[str] = []
    falls: list[dict[str, str]] = []
    grown: tuple[tuple[str, str], ...] = ()
    with Steps() as steps:
        if program:
            found = _run_program(Path(target), device, operand or [], timeline is not None, steps)
        else:
            from lockstep.compiler.packing import expanded
            from lockstep.executors import executor

            loaded = leaving.of(open_model(target, steps))
            falls = fallbacks(loaded)
            with executor(device, steps) as opened:
                grown = expanded(loaded.graph, opened.config)
                found = run_model(loaded, opened, texts or [], tokens, generate, timeline is not None, steps)
        if timeline is not None:
            from lockstep_sim import perfetto

            steps(f"writing {timeline}")
            perfetto.write(timeline, found.timelines, device, names)
    total = found.total
    if as_json:
        emit(
            {
                "target": target,
                "device": device,
                "texts": texts or [],
                **leaving.report,
                "programs": len(found.runs),
                **counted(total),
                "timeline": None if timeline is None else str(timeline),
                "fallbacks": falls,
                "expanded": as_expanded(grown),
            }
        )
        return
    show_counters(total, f"{len(found.runs)} program{'s' if len(found.runs) > 1 else ''} on {device}")
    if timeline is not None:
        results().print(f"{timeline}: open it at https://ui.perfetto.dev", markup=False, highlight=False)
    if not program:
        show_fallbacks(loaded)
        show_expanded(grown)


def require_core(uri: str) -> None:
    """Raise unless a URI names a device that has a core."""
    from lockstep.executors import HOSTS, check_uri

    check_uri(uri)
    if uri in HOSTS:
        raise UsageError(f"'{uri}' runs without programs; give a device with a core, such as fast:laptop")


def is_program(target: str) -> bool:
    """Whether a file is a program."""
    from lockstep_isa.program import FILE_MAGIC

    path = Path(target)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(FILE_MAGIC)) == FILE_MAGIC


def run_model(
    model: Model,
    device: OpenExecutor,
    texts: list[str],
    tokens: int,
    generate: int | None,
    timelines: bool,
    steps: Steps,
) -> Profile:
    """Run a model on its texts, or on a random input of ``tokens`` tokens, and say what it cost."""
    from lockstep.profile import profile

    work = work_of(model, texts, tokens, generate)
    steps(f"running on {device.uri}")
    with profile(device, timelines) as found:
        work(device)
    return found


def work_of(model: Model, texts: list[str], tokens: int, generate: int | None) -> Work:
    """What runs a model on any executor, always with the same inputs and the same tokens behind them."""
    from lockstep.verification import random_inputs, replay

    if texts:
        return replay(model.graph, [{model.input_name: ids} for ids in model.tokenize(texts)], generate)
    return replay(model.graph, [random_inputs(model.graph, tokens, 0)], generate)


def _run_program(path: Path, uri: str, given: list[str], timelines: bool, steps: Steps) -> Profile:
    from lockstep_driver import open_device
    from lockstep_isa.program import Program, ProgramError

    from lockstep.profile import Profile

    try:
        program = Program.load(path)
    except ProgramError as error:
        raise ProgramError(f"{path}: {error}") from None
    operands: dict[str, int] = {}
    for text in given:
        name, separator, value = text.partition("=")
        try:
            operands[name] = int(value, 0)
        except ValueError:
            separator = ""
        if not separator:
            raise UsageError(f"'{text}' gives no operand a value; write NAME=NUMBER")
    found = Profile()
    with open_device(uri, steps) as opened:
        steps(f"running on {uri}")
        opened.on_timeline = found.timelines.append if timelines else None
        # A program addresses memory as it was when it was compiled: its own code must lie behind all of that.
        behind = addressed_bytes(opened.config, program)
        opened.allocate(max(1, behind))
        found.runs.append(opened.run(program, operands))
    return found


def addressed_bytes(config: CoreConfig, program: Program) -> int:
    """Bytes from the beginning of device memory to the last one that a program reads or writes."""
    from lockstep_isa.instructions import LOAD, STORE, resolve
    from lockstep_isa.program import transfer_bytes

    end = 0
    for values in dict.fromkeys((program.least, program.greatest)):
        for i in (resolve(each, values) for each in program.instructions):
            if i is not None and i.type in (LOAD, STORE):
                end = max(end, i.address + (i.rows - 1) * i.stride + i.words * transfer_bytes(config, i))
    return end


def counted(total: Counters) -> dict[str, Any]:
    """Counters as JSON has them."""
    return {
        "cycles": total.cycles,
        "instructions": total.instructions,
        "read_beats": total.read_beats,
        "write_beats": total.write_beats,
        "mac_cycles": total.mac_cycles,
        "skipped_chunks": total.skipped_chunks,
        "utilisation": total.mac_cycles / total.cycles if total.cycles else None,
        "units": total.units,
    }


def show_counters(total: Counters, title: str) -> None:
    """The counters as a table: one row for each unit."""
    console = results()
    cycles = max(1, total.cycles)
    rows = [
        [name, *(f"{count:,}  {count / cycles:6.1%}" for count in counts.values())]
        for name, counts in total.units.items()
    ]
    columns = ["unit", *(name.replace("_", " ") for name in next(iter(total.units.values())))]
    console.print(table(columns, rows, title, numbers=1))
    skipped = f"; {total.skipped_chunks:,} chunks of zeros passed over" if total.skipped_chunks else ""
    console.print(
        f"{total.cycles:,} cycles, {total.instructions:,} instructions, the array busy in "
        f"{total.mac_cycles / cycles:.1%}; {total.read_beats:,} beats read, {total.write_beats:,} written{skipped}",
        highlight=False,
    )
