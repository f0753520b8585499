"""How long the fast core, the RTL and ``cpu`` take for the same text through MiniLM.

    python benchmarks/simulation_speed.py [--core laptop] [--tokens 128] [--threads 1] [--threads 2] [--no-rtl] [--json]

The fast core and ``cpu`` take turns in one process; simulators are built and programs compiled before. Times are
medians, on the clock and of all threads on the processors; values are compared bit for bit. The RTL runs once.
"""

from __future__ import annotations

import json
import os
import time
from typing import Annotated, Any

import lockstep
import numpy as np
import typer
from contenders import Contender, take_turns
from lockstep_hls import kernels


def beside_the_host(device: str, tokens: int, threads: int, repeat: int) -> dict[str, Any]:
    """Milliseconds of both, and how many times as long the device takes."""
    model = lockstep.load("minilm")
    inputs = [{model.input_name: np.random.default_rng(0).integers(1000, 29000, tokens)}]
    kernels.set_threads(threads)
    with lockstep.executor("cpu") as host, lockstep.executor(device) as core:
        contenders = {
            name: Contender({"text": lambda each=each: each.run(model.graph, inputs)[0]})
            for name, each in (("cpu", host), (device, core))
        }
        times, values = take_turns(contenders, repeat)
    cpu, fast = (times[name]["text"].summary() for name in contenders)
    return {
        "threads": threads,
        "cpu": cpu,
        "fast": fast,
        "times_as_long": {unit: fast[unit] / cpu[unit] for unit in ("wall_ms", "wall_ms_least", "cpu_ms")},
        "identical": bool(np.array_equal(values["cpu"].view(np.uint32), values[device].view(np.uint32))),
    }


def simulation(device: str, tokens: int) -> dict[str, float]:
    """Cycles of one text, and the seconds of its second run."""
    model = lockstep.load("minilm")
    inputs = [{model.input_name: np.random.default_rng(0).integers(1000, 29000, tokens)}]
    with lockstep.executor(device) as core:
        core.run(model.graph, inputs)
        before, began = core.totals, time.perf_counter()
        core.run(model.graph, inputs)
        return {"cycles": (core.totals - before).cycles, "seconds": time.perf_counter() - began}


def main(
    core: Annotated[str, typer.Option(help="The preset.")] = "laptop",
    tokens: Annotated[int, typer.Option(help="Tokens of the text.")] = 128,
    threads: Annotated[list[int] | None, typer.Option(help="Of cpu and the fast core; one, and all cores.")] = None,
    repeat: Annotated[int, typer.Option(help="Rounds.")] = 15,
    rtl: Annotated[bool, typer.Option(help="Simulate the RTL too.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="One object in the place of tables.")] = False,
) -> None:
    """Print milliseconds of ``cpu`` and of the fast core, then the cycles that fast core and RTL simulate a second."""
    counts = threads or sorted({1, os.cpu_count() or 1})
    hosts = [beside_the_host(f"fast:{core}", tokens, count, repeat) for count in counts]
    cores = {f"{name}:{core}": simulation(f"{name}:{core}", tokens) for name in ("fast", *(["rtl"] if rtl else []))}
    if as_json:
        print(json.dumps({"core": core, "tokens": tokens, "load": os.getloadavg()[0], "hosts": hosts, "cores": cores}))
        return
    print(f"MiniLM, one text of {tokens} tokens; load of the machine {os.getloadavg()[0]:.1f}")
    print(f"threads  {'cpu, ms of processor':>22} {'clock':>8}  {f'fast:{core}':>15} {'clock':>8}  times as long  bits")
    for one in hosts:
        cpu, fast, ratio = one["cpu"], one["fast"], one["times_as_long"]
        print(
            f"{one['threads']:7}  {cpu['cpu_ms']:22.1f} {cpu['wall_ms']:8.1f}  {fast['cpu_ms']:15.1f} "
            f"{fast['wall_ms']:8.1f}  {ratio['cpu_ms']:5.2f}, {ratio['wall_ms']:5.2f}   "
            f"{'the same' if one['identical'] else 'DIFFERENT'}"
        )
    for name, one in cores.items():
        rate = one["cycles"] / one["seconds"]
        print(f"{name:12}  {one['cycles']:9,} cycles  {one['seconds']:8.3f} s  {rate:13,.0f} cycles a second")
    if rtl:
        seconds = [one["seconds"] for one in cores.values()]
        print(f"the fast core is {seconds[1] / seconds[0]:.0f} times faster than the RTL")


if __name__ == "__main__":
    typer.run(main)
