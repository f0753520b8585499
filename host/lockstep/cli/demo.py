"""``lockstep demo``: sentences and a program's beginning through a simulated core, and the proof that others give the
same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .failures import DIFFERENT, guarded
from .output import JsonOption, Steps, emit, results, table

if TYPE_CHECKING:
    from lockstep.executors import OpenExecutor

MODEL = "minilm"
#: At most 16 tokens each, so that a sentence is one row tile of the array.
SENTENCES = ("The cat sleeps on the sofa.", "A kitten naps on a couch.", "Shares fell after the report.")

#: The model that writes, what it goes on from, and how many tokens it adds.
WRITER = "tiny"
PROMPT = "def add(self, "
NEW_TOKENS = 8


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: lockstep demo --device fast:laptop")(demo)


@guarded
def demo(
    device: Annotated[str, typer.Option(help="Where to run; 'lockstep devices' lists them.")] = "rtl:laptop",
    as_json: JsonOption = False,
) -> None:
    """Embed three sentences and generate a line of code on a simulated core, and compare every bit.

    The first run builds the simulator, which takes minutes; later ones take it from the cache.
    """
    with Steps() as steps:
        report = _run(device, steps)
    if as_json:
        emit(report)
    else:
        _show(report)
    if not report["identical"]:
        raise typer.Exit(DIFFERENT)


def _run(uri: str, steps: Steps) -> dict[str, Any]:
    from lockstep_driver import parse

    from lockstep.executors import HOSTS, check_uri, executor

    check_uri(uri)
    steps("importing PyTorch and transformers")
    import numpy as np

    from lockstep.generation import prompt_ids
    from lockstep.model import load
    from lockstep.verification import differing, generated_logits

    core = "laptop" if uri in HOSTS else parse(uri).config.name
    fast = f"fast:{core}"
    steps(f"loading {MODEL}")
    model = load(MODEL)
    inputs = [{model.input_name: ids} for ids in model.tokenize(SENTENCES)]
    steps(f"loading {WRITER}")
    writer = load(WRITER)
    prompt = prompt_ids(writer, PROMPT)
    written: list[int] = []
    logits: dict[str, np.ndarray] = {}
    hidden: dict[str, list[np.ndarray]] = {}
    expected_cycles = 0
    for other in (name for name in ("cpu", fast) if name != uri):
        with executor(other, steps) as opened:
            steps(f"running on {other}")
            hidden[other] = opened.run(model.graph, inputs)
            logits[other] = generated_logits(opened, writer.graph, prompt, NEW_TOKENS, written)
            expected_cycles = opened.cycles or 0
    with executor(uri, steps) as opened:
        with steps.bar(f"running on {uri}", expected_cycles) as opened.watch:
            hidden[uri] = opened.run(model.graph, inputs)
            counted = _counts(opened)
            logits[uri] = generated_logits(opened, writer.graph, prompt, NEW_TOKENS, written)
        generation_cycles = None if opened.cycles is None else opened.cycles - counted["cycles"]
    mine, mine_logits = hidden.pop(uri), logits.pop(uri)
    compared = {
        name: {
            "values_compared": sum(array.size for array in mine),
            "differences": sum(int(differing(a, b).sum()) for a, b in zip(mine, other_hidden, strict=True)),
        }
        for name, other_hidden in hidden.items()
    }
    generated = {
        name: {"values_compared": mine_logits.size, "differences": int(differing(mine_logits, other_logits).sum())}
        for name, other_logits in logits.items()
    }
    vectors = np.stack([model.pooling(array) for array in mine])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return {
        "model": MODEL,
        "device": uri,
        "sentences": list(SENTENCES),
        "tokens": [len(array) for array in mine],
        "similarities": (vectors @ vectors.T).tolist(),
        **counted,
        "identical": all(result["differences"] == 0 for part in (compared, generated) for result in part.values()),
        "values_compared": sum(result["values_compared"] for result in compared.values()),
        "compared_with": compared,
        "generation": {
            "model": WRITER,
            "prompt": PROMPT,
            "text": writer.tokenizer.decode(written, skip_special_tokens=True),
            "token_ids": written,
            "cycles": generation_cycles,
            "compared_with": generated,
        },
        "fallbacks": [{"operations": name, "reason": reason} for name, reason in model.report().fallbacks],
    }


def _counts(opened: OpenExecutor) -> dict[str, Any]:
    cycles = opened.cycles
    if cycles is None:
        return {"cycles": None, "utilisation": None, "cycles_per_second": None, "seconds": None}
    return {
        "cycles": cycles,
        "utilisation": opened.totals.mac_cycles / max(cycles, 1),
        "cycles_per_second": cycles / max(opened.core_seconds, 1e-9),
        "seconds": opened.core_seconds,
    }


def _show(report: dict[str, Any]) -> None:
    console = results()
    numbers = [str(n + 1) for n in range(len(report["sentences"]))]
    rows = [
        [number, sentence, *(f"{value:.3f}" for value in line)]
        for number, sentence, line in zip(numbers, report["sentences"], report["similarities"], strict=True)
    ]
    console.print(table(["", "sentence", *numbers], rows, f"Cosine similarities on {report['device']}", numbers=2))
    console.print()
    if report["cycles"] is not None:
        console.print(
            f"{report['cycles']:,} cycles, the array busy in {report['utilisation']:.1%} of them; "
            f"{report['seconds']:.1f} s, {report['cycles_per_second']:,.0f} cycles a second",
            highlight=False,
            soft_wrap=True,
        )
    _show_compared(report["compared_with"], "hidden-state values")
    generation = report["generation"]
    console.print(f"\n{generation['model']} writes:", style="bold")
    console.print(generation["prompt"] + generation["text"], markup=False, highlight=False, soft_wrap=True)
    if generation["cycles"] is not None:
        console.print(f"{generation['cycles']:,} cycles for {len(generation['token_ids'])} tokens", highlight=False)
    _show_compared(generation["compared_with"], "logits")


def _show_compared(compared: dict[str, Any], values: str) -> None:
    for name, result in compared.items():
        count, differ = result["values_compared"], result["differences"]
        verdict = "the same bits" if differ == 0 else f"[bold red]{differ:,} values differ[/]"
        results().print(f"{name}: {count:,} {values} compared, {verdict}", highlight=False)
