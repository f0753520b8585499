"""Models that several tests look at; loading one takes seconds, so it happens once."""

from __future__ import annotations

import pytest
from lockstep.model import Model, load


@pytest.fixture(scope="session")
def minilm() -> Model:
    return load("minilm")
