"""A loaded model: its contract graph, its tokenizer and pooling, and what was recognised in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from lockstep.bundled import BUNDLED
from lockstep.capture import EXAMPLE_TOKENS, capture, used_parameters
from lockstep.checkpoint import find_folder, load_checkpoint
from lockstep.errors import CaptureError, FallbackError, InputError, ModelError, TokenizerError
from lockstep.evaluate import run_reference
from lockstep.graph import Fallback, Graph, Input, Quantise
from lockstep.pooling import Pooling, read_pooling
from lockstep.quantise import Prescales, load_prescales, quantise
from lockstep.recognise import recognise
from lockstep.session import HostSession, Session
from lockstep.text import load_tokenizer, token_ids

#: File in a model's folder that holds its pre-scale, if somebody fitted one.
PRESCALE_FILE = "lockstep_prescale.safetensors"
#: Longest sequence that a model is captured for unless a longer one is asked for: rotary tables grow with it, and so
#: does the time to compute masks.
LONGEST = 4096


class Executor(Protocol):
    """Whatever runs contract graphs: a simulated core, a board, or the host itself."""

    def run(self, graph: Graph, sequences: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
        """``float32[tokens, features]`` for each sequence, given as arrays by input name without the batch."""
        ...


@runtime_checkable
class GeneratingExecutor(Executor, Protocol):
    """An executor that also keeps key-value caches."""

    def open_session(self, graph: Graph, capacity: int) -> Session:
        """A session of a causal language model with room for ``capacity`` tokens."""
        ...


@dataclass(frozen=True)
class HostExecutor:
    """The ``cpu`` device: contract operations without a program, one sequence after the other.

    ``operations`` is a module such as ``lockstep_isa.operations`` or ``lockstep_hls.kernels``.
    """

    operations: Any

    def run(self, graph: Graph, sequences: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
        return [run_reference(graph, inputs, self.operations) for inputs in sequences]

    def open_session(self, graph: Graph, capacity: int) -> Session:
        return HostSession(graph, capacity, self.operations)


@dataclass(frozen=True)
class Report:
    """What a model is made of.

    Attributes
    ----------
    source : where it came from.
    operations : number of nodes of each kind.
    fallbacks : for each part that PyTorch runs on the CPU, its operations and the reason.
    parameters : number of parameters in the contract graph.
    prescaled : quantise points with a pre-scale, and all of them.
    max_tokens : longest sequence.
    """

    source: str
    operations: dict[str, int]
    fallbacks: tuple[tuple[str, str], ...]
    parameters: int
    prescaled: tuple[int, int]
    max_tokens: int

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {kind}" for kind, count in self.operations.items())
        lines = [
            f"{self.source}: {counts}",
            f"{self.parameters:,} parameters; pre-scale at {self.prescaled[0]} of {self.prescaled[1]} quantise points; "
            f"up to {self.max_tokens} tokens",
        ]
        lines.extend(f"on the CPU in PyTorch: {name} ({reason})" for name, reason in self.fallbacks)
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Model:
    """A model that is ready for any executor.

    Attributes
    ----------
    graph : contract stage, W8A8.
    float_graph : float stage, from which another pre-scale can be fitted.
    pooling : how a sequence becomes one vector.
    folder : the model's files; none for a module.
    """

    graph: Graph
    float_graph: Graph
    pooling: Pooling
    folder: Path | None

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the model's folder; raises ``TokenizerError`` if there is none."""
        if self.folder is None:
            raise TokenizerError("a model made from a torch.nn.Module has no tokenizer; give token ids")
        return load_tokenizer(self.folder)

    def tokenize(self, texts: Sequence[str]) -> list[np.ndarray]:
        """``int64[tokens]`` for each text, special tokens included, cut where the model's folder says so."""
        cut_to, lower = self.pooling.max_tokens, self.pooling.lower_case
        return [token_ids(self.tokenizer, text, self.graph.max_tokens, cut_to, lower) for text in texts]

    def hidden_states(self, token_ids: Any, operations: Any) -> np.ndarray:
        """``float32[tokens, features]`` for one sequence of token ids, computed on the host by ``operations``."""
        return run_reference(self.graph, {self.input_name: token_ids}, operations)

    def embed(self, texts: Sequence[str], executor: Executor | str = "cpu") -> np.ndarray:
        """``float32[texts, features]``: one vector per text, pooled as the model's folder says.

        ``executor`` is open already, or the URI of one that is opened for this call, such as ``"fast:laptop"``.
        """
        if isinstance(texts, str):
            raise InputError("the texts are one string; give a list of strings, even for a single text")
        if not texts:
            raise InputError("there is no text to embed; give at least one")
        if isinstance(executor, str):
            from lockstep.executors import executor as open_executor

            with open_executor(executor) as opened:
                return self.embed(texts, opened)
        sequences = [{self.input_name: ids} for ids in self.tokenize(texts)]
        return np.stack([self.pooling(hidden) for hidden in executor.run(self.graph, sequences)])

    @property
    def input_name(self) -> str:
        """The name of the model's only input; raises ``ModelError`` if it has several."""
        names = [node.name for node in self.graph.of(Input)]
        if len(names) != 1:
            raise ModelError(f"the model has the inputs {', '.join(map(repr, names))}; run its graph with all of them")
        return names[0]

    def report(self) -> Report:
        """What was recognised, and what falls back to PyTorch and why."""
        points = [node.prescale for node in self.graph.of(Quantise)]
        fallbacks = tuple((node.name, node.reason) for node in self.graph.of(Fallback))
        size = sum(array.size for array in self.graph.tensors.values())
        prescaled = sum(prescale is not None for prescale in points)
        return Report(
            self.graph.source, self.graph.counts(), fallbacks, size, (prescaled, len(points)), self.graph.max_tokens
        )


