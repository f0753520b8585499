"""What int4 and zeros cost on real weights, on text that calibration never saw; `-s` shows the figures."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from bytelm.corpus import read_corpus, sample
from bytelm.tokenizer import BOS
from lockstep.checkpoint import find_folder
from lockstep.evaluate import run_float
from lockstep.model import HostExecutor, Model, load
from lockstep.quantisation.formats import Format
from lockstep.quantisation.recipe import Quantised, Recipe, calibration_inputs, quantise_model
from lockstep.quantise import prescales_of, quantise
from lockstep_hls import kernels
from sample_sentences import SENTENCES

INT4, SPARSE = Format(4, 32), Format(8, None, (2, 4))
#: Bytes of held-out text that are scored, in windows of as many.
SCORED, WINDOW = 16_384, 1024
#: Bytes of training text with which `tiny` is calibrated.
CALIBRATED = 32_768


@pytest.fixture(scope="module")
def wanted(minilm: Model) -> np.ndarray:
    return np.stack(
        [minilm.pooling(run_float(minilm.float_graph, {"input_ids": ids})) for ids in minilm.tokenize(SENTENCES)]
    )


def sentence_cosines(minilm: Model, recipe: Recipe, wanted: np.ndarray) -> tuple[np.ndarray, Quantised]:
    found = quantise_model(minilm, recipe, calibration_inputs(minilm, None), prescales_of(minilm.graph))
    contract = quantise(minilm.float_graph, found.prescales, found.weights)
    hidden = HostExecutor(kernels).run(contract, [{"input_ids": ids} for ids in minilm.tokenize(SENTENCES)])
    cosines = (np.stack([minilm.pooling(rows) for rows in hidden]).astype(np.float64) * wanted).sum(axis=1)
    print(f"{recipe.method} {recipe.format}, {found.bits:.2f} bits: {cosines.mean():.4f}, least {cosines.min():.4f}")
    return cosines, found


def test_minilm_in_int4(minilm: Model, wanted: np.ndarray) -> None:
    cosines, found = sentence_cosines(minilm, Recipe(INT4, "gptq"), wanted)
    assert found.bits == 4.25
    assert cosines.mean() >= 0.974


@pytest.mark.slow
def test_minilm_with_6_bits_on_average(minilm: Model, wanted: np.ndarray) -> None:
    cosines, found = sentence_cosines(minilm, Recipe(INT4, "gptq", 6.0), wanted)
    assert found.bits <= 6
    assert cosines.mean() >= 0.985


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "least"),
    [
        (Recipe(INT4, "rtn"), 0.96),
        (Recipe(INT4, "awq"), 0.965),
        (Recipe(Format(4, 64), "gptq"), 0.97),
        (Recipe(Format(4, 128), "gptq"), 0.96),
        (Recipe(SPARSE, "wanda"), 0.7),
        (Recipe(SPARSE, "sparsegpt"), 0.8),
    ],
)
def test_minilm_in_other_formats(minilm: Model, wanted: np.ndarray, recipe: Recipe, least: float) -> None:
    """Not good enough to use with zeros and no training; the bounds say that it gets no worse."""
    cosines, _ = sentence_cosines(minilm, recipe, wanted)
    assert cosines.mean() >= least


@pytest.fixture(scope="module")
def tiny() -> Model:
    return load("tiny")


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of the text that `tiny` was trained on."""
    path = tmp_path_factory.mktemp("text") / "code.txt"
    path.write_bytes(sample(read_corpus().training, CALIBRATED))
    return path


def bits_per_byte(logits: np.ndarray, following: np.ndarray) -> float:
    shares = torch.from_numpy(logits).double().log_softmax(dim=1).numpy()
    return float(-shares[np.arange(len(following)), following].mean() / math.log(2))


def windows() -> list[np.ndarray]:
    text = (find_folder("tiny") / "heldout.txt").read_bytes()[:SCORED]
    return [np.array([BOS, *text[start : start + WINDOW]]) for start in range(0, SCORED, WINDOW)]


@pytest.fixture(scope="module")
def exact(tiny: Model) -> float:
    """Bits per byte of the float model."""
    graph = tiny.float_graph
    return float(np.mean([bits_per_byte(run_float(graph, {"input_ids": ids[:-1]}), ids[1:]) for ids in windows()]))


def test_a_language_model_reads_the_file_as_one_text(tiny: Model, code: Path) -> None:
    pieces = [inputs["input_ids"] for inputs in calibration_inputs(tiny, code)]
    assert {len(piece) for piece in pieces[:-1]} == {512}
    assert np.concatenate(pieces).tolist() == [BOS, *code.read_bytes()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "most"),
    [
        (Recipe(INT4, "gptq"), 0.05),
        (Recipe(INT4, "rtn"), 0.05),
        (Recipe(SPARSE, "sparsegpt"), 0.15),
        (Recipe(Format(4, 32, (2, 4)), "sparsegpt"), 0.2),
    ],
)
def test_tiny_on_held_out_text(tiny: Model, code: Path, exact: float, recipe: Recipe, most: float) -> None:
    found = quantise_model(tiny, recipe, calibration_inputs(tiny, code), {})
    session = HostExecutor(kernels).open_session(quantise(tiny.float_graph, {}, found.weights), WINDOW)
    scores = []
    for ids in windows():
        session.truncate(0)
        scores.append(bits_per_byte(session.extend(ids[:-1], "all"), ids[1:]))
    cost = float(np.mean(scores)) - exact
    print(f"{recipe.method} {recipe.format}, {found.bits:.2f} bits: {cost:+.4f} bits per byte to {exact:.4f}")
    assert cost <= most
