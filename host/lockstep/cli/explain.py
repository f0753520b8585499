"""``lockstep explain``: what bounds a model on a core, and what would help most."""

from __future__ import annotations

import dataclasses

import typer

from .failures import guarded
from .models import ModelArgument, check_texts, fallbacks, open_model, show_fallbacks
from .output import JsonOption, Steps, emit, results
from .prune_options import Leaving, PruneHeadsOption, PruneOption
from .run import (
    RunDeviceOption,
    RunGenerateOption,
    RunTokensOption,
    TextsArgument,
    counted,
    require_core,
    work_of,
)


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: lockstep explain minilm 'The cat sleeps.' --device fast:laptop")(explain)


@guarded
def explain(
    model: ModelArgument,
    texts: TextsArgument = None,
    device: RunDeviceOption = "fast:laptop",
    tokens: RunTokensOption = 12,
    generate: RunGenerateOption = None,
    prune: PruneOption = None,
    prune_heads: PruneHeadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what bounds a model on a core and what would help, in sentences.

    The model runs on the device. The fast core then predicts it on cores that differ in one thing each: the bus, the
    lanes, the array, the accumulator queue, the memory. Each core is built once, in some seconds.
    """
    require_core(device)
    check_texts(texts or [])
    leaving = Leaving(prune, prune_heads)
    with Steps() as steps:
        loaded = leaving.of(open_model(model, steps))
        from lockstep.explain import explain as find

        found = find(device, work_of(loaded, texts or [], tokens, generate), steps)
    if as_json:
        emit(
            {
                "model": model,
                "device": device,
                "texts": texts or [],
                **leaving.report,
                "programs": found.programs,
                **counted(found.counters),
                "bound": found.bound,
                "busy": found.busy,
                "causes": [dataclasses.asdict(cause) for cause in found.causes],
                "predicted": found.predicted,
                "changes": [dataclasses.asdict(change) for change in found.changes],
                "sentences": found.sentences,
                "fallbacks": fallbacks(loaded),
            }
        )
        return
    for sentence in found.sentences:
        results().print(sentence, markup=False, highlight=False, soft_wrap=True)
    show_fallbacks(loaded)
