"""``lockstep quantize`` as its users meet it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from causal_models import VOCABULARY, byte_tokenizer, save_causal_model
from command_line import Command
from lockstep.errors import CheckpointError
from lockstep.model import load
from lockstep.quantisation.write import check_output
from lockstep_isa.instructions import MATRIX, Sparsity, Weights
from lockstep_isa.program import Program
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

TEXT = "a cat sleeps on the sofa while rain falls\nbread bakes and a cat falls\n"


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text(TEXT)
    return path


def test_a_model_becomes_a_folder_that_loads(
    cli: Command, small_folder: Path, tmp_path: Path, calibration: Path
) -> None:
    out = tmp_path / "out"
    outcome = cli("quantize", small_folder, "--out", out, "--calibration", calibration)
    assert outcome.status == 0, outcome.err
    assert "4.25 bits a weight on average" in outcome.out
    assert "int4 g32" in outcome.out
    assert "quantising encoder.layer.0.attention.self.query.weight" in outcome.err
    assert load(out).report().stored == {"int4 g32": 6}
    assert load(out).has_tokenizer
    assert cli("embed", out, "a cat sleeps").status == 0
    shown = cli("inspect", out)
    assert "weights stored as int4 g32" in shown.out
    assert cli("inspect", out, "--json").json["stored"] == {"int4 g32": 6}


def test_json_tells_the_loss_of_every_layer(
    cli: Command, small_folder: Path, tmp_path: Path, calibration: Path
) -> None:
    out = tmp_path / "out"
    given = ("--method", "gptq", "--bits", 6.5, "--calibration", calibration, "--json")
    report = cli("quantize", small_folder, "--out", out, *given).json
    assert report["method"] == "gptq"
    assert report["bits"] <= 6.5
    assert {layer["format"] for layer in report["layers"]} == {"int4 g32", "int8"}
    assert all(0 < layer["loss"] < 0.1 for layer in report["layers"])
    assert [point["layer"] for point in report["curve"]].count(None) == 1
    assert report["bytes"] == sum(tensor.nbytes for tensor in load_file(out / "model.safetensors").values())
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    targets = [name for group in config["config_groups"].values() for name in group["targets"]]
    assert sorted(targets) == sorted(layer["name"].removesuffix(".weight") for layer in report["layers"])


def test_a_language_model_generates_from_int4(cli: Command, tmp_path: Path, calibration: Path) -> None:
    source, out = save_causal_model(tmp_path / "source"), tmp_path / "out"
    assert cli("quantize", source, "--out", out, "--calibration", calibration).status == 0
    assert load(out).report().stored == {"int4 g32": 15}, "two layers of seven and the head"
    outcome = cli("generate", out, "--prompt", "a cat", "--max-new-tokens", 3, "--json")
    assert outcome.status == 0, outcome.err
    assert (out / "generation_config.json").is_file() == (source / "generation_config.json").is_file()


@pytest.mark.parametrize(
    ("given", "form"),
    [
        (("--weights", "int8", "--sparsity", "2:4"), (Weights.INT8, Sparsity.TWO_OF_FOUR)),
        (("--weights", "int4"), (Weights.INT4_32, Sparsity.DENSE)),
        (("--weights", "int4", "--sparsity", "2:4"), (Weights.INT4_32, Sparsity.TWO_OF_FOUR)),
    ],
)
def test_a_core_streams_what_was_written(
    cli: Command, small_folder: Path, tmp_path: Path, calibration: Path, given: tuple[str, ...], form: tuple[int, int]
) -> None:
    out = tmp_path / "out"
    asked = ("--method", "rtn", "--calibration", calibration)
    assert cli("quantize", small_folder, "--out", out, *given, *asked).status == 0
    assert cli("verify", out, "--device", "cpu", "--device", "fast:laptop", "--tokens", 21).status == 0
    program = tmp_path / "out.prog"
    compiled = cli("compile", out, "--device", "fast:laptop", "--tokens", 21, "-o", program, "--json").json
    assert compiled["expanded"] == []
    forms = {(i.weights, i.sparsity) for i in Program.load(program).instructions if i.type is MATRIX}
    assert forms == {form, (Weights.INT8, Sparsity.DENSE)}, "products with weights, and those of attention"
    told = cli("run", out, "a cat sleeps", "--device", "fast:ulx3s")
    assert "expanded to int8: encoder.layer.0.attention.self.query.weight" in told.out.replace("\n", " ")
    assert "core 'ulx3s' takes no packed weights" in told.out.replace("\n", " ")


def test_a_model_that_the_layout_cannot_hold_is_refused(cli: Command, tmp_path: Path, calibration: Path) -> None:
    """GPT-2 stores its layers as [inputs, outputs]."""
    words = {"vocab_size": VOCABULARY, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    source = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=64, **words)).save_pretrained(source)
    byte_tokenizer().save_pretrained(source)
    refused = cli("quantize", source, "--out", tmp_path / "out", "--calibration", calibration)
    refused.refused(2, "holds no weight of a layer as [outputs, inputs]")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sparsity", ["2:4", "1:4"])
def test_sparse_weights(cli: Command, small_folder: Path, tmp_path: Path, calibration: Path, sparsity: str) -> None:
    out = tmp_path / "out"
    given = ("--weights", "int8", "--sparsity", sparsity, "--calibration", calibration, "--json")
    report = cli("quantize", small_folder, "--out", out, *given).json
    assert report["method"] == "sparsegpt"
    assert load(out).report().stored == {f"int8 {sparsity}": 6}


def test_mistakes_are_named(cli: Command, small_folder: Path, tmp_path: Path, calibration: Path) -> None:
    out = tmp_path / "out"

    def refused(*arguments: object, named: str) -> None:
        cli("quantize", small_folder, "--out", out, *arguments).refused(2, named)
        assert not out.exists()

    refused("--weights", "int5", named="--weights int5 is none of int8, int4")
    refused("--sparsity", "4:8", named="--sparsity 4:8 is none of none, 2:4, 1:4")
    refused("--group", 16, named="a group of 16; it may be 32, 64, 128")
    refused("--group", 32, "--weights", "int8", named="--group is for int4")
    refused("--group", 64, named="groups of 64 do not divide the 32 inputs of 'encoder.layer.0.attention.self.query")
    refused("--method", "magic", named="no method 'magic'")
    refused("--method", "wanda", named="wanda is not for weights without sparsity")
    refused("--bits", 4, "--calibration", calibration, named="int4 g32 alone takes 4.25")
    refused("--calibration", tmp_path / "absent.txt", named="absent.txt: No such file")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    refused("--calibration", empty, named="holds no text")
    odd = tmp_path / "odd.txt"
    odd.write_bytes(b"\xff\xfe")
    refused("--calibration", odd, named="no text in UTF-8")


def test_nothing_is_overwritten(cli: Command, small_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    cli("quantize", small_folder, "--out", tmp_path / "out").refused(2, "is there already", "new or empty folder")
    cli("quantize", small_folder, "--out", small_folder / "out").refused(2, "inside the model's own folder")


@pytest.mark.parametrize("place", ["file/out", "file/below/out"])
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_quantised(
    cli: Command, small_folder: Path, tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").write_text("mine")
    outcome = cli("quantize", small_folder, "--out", tmp_path / place)
    outcome.refused(2, f"{tmp_path / place} cannot be written, since", "takes no folder")
    assert "quantising" not in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_quantised_model_is_not_quantised_again(
    cli: Command, small_folder: Path, tmp_path: Path, calibration: Path
) -> None:
    out = tmp_path / "out"
    assert cli("quantize", small_folder, "--out", out, "--method", "rtn", "--calibration", calibration).status == 0
    cli("quantize", out, "--out", tmp_path / "again").refused(2, "quantised already")


def test_a_pre_scale_goes_along_unless_it_is_left_out(
    cli: Command, small_folder: Path, tmp_path: Path, calibration: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    given = ("--weights", "int8", "--calibration", calibration)
    assert cli("quantize", small_folder, "--out", first, "--method", "smoothquant", *given).status == 0
    assert (first / "lockstep_prescale.safetensors").is_file()
    assert load(first).report().prescaled[0] > 0
    assert cli("quantize", small_folder, "--out", second, "--method", "rtn", "--no-prescale", *given).status == 0
    assert load(second).report().prescaled[0] == 0


def test_a_gguf_file_is_read_but_not_written(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"")
    for source in (tmp_path, tmp_path / "model.gguf"):
        with pytest.raises(CheckpointError, match=r"model\.gguf is a GGUF file.*give a folder of safetensors"):
            check_output(source, tmp_path.parent / "out")
