"""Mistakes at the command line: one sentence each, an exit status that says whose turn it is, and no traceback."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Command
from lockstep.cli.failures import explain
from lockstep_driver import DeviceError, DeviceTimeout, OutOfDeviceMemory
from lockstep_isa.config import PRESETS
from lockstep_isa.errors import ErrorCode
from safetensors.torch import load_file, save_file


@pytest.fixture
def folder(small_folder: Path, tmp_path: Path) -> Path:
    """The small model, for a test to spoil."""
    return Path(shutil.copytree(small_folder, tmp_path / "model"))


def change(folder: Path, **tensors: Any) -> None:
    path = folder / "model.safetensors"
    values = load_file(path)
    name = next(name for name in values if name.endswith("query.weight"))
    values[name] = tensors["query"](values[name])
    save_file(values, path, metadata={"format": "pt"})


@pytest.mark.parametrize("command", ["embed", "verify", "demo", "compile"])
@pytest.mark.parametrize("as_json", [False, True])
def test_an_unknown_device(cli: Command, folder: Path, command: str, as_json: bool) -> None:
    arguments: dict[str, list[object]] = {
        "embed": ["embed", folder, "cat"],
        "verify": ["verify", folder],
        "demo": ["demo"],
        "compile": ["compile", folder, "--tokens", 4, "--output", folder / "program"],
    }
    more = ["--json"] if as_json else []
    cli(*arguments[command], "--device", "gpu:laptop", *more).refused(2, "unknown device 'gpu:laptop'", "rtl:CORE")


def test_an_unknown_core(cli: Command, folder: Path) -> None:
    cli("embed", folder, "cat", "--device", "rtl:desktop").refused(2, "unknown core 'desktop'", "laptop")
    cli("synth", "desktop").refused(2, "unknown core 'desktop'")


def test_a_core_that_the_rtl_does_not_build(cli: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "broad", PRESETS["laptop"].replace(name="broad", lanes=64))
    cli("embed", folder, "cat", "--device", "rtl:broad").refused(2, "two lanes per row", "fast:broad")


def test_a_missing_model(cli: Command, tmp_path: Path) -> None:
    cli("embed", tmp_path / "nowhere", "cat", "--json").refused(2, "there is no folder", "nowhere")


def test_missing_weights(cli: Command, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    cli("verify", folder, "--device", "cpu", "--json").refused(2, "has no model.safetensors")


def test_a_truncated_checkpoint(cli: Command, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    cli("embed", folder, "cat").refused(2, "model.safetensors is truncated", "5000 bytes")


def test_a_pickle(cli: Command, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    cli("embed", folder, "cat").refused(2, "pickle files can run code")


def test_weights_of_a_wrong_type(cli: Command, folder: Path) -> None:
    change(folder, query=lambda weight: weight.to(torch.int8))
    cli("embed", folder, "cat").refused(2, "has dtype I8", "query.weight")


def test_weights_that_are_not_finite(cli: Command, folder: Path) -> None:
    change(folder, query=lambda weight: weight * float("nan"))
    cli("embed", folder, "cat").refused(2, "NaN or infinite", "query.weight")


def test_a_sequence_over_the_limit(cli: Command, folder: Path) -> None:
    cli("embed", folder, "cat " * 70).refused(2, "72 tokens", "positions for 64")
    cli("verify", folder, "--device", "cpu", "--tokens", 65).refused(2, "65 tokens", "positions for 64")


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_text(cli: Command, folder: Path, text: str) -> None:
    cli("embed", folder, "cat", text, "--json").refused(2, "text 2 of 2 is empty")
    cli("verify", folder, "--device", "cpu", "--text", text).refused(2, "text 1 of 1 is empty")


def test_a_model_that_does_not_fit_device_memory(cli: Command) -> None:
    sentence, status = explain(OutOfDeviceMemory("a buffer does not fit; open the device with more memory"))
    assert (sentence, status) == ("a buffer does not fit; open the device with more memory", 2)


def test_programs_that_cannot_be_used(cli: Command, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "small.prog"
    assert cli("compile", folder, "--device", "fast:tiny", "--tokens", 3, "--output", path).status == 0
    cli("disasm", path, "--device", "rtl:laptop").refused(2, "built for configuration", "compile it for this core")
    cli("disasm", path, "--device", "cpu").refused(2, "'cpu' runs without programs", "fast:laptop")
    cli("disasm", path, "--device", "slow:tiny").refused(2, "unknown device 'slow:tiny'")
    path.write_bytes(path.read_bytes()[:-64])
    cli("disasm", path, "--json").refused(2, "small.prog", "truncated")
    cli("disasm", folder / "config.json").refused(2, "not a Lockstep program file")
    cli("disasm", tmp_path / "nothing").refused(2, "nothing: No such file")
    cli("disasm", tmp_path).refused(2, "Is a directory")


def test_a_program_needs_a_device_with_a_core_and_a_part_that_exists(
    cli: Command, folder: Path, tmp_path: Path
) -> None:
    arguments = ("compile", folder, "--tokens", 3, "--output", tmp_path / "p", "--device")
    cli(*arguments, "cpu").refused(2, "'cpu' runs without programs")
    cli(*arguments, "fast:tiny", "--part", 1).refused(2, "no part 1")
    unwritable = ("compile", folder, "--tokens", 3, "--output", tmp_path / "no" / "p", "--device", "fast:tiny")
    cli(*unwritable).refused(2, "no/p: No such file")


@pytest.mark.parametrize("device", ["cpu", "fast:tiny"])
def test_no_compiler_is_the_environments_fault_and_leaves_nothing_half_built(
    cli: Command, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("LOCKSTEP_CACHE", str(cache))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    cli("embed", folder, "cat", "--device", device, "--json").refused(3, "no C++ compiler", "apt-get install g++")
    left = [path for path in cache.rglob("*") if path.suffix in (".so", ".o") or path.name.startswith("unfinished")]
    assert left == []
    entries = {entry["uri"]: entry for entry in cli("devices", "--json").json["devices"]}
    assert "no C++ compiler" in entries[device]["reason"]
    assert entries["golden"]["available"] is True


def test_a_compiler_that_fails_leaves_nothing_half_built(
    cli: Command, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "broken-compiler"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "out of memory"; exit 1\n')
    compiler.chmod(0o755)
    cache = tmp_path / "cache"
    monkeypatch.setenv("LOCKSTEP_CACHE", str(cache))
    monkeypatch.setenv("CXX", str(compiler))
    done = cli("embed", folder, "cat")
    done.refused(3, "failed with status 1")
    assert "out of memory" in done.err
    assert [path for path in cache.iterdir() if path.is_dir()] == []


def test_no_verilator_is_the_environments_fault(cli: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lockstep_sim import verilate

    verilate.find_verilator.cache_clear()
    monkeypatch.setattr(verilate.shutil, "which", lambda name: None)
    cli("embed", folder, "cat", "--device", "rtl:tiny").refused(3, "perl", "apt-get install perl")


def test_a_device_that_stops_is_the_environments_fault() -> None:
    sentence, status = explain(DeviceError(ErrorCode.WATCHDOG, 3, 0, 2))
    assert status == 3
    assert sentence.startswith("the core stopped with WATCHDOG in unit VECTOR, instruction 3")
    assert explain(DeviceTimeout("no answer"))[1] == 3


def test_interrupting_leaves_quietly(cli: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lockstep.model.load", interrupt)
    done = cli("embed", folder, "cat")
    assert (done.status, done.out) == (130, "")
    assert done.err.splitlines()[-1] == "interrupted"
    assert "Traceback" not in done.err


def test_a_mistake_of_ours_asks_for_a_report(cli: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stumble(name: str) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("lockstep.model.load", stumble)
    cli("embed", folder, "cat").refused(70, "a mistake in Lockstep, ZeroDivisionError: division by zero")


def test_debug_shows_the_traceback_with_the_same_status(cli: Command, tmp_path: Path) -> None:
    done = cli("--debug", "embed", tmp_path / "nowhere", "cat")
    assert done.status == 2
    assert "Traceback (most recent call last)" in done.err
    assert "error: there is no folder" in done.err


def test_wrong_options_are_usage_errors(cli: Command, folder: Path) -> None:
    for arguments in (["embed"], ["embed", folder], ["verify", folder], ["verify", folder, "--tokens", "0"], ["fly"]):
        done = cli(*arguments)
        assert (done.status, done.out) == (2, "")
        assert "Usage: lockstep" in done.err
