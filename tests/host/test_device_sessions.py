"""Causal models with their key-value cache on cores: the bits of the host, one program for every context."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from architectures import CASES, LAST, captured, example_inputs
from lockstep.bench.random_models import LlamaShape, llama_graph, random_weights
from lockstep.compiler.execute import DeviceExecutor
from lockstep.errors import SequenceLengthError
from lockstep.evaluate import run_reference
from lockstep.graph import Graph
from lockstep.model import HostExecutor
from lockstep.quantise import quantise
from lockstep.session import Session
from lockstep_driver import Device, OutOfDeviceMemory, open_device
from lockstep_hls import kernels
from support import assert_same_bits

TOKENS = 70
#: Four tiles of keys; every second layer sees a window that ends inside a tile; two kinds of grouped heads.
SHAPES = {
    "grouped": LlamaShape(61, 32, 48, 2, 4, 2, 300, tile=16),
    "windowed": LlamaShape(61, 48, 40, 2, 3, 1, 300, tile=16, window=21, head_norm=True),
    "one head": LlamaShape(61, 16, 48, 1, 1, 1, 300, tile=16),
    "one tile": LlamaShape(61, 32, 48, 1, 2, 2, 300),
}
IDS = np.random.default_rng(3).integers(0, 61, TOKENS)


def graph(shape: str) -> Graph:
    return llama_graph(SHAPES[shape], random_weights(SHAPES[shape]))


def host(model: Graph, capacity: int) -> Session:
    return HostExecutor(kernels).open_session(model, capacity)


def in_pieces(session: Session, ids: np.ndarray, cuts: Iterable[int]) -> np.ndarray:
    return np.concatenate([session.extend(part, "all") for part in np.split(ids, list(cuts))])


def generated(sessions: list[Session], prompt: np.ndarray, steps: int) -> list[np.ndarray]:
    """All logits of a prompt and of ``steps`` tokens behind it, the same tokens on every session."""
    found = [[session.extend(prompt, "all")] for session in sessions]
    for _ in range(steps):
        token = np.array([found[0][-1][-1].argmax()])
        for session, logits in zip(sessions, found, strict=True):
            logits.append(session.extend(token))
    return [np.concatenate(logits) for logits in found]


@pytest.mark.parametrize("core", ["tiny", "laptop", "ulx3s"])
@pytest.mark.parametrize("shape", SHAPES)
def test_cores_have_the_bits_of_the_host_however_a_text_is_cut(shape: str, core: str) -> None:
    model = graph(shape)
    wanted = host(model, TOKENS).extend(IDS, "all")
    with open_device(f"fast:{core}") as device:
        session = DeviceExecutor(device).open_session(model, TOKENS)
        for cuts in ((), (1, 2, 18, 19, 40), range(9, 30)):
            session.truncate(0)
            assert_same_bits(in_pieces(session, IDS, cuts), wanted)
        session.truncate(33)
        assert_same_bits(session.extend(IDS[33:50]), wanted[49:50])


@pytest.mark.parametrize("core", ["tiny", pytest.param("laptop", marks=pytest.mark.slow)])
@pytest.mark.parametrize("shape", ["grouped", "windowed"])
def test_the_rtl_has_the_bits_of_the_host_in_the_predicted_time(shape: str, core: str) -> None:
    model, cycles = graph(shape), {}
    wanted = host(model, TOKENS).extend(IDS, "all")
    for uri in (f"rtl:{core}", f"fast:{core}"):
        counted: list[int] = []
        with open_device(uri) as device:
            session = DeviceExecutor(device, lambda c, counted=counted: counted.append(c.cycles)).open_session(
                model, TOKENS
            )
            assert_same_bits(in_pieces(session, IDS, (5, 6, 7, 60, 61)), wanted)
        cycles[uri[:4]] = sum(counted)
    assert cycles["fast"] == pytest.approx(cycles["rtl:"], rel=0.03)


def test_one_program_serves_every_context() -> None:
    model = graph("grouped")
    with open_device("fast:laptop") as device:
        loaded: list[Any] = []
        load = device.load
        device.load = lambda program, **options: loaded.append(program) or load(program, **options)  # type: ignore
        session = DeviceExecutor(device).open_session(model, TOKENS)
        for token in IDS:
            session.extend(np.array([token]))
    assert len(loaded) == 1


def test_memory_of_a_device_does_not_grow_and_comes_back() -> None:
    model = graph("grouped")
    with open_device("fast:tiny") as device:
        executor = DeviceExecutor(device)
        executor.image(model)
        free = []
        for _ in range(3):
            session = executor.open_session(model, TOKENS)
            session.extend(IDS[:20])
            session.close()
            free.append(largest_buffer(device))
    # What is left behind is the model's parameters, placed once.
    assert free[0] == free[1] == free[2]


def largest_buffer(device: Device) -> int:
    """The largest multiple of 256 bytes that can be had."""
    low, high = 0, device.memory_bytes // 256
    while low < high:
        middle = (low + high + 1) // 2
        try:
            device.free(device.allocate(middle * 256))
            low = middle
        except OutOfDeviceMemory:
            high = middle - 1
    return low * 256


def test_what_does_not_fit_is_refused_and_leaves_the_session_as_it_was() -> None:
    model = graph("grouped")
    with open_device("fast:tiny") as device:
        session = DeviceExecutor(device).open_session(model, 20)
        before = session.extend(IDS[:15], "all")
        with pytest.raises(SequenceLengthError, match="has 15 tokens and room for 20; 6 more do not fit"):
            session.extend(IDS[15:21])
        with pytest.raises(SequenceLengthError, match="no token"):
            session.extend(IDS[:0])
        session.truncate(0)
        assert_same_bits(session.extend(IDS[:15], "all"), before)
    long = LlamaShape(61, 64, 64, 2, 4, 4, 8192)
    with open_device("fast:tiny?memory=1M") as device:
        executor = DeviceExecutor(device)
        with pytest.raises(OutOfDeviceMemory, match=r"\d+ bytes are missing; open the device with more"):
            executor.open_session(llama_graph(long, random_weights(long)), 8000)
        assert_same_bits(executor.open_session(model, 20).extend(IDS[:15], "all"), before)


@pytest.mark.parametrize("kind", [kind for kind, case in CASES.items() if case.causal])
def test_causal_architectures_have_the_bits_of_the_host(kind: str) -> None:
    model = quantise(captured(kind)[1])
    ids = example_inputs(kind, 40)["input_ids"][0].numpy()
    with open_device("fast:tiny") as device:
        sessions = [host(model, LAST), DeviceExecutor(device).open_session(model, LAST)]
        expected, found = generated(sessions, ids, 4)
    assert_same_bits(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("core", ["tiny", "laptop"])
@pytest.mark.parametrize("kind", [kind for kind, case in CASES.items() if case.causal])
def test_causal_architectures_at_every_length(kind: str, core: str) -> None:
    model = quantise(captured(kind, 256)[1])
    with open_device(f"fast:{core}") as device:
        sessions = [host(model, 220), DeviceExecutor(device).open_session(model, 220)]
        for tokens in (1, 7, 64, 200):
            for session in sessions:
                session.truncate(0)
            expected, found = generated(sessions, example_inputs(kind, tokens)["input_ids"][0].numpy(), 16)
            assert_same_bits(found, expected)


@pytest.mark.parametrize("kind", [kind for kind, case in CASES.items() if not case.causal])
def test_encoders_have_the_bits_of_the_host(kind: str) -> None:
    model = quantise(captured(kind)[1])
    with open_device("fast:laptop") as device:
        executor = DeviceExecutor(device)
        for tokens in (1, 7, 40, LAST - 2):
            inputs = {name: tensor[0].numpy() for name, tensor in example_inputs(kind, tokens).items()}
            (found,) = executor.run(model, [inputs])
            assert_same_bits(found, run_reference(model, inputs, kernels))
