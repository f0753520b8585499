"""Every command of ``lockstep``: what it prints for people, what it prints for machines, and how it ends."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import filelock
import lockstep
import numpy as np
import pytest
from command_line import Command
from lockstep import Program, verification
from lockstep.cli.demo import NEW_TOKENS
from lockstep.model import Model
from lockstep_driver.builder import ProgramBuilder
from lockstep_isa.config import PRESETS, preset
from lockstep_isa.instructions import LOAD, Memory
from lockstep_rtl import synthesis
from lockstep_sim.verilate import find_verilator

TEXTS = ("the cat sleeps", "rain falls")
COMMANDS = (
    "demo",
    "generate",
    "chat",
    "inspect",
    "embed",
    "verify",
    "devices",
    "doctor",
    "compile",
    "disasm",
    "bench",
    "synth",
    "clean",
)


def test_help_lists_every_command_and_each_has_an_example(cli: Command) -> None:
    overview = cli("--help")
    assert overview.status == 0
    for name in COMMANDS:
        assert name in overview.out
        page = cli(name, "--help")
        assert page.status == 0
        assert f"Example: lockstep {name}" in page.out
        assert "--json" in page.out


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "lockstep", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == "lockstep 0.1.0\n"


def test_embed_prints_vectors_for_machines(cli: Command, small_folder: Path) -> None:
    report = cli("embed", small_folder, *TEXTS, "--device", "fast:tiny", "--json").json
    assert report["model"] == str(small_folder)
    assert report["device"] == "fast:tiny"
    assert report["tokens"] == [5, 4]
    assert report["fallbacks"] == []
    assert report["cycles"] > 0
    expected = lockstep.load(small_folder).embed(TEXTS, "golden")
    assert (np.array(report["embeddings"], np.float32) == expected).all()


def test_embed_prints_a_table_for_people(cli: Command, small_folder: Path) -> None:
    done = cli("embed", small_folder, *TEXTS)
    assert done.status == 0
    assert "the cat sleeps" in done.out
    assert "first of 32 features" in done.out
    assert "cycles" not in done.out
    assert "running on cpu" in done.err


def test_verify_finds_the_rtl_the_fast_core_and_the_cpu_identical(cli: Command, small_folder: Path) -> None:
    devices = ("--device", "cpu", "--device", "rtl:tiny", "--device", "fast:tiny")
    done = cli("verify", small_folder, *devices, "--tokens", 6, "--seed", 4, "--json")
    assert done.status == 0, done.err
    report = done.json
    assert report["identical"] is True
    assert report["values_compared"] == 2 * 6 * 32
    assert report["first_difference"] is None
    assert report["cycles"]["cpu"] is None
    assert report["cycles"]["rtl:tiny"] > 1000


def test_verify_compares_a_single_device_with_the_cpu(cli: Command, small_folder: Path) -> None:
    done = cli("verify", small_folder, "--device", "fast:laptop", "--text", TEXTS[0], "--text", TEXTS[1])
    assert done.status == 0
    assert "identical: 288 values compared" in done.out
    assert "reference" in done.out


class Flipping:
    """An executor that flips the lowest bit of one value in the second sequence."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __enter__(self) -> Flipping:
        return self

    def __exit__(self, *_: object) -> None:
        self.inner.close()

    @property
    def cycles(self) -> int | None:
        return self.inner.cycles

    def run(self, graph: Any, sequences: Any) -> list[np.ndarray]:
        results = self.inner.run(graph, sequences)
        results[1] = results[1].copy()
        results[1].view(np.uint32)[2, 7] ^= 1
        return results


