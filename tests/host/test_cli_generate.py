"""``lockstep generate``, ``chat``, ``inspect`` and ``verify --generate``: text as it comes, and what it cost."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lockstep
import numpy as np
import pytest
from causal_models import save_causal_model
from command_line import Command
from lockstep import verification
from lockstep.cache_policy import CachePolicy
from lockstep.eviction import eviction
from lockstep.executors import OpenExecutor
from lockstep_isa.selectors import Blocks

ENDLESS: dict[str, Any] = {"eos_token_id": 999}
PROMPT = "def add("


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_causal_model(tmp_path_factory.mktemp("causal"), generation=ENDLESS)


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_causal_model(tmp_path_factory.mktemp("chat"), chat=True, generation=ENDLESS)


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts lines on standard input."""
    return lambda *lines: monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_generate_writes_text_on_standard_output_and_its_cost_on_standard_error(cli: Command, folder: Path) -> None:
    done = cli("generate", folder, "--prompt", PROMPT, "--max-new-tokens", 9, "--device", "fast:tiny", "--clock", 20)
    assert done.status == 0
    with lockstep.load(folder) as model:
        assert done.out == model.generate(PROMPT, max_new_tokens=9).text + "\n"
    assert "9 tokens of prompt, 9 new ones" in done.err
    assert "cycles, the array busy in" in done.err
    assert "at 20 MHz: the first token after" in done.err
    assert "tokens a second" in done.err


def test_generate_for_machines(cli: Command, folder: Path) -> None:
    values = ("--max-new-tokens", 12, "--temperature", 0.9, "--top-k", 30, "--top-p", 0.9, "--seed", 8)
    arguments = ("generate", folder, "--prompt", PROMPT, *values, "--context", 40, "--json")
    host, core = cli(*arguments).json, cli(*arguments, "--device", "fast:tiny").json
    with lockstep.load(folder) as model:
        expected = model.generate(PROMPT, max_new_tokens=12, temperature=0.9, top_k=30, top_p=0.9, seed=8)
    for report in (host, core):
        assert report["text"] == expected.text
        assert report["token_ids"] == list(expected.token_ids)
        assert (report["finish_reason"], report["seed"], report["new_tokens"]) == ("length", 8, 12)
    assert (host["cycles"], host["tokens_per_second"], host["utilisation"]) == (None, None, None)
    assert core["tokens_per_second"] == pytest.approx(11 * 50e6 / core["decode"]["cycles"])


def test_generate_stops_in_front_of_a_string(cli: Command, folder: Path) -> None:
    with lockstep.load(folder) as model:
        text = model.generate(PROMPT, max_new_tokens=30).text
    stop = next(text[n : n + 2] for n in range(5, len(text)) if text.find(text[n : n + 2]) == n)
    found = cli("generate", folder, "--prompt", PROMPT, "--max-new-tokens", 30, "--stop", stop, "--json").json
    assert found["text"] == text[: text.find(stop)]
    assert found["finish_reason"] == "stop"


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_ends_with_what_there_is(
    cli: Command, folder: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    with lockstep.load(folder) as model:
        expected = model.generate(PROMPT, max_new_tokens=30)
    calls = 0
    extend = lockstep.generation.Generator.extend

    def interrupted(self: Any, ids: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        return extend(self, ids)

    monkeypatch.setattr("lockstep.generation.Generator.extend", interrupted)
    done = cli("generate", folder, "--prompt", PROMPT, "--max-new-tokens", 30, *(["--json"] if as_json else []))
    assert done.status == 130
    assert "interrupted" in done.err
    assert "Traceback" not in done.err
    if as_json:
        assert done.json["token_ids"] == list(expected.token_ids[:8])
        assert done.json["finish_reason"] == "interrupted"
    else:
        assert len(done.out) > 3
        assert expected.text.startswith(done.out.rstrip("\n"))


def test_chat_keeps_the_conversation_and_its_cache(cli: Command, chat_folder: Path, say: Callable[..., None]) -> None:
    say("hello", "", "again", "/reset", "hello", "/exit", "never asked")
    arguments = ("chat", chat_folder, "--max-new-tokens", 6, "--device", "fast:tiny")
    turns = cli(*arguments, "--json").json["turns"]
    assert [turn["prompt"] for turn in turns] == ["hello", "again", "hello"]
    messages = [{"role": "user", "content": "hello"}]
    with lockstep.load(chat_folder) as model:
        first = model.generate(messages, max_new_tokens=6)
        messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "again"}]
        second = model.generate(messages, max_new_tokens=6)
    assert [turn["text"] for turn in turns] == [first.text, second.text, first.text]
    assert turns[1]["prefill"]["tokens"] < turns[1]["prompt_tokens"] - 10
    say("hello")
    done = cli(*arguments)
    assert done.status == 0
    assert done.out == first.text + "\n"


