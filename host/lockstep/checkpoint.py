"""Reading a model from where people have it: a Hugging Face folder, the local Hub cache, or a package.

Nothing is ever downloaded and no file of a folder is ever executed. Files are checked before they are used, so that a
broken download is reported with its name and sizes and not as a failure further on. transformers then maps names to
modules.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from transformers.utils import logging as transformers_logging

from lockstep.bundled import BUNDLED, bundled_folder
from lockstep.errors import (
    CheckpointError,
    ConfigurationMissingError,
    ModelNotFoundError,
    TensorError,
    UnknownArchitectureError,
)
from lockstep.quantisation.gguf_file import gguf_in, stored_weights, tensor_types
from lockstep.quantisation.schemes import read_scheme
from lockstep.quantisation.stored import StoredWeights

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_FLOATS = {"F32", "F16", "BF16"}
_WITH_LANGUAGE_HEAD = ("ForCausalLM", "LMHeadModel")
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Checkpoint:
    """A model as read from files.

    Attributes
    ----------
    module : the model in evaluation mode, float32.
    folder : where the files are.
    stored : matrices that the files hold quantised, by the name of the parameter.
    missing : parameters that the files do not hold and that PyTorch therefore made up. They are harmless where the
        captured graph does not use them (a pooler, say), and an error where it does: see ``require``.
    """

    module: torch.nn.Module
    folder: Path
    missing: frozenset[str]
    stored: StoredWeights = field(default_factory=StoredWeights)

    def require(self, used: list[str]) -> None:
        """Raise ``TensorError`` if one of the parameters ``used`` is not in the files."""
        absent = [name for name in used if name in self.missing]
        if absent:
            raise TensorError(
                f"{self.folder} lacks the tensor {absent[0]!r}{_and_more(absent)} that the model needs; "
                "the checkpoint is incomplete or belongs to another architecture than config.json says"
            )


def find_folder(name: str) -> Path:
    """The folder of a model given as a path, as a bundled name, or as a Hub id that is in the local cache; or its
    GGUF file.

    Raises
    ------
    ModelNotFoundError
        if there is none.
    """
    path = Path(name).expanduser()
    if path.is_dir() or gguf_in(path) is not None:
        return path
    if path.is_file():
        raise ModelNotFoundError(f"{name} is a file; give the folder that holds config.json and the weights")
    if name in BUNDLED:
        return bundled_folder(name)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        return _cached(name)
    raise ModelNotFoundError(
        f"there is no folder {name}; give a Hugging Face folder, a Hub id that is in the local cache, or one of: "
        f"{', '.join(BUNDLED)}"
    )


def _cached(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except Exception:
        raise ModelNotFoundError(
            f"there is no folder {name} and no model of that name in the local Hugging Face cache; nothing is "
            "downloaded here, so "
            f"fetch it first with: hf download {name}"
        ) from None


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read and check the model in ``folder``, or in a GGUF file.

    Raises
    ------
    ConfigurationMissingError, UnknownArchitectureError, CheckpointError, TensorError
        as the class says; each message names the file or the tensor.
    QuantisedCheckpointError
        if weights are quantised in a way that is not known, or that contradicts itself.
    """
    if (file := gguf_in(folder)) is not None:
        return _load_gguf(file)
    config = _configuration(folder)
    scheme = getattr(config, "quantization_config", None)
    found: dict[str, Path] = {}
    for path in weight_files(folder):
        names = check_file(path, quantised=scheme is not None)
        found.update(dict.fromkeys(names, path))
    _check_index(folder, found)
    stored, tensors = StoredWeights(), None
    if scheme is not None:
        tensors = read_tensors(folder)
        stored = read_scheme(scheme, tensors)
        del config.quantization_config
    with _quiet():
        try:
            kind = _kind(config) if tensors is None else _kind(config)._model_mapping[type(config)]
            module, report = kind.from_pretrained(
                None if tensors else folder,
                config=config,
                state_dict=tensors,
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                dtype=torch.float32,
            )
        except Exception as error:
            detail = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if "Unrecognized configuration class" in detail:
                raise UnknownArchitectureError(
                    f"{folder / 'config.json'} describes a {config.model_type!r} model, which has no base model in "
                    "transformers"
                ) from None
            raise CheckpointError(f"the model in {folder} cannot be built from its config.json: {detail}") from None
    if report["mismatched_keys"]:
        name, given, wanted = min(
            (str(name), list(given), list(wanted)) for name, given, wanted in report["mismatched_keys"]
        )
        raise TensorError(
            f"the tensor {name!r} in {folder} has shape {given} but config.json asks for {wanted}; they belong to "
            "different models"
        )
    extra = sorted(set(report["unexpected_keys"]) - _declared(config))
    if extra:
        where = found.get(extra[0], folder)
        raise TensorError(
            f"{where} holds the tensor {extra[0]!r}{_and_more(extra)} that {_architecture(config)} does not have; "
            "config.json and the weights belong to different models"
        )
    return Checkpoint(module.eval(), folder, frozenset(report["missing_keys"]), _by_parameter(stored, module))


