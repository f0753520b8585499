"""``lockstep compile`` and ``lockstep disasm``: program files, written and read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from .failures import UsageError, guarded
from .models import ModelArgument, as_expanded, fallbacks, open_model, show_expanded
from .output import JsonOption, Steps, emit, results


def register(app: typer.Typer) -> None:
    example = "Example: lockstep compile minilm --device rtl:laptop --tokens 16 --output minilm.prog"
    app.command(name="compile", epilog=example)(compile_model)
    app.command(epilog="Example: lockstep disasm minilm.prog | less")(disasm)


@guarded
def compile_model(
    model: ModelArgument,
    device: Annotated[str, typer.Option(help="A device with a core, such as rtl:laptop.")],
    tokens: Annotated[list[int], typer.Option(help="Tokens of a sequence; give it several times for a batch.", min=1)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The program file to write.")],
    part: Annotated[
        int, typer.Option(help="Which program, where fallbacks to PyTorch cut the model into several.", min=0)
    ] = 0,
    as_json: JsonOption = False,
) -> None:
    """Write the program that runs a model on a core; nothing is run."""
    from lockstep_driver import Device, parse
    from lockstep_sim.fast import FastCore

    from lockstep.executors import HOSTS, check_uri

    check_uri(device)
    if device in HOSTS:
        raise UsageError(f"'{device}' runs without programs; give a device with a core, such as fast:laptop")
    uri = parse(device)
    with Steps() as steps:
        loaded = open_model(model, steps)
        from lockstep.compiler.execute import DeviceExecutor
        from lockstep.compiler.packing import expanded
        from lockstep.compiler.stages import split

        stages = [number for number, stage in enumerate(split(loaded.graph)) if stage.device]
        if part >= len(stages):
            raise UsageError(f"{model} has {len(stages)} programs, so there is no part {part}; count from 0")
        # A program depends on the core and its memory, not on what plays the core: the fast one needs no long build.
        with Device(FastCore(uri.config, uri.memory_bytes, uri.timing, steps), device) as opened:
            steps(f"compiling for {device}")
            program = DeviceExecutor(opened).program(loaded.graph, tuple(tokens), stages[part])
    program.save(output)
    grown = expanded(loaded.graph, uri.config)
    size = output.stat().st_size
    if as_json:
        emit(
            {
                "model": model,
                "device": device,
                "tokens": tokens,
                "output": str(output),
                "bytes": size,
                "instructions": len(program.instructions),
                "config_crc": f"{program.config_crc:#010x}",
                "part": part,
                "parts": len(stages),
                "fallbacks": fallbacks(loaded),
                "expanded": as_expanded(grown),
            }
        )
    else:
        which = "" if len(stages) == 1 else f", part {part} of 0 to {len(stages) - 1}"
        text = f"{len(program.instructions):,} instructions, {size:,} bytes, for core '{uri.config.name}'{which}"
        results().print(f"{output}: {text}", markup=False, highlight=False, soft_wrap=True)
        show_expanded(grown)


@guarded
def disasm(
    program: Annotated[Path, typer.Argument(metavar="PROGRAM", help="A file that 'lockstep compile' wrote.")],
    device: Annotated[str | None, typer.Option(help="Check first that it can run on this device's core.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the instructions of a program file."""
    from lockstep_isa.config import PRESETS
    from lockstep_isa.program import Program, ProgramError, validate

    if device is not None:
        from lockstep.executors import HOSTS, check_uri

        check_uri(device)
        if device in HOSTS:
            raise UsageError(f"'{device}' runs without programs; give a device with a core, such as fast:laptop")
    try:
        loaded = Program.load(program)
        if device is not None:
            from lockstep_driver import parse

            validate(parse(device).config, loaded)
    except ProgramError as error:
        raise ProgramError(f"{program}: {error}") from None
    core = next((name for name, config in PRESETS.items() if config.crc == loaded.config_crc), None)
    instructions: tuple[Any, ...] = loaded.instructions
    counts = Counter(instruction.type.name for instruction in instructions)
    lines = loaded.disassemble()
    if as_json:
        emit(
            {
                "program": str(program),
                "config_crc": f"{loaded.config_crc:#010x}",
                "core": core,
                "operands": [operand._asdict() for operand in loaded.operands],
                "counts": dict(counts),
                "instructions": [_entry(n, i) for n, i in enumerate(instructions)],
            }
        )
        return
    named = f"core '{core}'" if core else "a core that is no preset"
    typer.echo(f"; {program}: {len(lines)} instructions for {named} (configuration {loaded.config_crc:#010x})")
    typer.echo(f"; {', '.join(f'{count} {name}' for name, count in counts.items())}")
    for number, (name, least, greatest, step) in enumerate(loaded.operands, 1):
        steps = "" if step == 1 else f" in steps of {step}"
        typer.echo(f"; operand {number} {name}: {least} to {greatest}{steps}")
    for line in lines:
        typer.echo(line)


def _entry(number: int, instruction: Any) -> dict[str, object]:
    fields = {name: int(value) for name, value in instruction.values.items() if name != "opcode"}
    return {"index": number, "name": instruction.type.name, "unit": instruction.type.unit.name, "fields": fields}