def test_chat_without_a_template_goes_on_from_the_lines(cli: Command, folder: Path, say: Callable[..., None]) -> None:
    say("x = 1", "y = 2")
    done = cli("chat", folder, "--max-new-tokens", 5, "--json")
    assert "no chat template" in done.err
    turns = done.json["turns"]
    with lockstep.load(folder) as model:
        assert turns[0]["text"] == model.generate("x = 1\n", max_new_tokens=5).text
    assert turns[1]["prompt_tokens"] > turns[0]["prompt_tokens"] + 6


def test_chat_says_that_a_conversation_is_full(cli: Command, folder: Path, say: Callable[..., None]) -> None:
    say("x" * 20, "y" * 300)
    done = cli("chat", folder, "--max-new-tokens", 4)
    assert done.status == 2
    assert len(done.out) > 1  # the first answer is not lost
    assert "error: the prompt has" in done.err


def test_inspect_shows_operations_memory_and_fallbacks(cli: Command, folder: Path, small_folder: Path) -> None:
    report = cli("inspect", folder, "--json").json
    assert report["operations"]["Attention"] == 2
    assert report["operations"]["Linear"] == 15
    # Per layer q, k, v, o and the three of the feed-forward, then the head.
    products = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64) + 260 * 32
    assert report["int8_bytes"] == products
    assert report["cache_bytes"] == 2 * 2 * 2 * (8 + 4)
    assert (report["causal"], report["max_tokens"], report["fallbacks"]) == (True, 256, [])
    text = cli("inspect", folder).out
    assert f"{products:,} bytes" in text
    assert "nothing falls back to PyTorch" in text
    encoder = cli("inspect", small_folder, "--json").json
    assert (encoder["causal"], encoder["cache_bytes"]) == (False, 0)


