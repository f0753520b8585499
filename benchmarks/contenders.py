"""What is timed beside ``cpu``, and how: all contenders take turns, so that a busy machine is busy for all of them."""

from __future__ import annotations

import importlib
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

#: Seconds between contenders: the threads of some spin for a while when there is nothing left to do.
SETTLE = 0.2


class Missing(Exception):
    """A contender that cannot be had here; the message says why."""


@dataclass(frozen=True)
class Contender:
    """Something that runs the model.

    Attributes
    ----------
    phases : what is timed, in this order: name -> a run, which returns the values to compare.
    close : gives back what it holds.
    """

    phases: dict[str, Callable[[], np.ndarray]]
    close: Callable[[], None] = lambda: None


@dataclass
class Times:
    """Seconds of one phase of one contender: on the clock, and of all its threads on the processors."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """Medians in milliseconds; of the clock also the quartiles, and the least, which others disturbed least."""
        low, middle, high = np.percentile(self.wall, [25, 50, 75]) * 1e3
        cpu = float(np.median(self.cpu)) * 1e3
        least = min(self.wall) * 1e3
        return {"wall_ms": middle, "wall_ms_low": low, "wall_ms_high": high, "wall_ms_least": least, "cpu_ms": cpu}


def take_turns(contenders: dict[str, Contender], repeat: int) -> tuple[dict[str, dict[str, Times]], dict[str, Any]]:
    """``repeat`` rounds in which each runs every phase, behind a round that warms up: their times, and the values of
    their last phase.
    """
    times = {name: {phase: Times() for phase in each.phases} for name, each in contenders.items()}
    values: dict[str, Any] = {}
    for round_ in range(repeat + 1):
        for name, contender in contenders.items():
            time.sleep(SETTLE)
            for phase, run in contender.phases.items():
                if len(contender.phases) == 1:
                    run()  # what the others left in the caches is no matter of this one
                wall, cpu = time.perf_counter(), time.process_time()
                values[name] = run()
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                if round_:
                    times[name][phase].wall.append(wall)
                    times[name][phase].cpu.append(cpu)
    return times, values


def library(name: str) -> Any:
    """The Python package ``name``; raises ``Missing`` where it is not installed."""
    try:
        with quiet():
            return importlib.import_module(name)
    except ImportError as error:
        raise Missing(f"{name} is not installed: {error}") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing that libraries say about themselves reaches the terminal: neither logs and warnings nor what C writes."""
    disabled, saved = logging.root.manager.disable, [os.dup(1), os.dup(2)]
    logging.disable(logging.CRITICAL)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for number, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, number)
            os.close(copy)
        os.close(nowhere)
        logging.disable(disabled)
