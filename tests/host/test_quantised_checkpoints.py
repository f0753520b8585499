"""Reading checkpoints that others quantised, and writing such that others can read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lockstep.errors import CheckpointError, ModelError, PrescaleError, QuantisedCheckpointError
from lockstep.evaluate import run_reference
from lockstep.executors import executor
from lockstep.graph import Linear
from lockstep.model import HostExecutor, Model, load
from lockstep.quantisation.formats import Format, QuantisedWeight
from lockstep.quantisation.methods import nearest
from lockstep.quantisation.recipe import Recipe, quantise_model
from lockstep.quantisation.schemes import Tensors, read_scheme
from lockstep.quantisation.stored import Stored, StoredWeights
from lockstep.quantisation.write import layout, names_in_files, write_folder
from lockstep.quantise import quantise
from lockstep_hls import kernels
from lockstep_isa import operations
from safetensors.torch import load_file, save_file
from sample_models import random_bert
from support import DATA, assert_same_bits

INPUTS = [{"input_ids": np.arange(start, start + 9)} for start in range(0, 90, 9)]
COMPRESSED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}


@pytest.fixture(scope="module")
def narrow(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``source`` in int4, rounded to nearest; not to be changed."""
    out = tmp_path_factory.mktemp("narrow") / "out"
    quantised(source, out, Recipe(Format(4, 32), "rtn"))
    return out


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    random_bert().save_pretrained(folder)
    return folder


# --- compressed-tensors ----------------------------------------------------------------------------------------------


def from_the_library() -> Tensors:
    """Tensors that compressed-tensors 0.20.0 packed, with the values that it unpacks them to, ``NAME.expected``."""
    return load_file(DATA / "compressed_tensors.safetensors")


@pytest.mark.parametrize(
    ("name", "format", "most"),
    [
        ("multiples", Format(4, 32), 0.0),
        ("channel", Format(), 0.0),
        ("tensor", Format(), 0.0),
        ("group", Format(4, 32), 0.04),
        ("asymmetric", Format(), 0.004),
    ],
)
def test_what_the_library_packs_means_the_same_here(name: str, format: Format, most: float) -> None:
    """Scales that are no whole multiples, and zero points, cost at most ``most`` of a channel's largest value."""
    tensors = {key: tensor for key, tensor in from_the_library().items() if key.startswith(f"{name}.")}
    expected = tensors.pop(f"{name}.expected").numpy()
    found = read_scheme(COMPRESSED, tensors)
    weight = found.weights[f"{name}.weight"]
    assert weight.format == format
    difference = np.abs(weight.dequantised() - expected) / np.abs(expected).max(axis=1, keepdims=True)
    assert difference.max() <= most
    assert found.errors.get(f"{name}.weight", 0) == pytest.approx(difference.max(), abs=1e-6)
    assert np.array_equal(tensors[f"{name}.weight"].numpy(), weight.dequantised())
    assert list(tensors) == [f"{name}.weight"]


@pytest.mark.parametrize(
    "format", [Format(), Format(4, 32), Format(4, 64), Format(8, None, (2, 4)), Format(4, 32, (1, 4))]
)
def test_what_is_written_is_read_to_the_bit(format: Format) -> None:
    weight = nearest(torch.randn(40, 128, generator=torch.Generator().manual_seed(3)), format)
    config: dict[str, Any] = dict(COMPRESSED)
    if format.pattern is not None:
        config["sparsity_config"] = {"format": "dense", "sparsity_structure": "2:4"}
    found = read_scheme(config, layout("layer", weight)).weights["layer.weight"]
    assert found.format == format
    assert_same_bits(found.values, weight.values)
    assert_same_bits(found.scale, weight.scale)
    assert_same_bits(found.w8, weight.w8)


