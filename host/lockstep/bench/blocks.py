"""The blocks of a transformer, from their input on chip to their result on chip; see :mod:`.resblock`."""

from __future__ import annotations

from collections.abc import Iterator

from lockstep_driver import Device

from .limits import Limit
from .measure import Bench, BenchError, Measurement, Ran
from .resblock.block import Block, build_block, execute
from .resblock.reference import Kind
from .sizes import AttentionBlockSizes, FeedForwardBlockSizes


def run(sizes: AttentionBlockSizes | FeedForwardBlockSizes, bench: Bench) -> Iterator[Measurement]:
    """One block; values, their int8 and the scales are compared."""
    kind: Kind = "ffn" if isinstance(sizes, FeedForwardBlockSizes) else "mha"
    given = {name: getattr(sizes, name) for name in ("seq", "d_model", "heads", "d_ff") if hasattr(sizes, name)}
    bench.say(f"resblock-{kind} on {bench.uri}")
    try:
        block = build_block(bench.config, kind, **given, seed=sizes.seed, parts=sizes.parts)
    except ValueError as error:
        raise BenchError(str(error)) from None
    golden = block.expected
    yield bench.measure(
        f"resblock-{kind}",
        given | {"parts": sizes.parts},
        Limit(
            block.limit_cycles,
            "multiply-accumulates / elements of the array; counted are the fetch of the program, all weights, scales, "
            "biases and tables from memory, and the block; input and result lie on chip",
            block.formula,
        ),
        lambda device: _run(device, block),
        [golden.values, golden.q, golden.s],
        memory_bytes=block.image.size,
    )


def _run(device: Device, block: Block) -> Ran:
    counters, results = execute(device, block)
    return Ran([results.values, results.q, results.s], counters)
