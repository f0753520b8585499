"""The key-value cache in device memory, and the run-time operands through which one program serves every context.

A program for M row tiles runs at any aligned slot of the cache: its first row tile holds the slots ``row .. row + R``,
of which those before the first new token are idle. So a token always stands in lane ``slot mod R``, keys and values
are appended without moving lanes, and rotary tables are read in whole words. A token's slot is its position, until a
cache of fewer slots gives up tokens: then one token at a time takes the slot of another, at the position that it has.

Keys of a head lie in panels, one word per feature; values one word per token and group of R features; scales one fp32
per token. All are appended where they belong, so the cache is never moved:

    keys    int8 [kv_heads][capacity / R][head_dim][R]        key scales    float32[kv_heads][capacity / R][R]
    values  int8 [kv_heads][head_dim / R][capacity][R]        value scales  float32[kv_heads][capacity / R][R]

With 4 bits, 17 words stand in the place of 32 (:mod:`.int4_images`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from lockstep_driver import Buffer, Device
from lockstep_driver.builder import ProgramBuilder
from lockstep_isa.config import CoreConfig
from lockstep_isa.selectors import Blocks

from lockstep.eviction import Piece
from lockstep.graph import Attention
from lockstep.session import CacheRows

from . import int4_images
from .allocation import CapacityError
from .cache_form import INT8, CacheForm
from .layout import to_panels


@dataclass(frozen=True)
class LayerCache:
    """Where the cache of one attention lies: byte addresses of its four arrays."""

    keys: int
    values: int
    key_scales: int
    value_scales: int


def cache_bytes(config: CoreConfig, node: Attention, capacity: int, form: CacheForm = INT8) -> tuple[int, int]:
    """Bytes of the keys or the values, and of the scales of either, of one attention."""
    width = -(-node.head_dim // config.rows) * config.rows
    return node.kv_heads * form.words(capacity) * width, node.kv_heads * capacity * 4


@dataclass(frozen=True)
class LayerSketch:
    """Where the sketch of one attention's keys lies: byte addresses of words and scales, and panels of a head."""

    words: int
    scales: int
    panels: int


