"""Choosing the next token from logits: greedy, or drawn by the rules of transformers with a seeded generator."""

from __future__ import annotations

import json
import math
import secrets
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.generation import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lockstep.errors import ConfigurationMissingError, InputError

GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes
    ----------
    temperature : divides the logits before a token is drawn; none or 0 takes the token with the greatest logit.
    top_k : only so many tokens with the greatest logits can be drawn; none or 0 for all.
    top_p : only the likeliest tokens whose probabilities add up to this can be drawn; none or 1 for all.
    repetition_penalty : divides the positive logits of tokens that were there before, and multiplies the negative ones.
    seed : of the draws; none takes another one each time.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, wanted, fits in (
            ("temperature", "0 or a positive number", lambda x: 0 <= x < math.inf),
            ("top_k", "0 or a positive whole number", lambda x: x >= 0 and x == int(x)),
            ("top_p", "more than 0 and at most 1", lambda x: 0 < x <= 1),
            ("repetition_penalty", "a positive number", lambda x: 0 < x < math.inf),
            ("seed", "a whole number from 0 to 2**63 - 1", lambda x: 0 <= x < 1 << 63 and x == int(x)),
        ):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not fits(value):
                raise InputError(f"{name} is {value!r}; give {wanted}")

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn; otherwise they follow from the logits alone."""
        return bool(self.temperature)


@dataclass(frozen=True)
class Defaults:
    """What a model's folder says about generation: how tokens are chosen, and which of them end a text."""

    sampling: Sampling = field(default_factory=Sampling)
    end_tokens: frozenset[int] = frozenset()

    def chosen(self, temperature: float | None, top_k: int | None, top_p: float | None, seed: int | None) -> Sampling:
        """The folder's sampling with what the caller gives in its place. ``top_k`` or ``top_p`` asks for draws, so it
        makes the temperature 1 where there is none.
        """
        result = self.sampling
        if temperature is not None:
            result = replace(result, temperature=temperature)
        elif not result.draws and (top_k or top_p):
            result = replace(result, temperature=1.0)
        if top_k is not None:
            result = replace(result, top_k=top_k)
        if top_p is not None:
            result = replace(result, top_p=top_p)
        if result.draws:
            result = replace(result, seed=secrets.randbits(32) if seed is None else seed)
        elif seed is not None:
            result = replace(result, seed=seed)
        return result


def read_defaults(folder: Path | None) -> Defaults:
    """What ``generation_config.json`` and ``config.json`` of a model's folder say, as far as they are there.

    Raises
    ------
    ConfigurationMissingError
        if a file is not readable JSON, or holds values that make no sense.
    """
    if folder is None:
        return Defaults()
    configuration, generation = (_read(folder / name) for name in ("config.json", GENERATION_CONFIG))
    ends = generation.get("eos_token_id", configuration.get("eos_token_id"))
    drawn = bool(generation.get("do_sample"))
    fields = {name: generation.get(name) for name in ("top_k", "top_p", "repetition_penalty")}
    # Without do_sample transformers takes the best token and reads none of the others.
    temperature = generation.get("temperature")
    if not drawn:
        fields |= {"top_k": None, "top_p": None}
    try:
        sampling = Sampling((1.0 if temperature is None else temperature) if drawn else None, **fields)
        end_tokens = frozenset(int(end) for end in (ends if isinstance(ends, list) else [ends]) if end is not None)
    except (InputError, TypeError, ValueError) as error:
        raise ConfigurationMissingError(f"{folder / GENERATION_CONFIG} cannot be used: {error}") from None
    return Defaults(sampling, end_tokens)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        content = None
    if not isinstance(content, dict):
        raise ConfigurationMissingError(f"{path} is not readable JSON; fetch the file again, or remove it")
    return content


class Sampler:
    """Chooses tokens one after the other. The same logits and the same seed give the same tokens."""

    def __init__(self, sampling: Sampling) -> None:
        self._processors = LogitsProcessorList()
        if sampling.repetition_penalty not in (None, 1.0):
            self._processors.append(RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty or 1)))
        self._generator: torch.Generator | None = None
        if sampling.draws:
            assert sampling.temperature
            assert sampling.seed is not None
            self._generator = torch.Generator("cpu").manual_seed(int(sampling.seed))
            # The order in which transformers applies them.
            if sampling.temperature != 1:
                self._processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_k:
                self._processors.append(TopKLogitsWarper(int(sampling.top_k)))
            if sampling.top_p is not None and sampling.top_p < 1:
                self._processors.append(TopPLogitsWarper(float(sampling.top_p)))

    def choose(self, token_ids: np.ndarray, logits: np.ndarray) -> int:
        """The token behind ``token_ids``: int64[n], from its logits: ``float32[vocabulary]``."""
        scores: Any = torch.from_numpy(logits[None].copy())
        if self._processors:
            before: Any = torch.from_numpy(token_ids[None].astype(np.int64))
            scores = self._processors(before, scores)
        if self._generator is None:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))
