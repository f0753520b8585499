"""Cycles of matrix products on a core of Lockstep, beside what SCALE-Sim predicts for a systolic array of its size.

    python benchmarks/scale_sim.py [--device fast:laptop] [--shape 128x384x384] [--json]

SCALE-Sim 3 (Samajdar et al., ISPASS 2020; ``pip install scalesim``) models the array alone: its operands are there
when they are wanted (bandwidth ``CALC``). ``ws`` keeps weights in place, ``os`` results, as the core's array does.
The core's cycles count everything from doorbell to fence: operands over the bus from device memory, products, two
scales an element, float32 results back. A shape is M x N x K.
"""

from __future__ import annotations

import csv
import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from contenders import Missing, library, quiet
from lockstep.bench.gemm import run as run_gemm
from lockstep.bench.measure import Bench, BenchError
from lockstep.bench.sizes import GemmSizes
from lockstep_driver import parse
from lockstep_isa.config import CoreConfig

SHAPES = ("16x16x384", "16x384x384", "128x384x384", "256x256x256", "100x200x300")

_CONFIG = """[general]
run_name = gemm
[architecture_presets]
ArrayHeight = {config.rows}
ArrayWidth = {config.columns}
IfmapSramSzkB = {activation}
FilterSramSzkB = {weight}
OfmapSramSzkB = {result}
IfmapOffset = 0
FilterOffset = 10000000
OfmapOffset = 20000000
Bandwidth = {config.bus_bytes}
Dataflow = {dataflow}
ReadRequestBuffer = 64
WriteRequestBuffer = 64
[layout]
IfmapCustomLayout = False
FilterCustomLayout = False
IfmapSRAMBankBandwidth = {config.rows}
IfmapSRAMBankNum = 1
IfmapSRAMBankPort = 2
FilterSRAMBankBandwidth = {config.columns}
FilterSRAMBankNum = 1
FilterSRAMBankPort = 2
[sparsity]
SparsitySupport = false
[run_presets]
InterfaceBandwidth = CALC
UseRamulatorTrace = False
"""


def simulate(config: CoreConfig, shapes: list[tuple[int, int, int]], dataflow: str) -> list[int]:
    """SCALE-Sim's cycles of each product, from the first operand in the array on."""
    scale_sim = library("scalesim.scale_sim")
    memory_module = library("scalesim.memory.double_buffered_scratchpad_mem")
    # It makes an int of what is an array of one element, which NumPy 2.4 refuses.
    memory_module.max = lambda *values: np.max(np.ravel(values))
    memory = {
        "activation": config.activation_words * config.rows // 1024,
        "weight": config.weight_words * config.columns // 1024,
        "result": config.vector_words * config.vector_word_bytes // 1024,
    }
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / name for name in ("core.cfg", "shapes.csv", "layouts.csv")}
        paths["core.cfg"].write_text(_CONFIG.format(config=config, dataflow=dataflow, **memory))
        rows = "".join(f"product{i},{m},{n},{k},1:1,\n" for i, (m, n, k) in enumerate(shapes))
        paths["shapes.csv"].write_text("Layer,M,N,K,Sparsity,\n" + rows)
        paths["layouts.csv"].write_text("Layer,\n")
        with quiet():
            simulation = scale_sim.scalesim(
                save_disk_space=True, verbose=False, config=str(paths["core.cfg"]), topology=str(paths["shapes.csv"]),
                layout=str(paths["layouts.csv"]), input_type_gemm=True,
            )  # fmt: skip
            simulation.run_scale(top_path=folder)
        with (Path(folder) / "gemm" / "COMPUTE_REPORT.csv").open() as report:
            found = [{key.strip(): value for key, value in row.items() if key} for row in csv.DictReader(report)]
    return [int(float(row["Total Cycles"])) for row in found]


def parse_shape(text: str) -> tuple[int, int, int]:
    try:
        m, n, k = (int(size) for size in text.split("x"))
    except ValueError:
        raise typer.BadParameter(f"'{text}' is no shape; give M x N x K as 128x384x384") from None
    if min(m, n, k) < 1:
        raise typer.BadParameter(f"'{text}' has nothing in it; give sizes of at least 1")
    return m, n, k


def main(
    device: Annotated[str, typer.Option(help="The core.")] = "fast:laptop",
    shape: Annotated[list[str] | None, typer.Option(help="M x N x K, as 128x384x384; five unless given.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One object in the place of a table.")] = False,
) -> None:
    """Cycles of a core and of SCALE-Sim for the same products."""
    shapes = [parse_shape(text) for text in shape or SHAPES]
    config = parse(device).config
    try:
        predicted = {dataflow: simulate(config, shapes, dataflow) for dataflow in ("ws", "os")}
    except Missing as reason:
        raise SystemExit(f"{reason}; install it with: pip install scalesim") from None
    rows: list[dict[str, Any]] = []
    with Bench(device) as bench:
        for number, (m, n, k) in enumerate(shapes):
            try:
                (measured,) = run_gemm(GemmSizes(m=m, n=n, k=k), bench)
            except BenchError as error:
                raise SystemExit(f"{error}") from None
            cycles = {device: measured.cycles} | {
                f"SCALE-Sim {flow}": found[number] for flow, found in predicted.items()
            }
            ideal = -(-m * n * k // (config.rows * config.columns))
            rows.append(
                {"m": m, "n": n, "k": k, "ideal_cycles": ideal, "cycles": cycles, "identical": measured.identical}
            )
    if as_json:
        print(json.dumps({"device": device, "products": rows}))
        return
    print(f"Cycles on {config.rows} x {config.columns} multipliers, and the share in which all of them have work")
    print(f"{'M x N x K':>14}{'least':>12}" + "".join(f"{name:>22}" for name in rows[0]["cycles"]))
    for row in rows:
        ideal = row["ideal_cycles"]
        shares = (f"{cycles:,} ({ideal / cycles:.1%})" for cycles in row["cycles"].values())
        print(
            f"{row['m']}x{row['n']}x{row['k']}".rjust(14) + f"{ideal:12,}" + "".join(f"{cell:>22}" for cell in shares)
        )


if __name__ == "__main__":
    typer.run(main)
