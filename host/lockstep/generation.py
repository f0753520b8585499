"""Generation: from a prompt to new tokens and their text, on any executor.

    model = lockstep.load("tiny", device="fast:laptop")
    print(model.generate("def add(", max_new_tokens=40).text)

The logits have the same bits on every executor, and tokens are chosen on the host; so the same prompt, values and
seed give the same text everywhere.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lockstep.cache_policy import WHOLE, CachePolicy, hosted
from lockstep.compiler.packing import expanded
from lockstep.errors import InputError, ModelError, SequenceLengthError, TokenizerError
from lockstep.executors import OpenExecutor
from lockstep.graph import Add, LayerNorm, RMSNorm
from lockstep.run_report import Phase, Report
from lockstep.sampling import Sampler, Sampling
from lockstep.session import Session
from lockstep.streaming import Detokeniser, StopStrings

if TYPE_CHECKING:
    from lockstep.model import Model

#: New tokens if nobody says how many.
NEW_TOKENS = 128

Message = dict[str, str]
#: A text, token ids: int[n], or the messages of a chat.
Prompt = str | Sequence[int] | np.ndarray | Sequence[Message]
FinishReason = Literal["stop", "length", "interrupted"]


@dataclass(frozen=True)
class Options:
    """What to generate.

    Attributes
    ----------
    max_new_tokens : most new tokens.
    sampling : how they are chosen.
    stop : strings that end the text; it stops in front of them.
    context : most tokens, prompt and new ones; none for as many as are needed.
    policy : how the cache is treated.
    end_tokens : tokens that end the text.
    """

    max_new_tokens: int = NEW_TOKENS
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    context: int | None = None
    policy: CachePolicy = WHOLE
    end_tokens: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        for name, value in (("max_new_tokens", self.max_new_tokens), ("context", self.context)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InputError(f"{name} is {value!r}; give a whole number from 1 on")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise InputError(f"stop is {list(self.stop)!r}; give strings with something in them")

    def numbered(self, number: int) -> Options:
        """The same for prompt ``number`` of several: each draws for itself."""
        seed = self.sampling.seed
        return self if seed is None else replace(self, sampling=replace(self.sampling, seed=seed + number))


@dataclass(frozen=True)
class Generation:
    """What was generated behind one prompt.

    Attributes
    ----------
    text : of the new tokens, without special ones, up to a stop string; empty if the model has no tokenizer.
    token_ids : the new tokens; with the one that ended the text, if one did.
    finish_reason : ``"stop"`` for an end token or a stop string, ``"length"`` for ``max_new_tokens`` or a full
        context, ``"interrupted"`` while it is not at its end.
    report : what it cost.
    seed : of the draws; the same one gives the same tokens again. None if nothing was drawn.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    report: Report
    seed: int | None = None

    def __str__(self) -> str:
        return self.text


class Generator:
    """Prompts, one after the other, on one executor. The cache stays between them: what a prompt has in common with
    the tokens that are there is not computed again.

    Parameters
    ----------
    model : a causal language model. executor : open; the caller closes it.

    Raises
    ------
    ModelError
        if the model is not one that generates.
    """

    def __init__(self, model: Model, executor: OpenExecutor) -> None:
        if not model.graph.causal:
            raise ModelError(
                f"{model.graph.source} is no causal language model, so it cannot generate; it can embed texts"
            )
        output = next(node for node in model.graph if node.value == model.graph.output)
        if isinstance(output, LayerNorm | RMSNorm | Add):
            raise ModelError(
                f"{model.graph.source} has no language head, so it gives features and no logits; load the model of its "
                "...ForCausalLM architecture"
            )
        self.model = model
        self.executor = executor
        self._session: Session | None = None
        self._policy = WHOLE
        self._ids = np.zeros(0, np.int64)

    def stream(self, prompt: Prompt, options: Options) -> Stream:
        """The text behind ``prompt``, piece by piece. Everything is checked and the cache opened before it returns.

        A stream is at its end when the next one of the same generator begins.
        """
        ids = prompt_ids(self.model, prompt)
        context, most = room(self.model, len(ids), options)
        self._prepare(ids, context, options.policy)
        return Stream(self, ids, replace(options, max_new_tokens=most))

    def close(self) -> None:
        """Give the cache back."""
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def extend(self, ids: np.ndarray) -> np.ndarray:
        """``float32[vocabulary]``: the logits behind ``ids``, which are appended to the cache."""
        assert self._session is not None
        logits = self._session.extend(ids)[0]
        self._ids = np.concatenate([self._ids[: self._session.length - len(ids)], ids])
        return logits

    def _prepare(self, ids: np.ndarray, context: int, policy: CachePolicy) -> None:
        """A session for ``context`` tokens, which has kept what it can use of ``ids`` and nothing else."""
        if self._session is not None and (self._session.capacity < context or self._policy != policy):
            self.close()
        if self._session is None:
            self._session = self.executor.open_session(self.model.graph, context, policy)
            self._policy = policy
        # The last token is always computed, since its logits are wanted.
        had = self._ids[: min(self._session.length, len(ids) - 1)]
        differ = np.flatnonzero(had != ids[: len(had)])
        kept = int(differ[0]) if len(differ) else len(had)
        if kept != self._session.length and not self._session.slots.can_truncate(self._session.length):
            kept = 0
        self._session.truncate(kept)
        self._ids = self._ids[:kept]

    @property
    def kept(self) -> int:
        """Tokens in the cache."""
        return 0 if self._session is None else self._session.length


