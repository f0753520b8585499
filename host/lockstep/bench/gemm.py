"""Random matrix products: operands in device memory, result in device memory, every bit compared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from lockstep_driver import Device
from lockstep_driver.builder import ProgramBuilder
from lockstep_isa import operations
from lockstep_isa.config import CoreConfig
from lockstep_isa.instructions import (
    LOAD,
    MATRIX,
    STORE,
    VECTOR,
    Destination,
    FirstAdd,
    FirstMultiply,
    Memory,
    SecondMultiply,
    Source,
)
from lockstep_isa.program import Program
from numpy.typing import NDArray

from lockstep.compiler.layout import column_words, from_panels, to_panels
from lockstep.compiler.packing import Packing, packed_panels, packing
from lockstep.quantisation.formats import Format, QuantisedWeight

from .gemm_schedule import Box, Span, boxes
from .limits import ceil_div, gemm_limit
from .measure import Bench, BenchError, Measurement, Ran
from .random_weights import INT8, depth_unit, format_of, names_of, random_integers
from .sizes import GemmSizes

#: Sizes of random products.
LEAST, MOST = 16, 512
#: Boxes whose operands are asked for before a box is computed.
AHEAD = 4


@dataclass(frozen=True)
class Operands:
    """``(float(a @ b.w8.T) * row_scales) * b.scale``; a: int8[M, K], row_scales: float32[M], and b [N, K]."""

    a: NDArray[np.int8]
    row_scales: NDArray[np.float32]
    b: QuantisedWeight

    @property
    def shape(self) -> tuple[int, int, int]:
        """M, N, K."""
        return len(self.a), len(self.b.values), self.a.shape[1]


@dataclass(frozen=True)
class Places:
    """Byte addresses of the operands' panels, the scales' words (rows', then columns'), and the result's panels."""

    a: int
    b: int
    scales: int
    result: int


def random_operands(m: int, n: int, k: int, rng: np.random.Generator, format: Format = INT8) -> Operands:
    """All values of int8 against all of ``format``, and scales about 1 / 1000."""
    a = rng.integers(-128, 128, (m, k), np.int8)
    return Operands(a, rng.uniform(0.5e-3, 2e-3, m).astype(np.float32), random_integers(n, k, format, rng))


def gemm_program(config: CoreConfig, m: int, n: int, k: int, places: Places, form: Packing | None = None) -> Program:
    """The program of one product, its right side in ``form``, or dense int8; raises :class:`BenchError` where it does
    not fit the core's memories.
    """
    return _Writer(config, m, n, k, places, form or Packing(k)).program()


class _Writer:
    def __init__(self, config: CoreConfig, m: int, n: int, k: int, places: Places, form: Packing) -> None:
        self.config, self.m, self.n, self.k, self.places, self.form = config, m, n, k, places, form
        self.row_panels, self.column_panels = ceil_div(m, config.rows), ceil_div(n, config.columns)
        for memory, needed, there in (
            ("ACTIVATION", self.row_panels * k, config.activation_words),
            ("WEIGHT", self.column_panels * form.words, config.weight_words),
            ("VECTOR", self.row_panels * n, config.vector_words),
            ("PARAMETER", self.row_panels + self.column_panels, config.parameter_words),
        ):
            if needed > there:
                raise BenchError(
                    f"a product of {m} x {n} x {k} needs {needed:,} words of {memory} memory, core '{config.name}' has "
                    f"{there:,}; give smaller sizes, or a core with more memory"
                )
        self.builder = ProgramBuilder(config)
        # How much of the depth of each panel has been asked for.
        self.asked = {Memory.ACTIVATION: [0] * self.row_panels, Memory.WEIGHT: [0] * self.column_panels}
        self.scaled = False

    def program(self) -> Program:
        order = list(boxes(self.config, self.row_panels, self.column_panels, self.k, self.form))
        ahead = 0
        for number, box in enumerate(order):
            while ahead < min(number + AHEAD, len(order)):
                self.fetch(order[ahead])
                ahead += 1
                # Nobody needs them before a sum is complete, and what the array needs next should come first.
                if order[ahead - 1].depth.end == self.k and ahead >= min(2, len(order)):
                    self.fetch_scales()
            self.compute(box)
        return self.builder.finish()

    def fetch(self, box: Box) -> None:
        """Ask for what a box needs and nobody has asked for."""
        for memory, panels, address, panel_words in (
            (Memory.ACTIVATION, box.rows, self.places.a, self.k),
            (Memory.WEIGHT, box.columns, self.places.b, self.form.words),
        ):
            asked = self.asked[memory]
            missing = [p for p in range(panels.start, panels.end) if asked[p] < box.depth.end]
            if not missing:
                continue
            first, begin = missing[0], asked[missing[0]]
            assert missing == list(range(first, panels.end))
            assert {asked[p] for p in missing} == {begin}
            before, bytes_a_word = begin * panel_words // self.k, self.config.operand_word_bytes
            words = box.depth.end * panel_words // self.k - before
            whole = words == panel_words
            self.builder.emit(
                LOAD,
                memory=memory,
                rows=1 if whole else len(missing),
                words=words * len(missing) if whole else words,
                address=address + (first * panel_words + before) * bytes_a_word,
                stride=panel_words * bytes_a_word,
                local=first * panel_words + before,
                local_stride=panel_words,
            )
            for panel in missing:
                asked[panel] = box.depth.end

    def fetch_scales(self) -> None:
        if self.scaled:
            return
        self.scaled = True
        self.builder.emit(
            LOAD,
            memory=Memory.PARAMETER,
            words=self.row_panels + self.column_panels,
            address=self.places.scales,
            local=0,
        )

    def compute(self, box: Box) -> None:
        """A box's products, their way to VECTOR words, and those to device memory where the sums are complete."""
        k, w, rows, columns, depth = self.k, self.form.words, box.rows, box.columns, box.depth
        self.builder.emit(
            MATRIX,
            depth=len(depth),
            outer=len(rows),
            inner=len(columns),
            a=rows.start * k + depth.start,
            a_outer=k,
            w=columns.start * w + depth.start * w // k,
            w_inner=w,
            **self.form.fields,
        )
        to = rows.start * self.n + columns.start * self.config.columns
        words = min(self.n, columns.end * self.config.columns) - columns.start * self.config.columns
        fields: dict[str, int] = {}
        if depth.start:
            fields |= {"add1": FirstAdd.Y, "y": to, "y_stride": self.n}
        complete = depth.end == k
        if complete:
            fields |= {"mul1": FirstMultiply.LANE1, "lane1": rows.start}
            fields |= {"mul2": SecondMultiply.COLUMN0, "column0": self.row_panels + columns.start}
        self.builder.emit(
            VECTOR,
            source=Source.ACCUMULATOR,
            destination=Destination.VECTOR,
            tiles=len(rows),
            columns=words,
            to=to,
            to_stride=self.n,
            **fields,
        )
        if complete:
            self.store(rows, to, words)

    def store(self, rows: Span, first: int, words: int) -> None:
        bytes_a_word = self.config.vector_word_bytes
        self.builder.emit(
            STORE,
            memory=Memory.VECTOR,
            rows=len(rows),
            words=words,
            address=self.places.result + first * bytes_a_word,
            stride=self.n * bytes_a_word,
            local=first,
            local_stride=self.n,
        )


