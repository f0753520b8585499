"""How fast is ``cpu`` beside other ways to run the same model on the same processor?

    python benchmarks/cpu_peers.py [--case minilm] [--case llama] [--threads 1] [--threads 2] [--repeat 15] [--json]

``minilm`` is one text of 128 tokens; ``llama`` a model of Llama's shape with 120 million parameters that nobody
trained, a prompt of 128 tokens and 32 more one by one. PyTorch runs eagerly in fp32. OpenVINO, ONNX Runtime and
llama.cpp take part where they are installed (``pip install "lockstep-accel[peers]"``); the others are named with the
reason. All take turns in one process. The spread is that of the middle half; ``x`` is how many times as long as ``cpu``
something takes, by the medians, the least times, or the medians of processor time.
"""

from __future__ import annotations

import json
import os
from typing import Annotated, Any

import numpy as np
import torch
import typer
from contenders import Contender, Missing, take_turns

CASES = ("minilm", "llama")


def open_case(name: str, tokens: int, new: int) -> Any:
    if name == "minilm":
        from encoder_peers import Encoder

        return Encoder(tokens)
    from generation_peers import Generation

    return Generation(tokens, new)


def measure(case: Any, threads: int, repeat: int) -> tuple[dict[str, Any], dict[str, str]]:
    """The figures of each contender by phase, and why others are missing."""
    torch.set_num_threads(threads)
    contenders: dict[str, Contender] = {}
    missing: dict[str, str] = {}
    for name, open_contender in case.contenders(threads).items():
        try:
            contenders[name] = open_contender()
        except Missing as reason:
            missing[name] = str(reason)
    times, values = take_turns(contenders, repeat)
    results: dict[str, Any] = {}
    for name, phases in times.items():
        results[name] = {"cosine_to_pytorch": cosine(values[name], values["pytorch fp32"])}
        for phase, taken in phases.items():
            figures = taken.summary()
            own = times["lockstep"][phase].summary()
            results[name][phase] = figures | {
                "tokens_per_second": 1e3 * case.work[phase] / figures["wall_ms"],
                "lockstep_is_faster": figures["wall_ms"] / own["wall_ms"],
                "lockstep_is_faster_least": figures["wall_ms_least"] / own["wall_ms_least"],
                "lockstep_is_faster_cpu": figures["cpu_ms"] / own["cpu_ms"],
            }
    for contender in contenders.values():
        contender.close()
    return results, missing


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    x, y = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


def show(case: str, threads: int, results: dict[str, Any], missing: dict[str, str]) -> None:
    print(f"\n{case}, {threads} {'thread' if threads == 1 else 'threads'}")
    heads = ("median ms", "middle half", "least ms", "CPU ms", "tokens/s", "median x", "least x", "CPU x", "cosine")
    print(f"{'':<18}{'':<10}" + "".join(f"{head:>15}" for head in heads))
    for name, figures in results.items():
        for phase in (key for key in figures if key != "cosine_to_pytorch"):
            f = figures[phase]
            spread = f"{f['wall_ms_low']:.1f}-{f['wall_ms_high']:.1f}"
            times = (f"{f['wall_ms']:.2f}", spread, f"{f['wall_ms_least']:.2f}", f"{f['cpu_ms']:.2f}")
            keys = ("lockstep_is_faster", "lockstep_is_faster_least", "lockstep_is_faster_cpu")
            ratios = (f"{f[key]:.2f}" for key in keys)
            cells = (*times, f"{f['tokens_per_second']:.1f}", *ratios, f"{figures['cosine_to_pytorch']:.4f}")
            print(f"{name:<18}{phase:<10}" + "".join(f"{cell:>15}" for cell in cells))
    for name, reason in missing.items():
        print(f"{name:<18}left out: {reason}")


def main(
    case: Annotated[list[str] | None, typer.Option(help="minilm or llama; both unless given.")] = None,
    threads: Annotated[list[int] | None, typer.Option(help="Of all contenders; 1 and 2 unless given.", min=1)] = None,
    repeat: Annotated[int, typer.Option(help="Measurements of each.", min=1)] = 15,
    tokens: Annotated[int, typer.Option(help="Of the text, and of the prompt.", min=1)] = 128,
    new: Annotated[int, typer.Option(help="Tokens behind the prompt.", min=1)] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="One object in the place of a table.")] = False,
) -> None:
    """Time ``cpu`` and its peers on the same model and input, in turns."""
    chosen = case or list(CASES)
    if unknown := [name for name in chosen if name not in CASES]:
        raise typer.BadParameter(f"there is no case '{unknown[0]}'; cases are {' and '.join(CASES)}")
    measured = []
    for name in chosen:
        opened = open_case(name, tokens, new)
        for count in threads or [1, 2]:
            results, missing = measure(opened, count, repeat)
            load = round(os.getloadavg()[0], 1)
            measured.append({"case": name, "threads": count, "load": load, "results": results, "missing": missing})
            if not as_json:
                show(name, count, results, missing)
    if as_json:
        print(json.dumps({"cores": os.cpu_count(), "tokens": tokens, "new_tokens": new, "cases": measured}))


if __name__ == "__main__":
    typer.run(main)
