"""The bundled model tiny: its tokenizer, its folder, and that its card says what the stored weights do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from bytelm.card import Facts, Measured, render
from bytelm.corpus import Document
from bytelm.evaluation import text_bits
from bytelm.tokenizer import BOS, EOS, PAD, build_tokenizer, byte_characters
from bytelm.training import Recipe, rate_factor, train
from hypothesis import given
from hypothesis import strategies as st
from lockstep.checkpoint import find_folder
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

FOLDER = Path(__file__).resolve().parents[2] / "models" / "tiny"
CARD = (FOLDER / "README.md").read_text(encoding="utf-8")
HELD_OUT = (FOLDER / "heldout.txt").read_bytes()
MOST_BYTES = 8_000_000
SPECIAL = ("<|bos|>", "<|eos|>", "<|pad|>")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, local_files_only=True).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


def fact(name: str) -> int:
    """The first number in the card's row ``name``."""
    (value,) = re.findall(rf"^\| {name} \| \D*([\d,]+)", CARD, re.M)
    return int(value.replace(",", ""))


def bits_per_byte(text: str) -> list[float]:
    """The card's figures for ``text``: the model's, the 5-gram's, the 7-gram's."""
    (row,) = re.findall(rf"^\| {text} \| [\d,]+ \| (.*) \|$", CARD, re.M)
    return [float(value) for value in row.split(" | ")]


def test_the_name_leads_to_the_folder() -> None:
    assert find_folder("tiny").resolve() == FOLDER


@given(text=st.text().filter(lambda text: not any(special in text for special in SPECIAL)))
def test_text_goes_through_the_tokenizer_and_back(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids == [BOS, *text.encode()]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_every_byte_is_a_token(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.convert_tokens_to_ids(byte_characters()) == list(range(256))
    assert [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id] == [BOS, EOS, PAD]
    assert len(tokenizer) == 259
    assert tokenizer.decode([0xE2, 0x82, 0xAC, 0x0A]) == "€\n"


def test_the_stored_tokenizer_is_the_one_that_is_built(tokenizer: PreTrainedTokenizerBase) -> None:
    built = build_tokenizer(1024)
    assert tokenizer.backend_tokenizer.to_str() == built.backend_tokenizer.to_str()
    assert tokenizer.model_max_length == built.model_max_length == 1024


def test_the_folder_is_small_and_its_weights_are_as_the_card_says(model: LlamaForCausalLM) -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= MOST_BYTES
    path = FOLDER / "model.safetensors"
    assert path.stat().st_size == int(re.findall(r"bfloat16, ([\d,]+) bytes", CARD)[0].replace(",", ""))
    with safe_open(path, framework="pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 - a file is no dictionary
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert sum(tensor.numel() for tensor in tensors) == fact("parameters") == sum(p.numel() for p in model.parameters())


def test_the_shape_suits_a_16_by_16_array(model: LlamaForCausalLM) -> None:
    config = model.config
    assert (config.hidden_size, config.head_dim) == (256, 64)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 4)
    assert config.vocab_size % 16 == 0
    assert config.intermediate_size % 16 == 0
    assert config.tie_word_embeddings
    assert [config.bos_token_id, config.eos_token_id] == [BOS, EOS]


def test_the_stored_weights_reach_the_bits_per_byte_of_the_card(model: LlamaForCausalLM) -> None:
    claimed, five, _ = bits_per_byte("`heldout.txt`")
    found = text_bits(model, HELD_OUT, 1024, 512) / len(HELD_OUT)
    assert found == pytest.approx(claimed, abs=2e-3)
    assert found < five - 0.05
    assert len(HELD_OUT) == pytest.approx(64 * 1024, rel=0.02)


def test_the_model_beats_the_5_gram_on_all_held_out_files() -> None:
    claimed, five, _ = bits_per_byte("held-out files")
    assert claimed < five - 0.05


def test_scoring_in_windows_scores_every_byte_once(model: LlamaForCausalLM) -> None:
    text = HELD_OUT[:150]
    ids = torch.tensor([[BOS, *text]])
    with torch.inference_mode():
        logs = torch.log_softmax(model(input_ids=ids[:, :-1]).logits[0].double(), dim=1)
    each = -logs[torch.arange(len(text)), ids[0, 1:]] / torch.log(torch.tensor(2.0, dtype=torch.float64))
    assert text_bits(model, text, 1024, 512) == pytest.approx(float(each.sum()), rel=1e-4)
    counted: list[int] = []
    overlapping = text_bits(model, text, 64, 32, progress=counted.append)
    assert sum(counted) == len(text)
    # Bytes of the first window see as much as before, later ones less, which costs some bits but never many.
    assert float(each[:64].sum()) < overlapping < 2 * float(each.sum())


def test_training_lowers_the_loss_and_repeats() -> None:
    documents = tuple(Document(f"{index}.py", b"for x in y:\n    pass\n" * 40) for index in range(3))
    recipe = Recipe(steps=12, tokens_per_step=128, window=32, last_window=64, warmup_steps=2, compiled=False)

    def run() -> list[float]:
        torch.manual_seed(1)
        config = LlamaConfig(
            vocab_size=272,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
        losses: list[float] = []
        train(LlamaForCausalLM(config), documents, recipe, lambda step, bits: losses.append(bits))
        return losses

    losses = run()
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.5
    assert run() == losses


def test_rates_rise_stay_and_fall_to_zero() -> None:
    recipe = Recipe(steps=100, warmup_steps=10, decay_part=0.4)
    factors = [rate_factor(step, recipe) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:60] == [1.0] * 51
    assert factors[80] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(1 / 40)


def test_a_card_holds_its_figures() -> None:
    facts = Facts(
        date="2026-01-31",
        python="3.11.7",
        torch="2.13.0",
        parameters=1234567,
        layers=4,
        intermediate=640,
        weights_bytes=2469134,
        training_files=10,
        training_bytes=98765,
        held_out_files=["a.py"],
        steps=10,
        tokens_per_step=3072,
        cpu_seconds=1234.5,
        threads=1,
        window=1024,
        stride=512,
        measured=[Measured("held-out files", 4321, 1.23456, {5: 1.9, 7: 1.8})],
        prompt="def ",
        sample="def x(): pass",
    )
    card = render(facts)
    assert "| parameters | 1,234,567 |" in card
    assert "| held-out files | 4,321 | 1.2346 | 1.9000 | 1.8000 |" in card
    assert "10 steps of 3,072 tokens (30,720 in all)" in card
