"""``lockstep explore``: predictions that ``run`` repeats, results that go on where they ended, and the Pareto front."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from command_line import Command
from lockstep.explore import Outcome, Point, Task, core_of, explore, pareto, points, read_results
from lockstep.resources import estimate
from lockstep_isa.config import ConfigurationError, preset

TEXT = "a cat sleeps"
SIZES = ("--rows", "4", "--lanes", "2,4", "--bus", "32")


def outcome(cycles: int | None, logic: int) -> Outcome:
    return Outcome(Point(4, 4, 32), cycles, 0.5, 100, logic, 10, 20, 30, True)


def test_explore_predicts_what_run_counts_and_draws_it(cli: Command, small_folder: Path, tmp_path: Path) -> None:
    results, plot = tmp_path / "found.jsonl", tmp_path / "plot.svg"
    arguments = ("explore", small_folder, TEXT, *SIZES, "--memories", "tiny", "--jobs", 1)
    report = cli(*arguments, "--results", results, "--plot", plot, "--json").json
    found = {tuple(each["point"]): each for each in report["outcomes"]}
    counted = cli("run", small_folder, TEXT, "--device", "fast:tiny", "--json").json
    tiny = found[4, 4, 32]
    assert tiny["cycles"] == counted["cycles"]
    assert tiny["bytes_moved"] == 4 * (counted["read_beats"] + counted["write_beats"])
    assert tiny["utilisation"] == counted["utilisation"]
    assert found[4, 2, 32]["cycles"] > tiny["cycles"]
    assert len(results.read_text().splitlines()) == 2
    assert len(list(ElementTree.fromstring(plot.read_text()).iter("{http://www.w3.org/2000/svg}circle"))) == 2


def test_explore_runs_in_several_processes(cli: Command, small_folder: Path) -> None:
    arguments = ("explore", small_folder, TEXT, *SIZES, "--json")
    assert cli(*arguments, "--jobs", 2).json["outcomes"] == cli(*arguments, "--jobs", 1).json["outcomes"]


def test_explore_goes_on_where_it_was_interrupted(small_folder: Path, tmp_path: Path) -> None:
    path, task = tmp_path / "found.jsonl", Task(str(small_folder), "tiny", (TEXT,))
    wanted = points([4], [1, 2, 4], [32], "tiny")

    def interrupt(_: Outcome) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        explore(task, wanted, path, told=interrupt)
    assert list(read_results(path, task)) == wanted[:1]
    # What was there is taken as it is, even if it says something else than a run would.
    entry = json.loads(path.read_text())
    entry["outcome"]["cycles"] = 77
    path.write_text(json.dumps(entry) + "\n" + '{"task": {"model": "cut o')
    path.write_text(path.read_text() + "\n")
    told: list[Outcome] = []
    found = explore(task, wanted, path, told=told.append)
    assert [o.point for o in found] == wanted
    assert found[0].cycles == 77
    assert [o.cycles != 77 for o in found[1:]] == [True, True]
    assert len(told) == 3
    assert list(read_results(path, task)) == wanted
    assert read_results(path, Task(str(small_folder), "tiny", ("another",))) == {}


def test_the_front_leaves_out_what_is_slower_with_no_less_logic() -> None:
    fast, slow, worse, equal = outcome(10, 900), outcome(50, 100), outcome(60, 100), outcome(20, 900)
    assert pareto([worse, slow, equal, fast, outcome(None, 1)]) == [fast, slow]


def test_points_are_the_cores_among_the_combinations() -> None:
    assert points([8, 16], [16, 3], [64]) == [Point(8, 16, 64), Point(16, 16, 64)]
    assert core_of(Point(16, 16, 128)).crc == preset("laptop").crc
    assert core_of(Point(8, 2, 64), "ulx3s").crc == preset("ulx3s").crc
    with pytest.raises(ConfigurationError, match="rows must be a power of two"):
        points([12], [4], [64])


def test_the_estimate_is_near_what_synthesis_of_ulx3s_counted() -> None:
    """Against the table in docs/results.md; block RAMs and multipliers follow from the structure and are exact."""
    found = estimate(preset("ulx3s"))
    assert (found.multipliers, found.block_rams) == (100, 166)
    assert found.lut4 == pytest.approx(27_668 + 2 * 4_286 + 4 * 773, rel=0.01)
    assert found.ff == pytest.approx(24_720, rel=0.01)


@pytest.mark.parametrize(
    ("feature", "logic", "flip_flops", "multipliers", "block_rams"),
    [
        ("packed", 46_621, 28_716, 180, 166),
        ("selection", 41_324, 25_747, 102, 169),
        ("zero_skipping", 39_823, 24_927, 100, 170),
    ],
)
def test_the_estimate_knows_what_features_take(
    feature: str, logic: int, flip_flops: int, multipliers: int, block_rams: int
) -> None:
    """Against the table of features in docs/results.md."""
    found = estimate(preset("ulx3s").replace(**{feature: True}))
    assert (found.multipliers, found.block_rams) == (multipliers, block_rams)
    assert found.lut4 == pytest.approx(logic, rel=0.01)
    assert found.ff == pytest.approx(flip_flops, rel=0.01)


def test_explore_refuses_what_is_no_core(cli: Command, small_folder: Path) -> None:
    cli("explore", small_folder, "--rows", "4,x").refused(2, "'4,x' is no list of rows")
    cli("explore", small_folder, "--rows", "5", "--jobs", 1).refused(2, "rows must be a power of two")
    cli("explore", small_folder, "--memories", "huge").refused(2, "unknown core 'huge'")
