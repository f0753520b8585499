"""Models that several tests look at; loading one takes seconds, so it happens once."""

from __future__ import annotations

import pytest
import torch
from lockstep.model import Model, load

# Threads that wait for each other cost more than they bring on these sizes, the more so on a machine that is busy.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def minilm() -> Model:
    return load("minilm")
