"""One head of decode attention over the keys that the core chooses itself: sketch, selection, gather, attention."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from cores import open_core
from lockstep_driver.builder import ProgramBuilder
from lockstep_isa.config import CoreConfig, preset
from lockstep_isa.executor import GoldenCore
from lockstep_isa.instructions import (
    LOAD,
    MATRIX,
    STORE,
    TABLE_ENTRIES,
    VECTOR,
    Destination,
    FirstMultiply,
    Function,
    Maximum,
    Memory,
    SecondAdd,
    SecondMultiply,
    Source,
    Tap,
    ThirdMultiply,
    Weights,
)
from lockstep_isa.program import Program, validate
from lockstep_isa.tables import FUNCTIONS
from lockstep_isa.weights import expand, pack

CONFIG = preset("tiny")
ROWS = CONFIG.rows
BLOCKS, KEPT, DEPTH, FEATURES = 20, 6, 32, 2 * ROWS
KEYS = BLOCKS * ROWS
#: First and last blocks that are always kept.
SINKS, LOCAL = 1, 1


@dataclass
class Head:
    """Four queries of one group, a cache of keys and values, and a sketch of the keys.

    q: int8[ROWS, DEPTH], q_scale: f32[ROWS], with log2(e) / sqrt(DEPTH). k, v, k_scale, v_scale by key.
    k4: int4 values[KEYS, DEPTH] with multiplier: uint8[KEYS, 1] and scale k4_scale.
    """

    q: np.ndarray
    q_scale: np.ndarray
    k: np.ndarray
    k_scale: np.ndarray
    v: np.ndarray
    v_scale: np.ndarray
    k4: np.ndarray
    multiplier: np.ndarray
    k4_scale: np.ndarray

    @staticmethod
    def random(seed: int) -> Head:
        rng = np.random.default_rng(seed)
        topics = rng.normal(size=(BLOCKS, DEPTH))
        keys = np.repeat(topics, ROWS, axis=0) + 0.5 * rng.normal(size=(KEYS, DEPTH))
        queries = topics[rng.permutation(BLOCKS)[:ROWS]] * 1.5 + 0.3 * rng.normal(size=(ROWS, DEPTH))
        values = rng.normal(size=(KEYS, FEATURES))

        def quantised(x: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
            scale = (np.abs(x).max(axis=1) / steps).astype(np.float32)
            return np.rint(x / scale[:, None]).astype(np.int8), scale

        (q, q_scale), (k, k_scale), (v, v_scale) = (quantised(x, 127) for x in (queries, keys, values))
        k4, k4_scale = quantised(keys, 7)
        multiplier = rng.integers(1, 4, (KEYS, 1)).astype(np.uint8)
        q_scale = (q_scale * np.log2(np.e) / np.sqrt(DEPTH)).astype(np.float32)
        return Head(q, q_scale, k, k_scale, v, v_scale, k4, multiplier, (k4_scale / multiplier[:, 0]).astype("f4"))

    def kept(self) -> np.ndarray:
        """The blocks that count, by the sketch alone."""
        sketch = expand(self.k4, self.multiplier).astype(float) * self.k4_scale[:, None]
        scores = self.q_scale[:, None] * (self.q @ sketch.T)
        best = scores.reshape(ROWS, BLOCKS, ROWS).max(axis=(0, 2))
        best[:SINKS] = best[BLOCKS - LOCAL :] = np.inf
        return np.sort(np.argsort(-best, kind="stable")[:KEPT])

    def attention(self, blocks: np.ndarray) -> np.ndarray:
        """float64[ROWS, FEATURES], over the keys of ``blocks``."""
        keys = (blocks[:, None] * ROWS + np.arange(ROWS)).reshape(-1)
        scores = self.q_scale[:, None] * (self.q.astype(float) @ (self.k[keys] * self.k_scale[keys, None]).T)
        weight = np.exp2(scores - scores.max(axis=1, keepdims=True))
        return weight / weight.sum(axis=1, keepdims=True) @ (self.v[keys] * self.v_scale[keys, None])


def image(head: Head) -> tuple[dict[str, int], np.ndarray]:
    """Where everything lies in device memory, and uint8[bytes], what lies there."""
    tables = np.zeros((2, TABLE_ENTRIES, 4), np.float32)
    for n, name in enumerate(("exp2", "recip")):
        f = FUNCTIONS[name]
        tables[n, : f.entries, :3] = np.stack([f.c0, f.c1, f.c2], axis=1)
    parts = {
        "tables": tables,
        "q": head.q.T,
        "q_scale": head.q_scale,
        "sketch": pack(head.k4, ROWS, head.multiplier),
        "sketch_scale": head.k4_scale,
        # A block of keys is words of one feature each; a block of values, words of one key, half of the features each.
        "keys": head.k.reshape(BLOCKS, ROWS, DEPTH).transpose(0, 2, 1),
        "values": head.v.reshape(BLOCKS, ROWS, 2, ROWS).transpose(0, 2, 1, 3),
        "scales": np.stack([s.reshape(BLOCKS, ROWS) for s in (head.k_scale, head.v_scale)], axis=1),
        "result": np.zeros((FEATURES, ROWS), np.float32),
    }
    at, raw = {}, bytearray()
    for name, part in parts.items():
        raw += bytes(-len(raw) % 64)
        at[name] = len(raw)
        raw += np.ascontiguousarray(part).tobytes()
    return at, np.frombuffer(bytes(raw), np.uint8).copy()


def attention_program(config: CoreConfig, at: dict[str, int]) -> Program:
    b = ProgramBuilder(config)
    word, kept = 4 * ROWS, KEPT * ROWS
    # PARAMETER words: a row statistic each, then column words.
    q_scale, best, exponent, total, peak, p_scale, per_p, per_total = 0, 10, 40, 41, 42, 43, 44, 45
    sketch_scale, k_scale, v_scale = 50, 80, 100
    sketch_words = DEPTH // 2 + 1
    k, v, scores, weights, p = 512, 1024, 0, 200, 64
    b.emit(LOAD, memory=Memory.TABLE, words=2 * TABLE_ENTRIES, address=at["tables"])
    b.emit(LOAD, memory=Memory.PARAMETER, words=1, address=at["q_scale"], local=q_scale)
    b.emit(LOAD, memory=Memory.PARAMETER, words=BLOCKS, address=at["sketch_scale"], local=sketch_scale)
    b.emit(LOAD, memory=Memory.ACTIVATION, words=DEPTH, address=at["q"])
    b.emit(LOAD, memory=Memory.WEIGHT, words=BLOCKS * sketch_words, address=at["sketch"])

    # Scores of the sketch, all made positive, so that the greatest magnitude of a block is its greatest score.
    b.emit(MATRIX, depth=DEPTH, inner=BLOCKS, w_inner=sketch_words, weights=Weights.INT4_32)
    scale = {"mul1": FirstMultiply.LANE1, "lane1": q_scale, "mul2": SecondMultiply.COLUMN0}
    accumulated = {"source": Source.ACCUMULATOR, "destination": Destination.VECTOR}
    positive = {"add2": SecondAdd.IMMEDIATE1, "immediate1": int(np.float32(512).view(np.uint32))}
    b.emit(VECTOR, columns=KEYS, column0=sketch_scale, **accumulated, **scale, **positive, function=Function.RELU)
    blocks = {"source": Source.VECTOR, "tiles": BLOCKS, "columns": ROWS, "x_stride": ROWS}
    b.emit(VECTOR, **blocks, maximum=Maximum.ABSOLUTE, max_to=best)
    select = {"select": KEPT, "select_more_lanes": ROWS - 1, "select_first": SINKS, "select_last": LOCAL}
    b.emit(VECTOR, source=Source.PARAMETER, columns=BLOCKS, x=best, **select)

    # What was kept.
    gather = {"gather": 1, "rows": KEPT}
    block = {"words": DEPTH, "stride": DEPTH * ROWS, "local": k, "local_stride": DEPTH}
    b.emit(LOAD, memory=Memory.WEIGHT, address=at["keys"], **block, **gather)
    for half in range(2):
        block = {"words": ROWS, "stride": 2 * ROWS * ROWS, "local": v + half * kept, "local_stride": ROWS}
        b.emit(LOAD, memory=Memory.WEIGHT, address=at["values"] + half * ROWS * ROWS, **block, **gather)
    for n, local in enumerate((k_scale, v_scale)):
        block = {"words": 1, "stride": 2 * word, "local": local, "local_stride": 1}
        b.emit(LOAD, memory=Memory.PARAMETER, address=at["scales"] + n * word, **block, **gather)

    # Softmax over it, in powers of two; weights as uint8 with one scale a row.
    b.emit(MATRIX, depth=DEPTH, inner=KEPT, w=k, w_inner=DEPTH)
    score = {"function": Function.SCORE, "maximum": Maximum.EXPONENT, "max_to": exponent}
    b.emit(VECTOR, columns=kept, column0=k_scale, to=scores, **accumulated, **scale, **score)
    passed = {"source": Source.VECTOR, "columns": kept}
    power = {"function": Function.EXP2, "lane0": exponent, "sum": 1, "sum_to": total}
    scaled = {"mul3": ThirdMultiply.COLUMN2, "column2": v_scale, "tap": Tap.AFTER}
    scaled |= {"maximum": Maximum.ABSOLUTE, "max_to": peak, "destination": Destination.VECTOR, "to": weights}
    b.emit(VECTOR, **passed, x=scores, **power, **scaled)
    short = {"source": Source.PARAMETER, "destination": Destination.PARAMETER}
    step = {"mul1": FirstMultiply.IMMEDIATE0, "immediate0": int(np.float32(1 / 255).view(np.uint32))}
    b.emit(VECTOR, **short, x=peak, to=p_scale, **step)
    for x, to in ((p_scale, per_p), (total, per_total)):
        b.emit(VECTOR, **short, x=x, to=to, function=Function.RECIP, table=1)
    rounded = {"mul2": SecondMultiply.LANE0, "lane0": per_p, "destination": Destination.ACTIVATION, "to": p}
    b.emit(VECTOR, **passed, x=weights, **rounded)
    b.emit(MATRIX, depth=kept, inner=2, a=p, w=v, w_inner=kept, unsigned=1)
    drained = {"mul1": FirstMultiply.LANE1, "lane1": p_scale, "mul2": SecondMultiply.LANE0, "lane0": per_total}
    b.emit(VECTOR, columns=FEATURES, to=400, **accumulated, **drained)
    b.emit(STORE, memory=Memory.VECTOR, words=FEATURES, address=at["result"], local=400)
    return b.finish()


@pytest.mark.parametrize("seed", range(3))
def test_golden_is_attention_over_the_kept_blocks(seed: int) -> None:
    head = Head.random(seed)
    at, memory = image(head)
    program = attention_program(CONFIG, at)
    validate(CONFIG, program)
    golden = GoldenCore(CONFIG, memory)
    golden.run(program)
    blocks = head.kept()
    assert golden.index[:KEPT].tolist() == blocks.tolist()
    found = memory[at["result"] :].view(np.float32).reshape(FEATURES, ROWS).T
    expected = head.attention(blocks)
    # Weights have 8 bits.
    assert np.abs(found - expected).max() < 0.01 * np.abs(expected).max()
    others = head.attention(np.arange(KEPT))
    assert np.abs(found - others).max() > 0.1 * np.abs(expected).max(), "any blocks would have done"


@pytest.mark.parametrize("device", ["fast:tiny", "rtl:tiny"])
def test_devices_choose_and_attend_like_golden(device: str) -> None:
    head = Head.random(1)
    with open_core(*device.split(":")) as core:
        at, memory = image(head)
        buffer = core.allocate(memory.size)
        buffer.write(memory)
        places = {name: buffer.address + offset for name, offset in at.items()}
        program = attention_program(core.config, places)
        golden = GoldenCore(core.config, core.memory_at(0, core.memory_bytes).copy())
        golden.run(program)
        core.run(program, timeout=60)
        result = slice(at["result"], at["result"] + 4 * FEATURES * ROWS)
        expected = golden.memory[buffer.address :][result].view(np.uint32)
        assert (buffer.data[result].view(np.uint32) == expected).all()
