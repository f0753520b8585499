"""Block masks: from a file, or by a pattern that others have published."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lockstep.compiler.block_mask import check_mask, dense_mask

from .measure import BenchError

BlockMask = NDArray[np.bool_]
#: What ``--pattern`` can be, for messages.
PATTERNS = "causal, window:W, sinks:S+window:W with W and S in blocks, and random:DENSITY from 0 to 1"


def read_mask(file: Path, heads: int | None, blocks: int | None) -> BlockMask:
    """bool[heads, query blocks, key blocks] of a file of NumPy; raises :class:`BenchError`, also where its sizes are
    not those that were asked for, and :class:`BlockMaskError` for what is no mask.
    """
    try:
        mask = np.load(file, allow_pickle=False)
    except OSError as error:
        raise BenchError(f"{file} cannot be read: {error.strerror or error}; give a file of NumPy") from None
    except (ValueError, EOFError) as error:
        # NumPy takes for pickled objects what it does not know, and says how to load them unsafely.
        why = "" if "pickle" in str(error) else f": {error}"
        raise BenchError(f"{file} is no array of NumPy{why}; write it with numpy.save, as bool") from None
    if not isinstance(mask, np.ndarray):
        raise BenchError(f"{file} holds several arrays; write one with numpy.save")
    check_mask(mask)
    for name, option, asked, found in (
        ("heads", "--heads", heads, mask.shape[0]),
        ("blocks of tokens", "--seq and --block", blocks, mask.shape[1]),
    ):
        if asked is not None and asked != found:
            raise BenchError(
                f"{file} has {found} {name}, {option} ask for {asked}; leave them out, or give another mask"
            )
    return mask


def pattern_mask(pattern: str, heads: int, blocks: int, causal: bool, seed: int) -> BlockMask:
    """bool[heads, blocks, blocks] of a pattern; raises :class:`BenchError` for one that there is not.

    ``causal`` keeps the diagonal and all before it, ``window:W`` the diagonal and the W - 1 blocks before it (sliding
    windows; without ``causal`` also those behind it), ``sinks:S`` the first S blocks of
    keys too (StreamingLLM, https://arxiv.org/abs/2309.17453). ``random:DENSITY`` draws the blocks of every head by
    itself; the diagonal is kept, and is part of the density.
    """
    whole = dense_mask(heads, blocks, causal)
    if pattern == "causal":
        return whole & np.tril(np.ones((blocks, blocks), np.bool_))
    query, key = np.arange(blocks)[:, None], np.arange(blocks)
    if found := re.fullmatch(r"(?:sinks:(\d+)\+)?window:(\d+)", pattern):
        sinks, window = (int(text or 0) for text in found.groups())
        if window < 1:
            raise BenchError(f"--pattern {pattern} keeps no diagonal; give a window of at least 1 block")
        near = (key > query - window) & (causal | (key < query + window))
        return whole & (near | (key < sinks))
    if found := re.fullmatch(r"random:(\d*\.?\d+)", pattern):
        return _random(whole, float(found[1]), seed)
    raise BenchError(f"'{pattern}' is no pattern; there are {PATTERNS}")


def _random(whole: BlockMask, density: float, seed: int) -> BlockMask:
    """The diagonal, and of the other blocks as many, of all heads together, as the density leaves."""
    heads, blocks, _ = whole.shape
    diagonal = np.repeat(np.eye(blocks, dtype=np.bool_)[None], heads, axis=0)
    wanted = round(density * int(whole.sum()))
    least = heads * blocks
    if not least <= wanted <= int(whole.sum()):
        raise BenchError(
            f"the diagonal alone is a density of {least / int(whole.sum()):.3f} of {blocks} blocks, and all are "
            f"1; give --pattern random:DENSITY between them, not {density}"
        )
    rng = np.random.default_rng(seed)
    others = np.flatnonzero(whole & ~diagonal)
    # Heads differ: the share of each is drawn first, then its blocks.
    weight = np.repeat(rng.uniform(0.25, 1.75, heads), blocks * blocks)[others]
    order = np.argsort(rng.exponential(size=len(others)) / weight)
    mask = diagonal.copy()
    mask.reshape(-1)[others[order[: wanted - least]]] = True
    return mask
