"""Tiles of queries that choose blocks together: which ones, how many, and the attention to them."""

from __future__ import annotations

import numpy as np
import pytest
from lockstep_isa.attention import attention, score_factor, visible
from lockstep_isa.prefill_selection import TileBlocks
from lockstep_isa.quantisation import quantise_rows
from lockstep_isa.selectors import Looked, attention_selected
from lockstep_isa.sketch import sketch_rows

TOKENS, DEPTH = 192, 32


def values(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries, keys and values of one head; keys of a block are alike, and neighbouring queries look for one block."""
    rng = np.random.default_rng(seed)
    topics = np.repeat(rng.normal(size=(TOKENS // 16, DEPTH)), 16, axis=0)
    k = topics + 0.4 * rng.normal(size=(TOKENS, DEPTH))
    q = 1.5 * topics[np.repeat(16 * rng.permutation(TOKENS // 16), 16)] + 0.4 * rng.normal(size=(TOKENS, DEPTH))
    return q.astype(np.float32), k.astype(np.float32), rng.normal(size=(TOKENS, DEPTH)).astype(np.float32)


def looked(q: np.ndarray, k: np.ndarray, causal: bool) -> Looked:
    seen = visible(np.arange(len(q)), len(k), causal)
    return Looked(*quantise_rows(q), *quantise_rows(k), seen, score_factor(None, DEPTH))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries", "density"), [(16, 0.3), (32, 0.4), (48, 0.6)])
def test_a_tile_keeps_the_blocks_with_the_best_rows_of_the_sketch(queries: int, density: float, causal: bool) -> None:
    rule, (q, k, _) = TileBlocks(density, queries), values()
    tiles = rule.tiles(looked(q, k, causal))
    assert len(tiles) == TOKENS // queries
    rows, scales = sketch_rows(*quantise_rows(k))
    q8, sq = quantise_rows(q)
    scores = (q8.astype(float) @ (rows * scales.astype(float)[:, None]).T) * sq[:, None]
    for tile, found in enumerate(tiles):
        seen = (tile + 1) * queries // 16 if causal else TOKENS // 16
        own = scores[tile * queries : (tile + 1) * queries, : 4 * seen]
        best = own.max(axis=0).reshape(seen, 4).max(axis=1)
        best[0] = best[seen - queries // 16 :] = np.inf
        wanted = sorted(np.argsort(-best, kind="stable")[: rule.kept(seen)])
        assert found.tolist() == wanted
    chosen = {tuple(found) for found in tiles if len(found) > rule.first + rule.last}
    assert len(chosen) > 1, "all tiles chose alike: the scores decided nothing"


def test_as_many_as_the_density_says_in_decimal() -> None:
    assert [TileBlocks(0.1).kept(n) for n in (1, 2, 20, 21, 30, 31)] == [1, 2, 2, 3, 3, 4]
    assert [TileBlocks(0.2, 32).kept(n) for n in (2, 4, 15, 16, 64)] == [2, 3, 3, 4, 13]
    # 0.7 x 10 is more than 7 in binary fractions.
    assert TileBlocks(0.7).kept(10) == 7
    assert TileBlocks(1.0).kept(13) == 13
    assert TileBlocks(1e-6, 64).kept(100) == 5


def test_queries_of_a_tile_choose_together_and_others_have_no_say() -> None:
    rule, (q, k, _) = TileBlocks(0.3, 32), values()
    before = rule.choose(looked(q, k, causal=False))
    assert (before.reshape(-1, 32, TOKENS) == before.reshape(-1, 32, TOKENS)[:, :1]).all()
    # The last query of the second tile looks for what nobody there has looked for.
    missing = next(block for block in range(TOKENS // 16) if not before[32, block * 16])
    q[63] = 8 * k[missing * 16 : missing * 16 + 16].mean(axis=0)
    after = rule.choose(looked(q, k, causal=False))
    assert after[32:64, missing * 16].all()
    changed = (before != after).any(axis=1)
    assert changed[32:64].all()
    assert not changed[:32].any()
    assert not changed[64:].any()


def test_attention_meets_the_kept_keys_as_if_there_were_no_others() -> None:
    rule, (q, k, v) = TileBlocks(0.3, 32), values()
    seen = visible(np.arange(TOKENS), TOKENS, causal=True)
    (k8, sk), (v8, sv) = quantise_rows(k), quantise_rows(v)
    out, share = attention_selected(q, seen, k8, sk, v8, sv, rule, tile=TOKENS)
    assert 0.3 < share < 0.6
    for tile, blocks in enumerate(rule.tiles(looked(q, k, causal=True))):
        rows = slice(32 * tile, 32 * tile + 32)
        keys = np.concatenate([np.arange(16 * block, 16 * block + 16) for block in blocks])
        mask = keys <= np.arange(rows.start, rows.stop)[:, None]
        expected = attention(q[rows], k[keys], v[keys], tile=len(keys), mask=mask)
        assert (out[rows].view(np.uint32) == expected.view(np.uint32)).all()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((0.0,), "density of 0.0"),
        ((1.01,), "density of 1.01"),
        ((float("nan"),), "density of nan"),
        ((0.5, 24), "24 queries"),
        ((0.5, 0), "0 queries"),
        ((0.5, 30, 6), "block of 6 keys"),
    ],
)
def test_mistakes_are_named(arguments: tuple[float, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        TileBlocks(*arguments)  # type: ignore[arg-type]
