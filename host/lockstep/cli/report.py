"""``lockstep report``: a run of a model on a core as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .failures import DIFFERENT, UsageError, guarded
from .models import ModelArgument, check_texts, open_model
from .output import JsonOption, Steps, emit, results
from .prune_options import Leaving, PruneHeadsOption, PruneOption
from .run import RunDeviceOption, RunGenerateOption, RunTokensOption, TextsArgument, require_core, work_of


def register(app: typer.Typer) -> None:
    example = "Example: lockstep report minilm 'The cat sleeps.' --device fast:laptop --output minilm.html"
    app.command(epilog=example)(report)


@guarded
def report(
    model: ModelArgument,
    texts: TextsArgument = None,
    device: RunDeviceOption = "fast:laptop",
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path("report.html"),
    tokens: RunTokensOption = 12,
    generate: RunGenerateOption = None,
    prune: PruneOption = None,
    prune_heads: PruneHeadsOption = None,
    what_if: Annotated[
        bool, typer.Option("--what-if", help="Predict other cores too, as explain does; builds each once.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a page about a run: timeline, layers, roofline, what bounds it, and whether the bits are right.

    The page is one file and loads nothing. Exit status: 0, or 1 if a bit differs from the cpu.
    """
    require_core(device)
    check_texts(texts or [])
    leaving = Leaving(prune, prune_heads)
    if not output.absolute().parent.is_dir():
        raise UsageError(f"there is no folder '{output.parent}'; make it first")
    with Steps() as steps:
        loaded = leaving.of(open_model(model, steps))
        from lockstep.executors import executor
        from lockstep.explain import explain, explanation
        from lockstep.html_report import compare_bits, page
        from lockstep.layers import layers
        from lockstep.profile import profile

        work = work_of(loaded, texts or [], tokens, generate)
        with executor(device, steps) as opened:
            steps(f"running on {device}")
            with profile(opened, timelines=True) as found:
                actual = work(opened)
            config = opened.config
        assert config is not None
        with executor("cpu", steps) as host:
            steps("running on cpu")
            bits = compare_bits("cpu", device, work(host), actual)
        said = explain(device, work, steps) if what_if else explanation(device, found)
        output.write_text(page(f"{model} on {device}", config, found, said, bits), encoding="utf-8")
    total = found.total
    if as_json:
        emit(
            {
                "model": model,
                "device": device,
                "output": str(output),
                **leaving.report,
                "cycles": total.cycles,
                "identical": bits.first is None,
                "values_compared": bits.values,
                "sentences": said.sentences,
                "layers": [
                    {"name": layer.name, "cycles": layer.cycles, "macs": layer.macs, "bytes": layer.bytes_moved}
                    for layer in layers(found.timelines)
                ],
            }
        )
    else:
        results().print(f"{output}: {total.cycles:,} cycles; {bits}", markup=False, highlight=False, soft_wrap=True)
    if bits.first is not None:
        raise typer.Exit(DIFFERENT)
