"""One vector per sequence, as a sentence-transformers folder asks for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lockstep.errors import PoolingError
from lockstep.pooling import Pooling, read_pooling

HIDDEN = np.random.default_rng(1).standard_normal((7, 10)).astype(np.float32)


def folder(path: Path, pooling: dict[str, Any] | None, *more: str, settings: dict[str, Any] | None = None) -> Path:
    kinds = ["Transformer", "Pooling", *more]
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": f"{n}_{kind}"} for n, kind in enumerate(kinds)]
    (path / "modules.json").write_text(json.dumps(modules))
    if pooling is not None:
        (path / "1_Pooling").mkdir()
        (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    if settings is not None:
        (path / "sentence_bert_config.json").write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize(
    ("mode", "wanted"),
    [
        ("cls", HIDDEN[0]),
        ("lasttoken", HIDDEN[-1]),
        ("max", HIDDEN.max(0)),
        ("mean", HIDDEN.mean(0)),
        ("mean_sqrt_len_tokens", HIDDEN.sum(0) / np.sqrt(7)),
    ],
)
def test_every_mode_has_its_formula(mode: str, wanted: np.ndarray) -> None:
    result = Pooling((mode,))(HIDDEN)
    assert result.dtype == np.float32
    assert np.allclose(result, wanted, atol=1e-6)


def test_normalised_vectors_have_length_one() -> None:
    assert np.linalg.norm(Pooling(normalise=True)(HIDDEN)) == pytest.approx(1, abs=1e-6)
    assert not Pooling(normalise=True)(np.zeros((2, 4), np.float32)).any()


def test_several_modes_are_joined_in_the_order_of_sentence_transformers(tmp_path: Path) -> None:
    flags = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True, "word_embedding_dimension": 10}
    pooling = read_pooling(folder(tmp_path, flags))
    assert pooling.modes == ("cls", "mean")
    assert pooling(HIDDEN).shape == (20,)


def test_folders_of_both_ages_are_understood(tmp_path: Path) -> None:
    settings = {"max_seq_length": 256, "do_lower_case": True}
    wanted = Pooling(("max",), True, 256, True)
    assert read_pooling(folder(tmp_path, {"pooling_mode": "max"}, "Normalize", settings=settings)) == wanted
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    assert read_pooling(tmp_path) == wanted


def test_a_folder_that_says_nothing_means_the_mean(tmp_path: Path) -> None:
    assert read_pooling(tmp_path) == Pooling()


@pytest.mark.parametrize(
    ("pooling", "more", "message"),
    [
        ({"pooling_mode": "weightedmean"}, [], "asks for the pooling 'weightedmean'"),
        ({"pooling_mode_weightedmean_tokens": True}, [], "pooling_mode_weightedmean_tokens"),
        ({}, ["Dense"], "lists a module 'Dense'"),
        (None, [], "asks for pooling but there is no"),
    ],
)
def test_what_is_not_known_is_refused(
    tmp_path: Path, pooling: dict[str, Any] | None, more: list[str], message: str
) -> None:
    with pytest.raises(PoolingError, match=message):
        read_pooling(folder(tmp_path, pooling, *more))


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text("[")
    with pytest.raises(PoolingError, match=r"modules\.json is not readable JSON"):
        read_pooling(tmp_path)