def test_verify_names_a_planted_difference(cli: Command, small_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = verification.executor

    def plant(uri: str, progress: Any = None) -> Any:
        device = opened(uri, progress)
        return Flipping(device) if uri == "fast:laptop" else device

    monkeypatch.setattr(verification, "executor", plant)
    arguments = ["verify", small_folder, "--device", "cpu", "--device", "fast:tiny", "--device", "fast:laptop"]
    arguments += ["--text", TEXTS[0], "--text", TEXTS[1]]
    done = cli(*arguments, "--json")
    assert done.status == 1
    report = done.json
    assert report["identical"] is False
    assert report["differences"] == {"fast:tiny": 0, "fast:laptop": 1}
    first = report["first_difference"]
    assert (first["device"], first["sequence"], first["token"], first["feature"]) == ("fast:laptop", 1, 2, 7)
    assert int(first["expected"], 16) ^ int(first["actual"], 16) == 1
    text = cli(*arguments)
    assert text.status == 1
    assert "different, first in sequence 1, token 2, feature 7: fast:laptop has" in text.out


def test_devices_lists_cores_and_what_keeps_them_from_running(cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "broad", PRESETS["laptop"].replace(name="broad", bus_bytes=64))
    report = cli("devices", "--json").json
    entries = {entry["uri"]: entry for entry in report["devices"]}
    assert {"cpu", "golden", *(f"{s}:{core}" for s in ("rtl", "fast") for core in PRESETS)} == set(entries)
    assert entries["rtl:laptop"]["available"] is True
    assert entries["rtl:broad"]["available"] is False
    assert "buses of up to 32 bytes" in entries["rtl:broad"]["reason"]
    assert report["presets"]["laptop"]["lanes"] == 16
    text = cli("devices").out
    assert "rtl:laptop" in text
    assert "16 x 16" in text


def test_doctor_finds_a_healthy_machine(cli: Command) -> None:
    done = cli("doctor", "--json")
    report = done.json
    assert done.status == 0
    assert report["ok"] is True
    needed = {check["name"] for check in report["checks"] if check["required"]}
    assert {"Python", "PyTorch", "C++ compiler", "perl", "Verilator", "build cache"} <= needed
    assert all(check["ok"] and check["remedy"] is None for check in report["checks"] if check["required"])


def test_doctor_survives_what_is_broken_and_says_what_mends_it(
    cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_verilator.cache_clear()
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libtorch.so is gone')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "no-such-compiler")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOCKSTEP_CACHE", str(tmp_path / "file" / "cache"))
    done = cli("doctor")
    assert done.status == 3
    assert "Traceback" not in done.err
    assert "libtorch.so is gone" in done.out
    assert "-> pip install --force-reinstall 'torch" in done.out
    assert "-> apt-get install perl" in done.out
    assert "CXX names 'no-such-compiler'" in done.out
    assert "-> export LOCKSTEP_CACHE=" in done.out
    assert "Missing: PyTorch, C++ compiler, perl, Verilator, build cache." in done.out


def test_compile_writes_what_disasm_reads(cli: Command, small_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "small.prog"
    arguments = ("compile", small_folder, "--device", "rtl:laptop", "--tokens", 9, "--tokens", 3, "--output", path)
    report = cli(*arguments, "--json").json
    program = Program.load(path)
    assert report["instructions"] == len(program.instructions)
    assert report["tokens"] == [9, 3]
    assert report["bytes"] == path.stat().st_size
    assert "for core 'laptop'" in cli(*arguments).out
    listing = cli("disasm", path, "--device", "fast:laptop").out.splitlines()
    assert [line for line in listing if not line.startswith(";")] == program.disassemble()
    decoded = cli("disasm", path, "--json").json
    assert decoded["core"] == "laptop"
    assert sum(decoded["counts"].values()) == len(decoded["instructions"]) == report["instructions"]
    assert decoded["instructions"][0]["name"] == "LOAD"


def test_disasm_shows_what_a_run_must_give(cli: Command, tmp_path: Path) -> None:
    builder = ProgramBuilder(preset("tiny"))
    context = builder.operand("context", 0, 512)
    builder.emit(LOAD, memory=Memory.VECTOR, words=1, words_operand=context, address=0)
    path = tmp_path / "decode.prog"
    builder.finish().save(path)
    out = cli("disasm", path).out
    assert "; operand 1 context: 0 to 512\n" in out
    assert "words=1+context" in out
    assert cli("disasm", path, "--json").json["operands"] == [
        {"name": "context", "least": 0, "greatest": 512, "step": 1}
    ]


def test_synth_shows_resources_and_clock(cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    part = synthesis.Resources(lut4=1000, ff=20, multipliers=3)
    used = {"TRELLIS_COMB": 1000, "TRELLIS_FF": 20, "DP16KD": 0, "MULT18X18D": 3}
    report = synthesis.SynthesisReport(preset("ulx3s"), {"VECTOR": part}, part, used, 61.25, (("lane", 1.5),))
    folders: list[Path] = []

    features: list[str] = []

    def fake(
        config: Any, workdir: Path, progress: Any, *, place: bool, route: bool, seed: int
    ) -> synthesis.SynthesisReport:
        assert (config.name, seed) == ("ulx3s", synthesis.SEED)
        features[:] = [name for name in config.feature_names() if getattr(config, name)]
        if not place:
            return dataclasses.replace(report, fmax_mhz=None)
        assert workdir.is_dir()
        folders.append(workdir)
        progress("placing and routing")
        return dataclasses.replace(report, routed=route)

    monkeypatch.setattr(synthesis, "synthesise", fake)
    values = cli("synth", "ulx3s", "--json").json
    assert values["units"]["VECTOR"]["lut4"] == values["total"]["lut4"] == 1000
    assert (values["fits"], values["fmax_mhz"], values["routed"]) == (True, 61.25, True)
    assert cli("synth", "ulx3s", "--no-route", "--json").json["routed"] is False
    assert not features
    counted = cli("synth", "ulx3s", "--with", "selection", "--with", "packed", "--count", "--json").json
    assert features == ["packed", "selection"] == counted["features"]
    assert counted["fmax_mhz"] is None
    assert "not placed" in cli("synth", "ulx3s", "--count").out
    cli("synth", "ulx3s", "--with", "wings").refused(2, "'wings' is no feature of a core; there are packed, selection")
    assert "it fits; 61.2 MHz, projected from placement" in cli("synth", "ulx3s", "--no-route").out
    done = cli("synth", "ulx3s")
    assert "it fits; 61.2 MHz\n" in done.out
    assert "placing and routing" in done.err
    assert not any(folder.exists() for folder in folders)


def test_clean_removes_builds_and_nothing_else(cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCKSTEP_CACHE", str(tmp_path))
    done, building, unfinished = tmp_path / ("a" * 32), tmp_path / ("b" * 32), tmp_path / "unfinished-x7"
    for folder in (done, building, unfinished):
        folder.mkdir()
        (folder / "library.so").write_bytes(bytes(1000))
    (tmp_path / "letters.txt").write_text("mine")
    with filelock.FileLock(tmp_path / f"{building.name}.lock"):
        report = cli("clean", "--json").json
        assert (report["builds_removed"], report["bytes_freed"], report["builds_in_progress"]) == (1, 1000, 1)
        assert building.is_dir()
        assert unfinished.is_dir()
    assert "1 builds removed" in cli("clean").out
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == ["letters.txt"]


def test_the_demo_compares_the_device_with_the_fast_core_and_the_cpu(
    cli: Command, minilm: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {"minilm": minilm, "tiny": lockstep.load("tiny")}
    monkeypatch.setattr("lockstep.model.load", lambda name: models[name])
    done = cli("demo", "--device", "fast:laptop", "--json")
    report = done.json
    assert done.status == 0
    assert report["identical"] is True
    assert report["values_compared"] == sum(report["tokens"]) * 384
    assert report["similarities"][0][1] > 0.5 > report["similarities"][0][2]
    assert 0.8 < report["utilisation"] < 1
    assert report["cycles"] < 3_000_000
    generation = report["generation"]
    assert generation["text"] == models["tiny"].generate(generation["prompt"], max_new_tokens=NEW_TOKENS).text
    assert generation["compared_with"] == {"cpu": {"values_compared": NEW_TOKENS * 272, "differences": 0}}
    assert generation["cycles"] > 1_000_000
    text = cli("demo", "--device", "cpu").out
    assert "fast:laptop" in text
    assert "tiny writes:\ndef add(self, " in text
    assert "the same bits" in text


@pytest.mark.slow
def test_the_demo_runs_on_the_rtl_within_a_minute(cli: Command) -> None:
    import time

    assert cli("demo").status == 0
    start = time.monotonic()
    report = cli("demo", "--json").json
    assert time.monotonic() - start < 60
    assert set(report["compared_with"]) == {"cpu", "fast:laptop"}
    assert report["identical"] is True
    assert report["cycles_per_second"] > 100_000
