"""Text from tokens that come one by one: whole characters only, and nothing behind a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

#: What decoders put where the bytes of a character are not complete.
REPLACEMENT = "\ufffd"
#: A character has at most four bytes, so at most three replacements at the end can still become one.
_UNFINISHED = 3


class Detokeniser:
    """Turns tokens into pieces of text; special tokens have none.

    Tokens are decoded together with some before them, since a decoder may treat the first one of a text differently.
    Pieces that were given out are final.

    Parameters
    ----------
    tokenizer : of transformers.
    prompt : the tokens in front, none of whose text is given out.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = [int(token) for token in prompt[-8:]]
        self._done = len(self._decode().rstrip(REPLACEMENT))
        self._old = len(self._window)

    def push(self, token: int) -> str:
        """The text that ``token`` completes; often empty."""
        self._window.append(token)
        return self._take(final=False)

    def finish(self) -> str:
        """The rest: bytes that never became a character, as replacements."""
        return self._take(final=True)

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=True)

    def _take(self, final: bool) -> str:
        text = self._decode()
        end = len(text)
        while not final and len(text) - end < _UNFINISHED and end > self._done and text[end - 1] == REPLACEMENT:
            end -= 1
        piece = text[self._done : end]
        self._done = max(self._done, end)
        if end == len(text) and piece:
            # Everything is out: the tokens of this piece are what the next ones are decoded with.
            self._window = self._window[self._old :]
            self._old = len(self._window)
            self._done = len(self._decode())
        return piece


class StopStrings:
    """Lets text through up to the first of some strings; the beginning of one is held back until it is clear."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """What of ``piece``, and of what was held back, can be shown."""
        text = self._held + piece
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, since nothing follows."""
        text, self._held = self._held, ""
        return text
