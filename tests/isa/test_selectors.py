"""Selectors: what they keep, held to a look at the exact scores, and attention to it."""

from __future__ import annotations

import numpy as np
import pytest
from lockstep_isa.attention import attention, attention_cached, visible
from lockstep_isa.quantisation import quantise_rows
from lockstep_isa.selectors import (
    Blocks,
    Greedy,
    Looked,
    Predicted,
    Rounds,
    Selector,
    SignHashes,
    Sinks,
    attention_selected,
    greatest,
)
from lockstep_isa.sketch import key_sketch, sketch_rows
from lockstep_isa.weights import pack, stream

KEYS, DEPTH = 256, 32
ALL = np.float32(1)
SELECTORS: dict[str, Selector] = {
    "blocks": Blocks(64),
    "sinks": Sinks(4, 40),
    "greedy": Greedy(400),
    "hashes": SignHashes(6.0, 128),
    "predicted": Predicted(0.004),
    "rounds": Rounds(),
}


def cluster(seed: int = 0, rows: int = 12) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries, keys and values; each query is like a few keys and unlike the others."""
    rng = np.random.default_rng(seed)
    topics = rng.normal(size=(8, DEPTH))
    topic = np.repeat(rng.integers(0, 8, KEYS // 16), 16)
    k = topics[topic] + 0.3 * rng.normal(size=(KEYS, DEPTH))
    q = 2.0 * topics[rng.integers(0, 8, rows)] + 0.3 * rng.normal(size=(rows, DEPTH))
    return q.astype(np.float32), k.astype(np.float32), rng.normal(size=(KEYS, DEPTH)).astype(np.float32)


def looked(q: np.ndarray, k: np.ndarray, seen: np.ndarray) -> Looked:
    (q8, sq), (k8, sk) = quantise_rows(q), quantise_rows(k)
    return Looked(q8, sq, k8, sk, seen, np.float32(1.4427 / np.sqrt(DEPTH)))


def probabilities(q: np.ndarray, k: np.ndarray, seen: np.ndarray) -> np.ndarray:
    scores = q.astype(float) @ k.T.astype(float) / np.sqrt(DEPTH)
    weights = np.where(seen, np.exp(scores - np.where(seen, scores, -np.inf).max(axis=1, keepdims=True)), 0)
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("name", SELECTORS)
def test_selectors_keep_a_part_of_what_is_seen_and_never_nothing(name: str) -> None:
    q, k, _ = cluster()
    for seen in (visible(np.arange(len(q)), KEYS, causal=True), visible(np.arange(KEYS - 12, KEYS), KEYS, causal=True)):
        (kept,) = SELECTORS[name].select([looked(q, k, seen)])
        assert not (kept & ~seen).any()
        assert kept.any(axis=1).all()


@pytest.mark.parametrize("name", [name for name in SELECTORS if name != "sinks"])
def test_selectors_keep_most_of_the_probability_in_few_keys(name: str) -> None:
    q, k, _ = cluster()
    seen = visible(np.arange(KEYS - len(q), KEYS), KEYS, causal=True)
    (kept,) = SELECTORS[name].select([looked(q, k, seen)])
    share, mass = kept.sum() / seen.sum(), (probabilities(q, k, seen) * kept).sum(axis=1).mean()
    print(f"{name}: {share:.2f} of the keys have {mass:.3f} of the probability")
    assert share < 0.5
    assert mass > 0.75
    # As many keys by chance would have this much.
    assert mass > share + 0.3


def test_a_row_is_chosen_by_itself() -> None:
    q, k, _ = cluster()
    seen = visible(np.arange(KEYS - len(q), KEYS), KEYS, causal=True)
    for selector in SELECTORS.values():
        (together,) = selector.select([looked(q, k, seen)])
        for row in (0, 5, 11):
            one = slice(row, row + 1)
            assert np.array_equal(selector.select([looked(q[one], k, seen[one])])[0], together[one])


def test_blocks_are_those_of_the_best_rows_with_the_first_and_the_own_one() -> None:
    q, k, _ = cluster(3, rows=4)
    seen = visible(np.array([250, 100, 40, 5]), KEYS, causal=True)
    (q8, _), (k8, sk) = quantise_rows(q), quantise_rows(k)
    (kept,) = Blocks(64).select([looked(q, k, seen)])
    rows, scales = sketch_rows(k8, sk)
    exact = np.repeat((q8.astype(int) @ rows.T.astype(int)) * scales.astype(float), 4, axis=1)
    for row, last in enumerate((250, 100, 40, 5)):
        blocks = sorted({int(key) // 16 for key in np.flatnonzero(kept[row])})
        assert len(blocks) == min(4, last // 16 + 1)
        assert {0, last // 16} <= set(blocks)
        best = exact[row].reshape(-1, 16).max(axis=1)
        others = [b for b in range(last // 16 + 1) if b not in blocks]
        assert all(best[b] <= min(best[c] for c in blocks if c not in (0, last // 16)) for b in others)
        assert kept[row].sum() == sum(min(16, last + 1 - 16 * b) for b in blocks)


def test_heads_that_share_keys_choose_blocks_together() -> None:
    q, k, _ = cluster(5, rows=6)
    seen = visible(np.arange(KEYS - 6, KEYS), KEYS, causal=True)
    heads = [looked(rows, k, seen) for rows in (q, q[::-1], 0.01 * q)]
    own = [Blocks(64).select([head])[0] for head in heads]
    together = Blocks(64).select(heads)
    assert all(np.array_equal(kept, together[0]) for kept in together)
    assert not np.array_equal(own[0], own[1]), "any head would have done"
    # The third one's scores are small beside those of the others: it has no say.
    assert np.array_equal(Blocks(64).select(heads[:2])[0], together[0])
    for row in range(6):
        assert len({int(key) // 16 for key in np.flatnonzero(together[0][row])}) == 4
        assert (together[0][row] <= own[0][row] | own[1][row]).all()


def test_a_sketch_is_near_the_mean_of_four_keys_and_what_packed_weights_are_to_the_array() -> None:
    rng = np.random.default_rng(1)
    keys = rng.integers(-127, 128, (62, 64), np.int8)
    keys[:4], keys[4:8, :32] = 127, 1
    scales = rng.uniform(0.1, 0.2, 62).astype(np.float32)
    levels, multipliers, greatest_scales = key_sketch(keys, scales)
    padded = np.pad(keys.astype(float), ((0, 2), (0, 0))).reshape(16, 4, 64)
    assert greatest_scales.tolist() == np.pad(scales, (0, 2)).reshape(16, 4).max(axis=1).tolist()
    found, _ = sketch_rows(keys, scales)
    step = np.repeat(multipliers.astype(float), 32, axis=1)
    assert multipliers.min() == 1
    assert multipliers.max() == 17
    assert (np.abs(found - padded.mean(axis=1)) <= step / 2 + 1e-6)[1:].all()
    assert (found[0] == 7 * 17).all()
    assert (found[1, :32] == 1).all()
    assert np.array_equal(stream(pack(levels, 16, multipliers)[0], 64, 32), found.T)


def test_the_greatest_values_come_first_and_hidden_ones_never() -> None:
    values = np.array([[1, 3, 3, -np.inf, 2], [-np.inf, -np.inf, 0, -np.inf, -np.inf]], np.float32)
    assert greatest(values, 2).tolist() == [[False, True, True, False, False], [False, False, True, False, False]]
    assert greatest(values, 9).sum() == 5


def test_attention_to_what_is_kept() -> None:
    q, k, v = cluster()
    (k8, sk), (v8, sv) = quantise_rows(k), quantise_rows(v)
    seen = visible(np.arange(KEYS - len(q), KEYS), KEYS, causal=True)
    found, share = attention_selected(q, seen, k8, sk, v8, sv, Blocks(64), tile=512)
    (kept,) = Blocks(64).select([looked(q, k, seen)])
    assert share == kept.sum() / seen.sum()
    weights = np.where(kept, probabilities(q, k, kept), 0)
    assert np.abs(found - weights @ v).max() < 0.03
    # With keys beside each other a mask does the same, but for the order of sums.
    masked = attention(q, k, v, tile=512, mask=kept)
    assert np.abs(found - masked).max() < 1e-5


def test_keeping_everything_is_attention() -> None:
    q, k, v = cluster()
    (k8, sk), (v8, sv) = quantise_rows(k), quantise_rows(v)
    positions = np.arange(KEYS - len(q), KEYS)
    seen = visible(positions, KEYS, causal=True)
    wanted = attention_cached(q, positions, k8, sk[:, None], v8, sv[:, None], tile=64)
    found, share = attention_selected(q, seen, k8, sk, v8, sv, Sinks(KEYS, 1), tile=64)
    assert share == 1
    assert np.array_equal(found.view(np.uint32), wanted.view(np.uint32))


def test_blocks_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="40 keys are no whole blocks of 16"):
        Blocks(40)
    with pytest.raises(ValueError, match="fewer than the 2 blocks"):
        Blocks(16)
