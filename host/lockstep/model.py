"""A loaded model: its contract graph, its tokenizer and pooling, and what was recognised in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Protocol, overload, runtime_checkable

import numpy as np
import torch

from lockstep.bundled import BUNDLED
from lockstep.cache_policy import WHOLE, CachePolicy, asked_policy
from lockstep.capture import EXAMPLE_TOKENS, capture, used_parameters
from lockstep.checkpoint import find_folder, load_checkpoint
from lockstep.errors import CaptureError, FallbackError, InputError, ModelError, PrescaleError, TokenizerError
from lockstep.evaluate import run_reference
from lockstep.executors import OpenExecutor, check_uri
from lockstep.generation import (
    NEW_TOKENS,
    Generation,
    Generator,
    Message,
    Options,
    Prompt,
    Stream,
    is_batch,
    prompt_ids,
    room,
)
from lockstep.graph import Fallback, Graph, Input
from lockstep.head_pruning import HeadSchedule, prune_heads
from lockstep.inspection import ModelReport, inspect
from lockstep.pooling import Pooling, read_pooling
from lockstep.pruning import Schedule, prune_tokens
from lockstep.quantisation.stored import StoredWeights
from lockstep.quantise import Prescales, load_prescales, quantise, without_prescales
from lockstep.recognise import recognise
from lockstep.sampling import Defaults, read_defaults
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

    def open_session(self, graph: Graph, capacity: int, policy: CachePolicy = WHOLE) -> Session:
        """A session of a causal language model with room for ``capacity`` tokens, with a cache as ``policy`` says."""
        ...


@dataclass(frozen=True)
class HostExecutor:
    """The ``cpu`` device: contract operations without a program, one sequence after the other.

    ``operations`` is a module such as ``lockstep_isa.operations`` or ``lockstep_hls.kernels``.
    """

    operations: Any

    def run(self, graph: Graph, sequences: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
        return [run_reference(graph, inputs, self.operations) for inputs in sequences]

    def open_session(self, graph: Graph, capacity: int, policy: CachePolicy = WHOLE) -> Session:
        return HostSession(graph, capacity, self.operations, policy)


@dataclass(frozen=True, eq=False)
class Model:
    """A model that is ready for any executor.

    Attributes
    ----------
    graph : contract stage, W8A8.
    float_graph : float stage, from which another pre-scale can be fitted.
    pooling : how a sequence becomes one vector.
    folder : the model's files; none for a module.
    device : URI of the executor on which the model runs if a call names no other.
    stored : weights that the model's files hold quantised, by their names in the float graph.

    The device is opened when it is first used, and stays open; use the model as a context manager, or call
    :meth:`close`.
    """

    graph: Graph
    float_graph: Graph
    pooling: Pooling
    folder: Path | None
    device: str = "cpu"
    stored: StoredWeights = field(default_factory=StoredWeights)

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

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is a tokenizer that can be read."""
        try:
            return self.tokenizer is not None
        except TokenizerError:
            return False

    def embed(self, texts: Sequence[str], executor: Executor | str | None = None) -> np.ndarray:
        """``float32[texts, features]``: one vector per text, pooled as the model's folder says.

        ``executor`` is open already, or the URI of one that is opened for this call, such as ``"fast:laptop"``; none
        is the model's own device.
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
        hidden_states = (executor or self.executor).run(self.graph, sequences)
        return np.stack([self.pooling(hidden) for hidden in hidden_states])

    def pruned(self, schedule: Schedule | None = None, *, heads: HeadSchedule | None = None) -> Model:
        """The same model with fewer tokens or heads behind some layers.

        schedule : the number of a layer of attention, counted from 1, maps to the share of its tokens that stay; see
        :mod:`lockstep.pruning`. heads : the same for heads, with shares of all heads of the model; see
        :mod:`lockstep.head_pruning`. What is raised is said there; one of the two is needed.
        """
        graph = self.graph if schedule is None and heads is not None else prune_tokens(self.graph, schedule or {})
        return replace(self, graph=graph if heads is None else prune_heads(graph, heads))

    # --- Generation ----------------------------------------------------------------------------------------------

    @cached_property
    def executor(self) -> OpenExecutor:
        """The model's own device, opened when it is first asked for."""
        from lockstep.executors import executor as open_executor

        return open_executor(self.device)

    @cached_property
    def generator(self) -> Generator:
        """Generation on the model's own device, with the cache that stays between prompts."""
        return Generator(self, self.executor)

    @cached_property
    def generation_defaults(self) -> Defaults:
        """What ``generation_config.json`` says."""
        return read_defaults(self.folder)

    def options(
        self,
        *,
        max_new_tokens: int = NEW_TOKENS,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        context: int | None = None,
        evict: str | None = None,
        keep: int | None = None,
        select: int | str | None = None,
        cache_bits: int | None = None,
    ) -> Options:
        """What :meth:`generate` takes, with the model's defaults in place of what is not given; raises
        ``InputError`` for values that make no sense.
        """
        defaults = self.generation_defaults
        ends = defaults.end_tokens
        if not ends and self.has_tokenizer and self.tokenizer.eos_token_id is not None:
            ends = frozenset({self.tokenizer.eos_token_id})
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if stops:
            _ = self.tokenizer  # without one, a stop string would be overlooked
        sampling = defaults.chosen(temperature, top_k, top_p, seed)
        policy = asked_policy(evict, keep, select, cache_bits)
        return Options(max_new_tokens, sampling, stops, context, policy, ends)

    @overload
    def generate(self, prompt: str | Sequence[int] | np.ndarray | Sequence[Message], **options: Any) -> Generation: ...

    @overload
    def generate(self, prompt: Sequence[Prompt], **options: Any) -> list[Generation]: ...

    def generate(self, prompt: Prompt | Sequence[Prompt], **options: Any) -> Generation | list[Generation]:
        """The text behind a prompt, or a list of them behind several.

        Parameters
        ----------
        prompt : a text; token ids: int[n]; the messages ``{"role": ..., "content": ...}`` of a chat; or a list of
            these, of which number n draws with ``seed + n``.
        max_new_tokens : most new tokens; 128 if not given.
        temperature, top_k, top_p, seed : see :class:`lockstep.sampling.Sampling`; what is not given is as in the
            model's ``generation_config.json``. Without a temperature, or with 0, the best token is taken each time.
        stop : a string or several, in front of which the text ends.
        context : most tokens, prompt and new ones; as many as are needed if not given.
        keep : tokens that the cache keeps, and evict : by which policy; see :func:`lockstep.eviction.eviction`.
        select : keys that each query attends to; see :func:`lockstep.cache_policy.selector`.
        cache_bits : 4 for keys and values of half the bytes; see :mod:`lockstep_isa.int4_cache`.

        Raises
        ------
        ModelError
            one of its subclasses, such as ``SequenceLengthError`` where the prompt does not fit.
        lockstep.OutOfDeviceMemory, lockstep.CapacityError
            if model and cache do not fit the device.
        """
        chosen = self.options(**options)
        if not is_batch(prompt):
            return self._run(prompt, chosen)
        prompts: Any = prompt
        for each in prompts:
            room(self, len(prompt_ids(self, each)), chosen)  # so that no work is lost to a prompt that is refused
        return [self._run(each, chosen.numbered(n)) for n, each in enumerate(prompts)]

    def stream(self, prompt: Prompt, **options: Any) -> Stream:
        """An iterator over the pieces of the text behind one prompt; takes what :meth:`generate` takes.

        ``stream.result`` is what there is so far, with its report.
        """
        return self.generator.stream(prompt, self.options(**options))

    def _run(self, prompt: Any, options: Options) -> Generation:
        stream = self.generator.stream(prompt, options)
        for _ in stream:
            pass
        return stream.result

    def as_transformers(self, context: int | None = None) -> Any:
        """This model as a ``transformers.PreTrainedModel`` that generates; see
        :class:`lockstep.transformers_model.LockstepForCausalLM`.

        ``context`` is the most tokens of a sequence; as many as the model has positions if not given.
        """
        from lockstep.transformers_model import wrap

        return wrap(self, context)

    def close(self) -> None:
        """Give cache and device back; either is opened again when it is used."""
        for name in ("generator", "executor"):
            if (opened := self.__dict__.pop(name, None)) is not None:
                opened.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- What it is ------------------------------------------------------------------------------------------------

    @property
    def input_name(self) -> str:
        """The name of the model's only input; raises ``ModelError`` if it has several."""
        names = [node.name for node in self.graph.of(Input)]
        if len(names) != 1:
            raise ModelError(f"the model has the inputs {', '.join(map(repr, names))}; run its graph with all of them")
        return names[0]

    def report(self) -> ModelReport:
        """What was recognised, what memory it takes, and what falls back to PyTorch and why."""
        return inspect(self.graph, self.stored)


