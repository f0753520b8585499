"""``lockstep embed`` and ``lockstep verify``: models on one device, or on several side by side."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cache_options import CacheBitsOption, EvictOption, KeepOption, SelectOption
from .failures import DIFFERENT, UsageError, guarded
from .output import JsonOption, Steps, emit, results, table
from .prune_options import Leaving, PruneHeadsOption, PruneOption
from .waves import check_wave, described, show_wave, write_difference

if TYPE_CHECKING:
    from lockstep.cache_policy import CachePolicy
    from lockstep.model import Model

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A Hugging Face folder, a Hub id in the local cache, 'minilm' or 'tiny'.")
]


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: lockstep embed minilm 'The cat sleeps.' --device fast:laptop --json")(embed)
    app.command(epilog="Example: lockstep verify minilm --device cpu --device fast:laptop --tokens 24")(verify)


def open_model(name: str, steps: Steps) -> Model:
    """Load a model, saying so."""
    steps("importing PyTorch and transformers")
    from lockstep.model import load

    steps(f"loading {name}")
    return load(name)


def fallbacks(model: Model) -> list[dict[str, str]]:
    """What PyTorch runs on the CPU, and why."""
    return [{"operations": name, "reason": reason} for name, reason in model.report().fallbacks]


def check_texts(texts: list[str]) -> None:
    """Raise unless every text has something in it."""
    for number, text in enumerate(texts, 1):
        if not text.strip():
            raise UsageError(f"text {number} of {len(texts)} is empty; give at least one word")


@guarded
def embed(
    model: ModelArgument,
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...", help="One or more texts.")],
    device: Annotated[str, typer.Option(help="Where to run; 'lockstep devices' lists them.")] = "cpu",
    prune: PruneOption = None,
    prune_heads: PruneHeadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Turn texts into vectors."""
    from lockstep.executors import check_uri, executor

    check_uri(device)
    check_texts(texts)
    leaving = Leaving(prune, prune_heads)
    with Steps() as steps:
        loaded = leaving.of(open_model(model, steps))
        tokens = [len(ids) for ids in loaded.tokenize(texts)]
        with executor(device, steps) as opened:
            steps(f"running on {device}")
            vectors = loaded.embed(texts, opened)
            cycles = opened.cycles
    if as_json:
        emit(
            {
                "model": model,
                "device": device,
                "texts": texts,
                "tokens": tokens,
                **leaving.report,
                "features": int(vectors.shape[1]),
                "embeddings": vectors.tolist(),
                "cycles": cycles,
                "fallbacks": fallbacks(loaded),
            }
        )
        return
    console = results()
    rows = [
        [text, str(count), " ".join(f"{value:+.4f}" for value in vector[:4]) + " ..."]
        for text, count, vector in zip(texts, tokens, vectors, strict=True)
    ]
    console.print(table(["text", "tokens", f"first of {vectors.shape[1]} features"], rows))
    if cycles is not None:
        console.print(f"{cycles:,} cycles on {device}", highlight=False)
    show_fallbacks(loaded)


