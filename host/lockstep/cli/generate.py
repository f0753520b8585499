"""``lockstep generate`` and ``lockstep chat``: text from a model, as it comes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cache_options import CacheBitsOption, EvictOption, KeepOption, SelectOption
from .failures import INTERRUPTED, USER, UsageError, explain, guarded
from .models import ModelArgument, open_model
from .output import JsonOption, Steps, emit, messages

if TYPE_CHECKING:
    from lockstep.generation import Generation, Generator, Options, Prompt, Stream
    from lockstep.run_report import Report

DeviceOption = Annotated[str, typer.Option(help="Where to run; 'lockstep devices' lists them.")]
NewTokensOption = Annotated[int, typer.Option(help="Most new tokens.")]
TemperatureOption = Annotated[
    float | None,
    typer.Option(help="Above 0: tokens are drawn. 0: the best one is taken. By default as the model's folder says."),
]
TopKOption = Annotated[int | None, typer.Option(help="Draw from so many of the best tokens.")]
TopPOption = Annotated[float | None, typer.Option(help="Draw from the best tokens that have this probability.")]
SeedOption = Annotated[int | None, typer.Option(help="Seed of the draws; another one each time by default.")]
StopOption = Annotated[list[str] | None, typer.Option(help="A text in front of which to stop; may be given again.")]
ContextOption = Annotated[int | None, typer.Option(help="Most tokens, prompt and new ones.")]
ClockOption = Annotated[float, typer.Option(help="Clock of the core in MHz, for tokens per second.")]


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: lockstep generate tiny --prompt 'def add(' --device fast:laptop")(generate)
    app.command(epilog="Example: lockstep chat tiny --device fast:laptop")(chat)


@guarded
def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option(help="The text to go on from.")],
    device: DeviceOption = "cpu",
    max_new_tokens: NewTokensOption = 128,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    seed: SeedOption = None,
    stop: StopOption = None,
    context: ContextOption = None,
    keep: KeepOption = None,
    evict: EvictOption = None,
    select: SelectOption = None,
    cache_bits: CacheBitsOption = None,
    clock: ClockOption = 50.0,
    as_json: JsonOption = False,
) -> None:
    """Generate text behind a prompt: the text on standard output, what it cost on standard error.

    Ctrl-C ends it with what there is, and exit status 130.
    """
    if not prompt:
        raise UsageError("the prompt is empty; give at least one word")
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    asked = {
        "max_new_tokens": max_new_tokens,
        "stop": stop or (),
        "context": context,
        "keep": keep,
        "evict": evict,
        "select": select,
        "cache_bits": cache_bits,
        **sampling,
    }
    with _opened(model, device, clock, asked) as (generator, options):
        found = show(generator.stream(prompt, options), quiet=as_json)
        generator.close()
    if as_json:
        emit({"model": model, "device": device, "prompt": prompt, **described(found, clock)})
    else:
        summarise(found.report, clock)
    if found.finish_reason == "interrupted":
        raise typer.Exit(INTERRUPTED)


@guarded
def chat(
    model: ModelArgument,
    device: DeviceOption = "cpu",
    max_new_tokens: NewTokensOption = 256,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    seed: SeedOption = None,
    context: ContextOption = None,
    keep: KeepOption = None,
    evict: EvictOption = None,
    select: SelectOption = None,
    cache_bits: CacheBitsOption = None,
    clock: ClockOption = 50.0,
    as_json: JsonOption = False,
) -> None:
    """Talk with a model: a line on standard input is a turn, and the cache stays between turns.

    /reset forgets the conversation, /exit or the end of the input leaves. Where the tokenizer has no chat template,
    the lines are text that the model goes on from. Ctrl-C ends an answer; at the prompt it leaves.
    """
    turns: list[dict[str, Any]] = []
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    cache = {"keep": keep, "evict": evict, "select": select, "cache_bits": cache_bits}
    asked = {"max_new_tokens": max_new_tokens, "context": context, **cache, **sampling}
    with _opened(model, device, clock, asked, whole_context=True) as (generator, options):
        conversation = Conversation(generator)
        if not conversation.templated:
            _say("the tokenizer has no chat template: the model goes on from the lines as they are")
        while (line := _line(quiet=as_json)) is not None and line != "/exit":
            if line == "/reset":
                conversation.reset()
                continue
            if not line:
                continue
            try:
                found = show(conversation.ask(line, options), quiet=as_json)
            except Exception as error:
                # A terminal has somebody who can put it right; a script has not.
                sentence, status = explain(error)
                if status != USER or not sys.stdin.isatty():
                    raise
                _say(f"error: {sentence}")
                continue
            conversation.answered(found)
            turns.append({"prompt": line, **described(found, clock)})
            if not as_json:
                summarise(found.report, clock)
        generator.close()
    if as_json:
        emit({"model": model, "device": device, "turns": turns})


@contextmanager
def _opened(
    model: str, device: str, clock: float, asked: dict[str, Any], whole_context: bool = False
) -> Iterator[tuple[Generator, Options]]:
    """A generator on a device, and the options that were asked for, as ``Model.options`` takes them.

    whole_context : a cache for all tokens that the model can take, where no context was asked for.
    """
    if not 0 < clock < float("inf"):
        raise UsageError(f"a clock of {clock:g} MHz is none; give a positive number")
    from lockstep.cache_policy import asked_policy
    from lockstep.executors import check_uri, executor

    check_uri(device)
    # Before the model, which takes seconds.
    asked_policy(asked["evict"], asked["keep"], asked["select"], asked["cache_bits"])
    with Steps() as steps:
        loaded = open_model(model, steps)
        from lockstep.generation import Generator

        if whole_context and asked["context"] is None:
            asked |= {"context": loaded.graph.max_tokens}
        options = loaded.options(**asked)
        opened = executor(device, steps)
    with opened:
        yield Generator(loaded, opened), options


class Conversation:
    """What was said so far, as messages for a chat template, or as plain text where there is none."""

    def __init__(self, generator: Generator) -> None:
        from lockstep.generation import has_chat_template

        self.generator = generator
        self.templated = has_chat_template(generator.model.tokenizer)
        self._messages: list[dict[str, str]] = []
        self._text = ""
        self._asked = ""

    def ask(self, line: str, options: Any) -> Stream:
        """The answer to ``line``, as it comes."""
        self._asked = line
        prompt: Prompt = self._text + line + "\n"
        if self.templated:
            prompt = [*self._messages, {"role": "user", "content": line}]
        return self.generator.stream(prompt, options)

    def answered(self, found: Generation) -> None:
        """Take the last line and its answer into the conversation."""
        self._text += f"{self._asked}\n{found.text}"
        if not self._text.endswith("\n"):
            self._text += "\n"
        self._messages += [{"role": "user", "content": self._asked}, {"role": "assistant", "content": found.text}]

    def reset(self) -> None:
        """Forget everything."""
        self._messages.clear()
        self._text = ""


def show(stream: Stream, quiet: bool = False) -> Generation:
    """Write the pieces of a stream to standard output as they come, and return what there is at its end, which may
    be an interrupt.
    """
    try:
        for piece in stream:
            if not quiet:
                sys.stdout.write(piece)
                sys.stdout.flush()
    except KeyboardInterrupt:
        _say("\ninterrupted")
    if not quiet:
        sys.stdout.write("\n")
        sys.stdout.flush()
    return stream.result


def described(found: Generation, clock: float) -> dict[str, Any]:
    """A generation as JSON has it."""
    return {
        "text": found.text,
        "token_ids": list(found.token_ids),
        "finish_reason": found.finish_reason,
        "seed": found.seed,
        **found.report.as_dict(),
        "clock_mhz": clock,
        "tokens_per_second": found.report.tokens_per_second(clock * 1e6),
        "first_token_seconds": found.report.first_token_seconds(clock * 1e6),
    }


def summarise(report: Report, clock: float) -> None:
    """What a generation cost, on standard error."""
    _say(str(report))
    speed, first = report.tokens_per_second(clock * 1e6), report.first_token_seconds(clock * 1e6)
    if first is not None:
        then = "" if speed is None else f", then {speed:,.2f} tokens a second"
        _say(f"at {clock:g} MHz: the first token after {first:.3f} s{then}")


def _say(text: str) -> None:
    messages().print(text, markup=False, highlight=False, soft_wrap=True)


def _line(quiet: bool) -> str | None:
    """The next line of standard input; none at its end."""
    if sys.stdin.isatty() and not quiet:
        messages().print("> ", end="")
    line = sys.stdin.readline()
    return line.strip() if line else None
