"""Attention of a prompt to the blocks that the core chooses: bits of golden, the sketch, cycles, named mistakes."""

from __future__ import annotations

import numpy as np
import pytest
from command_line import Command
from lockstep.bench.selected_attention import Chosen, clustered_operands, run_selected
from lockstep.bench.sparse_attention import Operands, run_attention
from lockstep.compiler.allocation import CapacityError, Pieces
from lockstep.compiler.block_mask import BlockSparse, dense_mask
from lockstep.compiler.layout import column_words, table_words, to_panels
from lockstep.compiler.prefill_work import PrefillError, PrefillSparse, check_core
from lockstep.compiler.sketch_prefill import Constants, Sketch, SketchMaker, sketch_constants
from lockstep.compiler.steps import emit_steps
from lockstep_driver import open_device
from lockstep_driver.builder import ProgramBuilder
from lockstep_isa.attention import visible
from lockstep_isa.config import PRESETS, CoreConfig
from lockstep_isa.executor import GoldenCore
from lockstep_isa.instructions import LOAD, TABLE_ENTRIES, Memory
from lockstep_isa.prefill_selection import TileBlocks
from lockstep_isa.program import validate
from lockstep_isa.quantisation import quantise_rows
from lockstep_isa.selectors import attention_selected
from lockstep_isa.sketch import key_sketch
from lockstep_isa.weights import pack
from support import assert_same_bits

LAPTOP = PRESETS["laptop"]


def expected(work: PrefillSparse, operands: Operands) -> np.ndarray:
    """The contract's attention, row by row, to what the rule keeps for each row."""
    out = np.empty(operands.q.shape, np.float32)
    seen = visible(np.arange(work.tokens), work.tokens, work.causal)
    rule = TileBlocks(work.density, work.queries)
    for head, (q, k, v) in enumerate(zip(operands.q, operands.k, operands.v, strict=True)):
        kept = *quantise_rows(k), *quantise_rows(v)
        out[head] = attention_selected(q, seen, *kept, rule, tile=work.tokens)[0]
    return out


def check(work: PrefillSparse, *devices: str, seed: int = 0) -> None:
    operands = clustered_operands(work.heads, work.tokens, work.head_dim, seed)
    wanted = expected(work, operands)
    for device in devices:
        with open_device(device) as opened:
            assert_same_bits(run_selected(opened, work, operands).values[0], wanted)


# --- Bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("queries", [16, 32])
@pytest.mark.parametrize("density", [0.2, 0.6])
def test_every_core_has_the_bits_of_golden(queries: int, causal: bool, density: float) -> None:
    check(PrefillSparse(2, 192, 32, density, causal, queries), "fast:tiny", "fast:laptop")


def test_the_rtl_has_the_bits_of_golden() -> None:
    check(PrefillSparse(2, 96, 32, 0.5, True, 16), "rtl:tiny")


@pytest.mark.parametrize(
    "work",
    [
        PrefillSparse(5, 16, 32, 0.5),
        PrefillSparse(3, 64, 32, 0.5, True, 32),
        PrefillSparse(2, 112, 64, 0.4),
        PrefillSparse(2, 80, 96, 0.5, False),
        PrefillSparse(2, 64, 32, 1.0),
        PrefillSparse(2, 128, 32, 0.01, False),
        PrefillSparse(2, 256, 32, 0.4, True, 128),
        PrefillSparse(1, 448, 32, 0.2, False, 64),
    ],
    ids=["a tile a head", "two tiles", "keys end in a panel", "odd panels", "all", "no choice", "long tiles", "units"],
)
def test_sizes_need_not_be_round(work: PrefillSparse) -> None:
    check(work, "fast:tiny", "fast:laptop", seed=1)


def test_keys_that_outweigh_all_others_are_found() -> None:
    work = PrefillSparse(1, 256, 32, 0.2, False, 32)
    operands = clustered_operands(1, 256, 32)
    # Exponents of a few keys of block 9 are hundreds above the others': a tile without it has other results.
    operands.k[0, 148:152] = 40 * operands.q[0, 5]
    assert 9 in Chosen(work, operands).blocks[0][0]
    with open_device("fast:laptop") as device:
        assert_same_bits(run_selected(device, work, operands).values[0], expected(work, operands))


def test_scores_that_are_all_negative_have_an_order() -> None:
    work = PrefillSparse(1, 256, 32, 0.25, False, 16)
    drawn = clustered_operands(1, 256, 32)
    operands = Operands(-np.abs(drawn.q), np.abs(drawn.k), drawn.v)
    chosen = Chosen(work, operands).blocks[0]
    assert any(blocks.tolist() != [0, 1, 2, 15] for blocks in chosen)
    with open_device("fast:laptop") as device:
        assert_same_bits(run_selected(device, work, operands).values[0], expected(work, operands))