@guarded
def verify(
    model: ModelArgument,
    device: Annotated[
        list[str],
        typer.Option(help="The first one is the reference; a single one is compared with cpu. Give it several times."),
    ],
    text: Annotated[list[str] | None, typer.Option(help="A text to run; give it several times for more.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random input that runs where no text is given.", min=0)] = 0,
    tokens: Annotated[int, typer.Option(help="Length of the random input.", min=1)] = 12,
    generate: Annotated[
        int | None,
        typer.Option(help="Generate so many tokens behind each input, and compare the logits of each.", min=1),
    ] = None,
    keep: KeepOption = None,
    evict: EvictOption = None,
    select: SelectOption = None,
    cache_bits: CacheBitsOption = None,
    prune: PruneOption = None,
    prune_heads: PruneHeadsOption = None,
    wave: Annotated[
        Path | None,
        typer.Option(help="Where an rtl device differs, write the waveform around its first wrong value here (.fst)."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run the same inputs on several devices and compare all output values bit for bit.

    With --generate the first device chooses tokens, which all others take too, each with its own key-value cache. It is
    treated as --keep, --evict, --select and --cache-bits say.

    With --wave a core that differs runs twice more: beside the fast core, to find the first wrong value that it writes
    to memory, and then for the 2,000 cycles around it. A .gtkw for GTKWave and a .sucl for Surfer come with them.

    Exit status: 0 if all are identical, 1 if one differs.
    """
    from lockstep.executors import check_uri

    devices = device if len(device) > 1 else ["cpu", *device]
    for uri in devices:
        check_uri(uri)
    check_texts(text or [])
    policy, leaving = _cache_policy(generate, keep, evict, select, cache_bits), Leaving(prune, prune_heads)
    if wave is not None:
        check_wave(wave, devices)
    with Steps() as steps:
        loaded = leaving.of(open_model(model, steps))
        from lockstep.verification import random_inputs, replay, verify_generation
        from lockstep.verification import verify as compare

        if text:
            sequences = [{loaded.input_name: ids} for ids in loaded.tokenize(text)]
        else:
            sequences = [random_inputs(loaded.graph, tokens, seed)]
        if generate is None:
            found = compare(loaded.graph, sequences, devices, steps)
        else:
            prompts = [next(iter(inputs.values())) for inputs in sequences]
            found = verify_generation(loaded.graph, prompts, generate, devices, steps, policy)
        written, why = None, None
        if wave is not None:
            written, why = write_difference(found, replay(loaded.graph, sequences, generate, policy), wave, steps)
    first = found.first_difference
    report: dict[str, Any] = {
        "model": model,
        "devices": devices,
        "reference": found.reference,
        "generated": generate,
        **leaving.report,
        "identical": found.identical,
        "values_compared": found.values_compared,
        "differences": found.differences,
        "first_difference": None if first is None else dataclasses.asdict(first),
        "cycles": found.cycles,
        "wave": None if written is None else described(written),
        "no_wave": why,
        "fallbacks": fallbacks(loaded),
    }
    if as_json:
        emit(report)
    else:
        console = results()
        rows = [[uri, _cycles(found.cycles[uri]), _verdict(found.differences.get(uri))] for uri in found.cycles]
        console.print(table(["device", "cycles", "result"], rows))
        if first is None:
            console.print(f"identical: {found.values_compared:,} values compared", highlight=False)
        else:
            console.print(f"different, first in {first}", highlight=False, soft_wrap=True)
        if written is not None:
            show_wave(written)
        if why is not None:
            console.print(f"no waveform: {why}", highlight=False, markup=False, soft_wrap=True)
        show_fallbacks(loaded)
    if not found.identical:
        raise typer.Exit(DIFFERENT)


def _cache_policy(
    generate: int | None, keep: int | None, evict: str | None, select: str | None, cache_bits: int | None
) -> CachePolicy:
    from lockstep.cache_policy import asked_policy

    policy = asked_policy(evict, keep, select, cache_bits)
    if generate is None and (keep, evict, select, cache_bits) != (None,) * 4:
        raise UsageError("there is a cache only where tokens are generated; give --generate as well")
    return policy


def _cycles(cycles: int | None) -> str:
    return "-" if cycles is None else f"{cycles:,}"


def _verdict(differences: int | None) -> str:
    if differences is None:
        return "reference"
    return "the same bits" if differences == 0 else f"{differences:,} values differ"


def as_expanded(expanded: tuple[tuple[str, str], ...]) -> list[dict[str, str]]:
    """Weights that a core takes as dense int8, and why, as JSON has them."""
    return [{"weight": name, "reason": reason} for name, reason in expanded]


def show_expanded(expanded: tuple[tuple[str, str], ...]) -> None:
    """A line for each reason why weights of fewer bits are dense int8."""
    from lockstep.run_report import expanded_lines

    for line in expanded_lines(expanded):
        results().print(line, markup=False, highlight=False, soft_wrap=True)


def show_fallbacks(model: Model) -> None:
    """A line for each part that PyTorch runs."""
    for part in fallbacks(model):
        text = f"on the CPU in PyTorch: {part['operations']} ({part['reason']})"
        results().print(text, markup=False, highlight=False, soft_wrap=True)