def test_zeros_in_a_bitmask_are_put_back() -> None:
    weight = nearest(torch.randn(6, 40), Format(8, None, (2, 4)))
    kept, mask = [], np.zeros((6, 5), np.uint8)
    for row, column in np.ndindex(6, 40):
        # Two places for each four, those of zeros too where there are not two others.
        four = weight.values[row, column // 4 * 4 : column // 4 * 4 + 4]
        if column % 4 in np.argsort(-np.abs(four.astype(int)), kind="stable")[:2]:
            kept.append(weight.values[row, column])
            mask[row, column // 8] |= 1 << column % 8
    tensors = {
        "layer.compressed": torch.tensor(np.array(kept).reshape(6, 20)),
        "layer.bitmask": torch.from_numpy(mask),
        "layer.shape": torch.tensor([[6], [40]]),
        "layer.weight_scale": torch.from_numpy(weight.scale[:, None]),
    }
    config = {
        **COMPRESSED,
        "format": "int-quantized",
        "sparsity_config": {"format": "sparse-24-bitmask", "sparsity_structure": "2:4"},
    }
    found = read_scheme(config, dict(tensors)).weights["layer.weight"]
    assert np.array_equal(found.w8, weight.w8)
    assert found.pattern == (2, 4)
    del tensors["layer.bitmask"]
    with pytest.raises(QuantisedCheckpointError, match=r"lacks 'layer\.bitmask'"):
        read_scheme(config, tensors)


# --- GPTQ and AWQ ----------------------------------------------------------------------------------------------------


def packed(values: np.ndarray, order: tuple[int, ...]) -> torch.Tensor:
    """int32[rows, columns / 8]: nibble n of a word is value ``order[n]`` of its eight."""
    words = np.zeros((len(values), values.shape[1] // 8), np.uint32)
    for row, column in np.ndindex(*words.shape):
        for nibble, value in enumerate(order):
            words[row, column] |= np.uint32(int(values[row, 8 * column + value]) << 4 * nibble)
    return torch.from_numpy(words.view(np.int32))


IN_ORDER, AWQ_ORDER = (0, 1, 2, 3, 4, 5, 6, 7), (0, 2, 4, 6, 1, 3, 5, 7)


def gptq(q: np.ndarray, zeros: np.ndarray, scales: np.ndarray, group_of: np.ndarray) -> Tensors:
    """q: [inputs, outputs] in 0..15, zeros and scales: [groups, outputs]."""
    return {
        "layer.qweight": packed(q.T, IN_ORDER).T.contiguous(),
        "layer.qzeros": packed(zeros - 1, IN_ORDER),
        "layer.scales": torch.from_numpy(scales).half(),
        "layer.g_idx": torch.from_numpy(group_of).int(),
    }


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("ordered", [True, False])
def test_gptq_checkpoints(symmetric: bool, ordered: bool) -> None:
    rng = np.random.default_rng(6)
    q = rng.integers(0, 16, (64, 16))
    zeros = np.full((2, 16), 8) if symmetric else rng.integers(1, 16, (2, 16))
    scales = rng.uniform(0.01, 0.02, (2, 16)).astype(np.float16).astype(np.float32)
    group_of = np.arange(64) // 32 if ordered else rng.permutation(np.arange(64) // 32)
    wanted = ((q - zeros[group_of]) * scales[group_of]).T
    tensors = gptq(q, zeros, scales, group_of)
    found = read_scheme({"quant_method": "gptq", "bits": 4, "group_size": 32}, tensors)
    weight = found.weights["layer.weight"]
    assert weight.format == (Format(4, 32) if symmetric and ordered else Format())
    difference = np.abs(weight.dequantised() - wanted) / np.abs(wanted).max(axis=1, keepdims=True)
    assert difference.max() <= (0.04 if symmetric and ordered else 0.00395)
    assert list(tensors) == ["layer.weight"]


def test_a_folder_of_gptq_is_a_model(source: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(source, tmp_path / "out"))
    tensors, expected = load_file(out / "model.safetensors"), {}
    linear = [
        name for name in tensors if name.startswith("encoder") and name.endswith(("dense.weight", "query.weight"))
    ]
    for name in linear:
        weight = tensors.pop(name).numpy()
        groups = weight.reshape(len(weight), -1, 32)
        scales = (np.abs(groups).max(axis=2) / 7).astype(np.float16).astype(np.float32)
        q = np.clip(np.rint(groups / scales[..., None]), -8, 7).reshape(weight.shape).astype(int) + 8
        expected[name] = (q - 8) * np.repeat(scales, 32, axis=1)
        made = gptq(q.T, np.full(scales.T.shape, 8), scales.T, np.arange(weight.shape[1]) // 32)
        tensors |= {key.replace("layer", name.removesuffix(".weight"), 1): made[key].contiguous() for key in made}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
    (out / "config.json").write_text(json.dumps(config))
    model = load(out)
    assert sorted(model.stored.weights) == sorted(linear)
    assert model.report().stored == {"int4 g32": len(linear)}
    for name in linear:
        difference = np.abs(model.float_graph.tensors[name] - expected[name])
        assert difference.max() <= 0.04 * np.abs(expected[name]).max()
        assert np.array_equal(model.graph.tensors[f"{name}.int8"], model.stored.weights[name].w8)
    wanted = hidden(load(source))
    assert np.corrcoef(hidden(model).ravel(), wanted.ravel())[0, 1] > 0.98


def test_gptq_of_the_second_version_stores_zero_points_as_they_are() -> None:
    q, scales = np.full((64, 16), 3), np.full((2, 16), 0.25, np.float32)
    tensors = gptq(q, np.full((2, 16), 8), scales, np.arange(64) // 32)
    found = read_scheme({"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}, tensors)
    # The helper stores 7; the first version would take it for 8.
    assert (found.weights["layer.weight"].dequantised() == (3 - 7) * 0.25).all()


def test_awq_checkpoints() -> None:
    rng = np.random.default_rng(7)
    q, zeros = rng.integers(0, 16, (128, 24)), rng.integers(0, 16, (2, 24))
    scales = rng.uniform(0.01, 0.02, (2, 24)).astype(np.float16)
    wanted = ((q - np.repeat(zeros, 64, axis=0)) * np.repeat(scales.astype(np.float32), 64, axis=0)).T
    tensors = {
        "layer.qweight": packed(q, AWQ_ORDER),
        "layer.qzeros": packed(zeros, AWQ_ORDER),
        "layer.scales": torch.from_numpy(scales),
    }
    found = read_scheme({"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}, tensors)
    weight = found.weights["layer.weight"]
    assert weight.format == Format()
    assert (np.abs(weight.dequantised() - wanted) <= 0.00395 * np.abs(wanted).max(axis=1, keepdims=True)).all()


def test_values_that_fit_keep_their_integers_and_say_what_their_scales_cost() -> None:
    rng = np.random.default_rng(8)
    integers = rng.integers(-7, 8, (50, 128)).astype(np.int16)
    integers[:, ::32] = 7
    steps = rng.uniform(1, 2, (50, 4)).astype(np.float32)
    steps[:25] = np.array([1.0, 2.0, 3.0, 1.5])
    found = StoredWeights()
    found.add("layer", Stored(integers, steps, 4))
    weight = found.weights["layer"]
    assert np.array_equal(weight.dequantised()[:25], Stored(integers, steps, 4).values()[:25])
    # A step is off by at most half a scale, 1 / 15 of the largest step or less: 7 steps of 7 by 1 / 30.
    assert 0 < found.errors["layer"] < 1 / 30
    assert (weight.values[25:] == integers[25:]).mean() > 0.97


def test_one_step_for_a_whole_channel_stays_int4() -> None:
    integers = np.random.default_rng(9).integers(-8, 8, (6, 192)).astype(np.int16)
    steps = np.full((6, 1), 0.3, np.float32)
    found = StoredWeights()
    found.add("layer", Stored(integers, steps, 4))
    assert found.weights["layer"].format == Format(4, 64)
    assert found.errors == {}
    assert np.array_equal(found.weights["layer"].dequantised(), Stored(integers, steps, 4).values())


# --- Folders ---------------------------------------------------------------------------------------------------------


def quantised(source: Path, out: Path, recipe: Recipe, prescales: dict[str, np.ndarray] | None = None) -> Any:
    model = load(source)
    found = quantise_model(model, recipe, INPUTS, prescales or {})
    names = names_in_files(source, {name: model.float_graph.tensors[name] for name in found.weights})
    write_folder(source, out, found.weights, found.prescales, names)
    return model, found


def hidden(model: Model) -> np.ndarray:
    return run_reference(model.graph, {"input_ids": np.arange(30, 47)}, operations)


@pytest.mark.parametrize(
    "recipe", [Recipe(Format(4, 32), "gptq", 6.0), Recipe(Format(4, 32, (2, 4)), "sparsegpt"), Recipe(Format(), "rtn")]
)
def test_a_folder_gives_the_bits_of_the_model_that_was_written(source: Path, tmp_path: Path, recipe: Recipe) -> None:
    point = "encoder.layer.0.attention.self.query.weight"
    prescale = np.exp2(np.arange(32) % 3 - 1).astype(np.float32)
    model, found = quantised(source, tmp_path / "out", recipe, {point: prescale})
    again = load(tmp_path / "out")
    contract = quantise(model.float_graph, found.prescales, found.weights)
    wanted = run_reference(contract, {"input_ids": np.arange(30, 47)}, operations)
    assert_same_bits(hidden(again), wanted)
    assert again.stored.errors == {}
    assert sum(again.report().stored.values()) == 12
    assert_same_bits(again.float_graph.tensors[point], found.weights[point].dequantised() * prescale)
    with pytest.raises(PrescaleError, match="quantised already"):
        load(tmp_path / "out", prescale=None)


def test_every_device_runs_int4_and_zeros_as_int8(source: Path, tmp_path: Path) -> None:
    quantised(source, tmp_path / "out", Recipe(Format(4, 32, (2, 4)), "rtn"))
    model = load(tmp_path / "out")
    inputs = [{"input_ids": np.arange(30, 47)}]
    (on_host,) = HostExecutor(kernels).run(model.graph, inputs)
    with executor("fast:tiny") as device:
        (on_core,) = device.run(model.graph, inputs)
    assert_same_bits(on_core, on_host)
    assert_same_bits(hidden(model), on_host)
    for node in model.graph.of(Linear):
        assert ((model.graph.tensors[node.weight].reshape(-1, 4) != 0).sum(axis=1) <= 2).all()


Edit = Callable[[Tensors, dict[str, Any]], Any]
UP = "encoder.layer.1.intermediate.dense"


def without(name: str) -> Edit:
    return lambda tensors, config: tensors.pop(name)


def resized(name: str, *at: slice) -> Edit:
    return lambda tensors, config: tensors.update({name: tensors[name][at].contiguous()})


def says(**changes: Any) -> Edit:
    return lambda tensors, config: config.update(changes)


def cast(name: str, dtype: torch.dtype) -> Edit:
    return lambda tensors, config: tensors.update({name: tensors[name].to(dtype)})


def group_says(**changes: Any) -> Edit:
    return lambda tensors, config: config["config_groups"]["group_0"]["weights"].update(changes)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (without(f"{UP}.weight_scale"), rf"lacks '{UP}.weight_scale'; it is incomplete"),
        (without(f"{UP}.weight_shape"), rf"lacks '{UP}.weight_shape'"),
        (without(f"{UP}.weight_packed"), rf"holds '{UP}.weight_s\w+' but not the integers"),
        (resized(f"{UP}.weight_scale", slice(30)), r"weight_scale is \[30, 1\], which does not divide .* \[64, 32\]"),
        (resized(f"{UP}.weight_packed", slice(None), slice(3)), r"weight_packed is int32\[64, 3\]"),
        (says(quant_method="bitsandbytes"), "quant_method 'bitsandbytes'; compressed-tensors, gptq, awq"),
        (says(format="nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized'"),
        (says(sparsity_config={"format": "dense", "sparsity_structure": "2:4"}), r"of the 4 values \[0, .* not zero"),
        (says(transform_config={"config_groups": {"a": {}}}), "transforms"),
        (says(quant_method="gptq", bits=3), "gptq with 3 bits"),
        (says(quant_method="gptq", bits=4), "no tensor is quantised"),
        (says(quant_method=["gptq"]), r"quant_method \['gptq'\]"),
        (says(format={}), "format '{}'"),
        (says(config_groups=["group_0"]), r"config_groups = \['group_0'\], which is no object"),
        (says(config_groups={"group_0": None, "a": "b"}), "a = 'b', which is no object"),
        (says(sparsity_config="2:4"), "sparsity_config = '2:4', which is no object"),
        (group_says(group_size=64), r"groups of 64 for .*, but its scales are for groups of 32"),
        (group_says(strategy="channel", group_size=None), "groups of 64 for .*, but its scales are for groups of 32"),
        (group_says(num_bits=8), "says 8 bits for .*, but it is packed in 4"),
        (cast(f"{UP}.weight_packed", torch.float32), r"weight_packed is float32\[64, 4\]; packed integers are int32"),
        (cast(f"{UP}.weight_scale", torch.int8), r"weight_scale is int8\[64, 1\]; scales are floating-point"),
        (resized(f"{UP}.weight_scale", slice(0)), r"weight_scale is float32\[0, 1\]"),
        (resized(f"{UP}.weight_packed", slice(0)), r"weight_packed is int32\[0, 4\]"),
        (resized(f"{UP}.weight_shape", slice(1)), r"weight_shape is \[64\], which are no rows and columns"),
    ],
)
def test_a_broken_folder_is_refused_before_anything_runs(narrow: Path, tmp_path: Path, edit: Edit, named: str) -> None:
    out = Path(shutil.copytree(narrow, tmp_path / "out"))
    tensors, config = load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())
    edit(tensors, config["quantization_config"])
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(QuantisedCheckpointError, match=named) as caught:
        load(out)
    assert isinstance(caught.value, ModelError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (without("layer.qzeros"), r"lacks 'layer\.qzeros'"),
        (without("layer.qweight"), r"holds 'layer\.qzeros' but no qweight"),
        (
            resized("layer.scales", slice(2), slice(8)),
            r"scales is \[2, 8\], which does not divide a weight of 64 inputs",
        ),
        (resized("layer.qzeros", slice(1)), r"qzeros is \[1, 2\]"),
        (resized("layer.g_idx", slice(60)), "g_idx does not give"),
        (cast("layer.qweight", torch.float32), r"qweight is float32\[8, 16\]; packed integers are int32"),
        (cast("layer.scales", torch.int32), r"scales is int32\[2, 16\]; scales are floating-point"),
        (says(group_size=16), r"says groups of 16, but layer\.scales has groups of 32"),
    ],
)
def test_broken_gptq_tensors_are_named(edit: Edit, named: str) -> None:
    tensors = gptq(np.full((64, 16), 3), np.full((2, 16), 8), np.ones((2, 16), np.float32), np.arange(64) // 32)
    config: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    edit(tensors, config)
    with pytest.raises(QuantisedCheckpointError, match=named):
        read_scheme(config, tensors)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (resized("layer.weight", slice(0)), r"weight is int8\[0, 128\], which is no matrix"),
        (lambda tensors, _: tensors.update({"layer.weight": tensors["layer.weight"][0]}), r"weight is int8\[128\]"),
        (
            resized("layer.weight_zero_point", slice(30)),
            r"zero_point is int8\[30, 1\], which does not go with \[40, 1\]",
        ),
        (cast("layer.weight_zero_point", torch.bfloat16), r"zero_point is bfloat16\[40, 1\]"),
        (resized("layer.weight_scale", slice(None), slice(0)), r"weight_scale is float32\[40, 0\]"),
    ],
)
def test_broken_int8_tensors_are_named(edit: Edit, named: str) -> None:
    weight = nearest(torch.randn(40, 128, generator=torch.Generator().manual_seed(4)), Format())
    tensors = layout("layer", weight) | {"layer.weight_zero_point": torch.zeros(40, 1, dtype=torch.int8)}
    edit(tensors, {})
    with pytest.raises(QuantisedCheckpointError, match=named):
        read_scheme({**COMPRESSED, "format": "int-quantized"}, tensors)


def test_a_group_says_what_its_own_modules_have() -> None:
    """Of several groups each is for the modules that it names, by name or as a regular expression."""
    tensors: Tensors = {}
    for name, group in (("first", 32), ("second", 64)):
        tensors |= layout(
            name, nearest(torch.randn(8, 128, generator=torch.Generator().manual_seed(5)), Format(4, group))
        )
    said = {name: {"strategy": "group", "group_size": size, "num_bits": 4} for name, size in (("a", 32), ("b", 64))}
    groups = {
        "group_0": {"targets": ["first"], "weights": said["a"]},
        "group_1": {"targets": ["re:sec.*"], "weights": said["b"]},
    }
    found = read_scheme({**COMPRESSED, "config_groups": groups}, dict(tensors))
    assert {name: weight.format for name, weight in found.weights.items()} == {
        "first.weight": Format(4, 32),
        "second.weight": Format(4, 64),
    }
    groups["group_1"]["targets"], groups["group_0"]["targets"] = ["first"], ["re:sec.*"]
    with pytest.raises(QuantisedCheckpointError, match=r"groups of 64 for first\.weight, but .* groups of 32"):
        read_scheme({**COMPRESSED, "config_groups": groups}, dict(tensors))


def test_a_truncated_quantised_file_is_named(narrow: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(narrow, tmp_path / "out")) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is truncated"):
        load(tmp_path / "out")


def test_stored_int8_of_any_integers_is_kept() -> None:
    weight = QuantisedWeight(np.array([[-128, 127, 0, 5]], np.int8), np.array([0.25], np.float32))
    found = read_scheme({**COMPRESSED, "format": "int-quantized"}, layout("layer", weight)).weights["layer.weight"]
    assert_same_bits(found.w8, weight.w8)
