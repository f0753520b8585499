"""Cells of a netlist as Verilog expressions of 32 bits, or of 64 bits where a sum or a shift has more than 32.

What a word holds beyond its own bits is zero, always: so a word is masked where it is made and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from .netlist import Bit, Cell

_BITWISE = {"$and": "&", "$or": "|", "$xor": "^"}
_ARITHMETIC = {"$add": "+", "$sub": "-", "$mul": "*"}
_COMPARE = {"$eq": "==", "$ne": "!=", "$lt": "<", "$le": "<=", "$gt": ">", "$ge": ">="}
_SHIFT = {"$shl": "<<", "$shr": ">>"}
_REDUCE = {"$reduce_or", "$reduce_bool", "$reduce_and", "$logic_not"}


@dataclass(frozen=True)
class Word:
    """Some bits with a name: an input that copies share, one that they do not, a register, what a cell gives."""

    name: str
    width: int
    kind: Literal["shared", "lane", "register", "cell"]

    @property
    def bits(self) -> int:
        """Of the variable that holds it."""
        return 32 if self.width <= 32 else 64


def split(cell: Cell) -> Iterator[Cell]:
    """``cell`` as cells of at most 32 bits where it works bit by bit; ``WORD`` of a $memrd is the word it reads."""
    y = cell.ports["Y"]
    if cell.kind == "$memrd":
        for n, low in enumerate(range(0, len(y), 32)):
            yield Cell(cell.kind, {**cell.ports, "Y": y[low : low + 32]}, {"WORD": n}, cell.memory)
    elif len(y) > 32 and cell.kind in (*_BITWISE, "$not", "$mux", "$pmux"):
        ports = {}
        for name, bits in cell.ports.items():
            step = len(y)
            if name == "S":
                continue
            if len(bits) < step:
                fill: Bit = bits[-1] if cell.parameters.get(f"{name}_SIGNED") else "0"
                bits = bits + [fill] * (step - len(bits))
            ports[name] = bits
        for low in range(0, len(y), 32):
            high = min(low + 32, len(y))
            parts = {
                name: [bit for at in range(0, len(bits), len(y)) for bit in bits[at + low : at + high]]
                for name, bits in ports.items()
            }
            yield Cell(cell.kind, {**cell.ports, **parts}, {})
    else:
        yield cell


def inputs(cell: Cell) -> list[Bit]:
    """The bits that ``cell`` looks at."""
    return [bit for name, bits in cell.ports.items() if name != "Y" for bit in bits]


class Expressions:
    """Verilog of bits and cells.

    words : of each bit its word and its place there. text : how a register, a lane's input or a cell is read; an input
    that lanes share is read by the text with its bits in brackets.
    """

    def __init__(self, words: Mapping[Bit, tuple[Word, int]], text: Callable[[Word], str]) -> None:
        self.words, self.text = words, text

    def bits(self, bits: list[Bit], size: int = 32) -> str:
        """``bits``, lowest first, as a number of ``size`` bits, 32 or 64."""
        constant, parts, at = 0, [], 0
        while at < len(bits):
            bit = bits[at]
            if not isinstance(bit, int):
                constant |= (bit == "1") << at
                at += 1
                continue
            length = 1
            while at + length < len(bits) and bits[at + length] == bit:
                length += 1
            if length > 1:
                # The same bit again and again, as signs are extended.
                one = self._run(bit, 1, size)
                parts.append(_shifted(f"(({size}'d0 - {one}) & {_number((1 << length) - 1, size)})", at))
            else:
                word, place = self.words[bit]
                while at + length < len(bits) and self.words.get(bits[at + length]) == (word, place + length):
                    length += 1
                parts.append(_shifted(self._run(bit, length, size), at))
            at += length
        if constant or not parts:
            parts.append(_number(constant, size))
        return parts[0] if len(parts) == 1 else f"({' | '.join(parts)})"

    def _run(self, bit: Bit, length: int, size: int) -> str:
        """So many bits of one word from ``bit`` on, as a number."""
        word, low = self.words[bit]
        if word.kind == "shared":
            part = f"[{low + length - 1}:{low}]" if word.width > 1 else ""
            return f"{{{size - length}'d0, {self.text(word)}{part}}}" if length < size else f"{self.text(word)}{part}"
        text = self.text(word)
        if word.bits == 64 and size == 32:
            part = f"{text}[{low + length - 1}:{low}]"
            return f"{{{32 - length}'d0, {part}}}" if length < 32 else part
        if low:
            text = f"({text} >> {low})"
        if low + length < word.width:
            text = f"({text} & {_number((1 << length) - 1, word.bits)})"
        return f"{{32'd0, {text}}}" if size > word.bits else text

    def cell(self, cell: Cell) -> str:
        """What ``cell`` gives, of as many bits as its word's variable."""
        kind, ports, y = cell.kind, cell.ports, len(cell.ports["Y"])
        size = 32 if max(len(ports["A"]), len(ports.get("B", ())), y) <= 32 else 64
        signed = bool(cell.parameters.get("A_SIGNED"))
        if kind not in _SHIFT:
            signed = signed and bool(cell.parameters.get("B_SIGNED", 1))
        if kind in ("$mux", "$pmux"):
            value = self.bits(ports["A"])
            for n, select in enumerate(ports["S"]):
                value = f"({self.bits([select])} != 32'd0 ? {self.bits(ports['B'][n * y : (n + 1) * y])} : {value})"
            return value
        if kind in _REDUCE:
            return self._reduced(kind, ports["A"], size)
        if kind in _COMPARE:
            a, b = self._operand(ports["A"], size, signed), self._operand(ports["B"], size, signed)
            if kind not in ("$eq", "$ne") and (signed or max(len(ports["A"]), len(ports["B"])) < size):
                # Vector instructions compare signed numbers.
                a, b = f"$signed({a})", f"$signed({b})"
            return f"{{31'd0, {a} {_COMPARE[kind]} {b}}}"
        a = self._operand(ports["A"], size, signed and len(ports["A"]) < y)
        if kind == "$not":
            return _masked(f"(~{a})", y, size) if y > 1 else f"({a} ^ 32'd1)"
        if kind == "$neg":
            return _masked(f"({size}'d0 - {a})", y, size)
        if kind in _SHIFT:
            if signed and len(ports["A"]) < y:
                a = _masked(a, y, size)
            shifted = f"({a} {_SHIFT[kind]} {self.bits(ports['B'], size)})"
            return _masked(shifted, y, size) if kind == "$shl" or len(ports["A"]) > y else shifted
        if kind not in _BITWISE and kind not in _ARITHMETIC:
            raise ValueError(f"no expression for a cell '{kind}'")
        b = self._operand(ports["B"], size, signed and len(ports["B"]) < y)
        widths = len(ports["A"]), len(ports["B"])
        needs = {"$add": max(widths) + 1, "$mul": sum(widths), "$sub": size + 1}.get(kind, max(widths))
        result = f"({a} {(_BITWISE | _ARITHMETIC)[kind]} {b})"
        return result if needs <= y and not signed else _masked(result, y, size)

    def _operand(self, bits: list[Bit], size: int, signed: bool) -> str:
        value = self.bits(bits, size)
        if not signed or len(bits) == size:
            return value
        if all(not isinstance(bit, int) for bit in bits):
            number = int("".join(str(bit) for bit in reversed(bits)).replace("x", "0"), 2)
            return _number(number - (number >> len(bits) - 1 << len(bits)) & (1 << size) - 1, size)
        sign = _number(1 << len(bits) - 1, size)
        return f"(({value} ^ {sign}) - {sign})"

    def _reduced(self, kind: str, bits: list[Bit], size: int) -> str:
        mask = _number((1 << len(bits)) - 1, size)
        test = f"== {mask}" if kind == "$reduce_and" else f"== {size}'d0" if kind == "$logic_not" else f"!= {size}'d0"
        return f"{{31'd0, {self.bits(bits, size)} {test}}}"


def _number(value: int, size: int) -> str:
    return f"{size}'h{value:x}"


def _shifted(text: str, by: int) -> str:
    return f"({text} << {by})" if by else text


def _masked(text: str, width: int, size: int) -> str:
    return text if width == size else f"({text} & {_number((1 << width) - 1, size)})"