def test_values_that_no_tile_keeps_are_never_read() -> None:
    work = PrefillSparse(1, 256, 32, 0.2, False, 128)
    clean = clustered_operands(1, 256, 32)
    kept = np.unique(np.concatenate(Chosen(work, clean).blocks[0]))
    assert len(kept) < 16
    v = clean.v.copy().reshape(16, 16, 32)
    v[np.setdiff1d(np.arange(16), kept)] = np.nan
    with open_device("fast:tiny") as device:
        found = run_selected(device, work, Operands(clean.q, clean.k, v.reshape(clean.v.shape))).values[0]
    assert_same_bits(found, expected(work, clean))


# --- The sketch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("core", "tokens", "head_dim"), [("tiny", 16, 32), ("tiny", 112, 64), ("laptop", 336, 128), ("laptop", 80, 32)]
)
def test_the_core_makes_the_sketch_that_the_contract_says(core: str, tokens: int, head_dim: int) -> None:
    config = PRESETS[core]
    rng = np.random.default_rng(3)
    keys = rng.normal(size=(2, tokens, head_dim)) * rng.uniform(0.1, 10, (2, tokens, 1))
    keys[0, 4:8] = 0
    keys[1, 9] *= 1e4
    quantised = [quantise_rows(head.astype(np.float32)) for head in keys]
    golden, sketches, panels = made(config, quantised)
    for (k8, sk), sketch in zip(quantised, sketches, strict=True):
        levels, multipliers, scales = key_sketch(k8, sk)
        wanted = pack(levels, config.rows, multipliers).reshape(-1, config.rows)
        found = golden.weight[sketch.words : sketch.words + len(wanted)].view(np.uint8)
        np.testing.assert_array_equal(found, wanted)
        words = column_words(scales, config.rows)
        assert len(words) == panels
        assert_same_bits(golden.parameter[sketch.scales : sketch.scales + panels], words)


def made(config: CoreConfig, heads: list[tuple[np.ndarray, np.ndarray]]) -> tuple[GoldenCore, list[Sketch], int]:
    """A core that has made the sketches of some heads, where they lie, and their panels."""
    tokens, head_dim = heads[0][0].shape
    arrays: dict[str, np.ndarray] = dict(sketch_constants(config.rows)) | {"recip": table_words("recip")}
    for n, (k8, sk) in enumerate(heads):
        arrays |= {f"k{n}": to_panels(k8, config.rows), f"s{n}": column_words(sk, config.rows)}
    at, raw = {}, bytearray()
    for name, array in arrays.items():
        raw += bytes(-len(raw) % 64)
        at[name] = len(raw)
        raw += np.ascontiguousarray(array).tobytes()
    builder = ProgramBuilder(config)
    builder.emit(LOAD, memory=Memory.TABLE, words=TABLE_ENTRIES, address=at["recip"], local=TABLE_ENTRIES)
    words = (config.activation_words, config.weight_words, config.vector_words, config.parameter_words)
    memories = (Memory.ACTIVATION, Memory.WEIGHT, Memory.VECTOR, Memory.PARAMETER)
    pieces = {memory: Pieces(memory.name, 0, count) for memory, count in zip(memories, words, strict=True)}
    constants = Constants(**{name: at[name] for name in sketch_constants(config.rows)})
    maker = SketchMaker(builder, config, head_dim, tokens, pieces, constants)
    sketches = [
        Sketch(
            pieces[Memory.WEIGHT].take(maker.panels * maker.panel_words), pieces[Memory.PARAMETER].take(maker.panels)
        )
        for _ in heads
    ]
    emit_steps([step for n, sketch in enumerate(sketches) for step in maker.steps(at[f"k{n}"], at[f"s{n}"], sketch)])
    program = builder.finish()
    validate(config, program)
    golden = GoldenCore(config, np.frombuffer(bytes(raw), np.uint8).copy())
    golden.run(program)
    return golden, sketches, maker.panels


# --- Cycles and accuracy --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head_dim", "causal", "density", "least"),
    [
        *((128, causal, density, least) for causal in (True, False) for density, least in ((0.2, 3.0), (0.1, 5.0))),
        *((64, True, 0.2, 3.0), (64, False, 0.2, 3.0), (64, False, 0.1, 5.0)),
        # VECTOR is the limit here: for so few keys most of a pass is its beginning and its end.
        (64, True, 0.1, 4.5),
    ],
)
def test_choosing_costs_less_than_it_saves(head_dim: int, causal: bool, density: float, least: float) -> None:
    operands = clustered_operands(4, 1024, head_dim)
    dense = BlockSparse(dense_mask(4, 16, causal), 64, head_dim, 1024, causal)
    # In clusters dense attention has many zeros, which are to be multiplied here.
    with open_device("fast:laptop?without=zero_skipping") as device:
        cycles = run_attention(device, dense, operands).counters.cycles
        chosen = run_selected(device, PrefillSparse(4, 1024, head_dim, density, causal, 32), operands).counters.cycles
    assert cycles / chosen >= least