def _load_gguf(path: Path) -> Checkpoint:
    types = tensor_types(path)
    with _quiet(), redirect_stderr(io.StringIO()):  # a progress bar that cannot be turned off
        try:
            config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
            kind = _class_of(config)
            with torch.device("meta"):
                empty = kind(config)
            tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=empty)["tensors"]
            module, report = kind.from_pretrained(
                None, config=config, state_dict=tensors, output_loading_info=True, dtype=torch.float32
            )
        except Exception as error:
            detail = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"the model in {path} cannot be built: {detail}") from None
    stored = stored_weights(module, types)
    with torch.no_grad():
        for name, weight in stored.weights.items():
            module.get_parameter(name).copy_(torch.from_numpy(weight.dequantised()))
    return Checkpoint(module.eval(), path.parent, frozenset(report["missing_keys"]), stored)


def _class_of(config: Any) -> Any:
    """The class of a GGUF file's model, which is a language model where there can be one."""
    causal: Any = transformers.AutoModelForCausalLM._model_mapping
    other: Any = transformers.AutoModel._model_mapping
    return causal[type(config)] if type(config) in causal else other[type(config)]


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the safetensors files in ``folder``, by name."""
    tensors: dict[str, torch.Tensor] = {}
    for path in weight_files(folder):
        tensors.update(load_file(path))
    return tensors


def _by_parameter(stored: StoredWeights, module: torch.nn.Module) -> StoredWeights:
    """``stored`` by the names of the module's parameters; what transformers merged on loading is left out."""
    parameters = {name: parameter for name, parameter in module.state_dict().items() if parameter.ndim == 2}
    result = StoredWeights()
    for name, weight in stored.weights.items():
        found = same_tensor(name, torch.from_numpy(weight.dequantised()), parameters)
        if found is not None:
            result.weights[found] = weight
            if name in stored.errors:
                result.errors[found] = stored.errors[name]
    return result


