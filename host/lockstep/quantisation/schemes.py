"""Quantised checkpoints in safetensors: which scheme a folder is in, and what its tensors mean.

A scheme is a function that takes the tensors of its matrices out of a dictionary of tensors and gives them back as
``Stored``; ``SCHEMES`` lists them by the ``quant_method`` in ``config.json``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from lockstep.errors import QuantisedCheckpointError
from lockstep.quantisation.stored import Stored, StoredWeights

Tensors = dict[str, torch.Tensor]
#: (quantization_config, tensors by name) -> matrices by the name of the weight; takes what it reads out of the tensors.
Scheme = Callable[[dict[str, Any], Tensors], dict[str, Stored]]

#: Where AutoAWQ puts the eight values of a word: value i is in nibble _AWQ_ORDER[i].
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
_COMPRESSED_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "mixed-precision", "dense")


def read_scheme(config: Any, tensors: Tensors) -> StoredWeights:
    """The quantised matrices in ``tensors``, which then holds all others, and their values as float32.

    Raises ``QuantisedCheckpointError`` for a scheme that is not known, and for tensors that are missing or of a shape
    that does not go with the others.
    """
    method = config.get("quant_method") if isinstance(config, dict) else None
    if not isinstance(method, str) or method not in SCHEMES:
        raise QuantisedCheckpointError(
            f"config.json says quant_method {method!r}; {', '.join(SCHEMES)} checkpoints and GGUF files can be read"
        )
    found = StoredWeights()
    for name, stored in SCHEMES[method](config, tensors).items():
        found.add(name, stored)
        tensors[name] = torch.from_numpy(found.weights[name].dequantised())
    if not found.weights:
        raise QuantisedCheckpointError(f"config.json says quant_method {method!r}, but no tensor is quantised")
    return found


def unpack_words(words: torch.Tensor, bits: int) -> np.ndarray:
    """Unsigned values uint8[rows, columns * 32 / bits] of int32[rows, columns], the first in the low bits."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    unsigned = words.numpy().view(np.uint32)
    return ((unsigned[..., None] >> shifts) & np.uint32(2**bits - 1)).reshape(len(words), -1).astype(np.uint8)


# --- compressed-tensors ----------------------------------------------------------------------------------------------


def _compressed_tensors(config: dict[str, Any], tensors: Tensors) -> dict[str, Stored]:
    sparsity = _mapping(config, "sparsity_config")
    named = _mapping(config, "config_groups")
    groups = [_mapping(named, name) for name in named]
    formats = [config.get("format", "dense"), *(group.get("format") or config.get("format") for group in groups)]
    if unknown := sorted(str(each) for each in formats if each not in _COMPRESSED_FORMATS):
        raise QuantisedCheckpointError(
            f"config.json says the compressed-tensors format {unknown[0]!r}; {', '.join(_COMPRESSED_FORMATS[:2])} and "
            "mixtures of them can be read"
        )
    if sparsity.get("format", "dense") not in ("dense", "sparse-24-bitmask"):
        raise QuantisedCheckpointError(f"config.json says the sparse format {sparsity['format']!r}, which is not known")
    if _mapping(config, "transform_config").get("config_groups"):
        raise QuantisedCheckpointError("config.json asks for transforms of the weights, which are not supported")
    sparse = sparsity.get("sparsity_structure") == "2:4"
    for name in [name for name in tensors if name.endswith(".compressed")]:
        _decompress(name.removesuffix(".compressed"), tensors)
    result: dict[str, Stored] = {}
    for name in sorted(tensors):
        base = name.rpartition(".")[0]
        if name.endswith(".weight_packed"):
            result[f"{base}.weight"] = _packed(base, tensors, sparse)
        elif name.endswith(".weight") and tensors[name].dtype == torch.int8:
            result[name] = _integers(base, tensors, sparse)
    for name, stored in result.items():
        _check_said(name, stored, groups)
    leftover = [name for name in tensors if name.endswith((".weight_scale", ".weight_zero_point", ".weight_shape"))]
    if leftover:
        raise QuantisedCheckpointError(
            f"the checkpoint holds {leftover[0]!r} but not the integers that it belongs to; fetch its files again"
        )
    for name in [name for name in tensors if name.endswith((".input_scale", ".input_zero_point"))]:
        del tensors[name]  # activations are quantised per token at run time
    return result


