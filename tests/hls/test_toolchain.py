"""The compiler is found or named, and a cached build is whole or absent."""

from __future__ import annotations

import ctypes
import threading
import time
from pathlib import Path

import pytest
from lockstep_hls import toolchain
from lockstep_hls.toolchain import ToolchainError, build_cached, compile_shared


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("LOCKSTEP_CACHE", str(folder))
    return folder


def test_a_missing_compiler_names_the_command_that_installs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ToolchainError, match="apt-get install g\\+\\+"):
        toolchain.find_compiler()


def test_a_wrong_cxx_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(ToolchainError, match="'no-such-compiler'"):
        toolchain.find_compiler()


def test_cxx_may_carry_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = toolchain.find_compiler()[0]
    monkeypatch.setenv("CXX", f"{compiler} -DANSWER=42")
    assert toolchain.find_compiler() == [compiler, "-DANSWER=42"]


def test_a_failed_compilation_shows_its_last_lines_and_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    source = tmp_path / "broken.cpp"
    source.write_text("int answer() { return fortytwo; }\n")
    with pytest.raises(ToolchainError, match="fortytwo"):
        compile_shared([source])
    assert [path for path in cache.iterdir() if path.is_dir()] == []


def test_a_changed_header_is_a_new_build(tmp_path: Path) -> None:
    (tmp_path / "include").mkdir()
    header, source = tmp_path / "include" / "answer.hpp", tmp_path / "answer.cpp"
    source.write_text('#include "answer.hpp"\nextern "C" int answer() { return ANSWER; }\n')
    said: list[str] = []
    for value in (1, 2, 2):
        header.write_text(f"#define ANSWER {value}\n")
        library = compile_shared([source], [tmp_path / "include"], progress=said.append)
        assert ctypes.CDLL(str(library)).answer() == value
    assert said == ["compiling answer.cpp (once)"] * 2


def test_two_builds_at_once_build_once() -> None:
    built: list[Path] = []
    said: list[str] = []

    def builder(folder: Path) -> None:
        built.append(folder)
        time.sleep(0.3)
        (folder / "result").write_text("whole")

    results: list[str] = []
    threads = [
        threading.Thread(
            target=lambda: results.append((build_cached(["key"], builder, said.append) / "result").read_text())
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["whole"] * 3
    assert len(built) == 1
    assert said == ["waiting for another process that builds the same"] * 2


def test_a_builder_that_fails_is_tried_again(cache: Path) -> None:
    def failing(folder: Path) -> None:
        (folder / "half").write_text("")
        raise ToolchainError("no luck")

    with pytest.raises(ToolchainError, match="no luck"):
        build_cached(["key"], failing)
    assert [path for path in cache.iterdir() if path.is_dir()] == []
    assert list(build_cached(["key"], lambda folder: None).iterdir()) == []


def test_key_parts_do_not_run_together() -> None:
    assert build_cached(["ab", "c"], lambda folder: None) != build_cached(["a", "bc"], lambda folder: None)


def test_an_unusable_cache_names_the_variable_that_moves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOCKSTEP_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ToolchainError, match="LOCKSTEP_CACHE"):
        build_cached(["key"], lambda folder: None)
