"""A model inside transformers: its ``generate`` and its pipelines give the tokens of ours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lockstep
import pytest
import torch
import transformers
from causal_models import save_causal_model
from lockstep.errors import InputError, ModelError
from lockstep.model import Model

PROMPTS = ("def add(a, b):", "x", "while True")


@pytest.fixture(scope="module", params=["cpu", "fast:tiny"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    folder = save_causal_model(tmp_path_factory.mktemp("causal"), generation={"eos_token_id": 999})
    with lockstep.load(folder, device=request.param) as loaded:
        yield loaded


def test_generate_of_transformers_gives_our_tokens(model: Model) -> None:
    wrapped = model.as_transformers(context=64)
    assert isinstance(wrapped, transformers.PreTrainedModel)
    ids = model.tokenizer(PROMPTS[0], return_tensors="pt")
    found = wrapped.generate(**ids, max_new_tokens=10, do_sample=False)
    assert found[0, ids["input_ids"].shape[1] :].tolist() == list(
        model.generate(PROMPTS[0], max_new_tokens=10).token_ids
    )


def test_a_padded_batch_gives_each_prompt_the_tokens_that_it_gets_alone(model: Model) -> None:
    wrapped = model.as_transformers(context=64)
    ids = model.tokenizer(list(PROMPTS), return_tensors="pt", padding=True)
    assert (ids["attention_mask"] == 0).any()
    found = wrapped.generate(**ids, max_new_tokens=8, do_sample=False)[:, ids["input_ids"].shape[1] :]
    ours = model.generate(list(PROMPTS), max_new_tokens=8)
    assert found.tolist() == [list(one.token_ids) for one in ours]


def test_a_text_generation_pipeline_works(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    pipe: Any = transformers.pipeline(
        "text-generation", model=model.as_transformers(context=64), tokenizer=model.tokenizer
    )
    found = pipe(PROMPTS[0], max_new_tokens=8, do_sample=False, return_full_text=False)
    assert found[0]["generated_text"] == model.generate(PROMPTS[0], max_new_tokens=8).text
    assert "not supported" not in caplog.text


def test_forward_without_a_cache_gives_the_logits_of_every_token(model: Model) -> None:
    wrapped = model.as_transformers(context=64)
    ids = model.tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    whole = wrapped(ids)
    assert whole.logits.shape == (1, ids.shape[1], 260)
    first = wrapped(ids[:, :5])
    rest = wrapped(ids[:, 5:], past_key_values=first.past_key_values)
    assert torch.equal(torch.cat([first.logits, rest.logits], 1), whole.logits)
    assert torch.equal(wrapped(ids, logits_to_keep=1).logits, whole.logits[:, -1:])


def test_what_transformers_cannot_do_with_it_is_said(model: Model, small_folder: Path) -> None:
    wrapped = model.as_transformers(context=64)
    ids = model.tokenizer("x", return_tensors="pt")
    with pytest.raises(ModelError, match="beam search is not possible"):
        wrapped.generate(**ids, max_new_tokens=4, num_beams=2, do_sample=False)
    right = {"input_ids": torch.tensor([[5, 6, 258]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    with pytest.raises(InputError, match="padding_side='left'"):
        wrapped.generate(**right, max_new_tokens=4, do_sample=False)
    with pytest.raises(ModelError, match="cannot generate"):
        lockstep.load(small_folder).as_transformers()