class Cache:
    """The key-value cache of one sequence in the memory of one device.

    Parameters
    ----------
    device : whose memory is used. nodes : the attentions that it serves. capacity : tokens, a multiple of R, and of
    what ``form`` counts keys in.

    Raises :class:`OutOfDeviceMemory` where it does not fit, with nothing kept.
    """

    def __init__(self, device: Device, nodes: Sequence[Attention], capacity: int, form: CacheForm = INT8) -> None:
        self._device = device
        self._form = form
        self._capacity = capacity
        self._buffers: list[Buffer] = []
        self._parts: dict[int, tuple[Attention, list[Buffer]]] = {}
        self.layers: dict[int, LayerCache] = {}
        try:
            for node in nodes:
                data, scales = cache_bytes(device.config, node, capacity, form)
                buffers = [self._place(size) for size in (data, data, scales, scales)]
                self._parts[node.value] = node, buffers
                self.layers[node.value] = LayerCache(*(buffer.address for buffer in buffers))
                if form.bits == 4:
                    int4_images.begin(buffers[1].data, device.config.rows)
        except Exception:
            self.close()
            raise

    def write(self, value: int, rows: CacheRows) -> None:
        """Put the first tokens' keys and values of an attention where programs look for them; the rest stays."""
        node, (key_words, value_words, *scale_words) = self._parts[value]
        (keys, key_scales, values, value_scales), r, d = rows, self._device.config.rows, node.head_dim
        heads, tokens, groups = node.kv_heads, len(keys), -(-d // r)
        for buffer, scales in zip(scale_words, (key_scales, value_scales), strict=True):
            buffer.data.view(np.float32).reshape(heads, self._capacity)[:, :tokens] = scales.T
        if self._form.bits == 4:
            int4_images.write_keys(key_words.data, keys, heads, r)
            int4_images.write_values(value_words.data, values, heads, r)
            return
        panels = key_words.data.view(np.int8)[: heads * self._capacity * d].reshape(heads, -1, d, r)
        words = value_words.data.view(np.int8).reshape(heads, groups, self._capacity, r)
        for head in range(heads):
            own = slice(head * d, (head + 1) * d)
            whole = to_panels(keys[:, own], r)
            panels[head, : len(whole)] = whole
            padded = np.zeros((tokens, groups * r), np.int8)
            padded[:, :d] = values[:, own]
            words[head, :, :tokens] = padded.reshape(tokens, groups, r).transpose(1, 0, 2)

    def _place(self, size: int) -> Buffer:
        buffer = self._device.allocate(size)
        self._buffers.append(buffer)
        # What was there before could be no number at all, and nothing times no number is no number.
        buffer.data[:] = 0
        return buffer

    def close(self) -> None:
        """Free the device memory."""
        for buffer in self._buffers:
            self._device.free(buffer)
        self._buffers.clear()


@dataclass(frozen=True)
class Position:
    """Where a run stands: slot and position of its first new token, and the slots that this token sees."""

    slot: int
    rows: int
    first: int
    seen: int

    @property
    def aligned(self) -> int:
        """Slot of lane 0 of the first row tile."""
        return self.slot - self.lane

    @property
    def lane(self) -> int:
        """Lane of the first new token."""
        return self.slot % self.rows

    def end(self, tokens: int) -> int:
        """The slot behind the last one that ``tokens`` lanes see, rounded up to whole lanes."""
        return max(self.aligned + tokens, -(-self.seen // self.rows) * self.rows)


@dataclass(frozen=True)
class Section:
    """Operand numbers of one tile of keys in a program; the tile is skipped where it holds no key.

    Attributes
    ----------
    panels, keys, value_words : R keys each, the keys, and WEIGHT words of a group of features of their values.
    present, tiles, columns : 1, row tiles and features of a head, or 0 where the tile is skipped. index : the tile,
    counted from the first one that the window shows.
    """

    index: int
    panels: int
    keys: int
    value_words: int
    present: int
    tiles: int
    columns: int


@dataclass(frozen=True)
class Window:
    """Operand numbers of what a window (or all of the context) shows: its tiles of keys and where they begin."""

    sections: tuple[Section, ...]
    row: int
    keys: int
    values: int
    scales: int


@dataclass(frozen=True)
class Chosen:
    """Operand numbers of what a token chooses its keys from: blocks of keys, rows of their sketch and panels of those;
    and the row in lane 0, counted from the first key of the token's own block.
    """

    blocks: int
    rows: int
    panels: int
    row: int


class Context:
    """The operands of one program: declared while it is built, valued when it runs.

    Parameters
    ----------
    builder : of the program. config : the core. capacity : slots of the cache, a multiple of R. positions : tokens of
    the sequence. tiles : row tiles of the program. single : there is one new token only. form : of the cache.
    """

    def __init__(
        self,
        builder: ProgramBuilder,
        config: CoreConfig,
        capacity: int,
        tiles: int,
        single: bool = False,
        positions: int | None = None,
        form: CacheForm = INT8,
    ) -> None:
        self.form = form
        self.builder, self.config, self.capacity, self.tiles, self.single = builder, config, capacity, tiles, single
        self.positions = max(capacity, positions or 0)
        # Whether the one token may take the slot of another.
        self.replaces = single and positions is not None and positions > capacity
        self._numbers: dict[str, int] = {}
        self._formulas: dict[str, Callable[[Position], int]] = {}
        self._windows: dict[tuple[int | None, int, int], Window] = {}
        self._last = capacity - tiles * config.rows
        if self._last < 0:
            raise CapacityError(f"{tiles} row tiles of {config.rows} tokens do not fit a cache of {capacity} tokens")

    def values(self, piece: Piece) -> dict[str, int]:
        """The value of every operand for a run of some new tokens."""
        at = Position(piece.slot, self.config.rows, piece.first, piece.seen - piece.count + 1)
        return {name: formula(at) for name, formula in self._formulas.items()}

    def operand(self, name: str, least: int, greatest: int, formula: Callable[[Position], int], step: int = 1) -> int:
        """The number of an operand, declared once."""
        if name not in self._numbers:
            self._numbers[name] = self.builder.operand(name, least, greatest, step)
            self._formulas[name] = formula
        return self._numbers[name]

    @property
    def lane(self) -> int:
        """Lane of the first new token."""
        return self.operand("lane", 0, self.config.rows - 1, lambda at: at.lane)

    def aligned(self, factor: int) -> int:
        """The aligned slot times a factor: an offset into an array with ``factor`` bytes a token."""
        return self.operand(f"row_x{factor}", 0, self._last * factor, lambda at: at.aligned * factor)

    def slot(self, factor: int) -> int:
        """The first new token's slot times a factor: its offset into an array with ``factor`` bytes a slot."""
        return self.operand(f"slot_x{factor}", 0, (self.capacity - 1) * factor, lambda at: at.slot * factor)

    def position(self, factor: int) -> int:
        """The first new token's position times a factor: its offset into an array with ``factor`` bytes a position."""
        return self.operand(f"position_x{factor}", 0, (self.positions - 1) * factor, lambda at: at.first * factor)

    @property
    def last_seen(self) -> int:
        """The last slot that the first new token sees, less its lane: that of the row in lane 0."""
        return self.operand("last_seen", 0, self.capacity - 1, lambda at: at.seen - 1 - at.lane)

    @property
    def new_words(self) -> int:
        """Words behind the idle ones of the first row tile: one a token, all row tiles."""
        rows = self.config.rows
        most = self.tiles * rows
        return self.operand("new_words", most - rows + 1, most, lambda at: most - at.lane)

    def window(self, size: int | None, tile: int, head_dim: int) -> Window:
        """The tiles of ``tile`` keys that a window of ``size`` tokens (none: all) can show, as sections."""
        key = (size, tile, head_dim)
        if key not in self._windows:
            self._windows[key] = self._window(size, tile, head_dim)
        return self._windows[key]

    def chosen(self, least: int, block: int, block_rows: int) -> Chosen:
        """Blocks of ``block`` keys, ``least`` or more, whose sketch has ``block_rows`` rows."""
        rows, most = self.config.rows, -(-self.capacity // block)

        def operand(name: str, of: Callable[[int], int]) -> int:
            return self.operand(f"chosen_{name}", of(least), of(most), lambda at: of(-(-at.seen // block)))

        return Chosen(
            operand("blocks", lambda blocks: blocks),
            operand("rows", lambda blocks: blocks * block_rows),
            operand("panels", lambda blocks: -(-blocks * block_rows // rows)),
            self.operand("chosen_row", 0, block - rows, lambda at: at.aligned % block) if rows < block else 0,
        )

    def _window(self, size: int | None, tile: int, head_dim: int) -> Window:
        rows, most = self.config.rows, self.tiles * self.config.rows
        form, unit = self.form, self.form.unit(rows)
        prefix = "" if size is None else f"window{size}_"
        all_tiles = -(-self.capacity // tile)
        # The first row sees back to row - size + 1; the last one stands most - 1 behind it.
        count = all_tiles if size is None else min(all_tiles, -(-(size + most) // tile) + 1)

        def start(at: Position) -> int:
            """First tile that any row sees."""
            return 0 if size is None else min(max(0, at.aligned - size + 1) // tile, all_tiles - count)

        def keys(index: int) -> Callable[[Position], int]:
            end = self.capacity

            def formula(at: Position) -> int:
                begin = (start(at) + index) * tile
                return max(0, min(-(-at.end(most) // unit) * unit, begin + tile, end) - begin)

            return formula

        sections = []
        for index in range(count):
            held = keys(index)
            name = f"{prefix}tile{index}"
            greatest = min(tile, self.capacity - index * tile)
            # Tile 0 always holds a key of any row: it is never skipped.
            least = 0 if index else unit

            def scaled(
                label: str, factor: int, held: Callable[[Position], int] = held, name: str = name, least: int = least
            ) -> int:
                return self.operand(
                    f"{name}_{label}", factor if least else 0, factor, lambda at: factor if held(at) else 0
                )

            def panels(at: Position, held: Callable[[Position], int] = held) -> int:
                return held(at) // rows

            def words(at: Position, held: Callable[[Position], int] = held) -> int:
                return form.words(held(at))

            all_keys = self.operand(f"{name}_keys", least, greatest, held, 1 if form == INT8 else unit)
            sections.append(
                Section(
                    index,
                    self.operand(f"{name}_panels", least // rows, greatest // rows, panels),
                    all_keys,
                    all_keys
                    if form == INT8
                    else self.operand(f"{name}_words", form.words(least), form.words(greatest), words),
                    scaled("present", 1) if index else 0,
                    scaled("tiles", self.tiles) if index else 0,
                    scaled(f"columns{head_dim}", head_dim) if index else 0,
                )
            )
        if size is None:
            return Window(tuple(sections), self.last_seen, 0, 0, 0)
        furthest = (all_tiles - count) * tile

        def offset(factor: int) -> int:
            return self.operand(f"{prefix}start_x{factor}", 0, furthest * factor, lambda at: start(at) * tile * factor)

        def value_offset(at: Position) -> int:
            return form.words(start(at) * tile) * rows

        row = self.operand(f"{prefix}row", 0, self._last, lambda at: at.aligned - start(at) * tile)
        values = self.operand(f"{prefix}start_values", 0, form.words(furthest) * rows, value_offset)
        return Window(tuple(sections), row, offset(form.words(head_dim)), values, offset(4))


@dataclass(frozen=True)
class CausalRun:
    """What a program for new tokens of one cached sequence is compiled for.

    Attributes
    ----------
    capacity : slots of the cache. tiles : row tiles of new tokens, idle lanes in front included.
    single : there is one new token, as in decode.
    caches : where the cache of every attention lies, by its value.
    logits : whether the output is computed for the last row tile, for all of them, or not at all.
    positions : tokens of the sequence. form : of keys and values.
    importance : where the attention that slots get is left, float32[tiles, capacity, R], by the attention's value;
        empty where nobody asks.
    blocks : how many keys a token attends to, if it chooses them; sketches : where their sketches lie.
    """

    capacity: int
    tiles: int
    single: bool
    caches: Mapping[int, LayerCache]
    logits: Literal["last", "all", "none"]
    positions: int = 0
    form: CacheForm = INT8
    importance: Mapping[int, int] = field(default_factory=dict)
    blocks: Blocks | None = None
    sketches: Mapping[int, LayerSketch] = field(default_factory=dict)


def rounded_capacity(config: CoreConfig, tokens: int, least_tile: int, block: int = 1) -> int:
    """Tokens that a cache for ``tokens`` holds: whole panels, whole blocks of ``block`` keys that are chosen or met
    together, and whole tiles of keys once there are several.
    """
    unit = math.lcm(block, config.rows if tokens <= least_tile else least_tile)
    capacity = -(-tokens // unit) * unit
    if capacity >= 1 << 19:
        raise CapacityError(f"a context of {tokens} tokens is longer than the {(1 << 19) - 1} that positions can name")
    return capacity
