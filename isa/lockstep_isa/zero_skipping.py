"""What a product leaves out because its activations are zero.

A *chunk* is R consecutive words of ACTIVATION that begin at a multiple of R. The core knows of each word whether it was
written as zeros; a chunk is zero if all of its words are. After Jang et al., MnnFast, ISCA 2019.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .config import CoreConfig
from .instructions import Instruction
from .program import is_packed

#: Chunks of which the core knows ahead of the one that it multiplies whether they follow.
CHUNKS_AHEAD = 4


def may_skip(config: CoreConfig, i: Instruction) -> bool:
    """Whether a resolved MATRIX instruction looks for chunks that are zero.

    Its weights are dense int8, its tiles have two chunks or more, and every tile begins with a chunk.
    """
    rows = config.rows
    aligned = (i.a | i.a_outer | i.a_inner) % rows == 0
    return config.zero_skipping and not is_packed(i) and i.depth >= 2 * rows and aligned


def skipped_chunks(config: CoreConfig, i: Instruction, zero: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which chunks a resolved MATRIX instruction passes over: bool[tiles, chunks], in the order of its tiles.

    zero : bool[words], which words of ACTIVATION were written as zeros. A tile has ``depth // R`` chunks; it is R times
    those that are left and ``depth % R`` steps long. The first chunk of a tile is always multiplied: a tile begins
    without a look at it, and no tile is empty.
    """
    rows, chunks = config.rows, i.depth // config.rows
    skipped = np.zeros((i.outer * i.inner, chunks), np.bool_)
    if may_skip(config, i):
        starts = [(i.a + o * i.a_outer + n * i.a_inner) % (1 << 16) for o in range(i.outer) for n in range(i.inner)]
        for tile, start in enumerate(starts):
            skipped[tile] = zero[start : start + chunks * rows].reshape(chunks, rows).all(axis=1)
        skipped[:, 0] = False
    return skipped
