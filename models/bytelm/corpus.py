"""The text that every Python installation carries: the sources of its standard library, split by file."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

#: Folders left out wherever they stand: installed packages, tests, and what some distributions ship separately.
LEFT_OUT = frozenset(
    {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"}
    | {"distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtledemo"}
)
#: One file in this many, chosen by a hash of its path, is held out: training never sees it.
HELD_OUT_ONE_IN = 12


@dataclass(frozen=True)
class Document:
    """One source file: its path below the folder of the standard library, and its bytes with LF line ends."""

    path: str
    text: bytes


@dataclass(frozen=True)
class Corpus:
    """Documents in the order of their paths; no text is in both parts."""

    training: tuple[Document, ...]
    held_out: tuple[Document, ...]


def is_held_out(path: str) -> bool:
    """Whether the file at ``path`` (relative, with slashes) is held out; depends on nothing but the path."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") % HELD_OUT_ONE_IN == 0


def read_corpus(folder: Path | None = None) -> Corpus:
    """The ``.py`` files below ``folder`` (the running interpreter's standard library) without empty and repeated ones.

    A text that occurs in several files counts where its path comes first, so that no held-out text is trained on.
    """
    folder = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    parts: dict[bool, list[Document]] = {False: [], True: []}
    seen: set[bytes] = set()
    for path in sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py")):
        if LEFT_OUT.intersection(path.split("/")[:-1]) or path.startswith("_sysconfigdata"):
            continue
        text = (folder / path).read_bytes().replace(b"\r\n", b"\n")
        if not text or text in seen:
            continue
        seen.add(text)
        parts[is_held_out(path)].append(Document(path, text))
    return Corpus(tuple(parts[False]), tuple(parts[True]))


def sample(documents: tuple[Document, ...], size: int) -> bytes:
    """``size`` bytes at most: whole lines from the beginning of each document, the same share of each.

    Documents shorter than their share leave the rest to those after them.
    """
    pieces: list[bytes] = []
    left = size
    for index, document in enumerate(sorted(documents, key=lambda document: len(document.text))):
        share = left // (len(documents) - index)
        piece = document.text
        if len(piece) > share:
            piece = piece[: piece.rfind(b"\n", 0, share) + 1]
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)
