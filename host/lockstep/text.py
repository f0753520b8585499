"""Texts to token ids, with the tokenizer that lies in the model's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import transformers

from lockstep.errors import SequenceLengthError, TokenizerError
from lockstep.quantisation.gguf_file import gguf_in

_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in ``folder``; raises ``TokenizerError`` if there is none or it cannot be read."""
    given: dict[str, Any] = {"local_files_only": True}
    if not any((folder / name).is_file() for name in _FILES):
        file = gguf_in(folder)
        if file is None:
            raise TokenizerError(
                f"{folder} has no tokenizer (none of {', '.join(_FILES)}); fetch tokenizer.json, or give token ids"
            )
        given["gguf_file"] = file.name
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, **given)
    except Exception as error:
        detail = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TokenizerError(f"the tokenizer in {folder} cannot be read: {detail}") from None


def token_ids(tokenizer: Any, text: str, max_tokens: int, cut_to: int | None, lower_case: bool = False) -> np.ndarray:
    """``int64[tokens]`` for one text, special tokens included.

    Parameters
    ----------
    max_tokens : positions that the model has.
    cut_to : the length to which the model's folder wants long texts cut; if none, a text that is too long is an error.

    Raises
    ------
    SequenceLengthError
        if the text has more tokens than the model has positions and is not to be cut.
    """
    text = text.strip().lower() if lower_case else text.strip()
    limits: dict[str, Any] = {} if cut_to is None else {"truncation": True, "max_length": min(cut_to, max_tokens)}
    ids = tokenizer(text, verbose=False, **limits)["input_ids"]
    if len(ids) > max_tokens:
        raise SequenceLengthError(
            f"a text of {len(text)} characters makes {len(ids)} tokens, but the model has positions for "
            f"{max_tokens}; shorten or split it"
        )
    return np.asarray(ids, np.int64)