def load(
    model: str | Path | torch.nn.Module,
    prescale: str | Path | None = "default",
    *,
    example: Mapping[str, torch.Tensor] | None = None,
    max_tokens: int | None = None,
    strict: bool = False,
    device: str = "cpu",
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
    device : URI of the executor on which the model runs, such as ``"rtl:laptop"``; opened at first use.

    Raises
    ------
    ModelError
        one of its subclasses, with a sentence that says what to do; ``FallbackError`` is what ``strict`` raises.
    lockstep.DeviceNotFound
        if ``device`` names none.
    """
    check_uri(device)
    if isinstance(model, torch.nn.Module):
        graph = _float_graph(model, example, max_tokens, type(model).__name__)
        _refuse_fallbacks(graph, strict)
        chosen = None if prescale in (None, "default") else load_prescales(Path(str(prescale)))
        return Model(quantise(graph, chosen), graph, Pooling(), None, device)
    name = str(model)
    checkpoint = load_checkpoint(find_folder(name))
    folder = checkpoint.folder
    pooling = read_pooling(folder)
    graph = _float_graph(checkpoint.module, example, max_tokens, name, checkpoint.require)
    _refuse_fallbacks(graph, strict)
    stored = checkpoint.stored
    if stored.weights and prescale != "default":
        raise PrescaleError(
            f"the weights of {name} are quantised already; a pre-scale can no longer be chosen for them"
        )
    prescales = _prescales(prescale, name, folder)
    contract = quantise(graph, prescales, stored.weights)
    if stored.weights and prescales:
        graph = without_prescales(graph, prescales, stored.weights)
    return Model(contract, graph, pooling, folder, device, stored)


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
    bundled = resources.files("lockstep") / "data" / f"{name}_prescale.safetensors"
    if name in BUNDLED and bundled.is_file():
        with resources.as_file(bundled) as path:
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
