"""Running the same inputs on several executors and comparing the results bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from lockstep_hls.toolchain import Progress

from lockstep.cache_policy import WHOLE, CachePolicy
from lockstep.executors import OpenExecutor, check_uri, executor
from lockstep.graph import Gather, Graph

Inputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Difference:
    """The first value, in the order of sequences, tokens and features, in which a device differs from the reference.

    ``expected`` and ``actual`` are the bits of the float32 values, such as ``"0x3f800000"``.
    """

    device: str
    sequence: int
    token: int
    feature: int
    expected: str
    actual: str

    def __str__(self) -> str:
        expected, actual = (_value(bits) for bits in (self.expected, self.actual))
        return (
            f"sequence {self.sequence}, token {self.token}, feature {self.feature}: {self.device} has {actual:.9g} "
            f"({self.actual}) where {expected:.9g} ({self.expected}) is expected"
        )


@dataclass(frozen=True)
class Verification:
    """What a comparison found.

    Attributes
    ----------
    reference : URI of the executor with which the others were compared.
    values_compared : output values of all sequences, once for every executor that was compared.
    differences : URI -> number of values that differ.
    first_difference : of the first executor that differs, or none.
    cycles : URI -> cycles of its programs, none for the host.
    """

    reference: str
    values_compared: int
    differences: dict[str, int]
    first_difference: Difference | None
    cycles: dict[str, int | None]

    @property
    def identical(self) -> bool:
        """Whether no value differs."""
        return self.first_difference is None


def differing(expected: np.ndarray, actual: np.ndarray) -> np.ndarray:
    """bool[...]: where two float32 arrays of one shape differ in their bits; NaN equals NaN."""
    if expected.shape != actual.shape:
        raise ValueError(f"results have the shapes {expected.shape} and {actual.shape}")
    same = np.ascontiguousarray(expected).view(np.uint32) == np.ascontiguousarray(actual).view(np.uint32)
    return ~(same | (np.isnan(expected) & np.isnan(actual)))


def first_difference(device: str, expected: Sequence[np.ndarray], actual: Sequence[np.ndarray]) -> Difference | None:
    """Where ``actual`` first differs from ``expected``; arrays are ``float32[tokens, features]``, one per sequence."""
    for sequence, (wanted, found) in enumerate(zip(expected, actual, strict=True)):
        places = np.argwhere(differing(wanted, found))
        if len(places):
            token, feature = (int(i) for i in places[0])
            return Difference(device, sequence, token, feature, _bits(wanted, places[0]), _bits(found, places[0]))
    return None


def random_inputs(graph: Graph, tokens: int, seed: int) -> Inputs:
    """Inputs for one sequence of ``tokens`` tokens, drawn from ``seed``: indices inside their tables, normal floats."""
    random = np.random.default_rng(seed)
    inputs: Inputs = {}
    for name, node in graph.inputs.items():
        shape = [tokens if size is None else size for size in node.shape]
        if node.dtype.startswith("int"):
            tables = [len(graph.tensors[g.table]) for g in graph.of(Gather) if g.indices == node.value]
            inputs[name] = random.integers(0, min(tables, default=2), shape)
        else:
            inputs[name] = random.normal(size=shape).astype(np.float32)
    return inputs


def verify(graph: Graph, sequences: list[Inputs], devices: Sequence[str], progress: Progress = None) -> Verification:
    """Run ``sequences`` on each device and compare all output values with those of the first one.

    Parameters
    ----------
    graph : contract stage, such as ``Model.graph``.
    devices : URIs, two or more. progress : told in one line what is built and what runs.

    Raises what :func:`lockstep.executor` and the model raise; every URI is checked before anything runs.
    """

    def run(device: OpenExecutor) -> list[np.ndarray]:
        return device.run(graph, sequences)

    return _compare(devices, run, progress)


def verify_generation(
    graph: Graph,
    prompts: list[np.ndarray],
    tokens: int,
    devices: Sequence[str],
    progress: Progress = None,
    policy: CachePolicy = WHOLE,
) -> Verification:
    """Generate ``tokens`` tokens behind each prompt: int[n], and compare the logits of each with those of the first
    device, which alone chooses the tokens. Every device keeps its own key-value cache, as ``policy`` says.

    Raises ``ModelError`` for a graph that is no causal language model, or prompts that do not fit, and what
    :func:`verify` raises. ``token`` of a difference counts generated tokens from 0.
    """
    chosen: list[list[int]] = [[] for _ in prompts]

    def run(device: OpenExecutor) -> list[np.ndarray]:
        return [
            generated_logits(device, graph, prompt, tokens, taken, policy)
            for prompt, taken in zip(prompts, chosen, strict=True)
        ]

    return _compare(devices, run, progress)


def generated_logits(
    device: OpenExecutor,
    graph: Graph,
    prompt: np.ndarray,
    tokens: int,
    chosen: list[int],
    policy: CachePolicy = WHOLE,
) -> np.ndarray:
    """``float32[tokens, vocabulary]``: the logits from which ``tokens`` tokens behind ``prompt``: int[n] are chosen.

    ``chosen`` holds the tokens to take; where it has fewer, the best ones are taken and appended.
    policy : how the cache is treated.
    """
    session = device.open_session(graph, len(prompt) + tokens, policy)
    try:
        rows = [session.extend(prompt)]
        for number in range(tokens):
            if len(chosen) == number:
                chosen.append(int(rows[-1][0].argmax()))
            if number + 1 < tokens:
                rows.append(session.extend(np.array(chosen[number : number + 1])))
        return np.concatenate(rows)
    finally:
        session.close()


def replay(
    graph: Graph, sequences: Sequence[Inputs], generate: int | None, policy: CachePolicy = WHOLE
) -> Callable[[OpenExecutor], list[np.ndarray]]:
    """What runs ``sequences`` on any executor, always the same way.

    generate : tokens to generate behind each sequence; the first executor chooses them, all others take them too.
    policy : how the cache is treated meanwhile.
    """
    chosen: list[list[int]] = [[] for _ in sequences]

    def run(device: OpenExecutor) -> list[np.ndarray]:
        if generate is None:
            return device.run(graph, list(sequences))
        prompts = [next(iter(inputs.values())) for inputs in sequences]
        return [
            generated_logits(device, graph, prompt, generate, taken, policy)
            for prompt, taken in zip(prompts, chosen, strict=True)
        ]

    return run


def _compare(
    devices: Sequence[str], run: Callable[[OpenExecutor], list[np.ndarray]], progress: Progress
) -> Verification:
    if len(devices) < 2:
        raise ValueError("a comparison needs two devices")
    for uri in devices:
        check_uri(uri)
    expected: list[np.ndarray] | None = None
    differences: dict[str, int] = {}
    cycles: dict[str, int | None] = {}
    first: Difference | None = None
    compared = 0
    for uri in devices:
        with executor(uri, progress) as device:
            if progress is not None:
                progress(f"running on {uri}")
            results = run(device)
            cycles[uri] = device.cycles
        if expected is None:
            expected = results
            continue
        compared += sum(result.size for result in results)
        found = sum(int(differing(e, a).sum()) for e, a in zip(expected, results, strict=True))
        differences[uri] = differences.get(uri, 0) + found
        first = first or first_difference(uri, expected, results)
    return Verification(devices[0], compared, differences, first, cycles)


def _bits(array: np.ndarray, at: np.ndarray) -> str:
    return f"0x{int(array[tuple(at)].view(np.uint32)):08x}"


def _value(bits: str) -> float:
    return float(np.uint32(int(bits, 16)).view(np.float32))
