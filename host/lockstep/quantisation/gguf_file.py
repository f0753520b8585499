"""Models in one GGUF file, through the package ``gguf`` and what transformers knows of its names.

transformers computes the float values of all tensors. Those of Q4_0 (groups of 32 with an fp16 step of either sign)
become int4 again with the nearest multipliers, all other quantised ones int8.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from lockstep.errors import CheckpointError, QuantisedCheckpointError
from lockstep.quantisation.formats import Format
from lockstep.quantisation.stored import StoredWeights

ENDING = ".gguf"
_FLOATS = {"F32", "F16", "BF16", "F64"}


def gguf_in(path: Path) -> Path | None:
    """The GGUF file at ``path``: itself, or the first by name in a folder of that kind of files; else none."""
    if path.is_file():
        return path if path.suffix == ENDING else None
    files = sorted(path.glob(f"*{ENDING}"))
    return files[0] if files and not any(path.glob("*.safetensors*")) else None


def tensor_types(path: Path) -> dict[str, str]:
    """The names of the types of all tensors in a GGUF file, such as ``Q8_0``, by their names there.

    Raises
    ------
    QuantisedCheckpointError
        if the package that reads such files is not installed.
    CheckpointError
        if the file is damaged.
    """
    if importlib.util.find_spec("gguf") is None:
        raise QuantisedCheckpointError(
            f'{path} needs the package gguf to be read; run: pip install "lockstep-accel[gguf]"'
        )
    from gguf import GGUFReader

    try:
        return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}
    except Exception as error:
        detail = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} is truncated or no GGUF file ({detail}); fetch it again") from None


def stored_weights(module: torch.nn.Module, types: dict[str, str]) -> StoredWeights:
    """The matrices of ``module`` that are quantised in its file, by parameter, in the forms of the contract.

    ``types`` is what :func:`tensor_types` gives. Tables of embeddings stay as they are.
    """
    names = _parameter_names(module)
    matrices = {f"{name}.weight" for name, part in module.named_modules() if isinstance(part, torch.nn.Linear)}
    state = module.state_dict()
    tied = {id(part.weight) for part in module.modules() if isinstance(part, torch.nn.Embedding)}
    found = StoredWeights()
    for name, kind in sorted(types.items()):
        parameter = names.get(name)
        if kind in _FLOATS or parameter not in matrices or id(module.get_parameter(parameter)) in tied:
            continue
        values = state[parameter].float().numpy()
        four = kind == "Q4_0" and values.shape[1] % 32 == 0
        found.add_values(parameter, values, Format(4, 32) if four else Format(8))
    return found


def _parameter_names(module: Any) -> dict[str, str]:
    """Names of parameters by the names in the file."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    config = module.config.to_dict()
    processor = TENSOR_PROCESSORS.get(module.config.model_type, TensorProcessor)(config=config)
    return dict(get_gguf_hf_weights_map(module, processor))
