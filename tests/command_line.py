"""Calling the command line inside a test, and a small model with a tokenizer for it to run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
WORDS = ("a", "cat", "sleeps", "on", "the", "sofa", "while", "rain", "falls", "and", "bread", "bakes")


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one object on standard output."""
        return json.loads(self.out)

    def refused(self, status: int, *parts: str) -> str:
        """The sentence on standard error, which holds ``parts``; nothing is on standard output."""
        assert self.status == status, self
        assert self.out == ""
        assert "Traceback" not in self.err
        errors = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, self.err
        for part in parts:
            assert part in errors[0]
        return errors[0]


Command = Callable[..., Outcome]


def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """A function that calls ``lockstep`` with its arguments in this process."""
    from lockstep.cli.app import app

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            app([str(argument) for argument in arguments], prog_name="lockstep")
        said = capsys.readouterr()
        status = left.value.code
        return Outcome(status if isinstance(status, int) else 0, said.out, said.err)

    return run


def save_small_model(folder: Path) -> Path:
    """A folder with a BERT of one layer that nobody trained, and a tokenizer that knows a dozen words."""
    from sample_models import random_bert
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    random_bert(num_hidden_layers=1).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    return folder