def load(
    model: str | Path | torch.nn.Module,
    prescale: str | Path | None = "default",
    *,
    example: Mapping[str, torch.Tensor] | None = None,
    max_tokens: int | None = None,
    strict: bool = False,
) -> Model:
    """Load a model: a Hugging Face folder, a Hub id in the local cache, ``"minilm"``, or any ``torch.nn.Module`` that
    exports.

    Parameters
    ----------
    prescale : ``"default"`` takes what comes with the model, if anything; none takes nothing; a path names a file
        made by ``python -m lockstep.calibrate``.
    example : inputs with a batch of one with which a module is captured; not needed for models of transformers.
    max_tokens : longest sequence to serve; for models of transformers as many as they have positions, up to 4096.
    strict : whether to refuse a model of which a part would run in PyTorch.

    Raises
    ------
    ModelError
        one of its subclasses, with a sentence that says what to do; ``FallbackError`` is what ``strict`` raises.
    """
    if isinstance(model, torch.nn.Module):
        graph = _float_graph(model, example, max_tokens, type(model).__name__)
        _refuse_fallbacks(graph, strict)
        chosen = None if prescale in (None, "default") else load_prescales(Path(str(prescale)))
        return Model(quantise(graph, chosen), graph, Pooling(), None)
    name = str(model)
    folder = find_folder(name)
    checkpoint = load_checkpoint(folder)
    pooling = read_pooling(folder)
    graph = _float_graph(checkpoint.module, example, max_tokens, name, checkpoint.require)
    _refuse_fallbacks(graph, strict)
    return Model(quantise(graph, _prescales(prescale, name, folder)), graph, pooling, folder)


def _refuse_fallbacks(graph: Graph, strict: bool) -> None:
    fallbacks = graph.of(Fallback)
    if strict and fallbacks:
        named = "; ".join(f"{node.name} ({node.reason})" for node in fallbacks)
        parts = "a part" if len(fallbacks) == 1 else f"{len(fallbacks)} parts"
        raise FallbackError(
            f"{parts} of {graph.source} would run in PyTorch on the CPU: {named}; load it without strict to allow that"
        )


def _prescales(prescale: str | Path | None, name: str, folder: Path) -> Prescales | None:
    if prescale is None:
        return None
    if prescale != "default":
        return load_prescales(Path(prescale))
    if (folder / PRESCALE_FILE).is_file():
        return load_prescales(folder / PRESCALE_FILE)
    if name in BUNDLED:
        with resources.as_file(resources.files("lockstep") / "data" / f"{name}_prescale.safetensors") as path:
            return load_prescales(path)
    return None


def _float_graph(
    module: torch.nn.Module,
    example: Mapping[str, torch.Tensor] | None,
    max_tokens: int | None,
    source: str,
    check: Any = None,
) -> Graph:
    config = getattr(module, "config", None)
    if max_tokens is None:
        positions = getattr(config, "max_position_embeddings", None)
        max_tokens = min(positions, LONGEST) if isinstance(positions, int) else None
    captured = capture(module, _example(module, config) if example is None else example, max_tokens)
    if check is not None:
        check(used_parameters(captured))
    return recognise(captured, source)


def _example(module: torch.nn.Module, config: Any) -> dict[str, torch.Tensor]:
    name = getattr(module, "main_input_name", None)
    if name == "input_ids":
        return {name: torch.ones((1, EXAMPLE_TOKENS), dtype=torch.int64)}
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    if name == "pixel_values" and isinstance(size, int):
        return {name: torch.zeros((1, channels, size, size))}
    raise CaptureError(
        f"{type(module).__name__} does not say what its inputs look like; give example={{name: tensor}} with a "
        "batch of one"
    )