def same_tensor(name: str, tensor: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Which of ``tensors`` is ``tensor``: that of its name, else the only one with its contents, whatever the dtype.

    transformers renames some tensors when it loads them, so names alone do not tell.
    """

    def same(other: torch.Tensor) -> bool:
        return other.shape == tensor.shape and torch.equal(other.float(), tensor)

    if name in tensors and same(tensors[name]):
        return name
    found = [other for other, value in tensors.items() if same(value)]
    return found[0] if len(found) == 1 else None


def _configuration(folder: Path) -> Any:
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigurationMissingError(f"{folder} has no config.json; is it the folder of a Hugging Face model?")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        raise ConfigurationMissingError(f"{path} is not readable JSON; fetch the file again") from None
    kind = content.get("model_type") if isinstance(content, dict) else None
    if not isinstance(kind, str):
        raise UnknownArchitectureError(f"{path} does not say a model_type, so the architecture is not known")
    if kind not in transformers.CONFIG_MAPPING:
        raise UnknownArchitectureError(
            f"{path} says model_type {kind!r}, which transformers {transformers.__version__} does not have; "
            "upgrade transformers, or build the torch.nn.Module yourself and load that"
        )
    with _quiet():
        try:
            return transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            detail = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigurationMissingError(f"{path} is not a valid {kind!r} configuration: {detail}") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of ``folder``, shards in the order of their names; raises ``CheckpointError`` if some are
    missing.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if index.is_file():
        names = sorted(set(_weight_map(index).values()))
        for name in names:
            if not (folder / name).is_file():
                raise CheckpointError(f"{index} lists {name}, which is not in {folder}; fetch the missing file")
        return [folder / name for name in names]
    pickles = [name for name in _PICKLES if (folder / name).is_file()]
    if pickles:
        raise CheckpointError(
            f"{folder} holds its weights as {pickles[0]} only; pickle files can run code and are refused, so "
            "convert them with "
            "transformers: AutoModel.from_pretrained(folder).save_pretrained(new_folder)"
        )
    raise CheckpointError(f"{folder} has no {WEIGHTS} and no {INDEX}; fetch the weights in safetensors format")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        mapping = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in mapping.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        raise CheckpointError(f"{index} is not a readable index of shards; fetch the file again") from None


def _check_index(folder: Path, found: dict[str, Path]) -> None:
    index = folder / INDEX
    if (folder / WEIGHTS).is_file() or not index.is_file():
        return
    for name, file in _weight_map(index).items():
        if name not in found:
            raise TensorError(
                f"{index} says that {file} holds the tensor {name!r}, but it does not; fetch {file} again"
            )


def check_file(path: Path, quantised: bool = False) -> list[str]:
    """The names of the tensors in a safetensors file, after checking sizes, types and that every value is finite.

    Raises
    ------
    CheckpointError
        if the file is truncated or corrupt.
    TensorError
        if a tensor has a type that cannot be used, or holds NaN or infinity.
    """
    size = path.stat().st_size
    header = _header(path, size)
    expected = max((entry["data_offsets"][1] for entry in header.values()), default=0) + _data_start(path)
    if size != expected:
        state = "truncated" if size < expected else "corrupt"
        raise CheckpointError(
            f"{path} is {state}: it has {size} bytes where its header needs {expected}; fetch the file again"
        )
    for name, entry in header.items():
        if entry["dtype"] not in _FLOATS and entry["dtype"][0] not in "IUB":
            raise TensorError(
                f"the tensor {name!r} in {path} has dtype {entry['dtype']}; only F32, F16 and BF16 weights can be read"
            )
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - the handle is no mapping
                tensor = file.get_tensor(name)
                if name.endswith("weight") and not tensor.is_floating_point() and not quantised:
                    raise TensorError(
                        f"the tensor {name!r} in {path} has dtype {header[name]['dtype']}; without a "
                        "quantization_config in config.json, only F32, F16 and BF16 weights can be read"
                    )
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    raise TensorError(
                        f"the tensor {name!r} in {path} holds NaN or infinite values; the checkpoint is damaged"
                    )
    except SafetensorError as error:
        raise CheckpointError(f"{path} is corrupt ({error}); fetch the file again") from None
    return list(header)


def _data_start(path: Path) -> int:
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def _header(path: Path, size: int) -> dict[str, Any]:
    start = _data_start(path)
    if size < 8 or start > size:
        raise CheckpointError(
            f"{path} is truncated: it has {size} bytes and its header alone needs {start}; fetch the file again"
        )
    with path.open("rb") as file:
        file.seek(8)
        content = file.read(start - 8)
    try:
        header = {name: entry for name, entry in json.loads(content).items() if name != "__metadata__"}
        for entry in header.values():
            _ = str(entry["dtype"])[0], int(entry["data_offsets"][1])
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise CheckpointError(f"{path} is corrupt: its header is not readable; fetch the file again") from None
    return header


def _kind(config: Any) -> Any:
    """What to build: a model with its language head if ``config`` says that it writes text, else the bare model."""
    if _architecture(config).endswith(_WITH_LANGUAGE_HEAD):
        return transformers.AutoModelForCausalLM
    return transformers.AutoModel


def _architecture(config: Any) -> str:
    return next(iter(config.architectures or ()), config.model_type)


def _declared(config: Any) -> set[str]:
    """Names of all tensors of the architectures that ``config`` declares, heads included."""
    names: set[str] = set()
    for architecture in config.architectures or ():
        kind = getattr(transformers, architecture, None)
        if kind is not None:
            with torch.device("meta"), _quiet():
                names.update(kind(config).state_dict())
    return names


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


@contextmanager
def _quiet() -> Any:
    """Without the reports and progress bars of transformers; what matters in them becomes an error here."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
