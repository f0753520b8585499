"""MiniLM, whole, on one text of random tokens."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from lockstep_driver import Counters, Device

from lockstep.compiler.execute import DeviceExecutor
from lockstep.executors import HOSTS, executor
from lockstep.graph import Graph
from lockstep.model import load
from lockstep.verification import random_inputs

from .limits import array_limit
from .measure import Bench, BenchError, Measurement, Ran
from .sizes import MiniLmSizes


def run(sizes: MiniLmSizes, bench: Bench) -> Iterator[Measurement]:
    """One text."""
    if sizes.reference not in HOSTS:
        raise BenchError(f"'{sizes.reference}' is no reference; give {' or '.join(HOSTS)}")
    if sizes.tokens < 1:
        raise BenchError(f"a text of {sizes.tokens} tokens is none; give at least 1")
    bench.say("loading minilm")
    graph = load("minilm").graph
    inputs = random_inputs(graph, sizes.tokens, sizes.seed)
    with executor(sizes.reference, bench.progress) as host:
        bench.say(f"running on {sizes.reference}")
        expected = host.run(graph, [inputs])
    bench.say(f"minilm, {sizes.tokens} tokens, on {bench.uri}")
    yield bench.measure(
        "minilm",
        {"tokens": sizes.tokens},
        array_limit(bench.config, graph, [sizes.tokens]),
        lambda device: _run(device, graph, inputs),
        expected,
        sizes.reference,
    )


def _run(device: Device, graph: Graph, inputs: dict[str, np.ndarray]) -> Ran:
    counted: list[Counters] = []
    runner = DeviceExecutor(device, counted.append)
    try:
        values = runner.run(graph, [inputs])
    finally:
        runner.close()
    (counters,) = counted
    return Ran(values, counters)