def run_gemm(device: Device, operands: Operands) -> Ran:
    """Place the operands, run the program, and read ``float32[M, N]``."""
    config, (m, n, k), b = device.config, operands.shape, operands.b
    rows = config.rows
    form = packing(config, k, b)
    panels = to_panels(b.w8, rows) if form == Packing(k) else packed_panels(b, 0, n, rows)
    scales = np.concatenate([column_words(operands.row_scales, rows), column_words(b.scale, rows)])
    arrays = (to_panels(operands.a, rows), panels, scales)
    buffers = [device.allocate(array.nbytes) for array in arrays]
    buffers.append(device.allocate(ceil_div(m, rows) * n * config.vector_word_bytes))
    try:
        for buffer, array in zip(buffers, arrays, strict=False):
            buffer.write(array)
        # What an earlier product left must not be taken for this one's.
        buffers[-1].data[:] = 0xFF
        places = Places(*(buffer.address for buffer in buffers))
        counters = device.run(gemm_program(config, m, n, k, places, form))
        raw = buffers[-1].data.view(np.float32).reshape(-1, n, rows)
        return Ran([from_panels(raw, m)], counters)
    finally:
        for buffer in buffers:
            device.free(buffer)


def run(sizes: GemmSizes, bench: Bench) -> Iterator[Measurement]:
    """One product, or ``shapes`` random ones with sizes from 16 to 512; K of packed weights has whole groups."""
    rng = np.random.default_rng(sizes.seed)
    format = format_of(sizes.weights, sizes.sparsity)
    shapes = _shapes(sizes, format, rng)
    for number, (m, n, k) in enumerate(shapes, 1):
        bench.say(f"gemm {m} x {n} x {k} on {bench.uri} ({number} of {len(shapes)})")
        operands = random_operands(m, n, k, rng, format)
        b = operands.b
        yield bench.measure(
            "gemm",
            {"m": m, "n": n, "k": k, "output": "float32", **names_of(format)},
            gemm_limit(bench.config, m, n, k, packing(bench.config, k, b)),
            partial(run_gemm, operands=operands),
            [operations.linear(operands.a, operands.row_scales, b.w8, b.scale)],
        )


def _shapes(sizes: GemmSizes, format: Format, rng: np.random.Generator) -> list[tuple[int, int, int]]:
    """M, N and K of every product."""
    m, n, k, unit = sizes.m, sizes.n, sizes.k, depth_unit(format)
    missing = " and ".join(f"--{name}" for name, size in (("m", m), ("n", n), ("k", k)) if size is None)
    if m is not None and n is not None and k is not None:
        if min(m, n, k) < 1:
            raise BenchError(f"a product of {m} x {n} x {k} has nothing in it; give sizes of at least 1")
        if k > operations.MAX_K:
            raise BenchError(f"K = {k} may overflow int32 sums; give at most {operations.MAX_K}")
        if k % unit:
            raise BenchError(f"K = {k} has no whole groups of {format} weights; give a multiple of {unit}")
        return [(m, n, k)]
    if (m, n, k) != (None, None, None):
        raise BenchError(f"a product has three sizes; give {missing} too, or none for random products")
    if sizes.shapes < 1:
        raise BenchError(f"{sizes.shapes} products are none; give --shapes of at least 1")
    drawn = rng.integers(LEAST, MOST + 1, (sizes.shapes, 3)).tolist()
    return [(m, n, ceil_div(k, unit) * unit) for m, n, k in drawn]
