"""What a token costs in decode on a core, relative to the bytes that it must read.

python benchmarks/decode_cost.py [--device fast:laptop] [--kv-heads 4] [--contexts 64,128,256,511] [--json]

A Llama of the shape of the bundled model ``tiny`` with random weights. The bound is the bytes of int8 weights, keys,
values and the scales of these two, over the bytes that the bus delivers in a cycle. Cycles of ``rtl:`` are counted,
those of ``fast:`` predicted.
"""

from __future__ import annotations

import json
from typing import Annotated

import numpy as np
import typer
from lockstep.bench.random_models import LlamaShape, llama_graph, random_weights
from lockstep.compiler.execute import DeviceExecutor
from lockstep.graph import Attention
from lockstep_driver import Counters, open_device

VOCABULARY, POSITIONS = 272, 1024


def main(
    device: Annotated[str, typer.Option(help="The core.")] = "fast:laptop",
    kv_heads: Annotated[int, typer.Option(help="Heads of keys and values, a divisor of 4.")] = 4,
    contexts: Annotated[str, typer.Option(help="Tokens in the cache, in rising order.")] = "64,128,256,511",
    as_json: Annotated[bool, typer.Option("--json", help="One object in the place of a table.")] = False,
) -> None:
    """Print cycles, bound and their ratio for one token behind each context."""
    shape = LlamaShape(VOCABULARY, 256, 640, 4, 4, kv_heads, POSITIONS)
    graph = llama_graph(shape, random_weights(shape))
    weights = sum(array.nbytes for array in graph.tensors.values() if array.dtype == np.int8)
    per_token = sum(2 * node.kv_heads * (node.head_dim + 4) for node in graph.of(Attention))
    ids = np.random.default_rng(0).integers(0, VOCABULARY, POSITIONS)
    counted: list[Counters] = []
    rows = []
    with open_device(device) as core:
        session = DeviceExecutor(core, counted.append).open_session(graph, POSITIONS)
        for context in map(int, contexts.split(",")):
            session.extend(ids[session.length : context])
            session.extend(ids[context : context + 1])
            bound = (weights + per_token * (context + 1)) / core.config.bus_bytes
            cycles = counted[-1].cycles
            rows.append({"context": context, "cycles": cycles, "bound": round(bound), "ratio": cycles / bound})
    if as_json:
        print(json.dumps({"device": device, "kv_heads": kv_heads, "tokens": rows}))
        return
    print(f"{device}, {kv_heads} heads of keys and values for 4 of queries")
    for row in rows:
        print(f"context {row['context']:5}  {row['cycles']:9,} cycles  bound {row['bound']:9,}  {row['ratio']:.3f}")


if __name__ == "__main__":
    typer.run(main)
