"""Capturing: from a ``torch.nn.Module`` to a functional graph of PyTorch operations with the length of a sequence
left open.

The module is exported with ``torch.export`` for a batch of one and lowered with ``run_decompositions({})``, which
keeps ``linear``, ``scaled_dot_product_attention``, ``layer_norm`` and ``gelu`` whole while removing in-place updates.
Nothing here looks at the name of an architecture. Dead code (a pooler whose result is not asked for) is never looked
at again.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from lockstep.errors import CaptureError
from lockstep.fragment import ancestors

#: Tokens of the example with which a model is traced; any number above one would do.
EXAMPLE_TOKENS = 8
#: Longest sequence that is offered when neither the model nor the user says one.
DEFAULT_MAX_TOKENS = 512


@dataclass(frozen=True)
class Captured:
    """A functional graph of PyTorch operations.

    Attributes
    ----------
    graph : the operations; every node carries its shape and dtype in ``meta["val"]``.
    parameters : placeholders that stand for parameters, buffers and lifted constants, with name and contents.
    inputs : placeholders that stand for the model's inputs, with their names.
    output : the node whose result the model returns first.
    min_tokens, max_tokens : shortest and longest sequence that the capture is good for.
    fixed : the length of a sequence is fixed.
    """

    graph: fx.Graph
    parameters: dict[fx.Node, tuple[str, torch.Tensor]]
    inputs: dict[fx.Node, str]
    output: fx.Node
    min_tokens: int
    max_tokens: int
    fixed: bool


def capture(module: torch.nn.Module, example: Mapping[str, torch.Tensor], max_tokens: int | None = None) -> Captured:
    """Capture ``module`` as called with the keyword arguments ``example``.

    Parameters
    ----------
    module : any module that ``torch.export`` accepts; it is captured in evaluation mode and float32, and left as it
        was.
    example : inputs for a batch of one: ``int64[1, tokens]``, ``float32[1, tokens, features]``, or any other shape,
        which is then fixed. Contents do not matter, shapes do; use at least two tokens.
    max_tokens : longest sequence the graph shall serve, 512 if not said.

    Raises
    ------
    CaptureError
        if the module cannot be exported or returns no floating-point tensor.
    """
    batches = {
        name: tuple(tensor.shape) for name, tensor in example.items() if tensor.ndim == 0 or tensor.shape[0] != 1
    }
    if batches:
        name, shape = next(iter(batches.items()))
        raise CaptureError(f"example input {name!r} has shape {list(shape)}: the first size must be a batch of 1")
    module = _ready(module)
    bound = DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens
    lengths = {tensor.shape[1] for tensor in example.values() if _has_tokens(tensor)}
    failures: list[Exception] = []
    # Some modules treat the shortest sequences as a case of their own; they are captured for longer ones.
    for least in (2, 3) if lengths else (2,):
        tokens = Dim("tokens", min=least, max=bound)
        dynamic = {name: {1: tokens} if _has_tokens(tensor) else None for name, tensor in example.items()}
        try:
            program = _export(module, example, dynamic)
        except Exception as error:
            failures.append(error)
            continue
        return _captured(program, 1 if least == 2 else least, bound, fixed=not lengths)
    # A module on features may fix its length (learnt positions added whole); it then serves that length only.
    if len(lengths) == 1 and all(tensor.is_floating_point() for tensor in example.values()):
        with contextlib.suppress(Exception):
            (length,) = lengths
            return _captured(_export(module, example, dict.fromkeys(example)), length, length, fixed=True)
    raise CaptureError(_explain(module, failures[0])) from None


def _has_tokens(tensor: torch.Tensor) -> bool:
    """Whether the second size of an input is the number of tokens: token ids, or rows of features."""
    return tensor.ndim == (3 if tensor.is_floating_point() else 2)


def _ready(module: torch.nn.Module) -> torch.nn.Module:
    """``module`` itself if it is float32 and evaluates already, else a copy that does."""
    tensors = [*module.parameters(), *module.buffers()]
    if not any(part.training for part in module.modules()) and all(
        tensor.dtype == torch.float32 for tensor in tensors if tensor.is_floating_point()
    ):
        return module
    return copy.deepcopy(module).eval().float()


def _export(module: torch.nn.Module, example: Mapping[str, torch.Tensor], dynamic: dict[str, Any]) -> ExportedProgram:
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the fused encoder layer would hide what it is made of
    try:
        with torch.no_grad(), warnings.catch_warnings(), _plain_form(module):
            warnings.simplefilter("ignore")
            program = torch.export.export(module, (), kwargs=dict(example), dynamic_shapes=dynamic, strict=False)
            return program.run_decompositions({})
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


@contextlib.contextmanager
def _plain_form(module: torch.nn.Module) -> Iterator[None]:
    """With models of transformers set to keep no cache and to pick the weights of experts by index, which
    ``lockstep.routing`` reads; afterwards they are as they were.
    """
    settings = {"use_cache": False, "_experts_implementation_internal": "batched_mm"}
    configurations = {id(part.config): part.config for part in module.modules() if hasattr(part, "config")}
    before = [
        (configuration, name, getattr(configuration, name))
        for configuration in configurations.values()
        for name in settings
        if hasattr(configuration, name)
    ]
    try:
        for configuration, name, _ in before:
            setattr(configuration, name, settings[name])
        yield
    finally:
        for configuration, name, value in before:
            setattr(configuration, name, value)


def _explain(module: torch.nn.Module, error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    detail = lines[0] if lines else type(error).__name__
    hint = "; say a smaller max_tokens" if "Constraints violated" in str(error) else ""
    return f"{type(module).__name__} cannot be captured by torch.export{hint}: {detail}"


def _captured(program: ExportedProgram, least: int, bound: int, fixed: bool) -> Captured:
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    parameters: dict[fx.Node, tuple[str, torch.Tensor]] = {}
    inputs: dict[fx.Node, str] = {}
    for spec in program.graph_signature.input_specs:
        node = placeholders[spec.arg.name]
        if spec.kind == InputKind.USER_INPUT:
            if isinstance(node.meta.get("val"), torch.Tensor):
                inputs[node] = spec.arg.name
        elif spec.target is not None:
            source = program.state_dict if spec.target in program.state_dict else program.constants
            parameters[node] = (spec.target, source[spec.target].detach())
    outputs = next(node for node in program.graph.nodes if node.op == "output").args[0]
    for output, result in zip(outputs, program.graph_signature.output_specs, strict=True):
        if result.kind != OutputKind.USER_OUTPUT:
            continue  # a buffer that the module changes
        value = output.meta.get("val") if isinstance(output, fx.Node) else None
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return Captured(program.graph, parameters, inputs, output, least, bound, fixed)
    raise CaptureError("the module returns no floating-point tensor, so there is nothing to compute")


def used_parameters(captured: Captured) -> list[str]:
    """Names of the parameters that the output depends on."""
    needed = set(ancestors(captured.output, stop=lambda node: False))
    return [name for node, (name, _) in captured.parameters.items() if node in needed]
