"""Reading models in GGUF files."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import gguf
import numpy as np
import pytest
from lockstep.errors import CheckpointError, QuantisedCheckpointError
from lockstep.model import load
from lockstep.quantisation.formats import Format
from support import assert_same_bits


def write_gguf(path: Path, kind: gguf.GGMLQuantizationType) -> dict[str, np.ndarray]:
    """A Llama of one layer; the values that ``gguf`` unpacks, by tensor."""
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("small")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(61)
    shapes = {"token_embd": (61, 64), "output": (61, 64), "blk.0.attn_q": (64, 64), "blk.0.attn_k": (32, 64)}
    shapes |= {"blk.0.attn_v": (32, 64), "blk.0.attn_output": (64, 64), "blk.0.ffn_gate": (96, 64)}
    shapes |= {"blk.0.ffn_up": (96, 64), "blk.0.ffn_down": (64, 96)}
    values = {}
    for name, shape in shapes.items():
        data = gguf.quants.quantize(rng.normal(size=shape).astype(np.float32) / 8, kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
        values[name] = gguf.quants.dequantize(data, kind)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


@pytest.mark.parametrize(
    ("kind", "format", "most"), [("Q8_0", Format(), 0.00395), ("Q4_0", Format(4, 32), 0.13), ("F16", None, 0)]
)
def test_gguf_files(tmp_path: Path, kind: str, format: Format | None, most: float) -> None:
    path = tmp_path / "model.gguf"
    values = write_gguf(path, gguf.GGMLQuantizationType[kind])
    model = load(path)
    assert model.graph.causal
    assert {weight.format for weight in model.stored.weights.values()} == ({format} - {None})
    assert len(model.stored.weights) == (0 if format is None else 8)
    for name, there in (("mlp.down_proj", "ffn_down"), ("self_attn.v_proj", "attn_v")):
        parameter, wanted = f"model.layers.0.{name}.weight", values[f"blk.0.{there}"]
        difference = np.abs(model.float_graph.tensors[parameter] - wanted) / np.abs(wanted).max(axis=1, keepdims=True)
        assert difference.max() <= most
        if format is not None:
            assert model.stored.errors[parameter] == pytest.approx(difference.max(), rel=1e-5)
            assert_same_bits(model.graph.tensors[f"{parameter}.int8"], model.stored.weights[parameter].w8)
    assert model.report().rounded_again == max(model.stored.errors.values(), default=0)
    assert load(tmp_path).graph.causal, "a folder with nothing but the file is the same"


def test_a_gguf_file_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "model.gguf", gguf.GGMLQuantizationType.F16)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(QuantisedCheckpointError, match=r'pip install "lockstep-accel\[gguf\]"'):
        load(tmp_path)


def test_a_truncated_gguf_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, gguf.GGMLQuantizationType.Q8_0)
    path.write_bytes(path.read_bytes()[:-20_000])
    with pytest.raises(CheckpointError, match=r"model\.gguf is truncated or no GGUF file"):
        load(path)
