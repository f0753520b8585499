"""What passing over chunks of zeros saves: the same programs on a core with it and on the same core without.

    python benchmarks/zero_skipping.py [--core laptop] [--json]

Cycles are predicted by the fast core. Both cores must leave the same bits. A `Llama` has random weights and one prompt
of random tokens; the bundled model `tiny` reads text that it was not trained on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import lockstep
import numpy as np
import typer
from lockstep.bench.random_models import LlamaShape, llama_graph, random_weights
from lockstep.bench.sparse_attention import random_operands, run_attention
from lockstep.bench.sparse_masks import pattern_mask
from lockstep.compiler.block_mask import BlockSparse
from lockstep.compiler.execute import DeviceExecutor
from lockstep.graph import Graph
from lockstep.profile import total
from lockstep.verification import random_inputs
from lockstep_driver import Counters, Device
from lockstep_driver.uri import SCHEMES, DeviceUri
from lockstep_isa.config import CoreConfig, preset
from lockstep_sim.core import MemoryTiming
from numpy.typing import NDArray

MEMORY_BYTES = 256 << 20
HELD_OUT = Path(__file__).parents[1] / "models" / "tiny" / "heldout.txt"

#: What runs on a device; its values and its counters.
Case = Callable[[Device], tuple[NDArray[np.float32], Counters]]


def attention(pattern: str, heads: int, tokens: int, head_dim: int) -> Case:
    """Causal attention by itself, blocks of 64 tokens."""
    work = BlockSparse(pattern_mask(pattern, heads, tokens // 64, True, 0), 64, head_dim, min(tokens, 2048))
    operands = random_operands(heads, tokens, head_dim)

    def run(device: Device) -> tuple[NDArray[np.float32], Counters]:
        ran = run_attention(device, work, operands)
        return ran.values[0], ran.counters

    return run


def prefill(graph: Graph, ids: NDArray[np.int64]) -> Case:
    """A prompt, from its first token to the logits behind its last one."""

    def run(device: Device) -> tuple[NDArray[np.float32], Counters]:
        counted: list[Counters] = []
        session = DeviceExecutor(device, counted.append).open_session(graph, len(ids))
        return session.extend(ids), total(counted)

    return run


def text(graph: Graph, tokens: int) -> Case:
    """A model without a cache, on random tokens."""

    def run(device: Device) -> tuple[NDArray[np.float32], Counters]:
        counted: list[Counters] = []
        values = DeviceExecutor(device, counted.append).run(graph, [random_inputs(graph, tokens, 0)])
        return values[0], total(counted)

    return run


def cases() -> Iterator[tuple[str, Case]]:
    """Name and case."""
    for pattern in ("causal", "random:0.4", "random:0.1"):
        yield f"attention alone, 8 heads of 128 features, 2,048 tokens, {pattern}", attention(pattern, 8, 2048, 128)
    yield "attention alone, 4 heads of 128 features, 512 tokens, causal", attention("causal", 4, 512, 128)
    shape = LlamaShape(64, 256, 512, 2, 4, 4, 512)
    llama = llama_graph(shape, random_weights(shape))
    for tokens in (64, 128, 512):
        ids = np.random.default_rng(3).integers(0, 64, tokens)
        yield f"prefill of {tokens} tokens, Llama of 2 layers with 256 features", prefill(llama, ids)
    ids = np.frombuffer(HELD_OUT.read_bytes()[:256], np.uint8).astype(np.int64)
    yield "prefill of 256 bytes, tiny", prefill(lockstep.load("tiny").graph, ids)
    minilm = lockstep.load("minilm").graph
    for tokens in (1, 128):
        yield f"MiniLM, {tokens} token{'s' if tokens > 1 else ''}", text(minilm, tokens)


def compare(name: str, case: Case, config: CoreConfig) -> dict[str, object]:
    """One row; raises AssertionError where bits differ."""
    found = []
    for zero_skipping in (False, True):
        uri = DeviceUri("fast", config.replace(zero_skipping=zero_skipping), MEMORY_BYTES, MemoryTiming())
        with Device(SCHEMES["fast"][0](uri, None), f"fast:{config.name}") as device:
            found.append(case(device))
    (expected, without), (values, counters) = found
    assert values.tobytes() == expected.tobytes(), f"{name}: other bits"
    return {
        "case": name,
        "cycles_without": without.cycles,
        "cycles": counters.cycles,
        "saved": 1 - counters.cycles / without.cycles,
        "skipped_chunks": counters.skipped_chunks,
        "steps_saved": 1 - counters.mac_cycles / without.mac_cycles,
    }


def main(
    core: Annotated[str, typer.Option(help="A preset.")] = "laptop",
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of JSON objects and nothing else.")] = False,
) -> None:
    """Print a table of Markdown, row by row."""
    rows = []
    if not as_json:
        print("| what | cycles without | with | saved | chunks passed over | steps of the array saved |")
        print("| --- | --- | --- | --- | --- | --- |")
    for name, case in cases():
        row = compare(name, case, preset(core))
        rows.append(row)
        if not as_json:
            print(
                f"| {name} | {row['cycles_without']:,} | {row['cycles']:,} | {row['saved']:.2%} | "
                f"{row['skipped_chunks']:,} | {row['steps_saved']:.2%} |",
                flush=True,
            )
    if as_json:
        print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    typer.run(main)
