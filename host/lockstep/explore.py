"""Many cores for one model: predicted cycles and estimated resources, and which cores are worth building."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from lockstep_driver import Device, DriverError
from lockstep_hls.toolchain import ToolchainError
from lockstep_isa.config import ConfigurationError, CoreConfig, preset
from lockstep_rtl.synthesis import DEVICE
from lockstep_sim.fast import FastCore

from lockstep.errors import ModelError
from lockstep.resources import estimate

_DEVICE_BYTES = 256 << 20


class Point(NamedTuple):
    """A core: rows (and columns) of the array, vector lanes, bits of the bus."""

    rows: int
    lanes: int
    bus: int

    def __str__(self) -> str:
        return f"{self.rows} x {self.rows}, {self.lanes} lanes, {self.bus} bit"


@dataclass(frozen=True)
class Task:
    """What each core runs: a model, texts or the length of a random input, tokens to generate behind.

    ``memories`` is a preset: memories on chip have as many bytes as its ones, whatever the width of their words.
    """

    model: str
    memories: str = "laptop"
    texts: tuple[str, ...] = ()
    tokens: int = 12
    generate: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What a core would reach.

    Attributes
    ----------
    cycles : predicted; none where the model does not run there, and ``reason`` says why.
    utilisation : share of the cycles in which operands enter the array. bytes_moved : on the bus.
    logic, flip_flops, multipliers, block_rams : estimated, of an ECP5. fits : whether an ECP5-85F has them.
    """

    point: Point
    cycles: int | None
    utilisation: float | None
    bytes_moved: int | None
    logic: int
    flip_flops: int
    multipliers: int
    block_rams: int
    fits: bool
    reason: str = ""


def points(rows: Iterable[int], lanes: Iterable[int], bus: Iterable[int], memories: str = "laptop") -> list[Point]:
    """Every combination that is a core, the smallest first; raises ``ConfigurationError`` where there is none."""
    found, refused = [], None
    for point in sorted(set(Point(*sizes) for sizes in product(rows, lanes, bus))):
        try:
            core_of(point, memories)
            found.append(point)
        except ConfigurationError as error:
            refused = error
    if not found:
        raise refused or ConfigurationError("no core is asked for; give rows, lanes and bits of the bus")
    return found


def core_of(point: Point, memories: str = "laptop") -> CoreConfig:
    """The core of a point, with memories of as many bytes as a preset has; raises ``ConfigurationError``."""
    if point.bus % 8:
        raise ConfigurationError(f"a bus of {point.bus} bit has no whole bytes")
    like = preset(memories)
    words = {
        name: max(16, min(65536, getattr(like, name) * like.rows // max(1, point.rows)))
        for name in ("activation_words", "weight_words", "vector_words", "parameter_words")
    }
    name = f"{point.rows}x{point.rows}-{point.lanes}-{point.bus}"
    features = {"packed": like.packed, "selection": like.selection}
    features["zero_skipping"] = like.zero_skipping and point.rows >= 4
    return CoreConfig(name, point.rows, point.rows, point.lanes, point.bus // 8, **words, **features)


def explore(
    task: Task,
    wanted: Sequence[Point],
    results: Path | None = None,
    jobs: int = 1,
    told: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """What ``task`` costs on each core.

    Parameters
    ----------
    results : file of JSON lines to which every outcome is appended as soon as it is there; what it has already is not
        computed again. An interrupt loses nothing else.
    jobs : processes. told : is given each outcome as it comes, those of the file first.
    """
    known = read_results(results, task) if results is not None and results.is_file() else {}
    found = {point: known[point] for point in wanted if point in known}
    for outcome in found.values():
        if told is not None:
            told(outcome)
    left = [point for point in wanted if point not in found]
    for outcome in _run(task, left, jobs):
        found[outcome.point] = outcome
        if results is not None:
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"task": asdict(task), "outcome": asdict(outcome)}) + "\n")
        if told is not None:
            told(outcome)
    return [found[point] for point in wanted]


def read_results(path: Path, task: Task) -> dict[Point, Outcome]:
    """The outcomes of ``task`` in a file of results; a line that an interrupt cut off is left out."""
    found: dict[Point, Outcome] = {}
    same = json.loads(json.dumps(asdict(task)))
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry: dict[str, Any] = json.loads(line)
        except ValueError:
            continue
        if entry.get("task") == same:
            outcome = entry["outcome"]
            point = Point(*outcome.pop("point"))
            found[point] = Outcome(point, **outcome)
    return found


def pareto(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Those to which no other is better in cycles or logic without being worse in the other, the fastest first."""
    ran = sorted((o for o in outcomes if o.cycles is not None), key=lambda o: (o.cycles, o.logic))
    best: list[Outcome] = []
    for outcome in ran:
        if not best or outcome.logic < best[-1].logic:
            best.append(outcome)
    return best


def evaluate(task: Task, point: Point, work: Any) -> Outcome:
    """What a core would reach; ``work`` runs the task on any executor."""
    from lockstep.compiler.allocation import CapacityError
    from lockstep.executors import OpenExecutor

    config = core_of(point, task.memories)
    used = estimate(config)
    sites = {
        "TRELLIS_COMB": used.logic,
        "TRELLIS_FF": used.ff,
        "DP16KD": used.block_rams,
        "MULT18X18D": used.multipliers,
    }
    fits = all(sites[name] <= there for name, there in DEVICE.items())
    resources = (used.logic, used.ff, used.multipliers, used.block_rams, fits)
    try:
        with OpenExecutor("fast", device=Device(FastCore(config, _DEVICE_BYTES), "fast")) as device:
            work(device)
            total = device.totals
    except (CapacityError, DriverError, ModelError) as error:
        return Outcome(point, None, None, None, *resources, reason=str(error))
    return Outcome(point, total.cycles, total.mac_cycles / max(1, total.cycles), total.bytes_moved, *resources)


def _run(task: Task, wanted: Sequence[Point], jobs: int) -> Iterator[Outcome]:
    if not wanted:
        return
    if jobs == 1:
        work = _work(task)
        for point in wanted:
            yield evaluate(task, point, work)
        return
    pool = ProcessPoolExecutor(min(jobs, len(wanted)), get_context("spawn"), _begin, (task,))
    try:
        for done in as_completed([pool.submit(_evaluate, task, point) for point in wanted]):
            yield done.result()
    finally:
        # What has not begun never does; what has takes some seconds.
        pool.shutdown(cancel_futures=True)


_WORK: Any = None


def _begin(task: Task) -> None:
    """In a process of its own: load the model once. The parent alone answers Ctrl-C."""
    global _WORK
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch

    torch.set_num_threads(1)
    _WORK = _work(task)


def _evaluate(task: Task, point: Point) -> Outcome:
    try:
        return evaluate(task, point, _WORK)
    except ToolchainError as error:
        # Its class takes more than a message, so that it would not come back from here.
        raise RuntimeError(str(error)) from None


def _work(task: Task) -> Any:
    from lockstep.model import load
    from lockstep.verification import random_inputs, replay

    model = load(task.model)
    if task.texts:
        sequences = [{model.input_name: ids} for ids in model.tokenize(list(task.texts))]
    else:
        sequences = [random_inputs(model.graph, task.tokens, 0)]
    return replay(model.graph, sequences, task.generate)
