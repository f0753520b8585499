"""Models that several tests look at; loading one takes seconds, so it happens once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command_line import Command, command, save_small_model
from lockstep.model import Model, load

# Threads that wait for each other cost more than they bring on these sizes, the more so on a machine that is busy.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def minilm() -> Model:
    return load("minilm")


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer and 32 features, with a tokenizer; not to be changed."""
    return save_small_model(tmp_path_factory.mktemp("small"))


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Command:
    """The command ``lockstep``."""
    return command(capsys)