def test_verify_compares_the_logits_of_generated_tokens(
    cli: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("verify", folder, "--device", "cpu", "--device", "fast:tiny", "--text", PROMPT, "--generate", 5)
    report = cli(*arguments, "--json").json
    assert (report["identical"], report["generated"]) == (True, 5)
    assert report["values_compared"] == 5 * 260
    assert report["cycles"]["fast:tiny"] > 1000
    opened = verification.executor

    def plant(uri: str, progress: Any = None) -> OpenExecutor:
        device = opened(uri, progress)
        if uri != "fast:tiny":
            return device
        open_session = device.open_session

        def flipping(graph: Any, capacity: int, policy: Any) -> Any:
            session = open_session(graph, capacity, policy)
            extend = session.extend

            def changed(ids: np.ndarray, logits: Any = "last") -> np.ndarray:
                found = extend(ids, logits).copy()
                if session.length == len(PROMPT) + 1 + 3:
                    found.view(np.uint32)[0, 7] ^= 1
                return found

            session.extend = changed
            return session

        device.open_session = flipping  # type: ignore[method-assign]
        return device

    monkeypatch.setattr(verification, "executor", plant)
    done = cli(*arguments, "--json")
    assert done.status == 1
    first = done.json["first_difference"]
    assert (first["device"], first["sequence"], first["token"], first["feature"]) == ("fast:tiny", 0, 3, 7)
    assert done.json["differences"] == {"fast:tiny": 1}


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 32 features."""
    return save_causal_model(tmp_path_factory.mktemp("wide"), generation=ENDLESS, hidden_size=128)


@pytest.mark.parametrize(
    ("asked", "policy"),
    [
        (("--keep", 12), CachePolicy(eviction("streaming", 12))),
        (("--keep", 12, "--evict", "h2o"), CachePolicy(eviction("h2o", 12))),
        (("--select", "32"), CachePolicy(selector=Blocks(32))),
        (("--cache-bits", 4), CachePolicy(bits=4)),
    ],
)
def test_verify_treats_caches_as_it_is_told(
    cli: Command, wide_folder: Path, monkeypatch: pytest.MonkeyPatch, asked: tuple[Any, ...], policy: CachePolicy
) -> None:
    opened: list[CachePolicy] = []
    open_session = OpenExecutor.open_session

    def spied(self: OpenExecutor, graph: Any, capacity: int, policy: Any = None) -> Any:
        opened.append(policy)
        return open_session(self, graph, capacity, policy)

    monkeypatch.setattr(OpenExecutor, "open_session", spied)
    prompt = "def add(self, other, more, and_more):"
    devices = ("--device", "golden", "--device", "cpu", "--device", "fast:tiny")
    report = cli("verify", wide_folder, *devices, "--text", prompt, "--generate", 4, *asked, "--json").json
    assert report["identical"]
    assert opened == [policy] * 3


def test_a_cache_of_4_bits_gives_the_same_text_on_a_core(cli: Command, wide_folder: Path) -> None:
    arguments = ("generate", wide_folder, "--prompt", PROMPT, "--max-new-tokens", 30, "--json")
    whole, host, core = (
        cli(*arguments, *more).json
        for more in ((), ("--cache-bits", 4), ("--cache-bits", 4, "--device", "fast:laptop"))
    )
    assert host["token_ids"] == core["token_ids"] != whole["token_ids"]


# --- Mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--prompt", ""], ["the prompt is empty"]),
        (["--prompt", "x" * 300], ["the prompt has 301 tokens", "256"]),
        (["--prompt", "x" * 30, "--context", "16"], ["the prompt has 31 tokens", "16"]),
        (["--prompt", "x", "--context", "999"], ["a context of 999 tokens is too long"]),
        (["--prompt", "x", "--temperature", "-1"], ["temperature is -1"]),
        (["--prompt", "x", "--top-p", "2"], ["top_p is 2"]),
        (["--prompt", "x", "--top-k", "-2"], ["top_k is -2"]),
        (["--prompt", "x", "--seed", "-2"], ["seed is -2"]),
        (["--prompt", "x", "--max-new-tokens", "0"], ["max_new_tokens is 0"]),
        (["--prompt", "x", "--clock", "0"], ["a clock of 0 MHz is none"]),
        (["--prompt", "x", "--device", "gpu:x"], ["unknown device 'gpu:x'"]),
        (["--prompt", "x", "--cache-bits", "6"], ["6 is no number of bits", "8 or 4"]),
        (["--prompt", "x", "--cache-bits", "4"], ["heads of 8 features", "groups of 32"]),
    ],
)
def test_mistakes_are_one_sentence(cli: Command, folder: Path, arguments: list[str], parts: list[str]) -> None:
    cli("generate", folder, *arguments, "--json").refused(2, *parts)


def test_a_cache_without_generated_tokens_is_a_mistake(cli: Command, folder: Path) -> None:
    cli("verify", folder, "--device", "cpu", "--cache-bits", 4).refused(2, "only where tokens are generated")


def test_models_that_cannot_generate(cli: Command, folder: Path, small_folder: Path, tmp_path: Path) -> None:
    cli("generate", small_folder, "--prompt", "the cat").refused(2, "no causal language model")
    other = shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    cli("generate", other, "--prompt", "x").refused(2, "has no tokenizer")
    cli("chat", other).refused(2, "has no tokenizer")
    configuration = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**configuration, "model_type": "llamaphant"}))
    cli("generate", other, "--prompt", "x").refused(2, "model_type 'llamaphant'")


def test_a_context_that_does_not_fit_the_device(cli: Command, tmp_path: Path) -> None:
    folder = save_causal_model(tmp_path, max_position_embeddings=4096, num_key_value_heads=4, generation=ENDLESS)
    arguments = ("generate", folder, "--prompt", "x", "--context", 4096, "--device", "fast:tiny?memory=1M")
    cli(*arguments).refused(2, "bytes are missing", "memory=")
