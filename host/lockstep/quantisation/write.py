"""Writing a quantised model: a folder in the layout of compressed-tensors, which other tools read as well."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from lockstep.checkpoint import INDEX, WEIGHTS, read_tensors, same_tensor, weight_files
from lockstep.errors import CheckpointError, WeightFormatError
from lockstep.model import PRESCALE_FILE
from lockstep.quantisation.formats import Format, QuantisedWeight
from lockstep.quantisation.gguf_file import gguf_in
from lockstep.quantise import Prescales

#: Endings of files that hold weights in another form and are not copied.
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ot")


def check_output(source: Path, out: Path) -> None:
    """Raise ``CheckpointError`` unless ``out`` is free for a model from ``source``, and can be written, and ``source``
    is a folder of safetensors.
    """
    if (file := gguf_in(source)) is not None:
        raise CheckpointError(f"{file} is a GGUF file, which can be read, not written; give a folder of safetensors")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} is there already; give the name of a new or empty folder")
    if source.resolve() in out.resolve().parents:
        raise CheckpointError(f"{out} is inside the model's own folder; give one outside of {source}")
    place = next(each for each in out.absolute().parents if each.exists() or each.is_symlink())
    try:
        tempfile.TemporaryDirectory(dir=place).cleanup()
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written, since {place} takes no folder: {error.strerror}") from None


def names_in_files(source: Path, weights: Mapping[str, np.ndarray]) -> dict[str, str]:
    """The names in the files of ``source`` of the weights that they hold as [outputs, inputs].

    ``weights`` are float32[N, K] by their names in the model. Raises ``WeightFormatError`` if none is there.
    """
    held = read_tensors(source)
    found = {name: same_tensor(name, torch.from_numpy(weight), held) for name, weight in weights.items()}
    names = {name: stored for name, stored in found.items() if stored is not None}
    if not names:
        raise WeightFormatError(f"{source} holds no weight of a layer as [outputs, inputs]; nothing can be quantised")
    return names


def write_folder(
    source: Path, out: Path, weights: Mapping[str, QuantisedWeight], prescales: Prescales, names: Mapping[str, str]
) -> int:
    """Write ``weights``, by their names in the model, and everything else of ``source`` to ``out``.

    ``names`` is what :func:`names_in_files` gives. Returns the bytes of the tensors. ``out`` appears when it is
    complete.
    """
    tensors = read_tensors(source)
    formats: dict[str, Format] = {}
    for name, weight in weights.items():
        base = names[name].removesuffix(".weight")
        del tensors[names[name]]
        tensors |= layout(base, weight)
        formats[base] = weight.format
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = description(formats)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as place:
        folder = Path(place) / out.name
        folder.mkdir()
        _copy_others(source, folder)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
        if prescales:
            save_file({name: torch.from_numpy(array) for name, array in prescales.items()}, folder / PRESCALE_FILE)
        for path in folder.glob("*.safetensors"):
            path.chmod(0o644)  # safetensors writes for its owner alone
        if out.exists():
            out.rmdir()  # it is empty
        folder.rename(out)
    return sum(tensor.nbytes for tensor in tensors.values())


def _copy_others(source: Path, folder: Path) -> None:
    own = {path.name for path in weight_files(source)} | {"config.json", WEIGHTS, INDEX}
    for path in sorted(source.iterdir()):
        if path.is_dir():
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns(*(f"*{s}" for s in _OTHER_WEIGHTS)))
        elif path.name not in own and not path.name.endswith(_OTHER_WEIGHTS):
            shutil.copyfile(path, folder / path.name)


def layout(base: str, weight: QuantisedWeight) -> dict[str, torch.Tensor]:
    """The tensors of one weight; group scales are ``multiplier * scale`` and exact in fp32."""
    if weight.multipliers is None:
        return {
            f"{base}.weight": torch.from_numpy(np.ascontiguousarray(weight.values)),
            f"{base}.weight_scale": torch.from_numpy(weight.scale[:, None].copy()),
        }
    return {
        f"{base}.weight_packed": pack_words(weight.values),
        f"{base}.weight_scale": torch.from_numpy(weight.scale[:, None] * weight.multipliers.astype(np.float32)),
        f"{base}.weight_shape": torch.tensor(weight.values.shape),
    }


def pack_words(values: np.ndarray) -> torch.Tensor:
    """int32[N, K / 8] of int8[N, K] in -8..7: each plus 8, the first in the low bits."""
    nibbles = (values.astype(np.int16) + 8).astype(np.uint32).reshape(len(values), -1, 8)
    words = np.bitwise_or.reduce(nibbles << np.arange(0, 32, 4, dtype=np.uint32), axis=2)
    return torch.from_numpy(words.view(np.int32))


def description(formats: Mapping[str, Format]) -> dict[str, Any]:
    """``quantization_config`` for modules by name."""
    kinds = sorted({format for format in formats.values()}, key=str)
    groups = {
        f"group_{number}": {
            "targets": [name for name, format in formats.items() if format == kind],
            "weights": {
                "num_bits": kind.bits,
                "type": "int",
                "symmetric": True,
                "strategy": "channel" if kind.group is None else "group",
                "group_size": kind.group,
                "dynamic": False,
            },
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
                "observer": None,
            },
            "output_activations": None,
            "format": _layout_name(kind),
        }
        for number, kind in enumerate(kinds)
    }
    names = {_layout_name(kind) for kind in kinds}
    result: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": names.pop() if len(names) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [],
        "kv_cache_scheme": None,
    }
    if all(kind.pattern is not None for kind in kinds):
        result["sparsity_config"] = {"format": "dense", "sparsity_structure": "2:4", "targets": [], "ignore": []}
    return result


def _layout_name(format: Format) -> str:
    return "int-quantized" if format.group is None else "pack-quantized"
