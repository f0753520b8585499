"""Two blocks of a transformer as benchmark cases: multi-head attention, and the feed-forward layer.

The published designs for the same blocks count from a block's input on chip to its result on chip, and so does this: a
program brings the input into the scratchpads, the counted one streams all weights and leaves the result there, and a
third one stores it for the comparison. Every value is compared with the golden operations, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from lockstep_driver import Device
from lockstep_driver.builder import ProgramBuilder
from lockstep_driver.device import Counters
from lockstep_isa.config import CoreConfig
from lockstep_isa.instructions import LOAD, MATRIX, STORE, VECTOR, Destination, Memory, Source
from lockstep_isa.program import Program
from numpy.typing import NDArray

from lockstep.compiler.layout import from_panels, panel_count, to_panels

from .attention import MultiHead
from .builder import Places
from .emitter import CHUNK_COLUMNS, Image
from .feedforward import FeedForward
from .reference import Kind, Parameters, Results, Sizes, expected, random_parameters


@dataclass(frozen=True)
class Block:
    """One case: three programs, and what they leave.

    Addresses of the programs count from the first byte of ``image``; :func:`run_block` moves them.

    Attributes
    ----------
    setup, program, readback : the input into the scratchpads; the block, which is what counts; the results out of them.
    image : uint8[bytes], device memory, with room for the results. outputs : where those lie in it: values, their int8
    as float32, and the scales, each as panels float32[row tiles, columns, rows].
    expected : the golden results. limit_cycles, formula : multiply-accumulates over those that the array does in a
    cycle, and how that comes about.
    """

    config: CoreConfig
    sizes: Sizes
    setup: Program
    program: Program
    readback: Program
    image: NDArray[np.uint8]
    outputs: tuple[int, int, int]
    expected: Results
    limit_cycles: int
    formula: str


def build_block(
    config: CoreConfig,
    kind: Kind,
    seq: int = 64,
    d_model: int = 512,
    heads: int = 8,
    d_ff: int = 2048,
    seed: int = 0,
    parts: int = 2,
) -> Block:
    """A block with random parameters, compiled for a core.

    kind : "mha" or "ffn". parts : 2 quantises the left operand of the last product in two parts, each in scales of its
    own, so that the array works on the first one while VECTOR makes the second one. 1 has one scale per token, as a
    linear layer has by itself; then the array has to wait.

    Raises ValueError for sizes that make no block, :class:`CapacityError` for one that does not fit the core.
    """
    if min(seq, d_model, heads, d_ff) < 1 or d_model % heads:
        raise ValueError(
            f"seq = {seq}, d_model = {d_model}, heads = {heads}, d_ff = {d_ff} make no block: "
            "give counts from 1 on, and heads that divide d_model"
        )
    if parts not in (1, 2):
        raise ValueError(f"parts = {parts}: a left operand is quantised in 1 or 2 parts")
    sizes = Sizes(kind, seq, d_model, heads, d_ff, _parts(config, kind, seq, d_model, heads, d_ff, parts))
    parameters = random_parameters(sizes, seed)
    image = Image()
    builder = (MultiHead if kind == "mha" else FeedForward)(config, sizes, parameters, image)
    builder.emit(parameters)
    places = builder.places
    setup = _setup(config, parameters, places, image)
    readback, outputs = _readback(config, sizes, places, image)
    limit = -(-sizes.macs // config.macs_per_cycle)
    formula = f"{sizes.macs_formula} / {config.macs_per_cycle} = {limit:,}"
    golden = expected(sizes, parameters)
    return Block(config, sizes, setup, builder.program, readback, image.bytes(), outputs, golden, limit, formula)


def _parts(
    config: CoreConfig, kind: Kind, seq: int, d_model: int, heads: int, d_ff: int, parts: int
) -> tuple[int, ...]:
    """Features of each part: whole heads, or whole chunks."""
    width = d_model if kind == "mha" else d_ff
    if kind == "mha":
        group = 2 if seq <= config.rows and heads % 2 == 0 else 1
        last = group * d_model // heads
    else:
        last = max(1, width // CHUNK_COLUMNS // 4) * CHUNK_COLUMNS
    if parts == 1 or last >= width:
        return (width,)
    # The last chunk may be narrower than the others.
    first = (width - last) // CHUNK_COLUMNS * CHUNK_COLUMNS if kind == "ffn" else width - last
    return (first, width - first) if first else (width,)


def run_block(device: Device, block: Block) -> tuple[Counters, bool]:
    """Run a block; returns the counters of its counted program, and whether every bit is the golden one."""
    counters, results = execute(device, block)
    golden = block.expected
    pairs = (results.values, golden.values), (results.q, golden.q), (results.s, golden.s)
    return counters, all(a.tobytes() == b.tobytes() for a, b in pairs)


def execute(device: Device, block: Block) -> tuple[Counters, Results]:
    """Run a block; returns the counters of its counted program, and what it left."""
    buffer = device.allocate(block.image.size)
    try:
        buffer.write(block.image)
        device.run(_moved(block.setup, buffer.address))
        counters = device.run(_moved(block.program, buffer.address))
        device.run(_moved(block.readback, buffer.address))
        results = _results(block, buffer.data)
    finally:
        device.free(buffer)
    return counters, results


def _moved(program: Program, base: int) -> Program:
    """The program with its addresses counted from ``base``."""
    instructions = tuple(
        i.replace(address=i.address + base) if i.type in (LOAD, STORE) else i for i in program.instructions
    )
    return Program(program.config_crc, instructions, program.operands)


def _results(block: Block, memory: NDArray[np.uint8]) -> Results:
    """What :attr:`Block.readback` stored."""
    rows = block.config.rows
    tiles = panel_count(block.sizes.seq, rows)

    def panels(start: int, columns: int) -> NDArray[np.generic]:
        raw = memory[start : start + 4 * tiles * columns * rows].view(np.float32)
        return from_panels(raw.reshape(tiles, columns, rows), block.sizes.seq)

    values, q, s = map(panels, block.outputs, (block.sizes.d_model, block.sizes.d_model, 1))
    return Results(values.astype(np.float32), q.astype(np.int8), s[:, 0].astype(np.float32))


def _setup(config: CoreConfig, parameters: Parameters, places: Places, image: Image) -> Program:
    """The input into the scratchpads: int8, its scales, and the residual."""
    builder = ProgramBuilder(config)
    rows = config.rows
    for memory, values, local in (
        (Memory.ACTIVATION, to_panels(parameters.q, rows), places.x.start),
        (Memory.PARAMETER, to_panels(parameters.s[:, None], rows), places.x.scales),
        (Memory.VECTOR, to_panels(parameters.residual, rows), places.residual),
    ):
        words = values.shape[0] * values.shape[1]
        builder.emit(LOAD, memory=memory, words=words, address=image.place(values), local=local)
    return builder.finish()


def _readback(config: CoreConfig, sizes: Sizes, places: Places, image: Image) -> tuple[Program, tuple[int, int, int]]:
    """The results out of the scratchpads.

    STORE reads VECTOR only. A pass copies the scales there; the int8 result goes through the array, as the left operand
    of a product with the identity.
    """
    builder = ProgramBuilder(config)
    rows, n = config.rows, sizes.d_model
    tiles = panel_count(sizes.seq, rows)
    values, quantised, scales = (image.place(np.zeros((tiles * c, rows), np.float32)) for c in (n, n, 1))

    def store(local: int, words: int, address: int) -> None:
        builder.emit(STORE, memory=Memory.VECTOR, words=words, address=address, local=local)

    store(places.residual, tiles * n, values)
    # The values are stored: their words are free.
    to = {"destination": Destination.VECTOR, "to": places.residual}
    builder.emit(LOAD, memory=Memory.WEIGHT, words=rows, address=image.place(np.eye(rows, dtype=np.int8)))
    for tile in range(tiles):
        for first in range(0, n, rows):
            columns = min(rows, n - first)
            builder.emit(MATRIX, depth=columns, a=places.result + tile * n + first)
            fields = to | {"to": places.residual + tile * n + first}
            builder.emit(VECTOR, source=Source.ACCUMULATOR, columns=columns, **fields)
    store(places.residual, tiles * n, quantised)
    builder.emit(VECTOR, source=Source.PARAMETER, x=places.result_scales, columns=tiles, **to)
    store(places.residual, tiles, scales)
    return builder.finish(), (values, quantised, scales)
