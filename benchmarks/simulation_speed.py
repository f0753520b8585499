"""How fast the RTL and the fast core run the same program: MiniLM on one text.

python benchmarks/simulation_speed.py [--core laptop] [--tokens 128] [--json]

Times are those of the second run in one process: simulators are built and programs compiled before.
"""

from __future__ import annotations

import json
import time
from typing import Annotated

import numpy as np
import typer
from lockstep.compiler.execute import DeviceExecutor
from lockstep.model import load
from lockstep_driver import Counters, open_device


def main(
    core: Annotated[str, typer.Option(help="The preset.")] = "laptop",
    tokens: Annotated[int, typer.Option(help="Tokens of the text.")] = 128,
    as_json: Annotated[bool, typer.Option("--json", help="One object in the place of a table.")] = False,
) -> None:
    """Print cycles, seconds and cycles a second of both, and how many times faster the fast core is."""
    model = load("minilm")
    inputs = [{model.input_name: np.random.default_rng(0).integers(1000, 29000, tokens)}]
    found = {}
    for scheme in ("rtl", "fast"):
        counted: list[Counters] = []
        with open_device(f"{scheme}:{core}") as device:
            executor = DeviceExecutor(device, counted.append)
            executor.run(model.graph, inputs)
            began = time.perf_counter()
            executor.run(model.graph, inputs)
            found[scheme] = {"cycles": counted[-1].cycles, "seconds": time.perf_counter() - began}
    ratio = found["rtl"]["seconds"] / found["fast"]["seconds"]
    if as_json:
        print(json.dumps({"core": core, "tokens": tokens, **found, "ratio": ratio}))
        return
    for scheme, one in found.items():
        rate = one["cycles"] / one["seconds"]
        print(f"{scheme}:{core}  {one['cycles']:9,} cycles  {one['seconds']:8.3f} s  {rate:13,.0f} cycles a second")
    print(f"the fast core is {ratio:.0f} times faster")


if __name__ == "__main__":
    typer.run(main)
