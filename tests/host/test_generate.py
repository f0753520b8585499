"""Generation: the same tokens on every executor, as text that comes whole, and what it says where it cannot."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lockstep
import numpy as np
import pytest
import torch
from causal_models import byte_tokenizer, save_causal_model
from lockstep.errors import ConfigurationMissingError, InputError, ModelError, SequenceLengthError, TokenizerError
from lockstep.evaluate import run_reference
from lockstep.generation import Generator
from lockstep.model import Model
from lockstep_isa import operations as golden

PROMPT = "def add(a, b):"
#: No token ends a text, so that its length is known.
ENDLESS: dict[str, Any] = {"eos_token_id": 999}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_causal_model(tmp_path_factory.mktemp("causal"), chat=True, generation=ENDLESS)


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Model]:
    with lockstep.load(folder) as loaded:
        yield loaded


def greedy(model: Model, prompt: str, count: int) -> list[int]:
    """Without any cache: the whole text again for each token, in the golden operations."""
    ids = model.tokenizer(prompt)["input_ids"]
    start = len(ids)
    for _ in range(count):
        logits = run_reference(model.graph, {model.input_name: np.array(ids)}, golden)
        ids.append(int(logits[-1].argmax()))
    return ids[start:]


@pytest.mark.parametrize("device", ["cpu", "golden", "fast:tiny", "fast:laptop"])
def test_every_device_generates_the_tokens_of_the_contract(folder: Path, model: Model, device: str) -> None:
    with lockstep.load(folder, device=device) as loaded:
        found = loaded.generate(PROMPT, max_new_tokens=12)
    assert list(found.token_ids) == greedy(model, PROMPT, 12)
    assert found.finish_reason == "length"
    assert found.text == model.tokenizer.decode(found.token_ids)
    assert found.seed is None


def test_drawn_tokens_follow_from_their_seed_on_every_device(folder: Path, model: Model) -> None:
    values: dict[str, Any] = {"max_new_tokens": 24, "temperature": 0.9, "top_k": 40, "top_p": 0.95}
    expected = model.generate(PROMPT, seed=5, **values)
    assert expected.seed == 5
    assert model.generate(PROMPT, seed=5, **values).token_ids == expected.token_ids
    assert model.generate(PROMPT, seed=6, **values).token_ids != expected.token_ids
    with lockstep.load(folder, device="fast:tiny") as other:
        assert other.generate(PROMPT, seed=5, **values).token_ids == expected.token_ids
    unseeded = model.generate(PROMPT, **values)
    assert model.generate(PROMPT, seed=unseeded.seed, **values).token_ids == unseeded.token_ids


@pytest.mark.parametrize(
    "values", [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.6}, {"temperature": 1.5, "top_k": 9}]
)
def test_draws_are_those_of_transformers(model: Model, values: dict[str, Any]) -> None:
    found = model.generate(PROMPT, max_new_tokens=16, seed=11, **values)
    ids = model.tokenizer(PROMPT, return_tensors="pt")
    torch.manual_seed(11)
    wrapped = model.as_transformers()
    theirs = wrapped.generate(**ids, max_new_tokens=16, do_sample=True, **{"top_k": 0, **values})
    assert theirs[0, ids["input_ids"].shape[1] :].tolist() == list(found.token_ids)


def test_a_stream_is_the_text_in_pieces_of_whole_characters(model: Model) -> None:
    whole = model.generate(PROMPT, max_new_tokens=60, temperature=1.0, seed=3)
    stream = model.stream(PROMPT, max_new_tokens=60, temperature=1.0, seed=3)
    pieces = list(stream)
    assert len(pieces) > 20
    assert "".join(pieces) == whole.text == model.tokenizer.decode(whole.token_ids)
    assert stream.result.token_ids == whole.token_ids


@pytest.mark.parametrize("text", ["Grüße, 世界! 👩‍🚀 ñ", "a\u00ff\u0100b", "日本語"])
def test_characters_of_many_bytes_come_whole(text: str) -> None:
    from lockstep.streaming import Detokeniser

    tokenizer = byte_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text.encode())
    detokeniser = Detokeniser(tokenizer, tokenizer("before ")["input_ids"])
    pieces = [detokeniser.push(token) for token in ids]
    assert [piece for piece in pieces if piece] == list(text)
    assert detokeniser.finish() == ""


def test_bytes_that_are_no_text_come_as_replacements() -> None:
    from lockstep.streaming import Detokeniser

    tokenizer = byte_tokenizer()
    data = bytes([0xE4, 0xB8, 0x41, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x42, 0xF0, 0x9F])
    detokeniser = Detokeniser(tokenizer)
    text = "".join(detokeniser.push(byte) for byte in data)
    assert text.endswith("B")
    assert text + detokeniser.finish() == data.decode(errors="replace")


def test_several_prompts_are_as_each_by_itself(model: Model) -> None:
    prompts = [PROMPT, "x", "while True"]
    found = model.generate(prompts, max_new_tokens=10, temperature=1.0, seed=20)
    assert [one.report.new_tokens for one in found] == [10, 10, 10]
    for number, prompt in enumerate(prompts):
        alone = model.generate(prompt, max_new_tokens=10, temperature=1.0, seed=20 + number)
        assert alone.token_ids == found[number].token_ids
    ids = [model.tokenizer(prompt)["input_ids"] for prompt in prompts]
    assert [one.token_ids for one in model.generate(ids, max_new_tokens=10, temperature=1.0, seed=20)] == [
        one.token_ids for one in found
    ]


def test_messages_go_through_the_chat_template(model: Model) -> None:
    messages = [{"role": "user", "content": "hello"}]
    found = model.generate(messages, max_new_tokens=5)
    assert found.token_ids == model.generate("<|user|>hello\n<|assistant|>", max_new_tokens=5).token_ids


def test_a_stop_string_ends_the_text_in_front_of_it(model: Model) -> None:
    whole = model.generate(PROMPT, max_new_tokens=60, temperature=1.0, seed=3)
    at = next(n for n in range(8, len(whole.text) - 3) if whole.text.find(whole.text[n : n + 3]) == n)
    stop = whole.text[at : at + 3]
    stream = model.stream(PROMPT, max_new_tokens=60, temperature=1.0, seed=3, stop=["never there", stop])
    text = "".join(stream)
    assert text == whole.text[:at] == stream.result.text
    assert stream.result.finish_reason == "stop"
    assert len(stream.result.token_ids) < len(whole.token_ids)


def test_the_beginning_of_a_stop_string_is_held_back_and_given_out_at_the_end() -> None:
    from lockstep.streaming import StopStrings

    stops = StopStrings(["abc", "ca"])
    assert [stops.push(piece) for piece in ("xa", "b", "ab", "d")] == ["x", "", "ab", "abd"]
    assert (stops.push("ab"), stops.finish()) == ("", "ab")
    assert (stops.push("zab"), stops.push("c!"), stops.stopped) == ("z", "", True)


def test_an_end_token_ends_the_text_and_has_none_itself(model: Model, folder: Path, tmp_path: Path) -> None:
    endless = model.generate(PROMPT, max_new_tokens=30)
    end = endless.token_ids[7]
    first = endless.token_ids.index(end)
    other = shutil.copytree(folder, tmp_path / "ends")
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [259, end]}))
    with lockstep.load(other) as loaded:
        found = loaded.generate(PROMPT, max_new_tokens=30)
    assert found.token_ids == endless.token_ids[: first + 1]
    assert found.finish_reason == "stop"
    assert found.text == model.tokenizer.decode(endless.token_ids[:first])


def test_the_folder_says_how_to_draw_unless_the_caller_does(folder: Path, model: Model, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "drawing")
    drawn = {**ENDLESS, "do_sample": True, "temperature": 0.8, "top_k": 7}
    (other / "generation_config.json").write_text(json.dumps(drawn))
    with lockstep.load(other) as loaded:
        found = loaded.generate(PROMPT, max_new_tokens=20, seed=2)
        plain = loaded.generate(PROMPT, max_new_tokens=20, temperature=0)
        hot = loaded.generate(PROMPT, max_new_tokens=20, temperature=3.0, top_k=0, seed=2)
    assert found.token_ids == model.generate(PROMPT, max_new_tokens=20, temperature=0.8, top_k=7, seed=2).token_ids
    assert plain.token_ids == model.generate(PROMPT, max_new_tokens=20).token_ids
    assert hot.token_ids == model.generate(PROMPT, max_new_tokens=20, temperature=3.0, seed=2).token_ids


def test_a_report_counts_what_a_core_did(folder: Path) -> None:
    with lockstep.load(folder, device="fast:tiny") as loaded:
        report = loaded.generate(PROMPT, max_new_tokens=9).report
        assert loaded.executor.cycles == report.cycles
    assert isinstance(report, lockstep.Report)
    assert (report.prompt_tokens, report.new_tokens) == (len(PROMPT) + 1, 9)
    assert (report.prefill.tokens, report.decode.tokens) == (len(PROMPT) + 1, 8)
    assert report.prefill.cycles + report.decode.cycles == report.cycles
    assert 0 < report.utilisation < 1
    assert report.utilisation == report.total.mac_cycles / report.cycles
    # All int8 weights but the embedding's come from memory at least once for every token behind the first.
    assert report.decode.bytes_moved > 8 * 20000
    assert report.tokens_per_second(2e6) == pytest.approx(8 * 2e6 / report.decode.cycles)
    assert report.first_token_seconds(1e6) == pytest.approx(report.prefill.cycles / 1e6)
    assert report.seconds > 0
    assert report.fallbacks == ()
    json.dumps(report.as_dict())


def test_a_report_says_what_the_host_runs_for_a_core(folder: Path) -> None:
    with lockstep.load(folder, device="fast:tiny") as loaded:
        report = loaded.generate(PROMPT, max_new_tokens=3, select="sinks:6").report
    assert report.hosted == (("attention", "cores choose blocks of 16 keys, not by Sinks(first=4, last=2)"),)
    assert "on the host: attention (cores choose" in str(report)
    assert report.as_dict()["hosted"][0]["part"] == "attention"


def test_a_report_of_the_host_has_no_cycles(model: Model) -> None:
    report = model.generate("x", max_new_tokens=2, select="sinks:6").report
    assert report.hosted == ()
    assert (report.cycles, report.utilisation, report.bytes_moved, report.tokens_per_second(1e6)) == (None,) * 4
    assert "cycles" not in str(report)


def test_what_a_prompt_shares_with_the_cache_is_not_computed_again(folder: Path, model: Model) -> None:
    with lockstep.load(folder, device="fast:tiny") as loaded:
        first = loaded.generate(PROMPT, max_new_tokens=8, context=64)
        ids = [*loaded.tokenizer(PROMPT)["input_ids"], *first.token_ids, 65, 66]
        again = loaded.generate(ids, max_new_tokens=8, context=64)
        other = loaded.generate("x" + PROMPT, max_new_tokens=8, context=64)
    assert again.report.prefill.tokens == 3  # the last new token was never computed
    assert other.report.prefill.tokens == len(PROMPT) + 1
    assert again.token_ids == model.generate(ids, max_new_tokens=8).token_ids
    assert list(other.token_ids) == greedy(model, "x" + PROMPT, 8)


def test_the_context_ends_a_text(model: Model) -> None:
    found = model.generate(PROMPT, max_new_tokens=50, context=20)
    assert found.report.prompt_tokens + found.report.new_tokens == 20
    assert found.finish_reason == "length"
    longest = model.generate(PROMPT, max_new_tokens=10_000)
    assert longest.report.prompt_tokens + longest.report.new_tokens == 256


def test_a_model_opens_its_device_when_it_is_used_and_again_after_it_was_closed(folder: Path) -> None:
    model = lockstep.load(folder, device="fast:tiny")
    assert "executor" not in vars(model)
    first = model.generate("x", max_new_tokens=3)
    opened = model.executor
    assert model.generate("x", max_new_tokens=3).token_ids == first.token_ids
    assert model.executor is opened
    model.close()
    assert "executor" not in vars(model)
    assert model.generate("x", max_new_tokens=3).token_ids == first.token_ids
    model.close()
    with pytest.raises(lockstep.DeviceNotFound, match="unknown device 'gpu'"):
        lockstep.load(folder, device="gpu")


def test_an_interrupt_keeps_what_there_is_and_the_model_usable(folder: Path, model: Model) -> None:
    with lockstep.load(folder, device="fast:tiny") as loaded:
        stream = loaded.stream(PROMPT, max_new_tokens=30)
        launch = loaded.executor._executor.launch
        calls = 0

        def interrupted(*arguments: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == 6:
                loaded.executor.watch = _interrupt
            launch(*arguments)

        loaded.executor._executor.launch = interrupted
        with pytest.raises(KeyboardInterrupt):
            list(stream)
        loaded.executor.watch = None
        whole = model.generate(PROMPT, max_new_tokens=30)
        assert stream.result.finish_reason == "interrupted"
        assert stream.result.token_ids == whole.token_ids[:5]
        assert whole.text.startswith(stream.result.text)
        assert loaded.generate(PROMPT, max_new_tokens=30).token_ids == whole.token_ids


def _interrupt(cycles: int) -> None:
    raise KeyboardInterrupt


# --- What it says where it cannot ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "values", "error", "message"),
    [
        ("", {}, SequenceLengthError, "the prompt is empty"),
        ([], {}, SequenceLengthError, "the prompt is empty"),
        (["x", ""], {}, SequenceLengthError, "the prompt is empty"),
        ("x" * 300, {}, SequenceLengthError, "the prompt has 301 tokens, but the model has positions for 256"),
        ("x" * 20, {"context": 16}, SequenceLengthError, "the prompt has 21 tokens, but the context holds 16"),
        ("x", {"context": 1000}, SequenceLengthError, "a context of 1000 tokens is too long"),
        ("x", {"context": 0}, InputError, "context is 0"),
        ("x", {"max_new_tokens": 0}, InputError, "max_new_tokens is 0"),
        ("x", {"max_new_tokens": 2.5}, InputError, "max_new_tokens is 2.5"),
        ("x", {"temperature": -1}, InputError, "temperature is -1; give 0 or a positive number"),
        ("x", {"temperature": float("nan")}, InputError, "temperature is nan"),
        ("x", {"temperature": "hot"}, InputError, "temperature is 'hot'"),
        ("x", {"top_k": -3}, InputError, "top_k is -3"),
        ("x", {"top_p": 1.5}, InputError, "top_p is 1.5; give more than 0 and at most 1"),
        ("x", {"top_p": 0}, InputError, "top_p is 0"),
        ("x", {"seed": -1}, InputError, "seed is -1"),
        ("x", {"stop": [""]}, InputError, "stop is"),
        (3.5, {}, InputError, "a prompt is a string"),
        ([0.5, 1.5], {}, InputError, "a prompt is a string"),
        ([5, 5000], {}, InputError, "index 5000 is not in the table"),
        ([{"role": "user"}], {}, InputError, "a message of a chat is"),
    ],
)
def test_what_cannot_be_generated_is_one_sentence(
    model: Model, prompt: Any, values: dict[str, Any], error: type[ModelError], message: str
) -> None:
    with pytest.raises(error, match=message) as raised:
        model.generate(prompt, **values)
    assert "\n" not in str(raised.value)
    assert model.generate("x", max_new_tokens=1).token_ids


def test_an_encoder_cannot_generate(small_folder: Path) -> None:
    with pytest.raises(ModelError, match="is no causal language model, so it cannot generate"):
        lockstep.load(small_folder).generate("the cat")


def test_a_model_without_its_head_cannot_generate(folder: Path) -> None:
    import transformers

    with pytest.raises(ModelError, match="has no language head"):
        lockstep.load(transformers.LlamaModel.from_pretrained(folder)).generate([1, 2])


def test_without_a_tokenizer_token_ids_work_and_texts_do_not(folder: Path, model: Model, tmp_path: Path) -> None:
    bare = shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*", "chat_template*"))
    with lockstep.load(bare) as loaded:
        ids = model.tokenizer(PROMPT)["input_ids"]
        found = loaded.generate(ids, max_new_tokens=6)
        assert found.token_ids == model.generate(PROMPT, max_new_tokens=6).token_ids
        assert found.text == ""
        with pytest.raises(TokenizerError, match="has no tokenizer"):
            loaded.generate(PROMPT)
        with pytest.raises(TokenizerError, match="has no tokenizer"):
            loaded.generate(ids, stop="x")


def test_without_a_chat_template_messages_are_refused(tmp_path: Path) -> None:
    with (
        lockstep.load(save_causal_model(tmp_path)) as loaded,
        pytest.raises(TokenizerError, match="has no chat template"),
    ):
        loaded.generate([{"role": "user", "content": "hello"}])


def test_a_context_that_does_not_fit_the_device_says_how_much_is_missing(tmp_path: Path) -> None:
    folder = save_causal_model(tmp_path, max_position_embeddings=8192, num_key_value_heads=4, generation=ENDLESS)
    with lockstep.load(folder, max_tokens=8192, device="fast:tiny?memory=1M") as loaded:
        with pytest.raises(lockstep.OutOfDeviceMemory, match="bytes are missing"):
            loaded.generate("x", context=8192)
        assert loaded.generate("x", max_new_tokens=3).report.new_tokens == 3


@pytest.mark.parametrize("content", ["{", '{"do_sample": true, "temperature": -2}', '{"eos_token_id": "x"}'])
def test_a_generation_config_that_makes_no_sense_is_named(folder: Path, tmp_path: Path, content: str) -> None:
    other = shutil.copytree(folder, tmp_path / "wrong")
    (other / "generation_config.json").write_text(content)
    with lockstep.load(other) as loaded, pytest.raises(ConfigurationMissingError, match=r"generation_config\.json"):
        loaded.generate("x")


# --- Memory ----------------------------------------------------------------------------------------------------------


def grown(model: Model, tokens: int, settle: int) -> int:
    """Bytes of Python's memory that tokens behind the first ``settle`` ones have taken."""
    import gc
    import tracemalloc

    def held() -> int:
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    stream = Generator(model, model.executor).stream("x", model.options(max_new_tokens=tokens))
    tracemalloc.start()
    try:
        before = 0
        for number, _ in enumerate(_tokens(stream)):
            if number == settle:
                before = held()
        return held() - before
    finally:
        tracemalloc.stop()


def _tokens(stream: Any) -> Iterator[int]:
    seen = 0
    for _ in stream:
        while seen < len(stream._tokens):
            yield stream._tokens[seen]
            seen += 1


@pytest.fixture
def long_model(tmp_path: Path) -> Callable[[int], Model]:
    return lambda positions: lockstep.load(
        save_causal_model(tmp_path, max_position_embeddings=positions, generation=ENDLESS)
    )


def test_memory_stays_flat(long_model: Callable[[int], Model]) -> None:
    with long_model(512) as model:
        assert grown(model, 400, 100) < 100_000


@pytest.mark.slow
def test_memory_stays_flat_over_two_thousand_tokens(long_model: Callable[[int], Model]) -> None:
    with long_model(2048) as model:
        assert grown(model, 2000, 100) < 300_000