def _packed(base: str, tensors: Tensors, sparse: bool) -> Stored:
    words, (rows, columns) = _words(f"{base}.weight_packed", tensors), _shape(f"{base}.weight_shape", tensors)
    bits = words.shape[1] * 32 // columns
    if bits not in (4, 8) or words.shape != (rows, columns * bits // 32):
        raise QuantisedCheckpointError(
            f"{base}.weight_packed is int32{list(words.shape)}, which is no [{rows}, {columns}] of 4 or 8 bits"
        )
    offset = 2 ** (bits - 1)
    integers = unpack_words(words, bits).astype(np.int16) - offset
    steps = _steps(base, tensors, rows, columns)
    if f"{base}.weight_zero_point" in tensors:
        zeros = _words(f"{base}.weight_zero_point", tensors)
        if zeros.shape != (-(-rows * bits // 32), steps.shape[1]):
            raise QuantisedCheckpointError(
                f"{base}.weight_zero_point is {list(zeros.shape)}, which does not go with it"
            )
        points = unpack_words(zeros.T.contiguous(), bits).T[:rows].astype(np.int16) - offset
        integers = integers - np.repeat(points, columns // steps.shape[1], axis=1)
    return Stored(integers, steps, bits, _groups(f"{base}.weight_g_idx", tensors, columns, steps), sparse)


def _integers(base: str, tensors: Tensors, sparse: bool) -> Stored:
    integers = tensors.pop(f"{base}.weight").numpy().astype(np.int16)
    if integers.ndim != 2 or not integers.size:
        raise QuantisedCheckpointError(f"{base}.weight is int8{list(integers.shape)}, which is no matrix of weights")
    steps = _steps(base, tensors, *integers.shape)
    if (zeros := tensors.pop(f"{base}.weight_zero_point", None)) is not None:
        if zeros.is_floating_point() or (zeros.numel() != 1 and zeros.numel() != steps.size):
            raise QuantisedCheckpointError(
                f"{base}.weight_zero_point is {_described(zeros)}, which does not go with {list(steps.shape)} scales"
            )
        points = np.broadcast_to(zeros.numpy().reshape(-1, steps.shape[1] if zeros.numel() > 1 else 1), steps.shape)
        integers = integers - np.repeat(points.astype(np.int16), integers.shape[1] // steps.shape[1], axis=1)
    return Stored(integers, steps, 8, _groups(f"{base}.weight_g_idx", tensors, integers.shape[1], steps), sparse)


def _steps(base: str, tensors: Tensors, rows: int, columns: int) -> np.ndarray:
    scale = _scales(f"{base}.weight_scale", tensors).float()
    if scale.numel() == 1:
        scale = scale.reshape(1, 1).expand(rows, 1)
    scale = scale.reshape(len(scale), -1)  # float[rows] is one for each
    if len(scale) != rows or columns % scale.shape[1]:
        raise QuantisedCheckpointError(
            f"{base}.weight_scale is {list(scale.shape)}, which does not divide a weight of [{rows}, {columns}]; its "
            "files do not belong together"
        )
    return np.ascontiguousarray(scale.numpy())


def _decompress(base: str, tensors: Tensors) -> None:
    """Put the dense ``base.weight`` in place of the kept values and the bits that say where they are."""
    kept = tensors.pop(f"{base}.compressed")
    shape, mask = _shape(f"{base}.shape", tensors), _needed(f"{base}.bitmask", tensors)
    if mask.dtype != torch.uint8 or mask.shape != (shape[0], -(-shape[1] // 8)):
        raise QuantisedCheckpointError(f"{base}.bitmask is {_described(mask)}, which does not go with {list(shape)}")
    bits = np.unpackbits(mask.numpy(), axis=-1, bitorder="little")
    places = torch.from_numpy(bits[:, : shape[1]].astype(bool))
    if int(places.sum()) != kept.numel():
        raise QuantisedCheckpointError(
            f"{base}.bitmask has {int(places.sum())} places for the {kept.numel()} values of {base}.compressed"
        )
    dense = torch.zeros(shape, dtype=kept.dtype)
    dense[places] = kept.flatten()
    tensors[f"{base}.weight"] = dense


def _mapping(config: dict[str, Any], name: str) -> dict[str, Any]:
    """What ``config`` has by ``name``, nothing where it has none."""
    found = config.get(name) or {}
    if not isinstance(found, dict):
        raise QuantisedCheckpointError(f"config.json says {name} = {found!r}, which is no object with names and values")
    return found


def _check_said(name: str, stored: Stored, groups: list[dict[str, Any]]) -> None:
    """Raise unless bits and groups of a weight are those that its entry of ``config_groups`` says, if it has one."""
    base = name.removesuffix(".weight")
    own = groups if len(groups) == 1 else [group for group in groups if _names(group.get("targets"), base)]
    for said in (_mapping(group, "weights") for group in own[:1]):
        columns, there = stored.integers.shape[1], stored.steps.shape[1]
        size = {"group": said.get("group_size"), "channel": columns, "tensor": columns}.get(str(said.get("strategy")))
        if isinstance(size, int) and size > 0 and size * there != columns:
            raise QuantisedCheckpointError(
                f"config.json says groups of {size} for {name}, but its scales are for groups of {columns // there}; "
                "they do not belong together"
            )
        if stored.bits == 4 and said.get("num_bits", 4) != 4:
            raise QuantisedCheckpointError(
                f"config.json says {said['num_bits']} bits for {name}, but it is packed in 4; they do not belong "
                "together"
            )


def _names(targets: Any, base: str) -> bool:
    """Whether one of ``targets`` is the module ``base``, by its name or as a regular expression."""
    known = [each for each in targets if isinstance(each, str)] if isinstance(targets, list) else []
    return base in known or any(_matches(each[3:], base) for each in known if each.startswith("re:"))


def _matches(pattern: str, base: str) -> bool:
    try:
        return re.match(pattern, base) is not None
    except re.error:
        return False


# --- GPTQ and AWQ ----------------------------------------------------------------------------------------------------


def _gptq(config: dict[str, Any], tensors: Tensors) -> dict[str, Stored]:
    bits = _bits(config, (4, 8))
    one_less = config.get("checkpoint_format", "gptq") == "gptq"  # zero points are stored less one
    result: dict[str, Stored] = {}
    for base in _bases(tensors):
        words, scales = _words(f"{base}.qweight", tensors), _scales(f"{base}.scales", tensors)
        integers = unpack_words(words.T.contiguous(), bits).astype(np.int16)
        rows, columns = integers.shape
        zeros = _words(f"{base}.qzeros", tensors)
        _check_shapes(base, scales, zeros, (rows, columns), bits, config)
        points = unpack_words(zeros, bits).astype(np.int16) + one_less
        steps = np.ascontiguousarray(scales.float().numpy().T)
        group_of = _groups(f"{base}.g_idx", tensors, columns, steps)
        at = np.arange(columns) // (columns // len(scales)) if group_of is None else group_of
        result[f"{base}.weight"] = Stored(integers - points[at].T, steps, bits, group_of)
    return result


def _awq(config: dict[str, Any], tensors: Tensors) -> dict[str, Stored]:
    bits = _bits(config, (4,))
    if str(config.get("version", "gemm")).lower() != "gemm":
        raise QuantisedCheckpointError(f"config.json says the AWQ version {config['version']!r}; only GEMM can be read")
    result: dict[str, Stored] = {}
    for base in _bases(tensors):
        words, scales = _words(f"{base}.qweight", tensors), _scales(f"{base}.scales", tensors)
        integers = _in_order(unpack_words(words, bits)).astype(np.int16)
        columns, rows = integers.shape
        zeros = _words(f"{base}.qzeros", tensors)
        _check_shapes(base, scales, zeros, (rows, columns), bits, config)
        points = np.repeat(_in_order(unpack_words(zeros, bits)).astype(np.int16), columns // len(scales), axis=0)
        result[f"{base}.weight"] = Stored(
            np.ascontiguousarray((integers - points).T), np.ascontiguousarray(scales.float().numpy().T), bits
        )
    return result


def _bits(config: dict[str, Any], known: tuple[int, ...]) -> int:
    bits = config.get("bits", config.get("w_bit"))
    if bits not in known:
        raise QuantisedCheckpointError(
            f"config.json says {config['quant_method']} with {bits} bits; {' or '.join(map(str, known))} can be read"
        )
    return int(bits)


def _bases(tensors: Tensors) -> list[str]:
    for name in tensors:
        if name.endswith((".qzeros", ".scales")) and f"{name.rpartition('.')[0]}.qweight" not in tensors:
            raise QuantisedCheckpointError(f"the checkpoint holds {name!r} but no qweight beside it; fetch it again")
    return [name.removesuffix(".qweight") for name in sorted(tensors) if name.endswith(".qweight")]


def _check_shapes(
    base: str, scales: torch.Tensor, zeros: torch.Tensor, shape: tuple[int, int], bits: int, config: dict[str, Any]
) -> None:
    rows, columns = shape
    if scales.ndim != 2 or scales.shape[1] != rows or not len(scales) or columns % len(scales):
        raise QuantisedCheckpointError(
            f"{base}.scales is {list(scales.shape)}, which does not divide a weight of {columns} inputs and {rows} "
            "outputs"
        )
    if zeros.shape != (len(scales), rows * bits // 32):
        raise QuantisedCheckpointError(f"{base}.qzeros is {list(zeros.shape)}, which does not go with its scales")
    said, there = config.get("group_size", config.get("q_group_size")), columns // len(scales)
    if isinstance(said, int) and 0 < said < columns and said != there:
        raise QuantisedCheckpointError(
            f"config.json says groups of {said}, but {base}.scales has groups of {there}; they do not belong together"
        )


def _in_order(values: np.ndarray) -> np.ndarray:
    return values.reshape(len(values), -1, 8)[..., list(_AWQ_ORDER)].reshape(values.shape)


# --- All -------------------------------------------------------------------------------------------------------------


def _needed(name: str, tensors: Tensors) -> torch.Tensor:
    if name not in tensors:
        raise QuantisedCheckpointError(f"the checkpoint lacks {name!r}; it is incomplete, so fetch its files again")
    return tensors.pop(name)


def _described(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _words(name: str, tensors: Tensors) -> torch.Tensor:
    """int32[rows, columns], each of which holds several integers."""
    words = _needed(name, tensors)
    if words.dtype != torch.int32 or words.ndim != 2 or not words.numel():
        raise QuantisedCheckpointError(f"{name} is {_described(words)}; packed integers are int32[rows, columns]")
    return words


def _scales(name: str, tensors: Tensors) -> torch.Tensor:
    scales = _needed(name, tensors)
    if not scales.is_floating_point() or not scales.numel():
        raise QuantisedCheckpointError(f"{name} is {_described(scales)}; scales are floating-point numbers")
    return scales


def _shape(name: str, tensors: Tensors) -> tuple[int, int]:
    sizes = _needed(name, tensors).flatten().tolist()
    if len(sizes) != 2 or any(size != int(size) or size < 1 for size in sizes):
        raise QuantisedCheckpointError(f"{name} is {sizes}, which are no rows and columns of a matrix")
    return int(sizes[0]), int(sizes[1])


def _groups(name: str, tensors: Tensors, columns: int, steps: np.ndarray) -> np.ndarray | None:
    """The group of each input, or none where groups are neighbours."""
    if name not in tensors:
        return None
    group_of = tensors.pop(name).to(torch.int64).numpy()
    if group_of.shape != (columns,) or group_of.min() < 0 or group_of.max() >= steps.shape[1]:
        raise QuantisedCheckpointError(f"{name} does not give one of {steps.shape[1]} groups for {columns} inputs")
    neighbours = np.array_equal(group_of, np.arange(columns) // (columns // steps.shape[1]))
    return None if neighbours else group_of


SCHEMES: dict[str, Scheme] = {"compressed-tensors": _compressed_tensors, "gptq": _gptq, "awq": _awq}
