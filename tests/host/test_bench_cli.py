"""``lockstep bench``: what it prints for people and machines, the files that it writes, and how it ends."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Command
from lockstep.bench import gemm, minilm
from lockstep.bench.measure import Measurement
from lockstep.bench.registry import CASES
from lockstep_isa import operations

PRODUCT = ("bench", "gemm", "--m", 20, "--n", 33, "--k", 40)
DECODE = ("bench", "decode", "--shape", "llama-tiny", "--layers", 1)
FIELDS = {
    *("case", "parameters", "device", "cycles", "cycles_are", "limit_cycles", "limit_formula", "limit_numbers"),
    *(
        "ratio",
        "share_of_limit",
        "bytes",
        "mac_cycles",
        "skipped_chunks",
        "units",
        "identical",
        "reference",
        "values_compared",
    ),
    *("differences", "cycles_per_second", "predicted_cycles", "published"),
}


def test_json_is_a_list_with_an_object_for_each_run(cli: Command) -> None:
    (one,) = cli(*PRODUCT, "--device", "fast:laptop", "--json").json
    assert set(one) == FIELDS
    assert one["case"] == "gemm"
    assert one["parameters"] == {"m": 20, "n": 33, "k": 40, "output": "float32"}
    assert one["cycles"] == one["predicted_cycles"] > one["limit_cycles"] > 0
    assert one["cycles_are"] == "predicted"
    assert one["ratio"] == pytest.approx(one["cycles"] / one["limit_cycles"])
    assert one["identical"]
    assert one["values_compared"] == 20 * 33
    assert sum(one["units"]["STORE"].values()) == one["cycles"]
    assert one["bytes"] > 20 * 40 + 33 * 40 + 4 * 20 * 33


def test_random_products_are_the_same_again_with_the_same_seed(cli: Command) -> None:
    def run(seed: int) -> list[Any]:
        found = cli("bench", "gemm", "--shapes", 3, "--seed", seed, "--device", "fast:laptop", "--json").json
        return [(one["parameters"], one["cycles"]) for one in found]

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_the_rtl_counts_and_the_fast_core_predicts(cli: Command) -> None:
    (one,) = cli(*PRODUCT, "--core", "tiny", "--json").json
    assert one["device"] == "rtl:tiny"
    assert one["cycles_are"] == "counted"
    assert one["identical"]
    assert one["predicted_cycles"] == pytest.approx(one["cycles"], rel=0.1)


def test_people_see_the_formula_the_bar_and_what_others_published(cli: Command) -> None:
    done = cli(*DECODE, "--context", 20, "--context", 40, "--device", "fast:laptop")
    assert done.status == 0, done.err
    assert "cycles predicted by the fast core" in done.out
    assert "limit = (weight bytes + bytes of keys" in done.out
    assert "context=40 (753,664 + " in done.out
    assert "2 of 2 have the bits of golden" in done.out
    assert "median" in done.out
    assert "at most 1.05 times the limit" in done.out
    assert "published, not measured here: 1.02 times its limit, Hummingbird" in done.out
    assert "decode of llama-tiny behind 20 tokens on fast:laptop" in done.err


def test_grouped_heads_read_less_of_keys_and_values(cli: Command) -> None:
    found = {}
    for kv_heads in (1, 4):
        arguments = (*DECODE, "--context", 40, "--kv-heads", kv_heads, "--device", "fast:laptop", "--json")
        (found[kv_heads],) = cli(*arguments).json
    for kv_heads, one in found.items():
        assert one["identical"]
        assert one["parameters"]["kv_heads"] == kv_heads
        # A layer of 256 features, 640 between, 4 heads of 64; 41 tokens of keys and values, with scales.
        weights, cache = (2 * 4 + 2 * kv_heads) * 64 * 256 + 3 * 640 * 256, 41 * 2 * kv_heads * (64 + 4)
        assert one["limit_numbers"].startswith(f"({weights:,} + {cache:,}) /")
    (unasked,) = cli(*DECODE, "--context", 40, "--device", "fast:laptop", "--json").json
    assert unasked["cycles"] == found[4]["cycles"]


@pytest.mark.parametrize(
    ("case", "weights", "sparsity"),
    [
        (("bench", "gemm", "--m", 64, "--n", 80, "--k", 128), "int8", "2:4"),
        (("bench", "gemm", "--m", 64, "--n", 80, "--k", 128), "int4", "none"),
        ((*DECODE, "--context", 40), "int4", "2:4"),
    ],
)
def test_packed_weights_are_compared_and_have_a_limit_of_their_own(
    cli: Command, case: tuple[object, ...], weights: str, sparsity: str
) -> None:
    asked = (*case, "--device", "fast:laptop", "--json")
    (dense,) = cli(*asked).json
    (one,) = cli(*asked, "--weights", weights, "--sparsity", sparsity).json
    assert one["identical"]
    assert one["parameters"] == dense["parameters"] | {"weights": weights, "sparsity": sparsity}
    for figure in ("limit_cycles", "cycles", "bytes", "mac_cycles"):
        assert one[figure] < dense[figure], figure


def test_chosen_keys_cost_as_much_as_their_bytes(cli: Command) -> None:
    case = (
        "bench",
        "decode",
        "--shape",
        "llama-160m",
        "--layers",
        1,
        "--context",
        300,
        "--device",
        "fast:laptop",
        "--json",
    )
    (one,) = cli(*case, "--select", 64).json
    assert one["identical"]
    assert one["parameters"]["select"] == 64
    assert one["attention_speedup"] > 2
    # 12 heads of 64 channels: 64 keys with values and scales, 19 blocks of 4 rows of 34 + 4 bytes.
    expected = 12 * (64 * 2 * 68 + 19 * 4 * 38) - 12 * 2 * 68
    share = 1 - 28 / 780  # what refresh leaves
    assert one["attention_limit_cycles"] == pytest.approx(expected / 16 / share)
    assert 0 < one["sketch_cycles"] < 0.1 * one["attention_cycles"]


def test_a_cache_of_4_bits_costs_as_much_as_its_bytes(cli: Command) -> None:
    case = ("bench", "decode", "--shape", "llama-160m", "--layers", 1, "--context", 500, "--device", "fast:laptop")
    (one,) = cli(*case, "--cache-bits", 4, "--json").json
    assert one["identical"]
    assert one["parameters"]["cache_bits"] == 4
    assert one["attention_speedup"] > 1.2
    assert one["cache_bytes_ratio"] == pytest.approx(68 / 38, rel=0.05)
    # 12 heads of 64 channels: 34 bytes and a scale for 500 tokens and the new one, beyond 64 bytes and a scale for one.
    share = 1 - 28 / 780  # what refresh leaves
    assert one["attention_limit_cycles"] == pytest.approx(12 * 2 * (501 * 38 - 68) / 16 / share)
    assert one["attention_ratio"] < 1.4


def test_minilm_fills_exactly_the_slots_of_its_limit(cli: Command) -> None:
    found = cli("bench", "minilm", "--tokens", 20, "--reference", "cpu", "--device", "fast:laptop", "--json").json
    (one,) = found
    assert one["identical"]
    assert one["reference"] == "cpu"
    assert one["mac_cycles"] == one["limit_cycles"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("gemm", "--m", 20), ("--n and --k",)),
        (("gemm", "--m", 20, "--k", 20), ("give --n too",)),
        (("gemm", "--m", 0, "--n", 1, "--k", 1), ("at least 1",)),
        (("gemm", "--m", 1, "--n", 1, "--k", 140_000), ("131071",)),
        (("gemm", "--shapes", 0), ("--shapes",)),
        (("gemm", "--m", 4000, "--n", 16, "--k", 512), ("ACTIVATION memory",)),
        (("minilm", "--reference", "gold"), ("golden", "cpu")),
        (("minilm", "--tokens", 0), ("at least 1",)),
        (("decode", "--shape", "gpt5"), ("gpt2-medium", "llama-1b")),
        (("decode", "--context", 0), ("--context",)),
        (("decode", "--shape", "llama-tiny", "--kv-heads", 3), ("3 heads", "the 4 of queries", "one of 1, 2, 4")),
        (("decode", "--shape", "llama-tiny", "--kv-heads", 0), ("--kv-heads", "one of 1, 2, 4")),
        (("decode", "--shape", "llama-tiny", "--shape", "gpt2-medium", "--kv-heads", 4), ("gpt2-medium", "llama-1b")),
        (("decode", "--select", 40), ("40 keys", "whole blocks of 16")),
        (("decode", "--select", 64, "--keep", 64), ("(keep)", "(select)", "one of them")),
        (("decode", "--cache-bits", 3), ("3 is no number of bits", "8 or 4")),
        (("decode", "--cache-bits", 4, "--keep", 64), ("run on the host", "two share a byte")),
        (("decode", "--cache-bits", 4, "--select", 64), ("run on the host", "of 8 bits, not of 4")),
        (("gemm", "--core", "tiny"), ("--device", "one of them")),
        (("gemm", "--weights", "int3"), ("'int3'", "int8, int4")),
        (("decode", "--sparsity", "3:4"), ("'3:4'", "none, 2:4, 1:4")),
        (("gemm", "--m", 9, "--n", 9, "--k", 40, "--weights", "int4"), ("K = 40", "int4 g32", "a multiple of 32")),
        (("sparse-attention", "--mask", "absent.npy"), ("absent.npy cannot be read: No such file",)),
        (("sparse-attention", "--tile", 0), ("a tile of 0 keys",)),
        (("sparse-attention", "--head-dim", 99_968), ("words of WEIGHT memory", "core 'laptop' has 4,096")),
    ],
)
def test_mistakes_are_named(cli: Command, arguments: tuple[object, ...], parts: tuple[str, ...]) -> None:
    cli("bench", *arguments, "--device", "fast:laptop").refused(2, *parts)


@pytest.mark.parametrize("case", ["gemm", "minilm", "decode", "resblock-mha", "resblock-ffn", "sparse-attention"])
def test_a_seed_below_0_is_refused(cli: Command, case: str) -> None:
    outcome = cli("bench", case, "--seed", -1)
    assert outcome.status == 2
    assert "--seed" in outcome.err


@pytest.mark.parametrize(
    ("option", "place", "why"),
    [
        ("--plot", "file", "is a file; give a folder"),
        ("--write", ".", "is a folder; give the name of a file"),
        ("--write", "absent/page.md", "absent, which is no folder"),
        ("--write", "file/page.md", "file, which is no folder"),
    ],
)
def test_places_that_cannot_be_written_are_refused_before_anything_runs(
    cli: Command, tmp_path: Path, option: str, place: str, why: str
) -> None:
    (tmp_path / "file").write_text("mine")
    outcome = cli(*PRODUCT, "--device", "fast:laptop", option, tmp_path / place)
    outcome.refused(2, option, why)
    assert "gemm" not in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_device_without_a_core_or_without_a_preset_is_refused(cli: Command) -> None:
    cli(*PRODUCT, "--device", "cpu").refused(2, "counts no cycles", "rtl:laptop")
    cli(*PRODUCT, "--core", "huge").refused(2, "unknown core 'huge'", "laptop")


def test_a_run_with_other_bits_exits_with_1(cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*given: Any) -> np.ndarray:
        return -operations.linear(*given)

    monkeypatch.setattr(gemm, "operations", type("Wrong", (), {"linear": staticmethod(wrong), "MAX_K": 9999}))
    done = cli(*PRODUCT, "--device", "fast:laptop")
    assert done.status == 1
    assert "660 differ" in done.out
    assert "0 of 1 have the bits of golden" in done.out


def test_all_goes_on_behind_a_case_that_fails(cli: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lockstep.bench import blocks, decode, sparse_attention_case

    def fails(*_: object) -> Iterator[Measurement]:
        raise OSError("no such weights")
        yield

    original = gemm.run
    sizes = CASES["gemm"].sizes
    monkeypatch.setattr(minilm, "run", fails)
    monkeypatch.setattr(gemm, "run", lambda _, bench: original(sizes(m=8, n=8, k=8), bench))
    monkeypatch.setattr(decode, "run", lambda _, bench: original(sizes(m=9, n=9, k=9), bench))
    monkeypatch.setattr(blocks, "run", lambda _, bench: original(sizes(m=7, n=7, k=7), bench))
    monkeypatch.setattr(sparse_attention_case, "run", lambda _, bench: original(sizes(m=6, n=6, k=6), bench))
    page = tmp_path / "page.md"
    done = cli("bench", "all", "--device", "fast:tiny", "--json", "--write", page)
    assert done.status == 1
    assert "error: minilm: no such weights" in done.err
    assert [one["parameters"]["m"] for one in done.json[:-1]] == [8, 9, 7, 7, 6]
    assert done.json[-1] == {"case": "minilm", "device": "fast:tiny", "error": "no such weights"}
    assert not page.exists()


def test_pictures_and_the_page_are_written(cli: Command, tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    options = ("--plot", tmp_path / "plots", "--write", page, "--device", "fast:laptop")
    done = cli("bench", "gemm", "--shapes", 14, *options)
    assert done.status == 0, done.err
    names = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert names == ["roofline.png", "roofline.svg", "units.png", "units.svg"]
    assert (tmp_path / "plots" / "units.png").read_bytes().startswith(b"\x89PNG")
    drawn = (tmp_path / "plots" / "units.svg").read_text()
    for word in ("LOAD", "MATRIX", "VECTOR", "STORE", "wait for token"):
        assert word in drawn
    assert "array and bus" in (tmp_path / "plots" / "roofline.svg").read_text()
    text = page.read_text()
    for part in ("On `fast:laptop`, ", "**projected**", "**arithmetic**", "## gemm", "14 runs: **median", "OpenGeMM"):
        assert part in text
    assert "| LOAD |" in text
    assert "](plots/roofline.svg)" in text


def test_plots_without_matplotlib_name_the_extra(cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    cli(*PRODUCT, "--device", "fast:laptop", "--plot", "plots").refused(2, "lockstep-accel[plot]")
