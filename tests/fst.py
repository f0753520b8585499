"""Enough of the FST format to know which signals and which times a waveform has."""

from __future__ import annotations

import zlib
from pathlib import Path

_HEADER, _HIERARCHY_GZIP, _HIERARCHY_LZ4 = 0, 4, 6
_SCOPE, _UPSCOPE, _ATTRIBUTE, _ATTRIBUTE_END = 254, 255, 252, 253


def times(path: Path) -> tuple[int, int]:
    """The first and the last time of a waveform."""
    header = _block(path.read_bytes(), _HEADER)[1]
    return int.from_bytes(header[:8], "big"), int.from_bytes(header[8:16], "big")


def signals(path: Path) -> dict[str, int]:
    """Path -> bits of every signal; a range behind its name is left out."""
    kind, content = _block(path.read_bytes(), _HIERARCHY_GZIP, _HIERARCHY_LZ4)
    size, packed = int.from_bytes(content[:8], "big"), content[8:]
    text = zlib.decompress(packed, 31) if kind == _HIERARCHY_GZIP else _lz4(packed, size)
    found: dict[str, int] = {}
    scopes: list[str] = []
    at = 0
    while at < len(text):
        tag, at = text[at], at + 1
        if tag == _SCOPE:
            name, at = _string(text, at + 1)
            _, at = _string(text, at)
            scopes.append(name)
        elif tag == _UPSCOPE:
            scopes.pop()
        elif tag == _ATTRIBUTE:
            _, at = _string(text, at + 2)
            _, at = _number(text, at)
        elif tag != _ATTRIBUTE_END:
            name, at = _string(text, at + 1)
            bits, at = _number(text, at)
            _, at = _number(text, at)
            found[".".join([*scopes, name.split(" ")[0].split("[")[0]])] = bits
    return found


def _block(data: bytes, *kinds: int) -> tuple[int, bytes]:
    at = 0
    while at < len(data):
        length = int.from_bytes(data[at + 1 : at + 9], "big")
        if data[at] in kinds:
            return data[at], data[at + 9 : at + 1 + length]
        at += 1 + length
    raise AssertionError(f"the waveform has no block of the kinds {kinds}")


def _string(text: bytes, at: int) -> tuple[str, int]:
    end = text.index(0, at)
    return text[at:end].decode(), end + 1


def _number(text: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (text[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if not text[at - 1] & 128:
            return value, at


def _lz4(packed: bytes, size: int) -> bytes:
    out = bytearray()
    at = 0

    def length(nibble: int) -> int:
        nonlocal at
        total = nibble
        while nibble == 15:
            total, at = total + packed[at], at + 1
            if packed[at - 1] != 255:
                break
        return total

    while True:
        token, at = packed[at], at + 1
        literals = length(token >> 4)
        out += packed[at : at + literals]
        at += literals
        if len(out) >= size:
            return bytes(out)
        distance, at = int.from_bytes(packed[at : at + 2], "little"), at + 2
        for _ in range(length(token & 15) + 4):
            out.append(out[-distance])
