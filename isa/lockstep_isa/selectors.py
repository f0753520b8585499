"""Which keys a query attends to, chosen while the model runs by a look at all of them that costs less than attention.

A :class:`Selector` says it for each query and head. What is kept is then met as if nothing else were there: kept keys
stand beside each other, in the order of their positions. A row's choice hangs on that row alone, so a token has the
same bits in a prompt and by itself.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lockstep_isa.attention import Visible, attention_cached, check_tile, score_factor, scores
from lockstep_isa.numerics import F32, add, clamp_score, exp2_parts, mul, recip, relu, rowsum, scale2
from lockstep_isa.quantisation import I8, matmul_int, quantise_rows
from lockstep_isa.sketch import POOL, sketch_rows

#: What blocks' scores are raised by; see :class:`Blocks`.
LIFT = np.float32(512)


@dataclass(frozen=True)
class Looked:
    """What a selector may look at: one head's queries and keys.

    Attributes
    ----------
    q8, sq : int8[M, d] and float32[M].  k8, sk : int8[n, d] and float32[n].
    seen : bool[M, n], the keys that each query may see.
    factor : what turns ``q . k`` into exponents of two, float32.
    """

    q8: I8
    sq: F32
    k8: I8
    sk: F32
    seen: Visible
    factor: np.float32

    def scores(self, q: I8, k: I8) -> F32:
        """Exponents of two from other integers of the same scales: float32[M, n], -inf where a key is not seen."""
        z = scores(q, mul(self.sq, self.factor), k, self.sk)
        return np.where(self.seen, clamp_score(z), np.float32(-np.inf))


class Selector(Protocol):
    """Chooses keys.

    ``select`` gets the query heads that share keys, one or more, and returns bool[M, n] for each: a part of ``seen``
    with at least one key in each row that sees any.
    """

    def select(self, heads: Sequence[Looked], /) -> list[Visible]: ...


class ForEachHead(ABC):
    """Query heads that share keys choose each for themselves."""

    def select(self, heads: Sequence[Looked], /) -> list[Visible]:
        return [self.choose(looked) for looked in heads]

    @abstractmethod
    def choose(self, looked: Looked) -> Visible:
        """What one head keeps."""


def coarse(values: I8, bits: int, group: int) -> I8:
    """The same in fewer levels: those of a group along the last axis are multiples of an integer, at most
    ``2^bits - 1`` of them, inside +-127.
    """
    most = (1 << bits - 1) - 1
    rows, depth = values.shape
    wide = values.astype(np.int32)
    padded = np.pad(wide, ((0, 0), (0, -depth % group))).reshape(rows, -1, group)
    multiplier = np.maximum(1, -(-np.abs(padded).max(axis=2, keepdims=True) // most))
    # Halves go away from zero.
    levels = np.sign(padded) * ((2 * np.abs(padded) + multiplier) // (2 * multiplier))
    limit = 127 // multiplier
    return (levels.clip(-limit, limit) * multiplier).reshape(rows, -1)[:, :depth].astype(np.int8)


def greatest(values: F32, count: int) -> Visible:
    """The ``count`` greatest values of each row, of equal ones the first; never one that is -inf."""
    order = np.argsort(-values, axis=1, kind="stable")[:, :count]
    kept = np.zeros(values.shape, np.bool_)
    np.put_along_axis(kept, order, True, axis=1)
    return kept & (values > -np.inf)


def block_scores(looked: Looked, block: int) -> F32:
    """The best score of each block's rows of the sketch, lifted by :data:`LIFT`: float32[M, blocks]."""
    rows, scales = sketch_rows(looked.k8, looked.sk)
    z = relu(add(scores(looked.q8, mul(looked.sq, looked.factor), rows, scales), LIFT))
    whole = np.pad(z, ((0, 0), (0, -z.shape[1] % (block // POOL))))
    return whole.reshape(len(z), -1, block // POOL).max(axis=2)


@dataclass(frozen=True)
class Blocks:
    """The blocks of keys that hold the best rows of the :mod:`sketch <lockstep_isa.sketch>`: what a core selects by
    itself. Query heads that share keys choose together, by the best score of any of them.

    Attributes
    ----------
    keys : kept, a multiple of ``block``. block : a multiple of 4 keys. first, last : blocks that are always kept, those
    of the sinks and the query's own.

    A block of whose keys a query sees none is never kept. Scores are lifted by :data:`LIFT` and held at 0, which makes
    the greatest magnitude of a block its best score.
    """

    keys: int
    block: int = 16
    first: int = 1
    last: int = 1

    def __post_init__(self) -> None:
        if self.block < 1 or self.block % POOL:
            raise ValueError(
                f"a block of {self.block} keys is no multiple of the {POOL} that share a row of the sketch"
            )
        if self.keys % self.block or self.keys < (self.first + self.last) * self.block:
            raise ValueError(
                f"{self.keys} keys are no whole blocks of {self.block}, or fewer than the {self.first + self.last} "
                "blocks that are always kept"
            )

    def select(self, heads: Sequence[Looked], /) -> list[Visible]:
        keys, seen = len(heads[0].k8), heads[0].seen
        best = np.max([block_scores(looked, self.block) for looked in heads], axis=0)
        count = -(-keys // self.block)
        padded = np.pad(seen, ((0, 0), (0, -keys % self.block)))
        holds = padded.reshape(len(seen), count, self.block).any(axis=2)
        number = np.arange(count)
        own = np.where(holds, number, 0).max(axis=1)
        forced = (number < self.first) | (number > own[:, None] - self.last)
        best = np.where(holds, np.where(forced, np.float32(np.inf), best), np.float32(-np.inf))
        kept = np.repeat(greatest(best, self.keys // self.block), self.block, axis=1)[:, :keys] & seen
        return [kept] * len(heads)


@dataclass(frozen=True)
class Sinks(ForEachHead):
    """The first ``first`` keys and the last ``last`` (StreamingLLM, Xiao et al., 2023, arXiv:2309.17453)."""

    first: int
    last: int

    def choose(self, looked: Looked) -> Visible:
        number = np.cumsum(looked.seen, axis=1)
        return looked.seen & ((number <= self.first) | (number > number[:, -1:] - self.last))


@dataclass(frozen=True)
class Greedy(ForEachHead):
    """Candidates from the ``rounds`` greatest and least products of single channels (A3, Ham et al., 2020,
    arXiv:2002.10941): a key whose products among them have a positive sum.
    """

    rounds: int

    def choose(self, looked: Looked) -> Visible:
        kept = np.zeros(looked.seen.shape, np.bool_)
        for row, seen in enumerate(looked.seen):
            keys = np.flatnonzero(seen)
            if not len(keys):
                continue
            products = looked.q8[row].astype(np.float64) * looked.k8[keys] * looked.sk[keys, None].astype(np.float64)
            flat = products.ravel()
            order = np.argsort(flat, kind="stable")
            few = min(self.rounds, len(flat))
            # Only what pulls in its own direction counts.
            picked = np.concatenate([order[-few:][flat[order[-few:]] > 0], order[:few][flat[order[:few]] < 0]])
            sums = np.bincount(picked // products.shape[1], flat[picked], len(keys))
            chosen = sums > 0
            chosen[-1] = True
            kept[row, keys[chosen]] = True
        return kept


@dataclass(frozen=True)
class SignHashes(ForEachHead):
    """Keys whose estimated score comes within ``margin`` exponents of two of the best: lengths are exact, cosines are
    estimated from the signs of ``bits`` random projections (ELSA, Ham et al., ISCA 2021).
    """

    margin: float
    bits: int = 64
    seed: int = 0

    def choose(self, looked: Looked) -> Visible:
        depth = looked.q8.shape[1]
        planes = _planes(self.bits, depth, self.seed)
        hashes = [np.where(matmul_int(x, planes.T) >= 0, 1, -1) for x in (looked.q8, looked.k8)]
        differing = (self.bits - hashes[0] @ hashes[1].T) // 2
        cosines = np.array([math.cos(math.pi * n / self.bits) for n in range(self.bits + 1)], np.float32)
        lengths = [np.sqrt((x.astype(np.float64) ** 2).sum(axis=1)).astype(np.float32) for x in (looked.q8, looked.k8)]
        size = mul(mul(lengths[0], mul(looked.sq, looked.factor))[:, None], mul(lengths[1], looked.sk))
        return _near(mul(cosines[differing], size), looked.seen, self.margin)


@dataclass(frozen=True)
class Predicted(ForEachHead):
    """Keys whose probability, from ``bits`` of queries and keys, is at least ``threshold`` (Sanger, Lu et al., MICRO
    2021).
    """

    threshold: float
    bits: int = 4

    def choose(self, looked: Looked) -> Visible:
        depth = looked.q8.shape[1]
        scores = looked.scores(coarse(looked.q8, self.bits, depth), coarse(looked.k8, self.bits, depth))
        m, n = exp2_parts(np.where(looked.seen, scores, np.float32(0)))
        peak = np.where(looked.seen, n, np.int32(-32000)).max(axis=1, initial=-32000)
        e = np.where(looked.seen, scale2(m, n - peak[:, None]), np.float32(0))
        shares = mul(e, recip(rowsum(e))[:, None])
        return _with_best(shares >= np.float32(self.threshold), scores, looked.seen)


@dataclass(frozen=True)
class Rounds(ForEachHead):
    """Keys that survive rounds of more and more bits (Energon, Zhou et al., 2021, arXiv:2110.09310): in each,
    those whose score is at least ``alpha * greatest + (1 - alpha) * mean`` of what is left, or with a negative
    ``alpha`` ``-alpha * least + (1 + alpha) * mean``.
    """

    rounds: tuple[tuple[int, float], ...] = ((2, 0.0), (4, 0.0))

    def choose(self, looked: Looked) -> Visible:
        kept, depth = looked.seen, looked.q8.shape[1]
        scores = np.zeros(kept.shape, np.float32)
        for bits, alpha in self.rounds:
            scores = looked.scores(looked.q8, coarse(looked.k8, bits, depth)).astype(np.float64)
            count = np.maximum(1, kept.sum(axis=1, keepdims=True))
            mean = np.where(kept, scores, 0).sum(axis=1, keepdims=True) / count
            most = np.where(kept, scores, -np.inf).max(axis=1, keepdims=True, initial=-np.inf)
            least = np.where(kept, scores, np.inf).min(axis=1, keepdims=True, initial=np.inf)
            with np.errstate(invalid="ignore"):
                border = np.where(alpha >= 0, alpha * most, -alpha * least) + (1 - abs(alpha)) * mean
            kept = _with_best(kept & (scores >= border), np.where(kept, scores, -np.inf), kept)
        return kept


@functools.cache
def _planes(bits: int, depth: int, seed: int) -> npt.NDArray[np.int64]:
    """int64[bits, depth] of -1 and 1."""
    return np.random.default_rng(seed).integers(0, 2, (bits, depth)) * 2 - 1


def _near(scores: F32, seen: Visible, margin: float) -> Visible:
    hidden = np.where(seen, scores, np.float32(-np.inf))
    best = hidden.max(axis=1, keepdims=True, initial=-np.inf)
    return seen & (hidden >= add(np.where(np.isfinite(best), best, np.float32(0)), np.float32(-margin)))


def _with_best(kept: Visible, scores: npt.NDArray[np.floating], seen: Visible) -> Visible:
    """``kept``, and the seen key of the greatest score where nothing was."""
    best = np.argmax(np.where(seen, scores, -np.inf), axis=1)
    result = kept & seen
    rows = np.flatnonzero(~result.any(axis=1) & seen.any(axis=1))
    result[rows, best[rows]] = True
    return result


def attention_selected(
    q: npt.ArrayLike,
    seen: Visible,
    k8: I8,
    sk: npt.ArrayLike,
    v8: I8,
    sv: npt.ArrayLike,
    selector: Selector,
    *,
    tile: int,
    scale: float | None = None,
    attend: Callable[..., F32] = attention_cached,
) -> tuple[F32, float]:
    """Attention of each query to the keys that ``selector`` keeps for it, head by head, and the share that it keeps.

    Parameters
    ----------
    q : float32[M, heads * d].  seen : bool[M, n].  k8, sk, v8, sv, scale : as for
        :func:`lockstep_isa.attention.attention_cached`.
    tile : keys per tile, counted along those that are kept.
    attend : computes attention to what is kept, with the bits of :func:`lockstep_isa.attention.attention_cached`.

    Returns float32[M, heads * d], and kept over seen keys.
    """
    q, (sk, sv) = np.asarray(q, np.float32), (np.asarray(s, np.float32).reshape(len(k8), -1) for s in (sk, sv))
    check_tile(tile, len(k8))
    kv_heads = sk.shape[1]
    d = k8.shape[1] // kv_heads
    heads = q.shape[1] // d
    factor = score_factor(scale, d)
    out, count, group = np.empty((len(q), heads, d), np.float32), 0, heads // kv_heads
    for kv_head in range(kv_heads):
        at = slice(kv_head * d, (kv_head + 1) * d)
        own_heads = range(kv_head * group, (kv_head + 1) * group)
        parts = [q[:, head * d : (head + 1) * d] for head in own_heads]
        looked = [Looked(*quantise_rows(part), k8[:, at], sk[:, kv_head], seen, factor) for part in parts]
        for head, part, kept in zip(own_heads, parts, selector.select(looked), strict=True):
            count += int(kept.sum())
            for row, chosen in enumerate(kept):
                own = np.flatnonzero(chosen)
                keys = np.ascontiguousarray(k8[own, at]), sk[own, kv_head]
                values = np.ascontiguousarray(v8[own, at]), sv[own, kv_head]
                last = np.array([len(own) - 1])
                out[row, head] = attend(part[row : row + 1], last, *keys, *values, tile=tile, scale=scale)[0]
    return out.reshape(len(q), -1), count / max(1, heads * int(seen.sum()))
