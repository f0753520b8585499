"""Weights and activations in int8: scales, sharing, pre-scales and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from lockstep.calibrate import calibrate, main, sentences
from lockstep.capture import capture
from lockstep.errors import PrescaleError
from lockstep.evaluate import run_float, run_reference
from lockstep.graph import Dense, Fallback, Graph, Linear, Quantise
from lockstep.model import Model, load
from lockstep.quantise import fit_prescales, load_prescales, quantise, quantise_points, quantise_weight
from lockstep.recognise import recognise
from lockstep_isa import operations
from safetensors.numpy import save_file
from sample_models import FEATURES, Between, Block, Sine, random_bert
from sample_sentences import SENTENCES
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def graph() -> Graph:
    return load(random_bert()).float_graph


weights = arrays.arrays(np.float32, (3, 5), elements=st.floats(-(2.0**100), 2.0**100, width=32))


@given(weights)
def test_weights_come_back_within_half_a_step(weight: np.ndarray) -> None:
    q, scale = quantise_weight(weight)
    assert q.dtype == np.int8
    assert scale.dtype == np.float32
    assert (np.abs(q.astype(int)) <= 127).all()
    kept = scale > 0
    error = np.abs(q[kept].astype(np.float64) * scale[kept, None] - weight[kept])
    assert (error <= 0.5001 * scale[kept, None]).all()


def test_scale_is_a_127th_of_the_largest_weight() -> None:
    q, scale = quantise_weight(np.array([[1.0, -2.54, 0.01], [0.0, 0.0, 0.0]], np.float32))
    assert q.tolist() == [[50, -127, 0], [0, 0, 0]]
    assert scale[0] == np.float32(2.54) / np.float32(127)
    assert scale[1] == 0


def test_rounding_is_to_nearest_even() -> None:
    q, _ = quantise_weight(np.array([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]], np.float32))
    assert q.tolist() == [[127, 0, 2, 2, 0, -2]]


def test_a_channel_of_zeros_gives_its_bias(graph: Graph) -> None:
    module = Block().eval()
    with torch.no_grad():
        module.down.weight[3] = 0
    contract = quantise(recognise(capture(module, {"x": torch.zeros(1, 8, FEATURES)})))
    result = run_reference(contract, {"x": np.ones((4, FEATURES), np.float32)}, operations)
    assert np.isfinite(result).all()


def test_products_of_one_value_share_its_quantisation(graph: Graph) -> None:
    contract = quantise(graph)
    assert contract.of(Dense) == []
    assert len(contract.of(Quantise)) == 8
    first = contract.of(Quantise)[0]
    assert [node.weight for node in contract.of(Linear) if node.quantised == first.value] == [
        f"encoder.layer.0.attention.self.{part}.weight.int8" for part in ("query", "key", "value")
    ]
    for node in contract.of(Linear):
        assert contract.tensors[node.weight].dtype == np.int8
        assert contract.tensors[node.scales].dtype == np.float32


def test_a_pre_scale_moves_between_activation_and_weight(graph: Graph) -> None:
    point = next(iter(quantise_points(graph)))
    prescale = np.exp2(np.arange(FEATURES) % 3 - 1).astype(np.float32)
    contract = quantise(graph, {point: prescale})
    first = contract.of(Quantise)[0]
    assert first.prescale is not None
    assert np.array_equal(contract.tensors[first.prescale], prescale)
    q, scale = quantise_weight(graph.tensors[point] / prescale)
    assert np.array_equal(contract.tensors[f"{point}.int8"], q)
    assert np.array_equal(contract.tensors[f"{point}.int8.scales"], scale)


def test_int8_stays_close_to_float_with_a_fallback_in_the_middle() -> None:
    torch.manual_seed(2)
    floating = recognise(capture(Between(Sine()).eval(), {"x": torch.zeros(1, 8, FEATURES)}))
    contract = quantise(floating)
    assert len(contract.of(Fallback)) == 1
    x = np.random.default_rng(0).standard_normal((9, FEATURES), np.float32)
    wanted, got = run_float(floating, {"x": x}), run_reference(contract, {"x": x}, operations)
    assert np.corrcoef(wanted.ravel(), got.ravel())[0, 1] > 0.999


def test_shared_weights_stay_shared_in_int8() -> None:
    from transformers import AlbertConfig, AlbertModel

    config = AlbertConfig(
        hidden_size=32,
        num_attention_heads=4,
        intermediate_size=64,
        vocab_size=50,
        embedding_size=16,
        num_hidden_layers=3,
    )
    floating = load(AlbertModel(config).eval()).float_graph
    prescales, _ = fit_prescales(floating, [{"input_ids": np.arange(5, 12)}])
    contract = quantise(floating, prescales)
    assert len(contract.of(Linear)) == 19
    assert len({node.weight for node in contract.of(Linear)}) == 7


def test_fitting_lowers_the_error_of_outlier_channels_and_repeats_itself(graph: Graph) -> None:
    spread = np.exp2(np.arange(FEATURES) % 7).astype(np.float32)
    name = "embeddings.LayerNorm.weight"
    loud = Graph(graph.nodes, graph.output, {**graph.tensors, name: graph.tensors[name] * spread}, graph.max_tokens)
    samples = [{"input_ids": np.arange(start, start + 9)} for start in range(0, 90, 9)]
    prescales, chosen = fit_prescales(loud, samples)
    again, _ = fit_prescales(loud, samples)
    assert prescales.keys() == again.keys() == chosen.keys()
    assert all(np.array_equal(prescales[point], again[point]) for point in prescales)
    inputs = {"input_ids": np.arange(3, 17)}
    wanted = run_float(loud, inputs)

    def error(contract: Graph) -> float:
        return float(((run_reference(contract, inputs, operations) - wanted) ** 2).mean())

    assert error(quantise(loud, prescales)) < 0.5 * error(quantise(loud))


def test_the_bundled_pre_scale_covers_every_point(minilm: Model) -> None:
    assert minilm.report().prescaled == (24, 24)


def test_calibration_and_accuracy_use_different_sentences() -> None:
    assert len(sentences()) >= 32
    assert len(SENTENCES) >= 30
    assert not set(sentences()) & set(SENTENCES)


def test_calibration_writes_what_load_finds(tmp_path: Path) -> None:
    random_bert().save_pretrained(tmp_path)
    words = {word: number for number, word in enumerate(["[UNK]", "one", "sentence", "and", "another"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    output, chosen = calibrate(str(tmp_path), ["one sentence", "and another sentence"])
    assert output.parent == tmp_path
    assert load_prescales(output).keys() == chosen.keys()
    assert load(tmp_path).report().prescaled == (len(chosen), 8)
    assert load(tmp_path, prescale=None).report().prescaled == (0, 8)


def test_mistakes_in_calibration_are_named_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "odd.txt").write_bytes(b"\xff")
    for arguments, named in (
        ([str(tmp_path / "nowhere")], "there is no folder"),
        (["minilm", "--sentences", str(tmp_path / "absent.txt")], "absent.txt: No such file"),
        (["minilm", "--sentences", str(tmp_path / "empty.txt")], "empty.txt holds no text"),
        (["minilm", "--sentences", str(tmp_path / "odd.txt")], "odd.txt is no text in UTF-8"),
    ):
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert named in said
        assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("elsewhere", np.ones(32, np.float32), "fitted for another model"),
        (None, np.ones(31, np.float32), r"not float32\[32\]"),
        (None, np.zeros(32, np.float32), "not a positive number"),
    ],
)
def test_a_pre_scale_that_does_not_fit_is_refused(
    graph: Graph, tmp_path: Path, name: str | None, array: np.ndarray, message: str
) -> None:
    path = tmp_path / "prescale.safetensors"
    save_file({name or next(iter(quantise_points(graph))): array}, path)
    with pytest.raises(PrescaleError, match=message):
        quantise(graph, load_prescales(path))


def test_pre_scale_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PrescaleError, match="there is no pre-scale file"):
        load_prescales(tmp_path / "absent.safetensors")
    (tmp_path / "odd.safetensors").write_bytes(b"odd")
    with pytest.raises(PrescaleError, match="not a readable safetensors file"):
        load_prescales(tmp_path / "odd.safetensors")