class Stream:
    """An iterator over pieces of text; every piece ends with a whole character.

    Attributes
    ----------
    result : what there is so far, at any time; also behind an interrupt.
    """

    def __init__(self, generator: Generator, ids: np.ndarray, options: Options) -> None:
        self._generator = generator
        self._prompt = ids
        self._options = options
        self._text: list[str] = []
        self._tokens: list[int] = []
        self._finish: FinishReason = "interrupted"
        self._prefill, self._decode = Phase(), Phase()
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def result(self) -> Generation:
        """What there is so far."""
        model, executor = self._generator.model, self._generator.executor
        sampling = self._options.sampling
        report = Report(
            executor.uri,
            len(self._prompt),
            len(self._tokens),
            self._prefill,
            self._decode,
            model.report().fallbacks,
            expanded(model.graph, executor.config),
            () if executor.config is None else hosted(self._options.policy),
        )
        seed = sampling.seed if sampling.draws else None
        return Generation("".join(self._text), tuple(self._tokens), self._finish, report, seed)

    def _run(self) -> Iterator[str]:
        model, options = self._generator.model, self._options
        detokeniser = Detokeniser(model.tokenizer, self._prompt.tolist()) if model.has_tokenizer else None
        stops = StopStrings(options.stop)
        sampler = Sampler(options.sampling)
        ids = np.zeros(len(self._prompt) + options.max_new_tokens, np.int64)
        ids[: len(self._prompt)] = self._prompt
        count = len(self._prompt)
        logits = self._extend(ids[self._generator.kept : count])
        while True:
            token = sampler.choose(ids[:count], logits)
            self._tokens.append(token)
            ids[count] = token
            count += 1
            # An end token has no text, unless a tokenizer does not know it as special.
            ended = token in options.end_tokens
            if detokeniser is not None and not ended:
                piece = stops.push(detokeniser.push(token))
                yield from self._show(piece)
            if ended or stops.stopped:
                self._finish = "stop"
                break
            if len(self._tokens) == options.max_new_tokens:
                self._finish = "length"
                break
            logits = self._extend(ids[count - 1 : count])
        if detokeniser is not None and not stops.stopped:
            rest = stops.push(detokeniser.finish())
            if stops.stopped:
                self._finish = "stop"
            else:
                rest += stops.finish()
            yield from self._show(rest)

    def _show(self, piece: str) -> Iterator[str]:
        if piece:
            self._text.append(piece)
            yield piece

    def _extend(self, ids: np.ndarray) -> np.ndarray:
        executor = self._generator.executor
        before, start = executor.totals, time.monotonic()
        logits = self._generator.extend(ids)
        seconds, did = time.monotonic() - start, executor.totals - before
        counted = (did.cycles, did.mac_cycles, did.bytes_moved) if did.programs else (None, None, None)
        phase = Phase(len(ids), seconds, *counted)
        if self._tokens:
            self._decode += phase
        else:
            self._prefill += phase
        return logits


def room(model: Model, prompt_tokens: int, options: Options) -> tuple[int, int]:
    """The tokens that the cache must hold, and how many of them can be new.

    Raises
    ------
    SequenceLengthError
        if the prompt leaves no room for a new token.
    """
    most = model.graph.max_tokens
    context = options.context
    if context is not None and context > most:
        raise SequenceLengthError(f"a context of {context} tokens is too long: the model has positions for {most}")
    limit = most if context is None else context
    if prompt_tokens >= limit:
        what = "the model has positions for" if context is None else "the context holds"
        raise SequenceLengthError(
            f"the prompt has {prompt_tokens} tokens, but {what} {limit}, of which at least one must be "
            "left for a new token; shorten the prompt" + ("" if limit == most else " or give a longer context")
        )
    new = min(options.max_new_tokens, limit - prompt_tokens)
    return (prompt_tokens + new if context is None else context), new


def is_messages(prompt: Any) -> bool:
    """Whether ``prompt`` is the messages of one chat."""
    return isinstance(prompt, list | tuple) and bool(prompt) and isinstance(prompt[0], dict)


def is_batch(prompt: Any) -> bool:
    """Whether ``prompt`` is several prompts."""
    return isinstance(prompt, list | tuple) and bool(prompt) and isinstance(prompt[0], str | list | tuple | np.ndarray)


def prompt_ids(model: Model, prompt: Prompt) -> np.ndarray:
    """``int64[tokens]`` of a text, special tokens included, of token ids, or of the messages of a chat.

    Raises
    ------
    InputError
        if it is none of these. SequenceLengthError : if it is empty. TokenizerError : if the model has no tokenizer,
        or no chat template for messages.
    """
    if isinstance(prompt, str):
        ids = model.tokenizer(prompt, verbose=False)["input_ids"] if prompt else []
    elif is_messages(prompt):
        ids = _chat_ids(model, prompt)
    else:
        ids = prompt
    try:
        array = np.asarray(ids)
    except ValueError:
        array = np.zeros((0, 0))
    if array.size == 0 and array.ndim == 1:
        raise SequenceLengthError("the prompt is empty; give at least one word")
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise InputError(
            "a prompt is a string, a list of token ids, or a list of messages {'role': ..., 'content': ...}"
        )
    return array.astype(np.int64)


def has_chat_template(tokenizer: Any) -> bool:
    """Whether ``tokenizer`` says how messages become a text."""
    return bool(getattr(tokenizer, "chat_template", None))


def _chat_ids(model: Model, messages: Any) -> list[int]:
    for message in messages:
        if not (isinstance(message, dict) and {"role", "content"} <= message.keys()):
            raise InputError(f"a message of a chat is {{'role': ..., 'content': ...}}, not {message!r}")
    if not has_chat_template(model.tokenizer):
        raise TokenizerError("the tokenizer has no chat template; give the prompt as one string")
    try:
        return model.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except Exception as error:
        detail = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TokenizerError(f"the chat template of the tokenizer refuses these messages: {detail}") from None
