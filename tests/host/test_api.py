"""What ``import lockstep`` shows: names, executors by URI, and comparisons."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import lockstep
import numpy as np
import pytest
from lockstep.verification import differing, first_difference, random_inputs
from support import assert_same_bits

TEXTS = ["the cat sleeps", "rain falls on the sofa"]


def test_every_public_name_is_there() -> None:
    assert set(lockstep.__all__) <= set(dir(lockstep))
    for name in lockstep.__all__:
        assert getattr(lockstep, name) is not None
    assert not hasattr(lockstep, "nonsense")


def test_importing_the_package_or_the_command_line_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'amaranth', 'numpy'}"
    code = f"import sys, lockstep, lockstep.cli.app; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_every_executor_gives_the_same_embeddings(small_folder: Path) -> None:
    model = lockstep.load(small_folder)
    expected = model.embed(TEXTS, "golden")
    assert expected.shape == (2, 32)
    for uri in ("cpu", "fast:tiny", "fast:laptop?memory=16M"):
        assert_same_bits(model.embed(TEXTS, uri), expected)
    assert_same_bits(model.embed(TEXTS), expected)


def test_an_open_executor_counts_cycles_over_several_runs(small_folder: Path) -> None:
    model = lockstep.load(small_folder)
    passed: list[int] = []
    with lockstep.executor("fast:laptop") as device:
        device.watch = passed.append
        model.embed(TEXTS, device)
        once = device.cycles
        model.embed(TEXTS, device)
        assert once is not None
        assert device.cycles == 2 * once == device.core_cycles == passed[-1]
        assert device.core_seconds > 0
    with lockstep.executor("cpu") as device:
        model.embed(TEXTS, device)
        assert device.cycles is None


@pytest.mark.parametrize("uri", ["", "laptop", "gpu", "cpu:laptop", "vhdl:laptop", "rtl:huge", "fast:tiny?speed=9"])
def test_an_unknown_uri_is_named(uri: str) -> None:
    with pytest.raises(lockstep.DeviceNotFound, match=f"device '{uri.replace('?', '[?]')}'"):
        lockstep.executor(uri)


def test_texts_must_be_a_list_with_something_in_it(small_folder: Path) -> None:
    model = lockstep.load(small_folder)
    with pytest.raises(lockstep.ModelError, match="give a list"):
        model.embed("the cat", "cpu")
    with pytest.raises(lockstep.ModelError, match="no text"):
        model.embed([], "cpu")


def test_random_inputs_follow_their_seed_and_stay_inside_the_vocabulary(small_folder: Path) -> None:
    graph = lockstep.load(small_folder).graph
    first, again, other = (random_inputs(graph, 40, seed)["input_ids"] for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()
    assert first.shape == (40,)
    assert 0 <= first.min() <= first.max() < 100


def test_verify_compares_every_value(small_folder: Path) -> None:
    model = lockstep.load(small_folder)
    sequences = [random_inputs(model.graph, tokens, 3) for tokens in (5, 17)]
    found = lockstep.verify(model.graph, sequences, ["golden", "cpu", "fast:tiny"])
    assert found.identical
    assert found.values_compared == 2 * (5 + 17) * 32
    assert found.differences == {"cpu": 0, "fast:tiny": 0}
    assert found.cycles["golden"] is found.cycles["cpu"] is None
    assert found.cycles["fast:tiny"]


def test_a_difference_is_one_of_bits_and_nan_equals_nan() -> None:
    expected = np.array([[0.0, 1.0], [np.nan, np.inf]], np.float32)
    actual = np.array([[0.0, 1.0], [-np.nan, np.inf]], np.float32)
    assert not differing(expected, actual).any()
    assert first_difference("x", [expected], [actual]) is None
    actual[0, 0] = -0.0
    found = first_difference("x", [expected, expected], [expected, actual])
    assert found == lockstep.Difference("x", 1, 0, 0, "0x00000000", "0x80000000")
    assert "sequence 1, token 0, feature 0: x has -0 (0x80000000) where 0" in str(found)