@pytest.mark.parametrize(("head_dim", "causal"), [(64, True), (128, False)])
def test_cycles_are_predicted(head_dim: int, causal: bool) -> None:
    # Keys for a sketch are loaded early: the prediction does not know that LOAD waits where VECTOR fills WEIGHT.
    work = PrefillSparse(2, 1024, head_dim, 0.1, causal, 32)
    operands = clustered_operands(work.heads, work.tokens, head_dim)
    cycles = []
    for device in ("fast:laptop", "rtl:laptop"):
        with open_device(device) as opened:
            cycles.append(run_selected(opened, work, operands).counters.cycles)
    assert cycles[0] == pytest.approx(cycles[1], rel=0.01)


def test_what_is_kept_has_most_of_what_as_many_blocks_can_have() -> None:
    work = PrefillSparse(2, 512, 64, 0.25, False, 16)
    chosen = Chosen(work, clustered_operands(2, 512, 64))
    assert chosen.best_probability <= 1
    assert chosen.probability > 0.9 * chosen.best_probability
    assert chosen.probability > 2.5 * work.kept_pairs / work.seen_pairs


# --- Mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((1, 64, 32, 0.0), "density of 0.0"),
        ((1, 64, 32, 1.5), "density of 1.5"),
        ((1, 64, 48, 0.5), "48 features"),
        ((1, 72, 32, 0.5), "72 tokens"),
        ((1, 48, 32, 0.5, True, 32), "48 tokens .* 32 queries"),
        ((1, 64, 32, 0.5, True, 24), "24 queries"),
        ((0, 64, 32, 0.5), "0 heads"),
        ((1, 32768, 32, 0.5), "1024 blocks"),
    ],
)
def test_mistakes_in_sizes_are_named(arguments: tuple[object, ...], match: str) -> None:
    with pytest.raises(PrefillError, match=match):
        PrefillSparse(*arguments)  # type: ignore[arg-type]


def test_cores_that_cannot_choose_say_so() -> None:
    work = PrefillSparse(1, 64, 32, 0.5)
    for core, match in (("ulx3s", "'ulx3s' cannot select"), ("paper", "64 rows of core 'paper'")):
        with pytest.raises(PrefillError, match=match):
            check_core(PRESETS[core], work)


def test_what_does_not_fit_is_named() -> None:
    work = PrefillSparse(1, 4096, 128, 0.5, False)
    with open_device("fast:laptop") as device, pytest.raises(CapacityError, match="WEIGHT memory"):
        run_selected(device, work, clustered_operands(1, 4096, 128))


# --- The command ----------------------------------------------------------------------------------------------------


def test_the_command_compares_with_dense_attention(cli: Command) -> None:
    sizes = ("--select", 0.25, "--seq", 256, "--heads", 2, "--head-dim", 32)
    (one,) = cli("bench", "sparse-attention", *sizes, "--device", "fast:laptop", "--json").json
    work = PrefillSparse(2, 256, 32, 0.25, True, 32)
    assert one["identical"]
    assert one["values_compared"] == 2 * 256 * 32
    assert one["parameters"]["queries"] == 32
    assert one["density"] == pytest.approx(work.kept_pairs / work.seen_pairs)
    assert one["speedup"] == pytest.approx(one["dense_cycles"] / one["cycles"])
    assert 0 < one["kept_probability"] <= one["best_probability"] <= 1
    assert "the sketch of the keys" in one["inside"]
    shown = cli("bench", "sparse-attention", *sizes, "--no-causal", "--device", "fast:tiny")
    assert "1 of 1 have the bits of golden" in shown.out
    assert "kept probability" in shown.out


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--select", "0"), ("density of 0.0", "at most 1")),
        (("--select", "1.2"), ("density of 1.2",)),
        (("--select", "0.2", "--head-dim", "48"), ("48 features", "32")),
        (("--select", "0.2", "--seq", "100"), ("100 tokens", "--seq")),
        (("--select", "0.2", "--seq", "64", "--queries", "128"), ("64 tokens", "128 queries")),
        (("--select", "0.2", "--queries", "20"), ("20 queries",)),
        (("--select", "0.2", "--pattern", "causal"), ("--pattern", "--select")),
        (("--select", "0.2", "--heads", "0"), ("0 heads",)),
        (("--select", "0.2", "--device", "fast:ulx3s"), ("'ulx3s' cannot select",)),
        (("--select", "0.2", "--device", "fast:paper"), ("64 rows",)),
    ],
)
def test_mistakes_are_named(cli: Command, arguments: tuple[str, ...], parts: tuple[str, ...]) -> None:
    device = () if "--device" in arguments else ("--device", "fast:laptop")
    cli("bench", "sparse-attention", *arguments, *device).refused(2, *parts)
