"""The corpus: which files it takes, and that held-out text is never trained on."""

from __future__ import annotations

from pathlib import Path

from bytelm.corpus import is_held_out, read_corpus, sample


def write(folder: Path, files: dict[str, bytes]) -> None:
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(text)


def test_files_are_split_by_path_in_order(tmp_path: Path) -> None:
    files = {f"module_{index}.py": f"x = {index}\r\n".encode() for index in range(100)}
    write(tmp_path, files)
    corpus = read_corpus(tmp_path)
    held_out = [document.path for document in corpus.held_out]
    trained = [document.path for document in corpus.training]
    assert held_out == sorted(path for path in files if is_held_out(path))
    assert trained == sorted(path for path in files if not is_held_out(path))
    assert 1 <= len(held_out) <= 20
    assert all(document.text == files[document.path].replace(b"\r", b"") for document in corpus.training)


def test_a_text_is_never_in_both_parts(tmp_path: Path) -> None:
    write(tmp_path, {f"copy_{index}.py": b"the same\n" for index in range(100)})
    corpus = read_corpus(tmp_path)
    assert len(corpus.training) + len(corpus.held_out) == 1


def test_installed_packages_tests_and_empty_files_are_left_out(tmp_path: Path) -> None:
    left_out = ["site-packages/a.py", "test/b.py", "json/tests/c.py", "_sysconfigdata_x.py", "notes.txt"]
    write(tmp_path, {**{path: path.encode() for path in left_out}, "empty.py": b"", "tests.py": b"kept"})
    corpus = read_corpus(tmp_path)
    assert [document.path for document in corpus.training + corpus.held_out] == ["tests.py"]


def test_the_standard_library_has_both_parts() -> None:
    corpus = read_corpus()
    sizes = [sum(len(document.text) for document in part) for part in (corpus.training, corpus.held_out)]
    assert sizes[0] > 4e6
    assert 0.02 < sizes[1] / sizes[0] < 0.2
    assert not {document.text for document in corpus.training} & {document.text for document in corpus.held_out}


def test_a_sample_takes_whole_lines_of_every_document(tmp_path: Path) -> None:
    write(tmp_path, {f"m{index}.py": b"line %d\n" % index * (3 + 40 * index) for index in range(4)})
    corpus = read_corpus(tmp_path)
    documents = corpus.training + corpus.held_out
    text = sample(documents, 500)
    assert 460 < len(text) <= 500
    lines = text.splitlines()
    assert {lines.count(b"line %d" % index) > 2 for index in range(4)} == {True}
    assert set(lines) == {b"line %d" % index for index in range(4)}
