"""A run of a model on a core as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from lockstep_isa.config import CoreConfig

from lockstep.charts import roofline_chart, timeline_chart
from lockstep.explain import Explanation
from lockstep.layers import Layer, layers
from lockstep.profile import Profile
from lockstep.verification import Difference, differing, first_difference

#: Colours of what units and the bus do; dark ones where the reader's system is dark.
_STYLE = """
:root { --ink: #1f2328; --soft: #59636e; --page: #ffffff; --line: #d1d9e0; --track: #f6f8fa;
  --busy: #2da44e; --data: #d4a72c; --token: #cf222e; --read: #0969da; --written: #8250df; --a: #afb8c1; --b: #d0d7de }
@media (prefers-color-scheme: dark) {
  :root { --ink: #f0f6fc; --soft: #9198a1; --page: #0d1117; --line: #3d444d; --track: #151b23;
    --a: #57606a; --b: #373e47 }
}
body { font: 15px/1.5 sans-serif; color: var(--ink); background: var(--page); max-width: 1000px; margin: 2em auto;
  padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
table { border-collapse: collapse; width: 100%; font-size: 13px }
th, td { padding: 3px 8px; border-bottom: 1px solid var(--line); text-align: right }
th:first-child, td:first-child { text-align: left }
td.bar { width: 22% } td.bar div { background: var(--read); height: 9px }
.figures { display: flex; flex-wrap: wrap; gap: 2em } .figures b { display: block; font-size: 1.5em }
.figures span, .note { color: var(--soft) }
.key i { display: inline-block; width: 11px; height: 11px; margin: 0 5px 0 14px }
svg { width: 100%; height: auto } svg text { font: 11px sans-serif; fill: var(--soft) }
.track { fill: var(--track) } .busy { fill: var(--busy) } .data { fill: var(--data) } .token { fill: var(--token) }
.read { fill: var(--read) } .written { fill: var(--written) } .layer0 { fill: var(--a) } .layer1 { fill: var(--b) }
.roof { fill: none; stroke: var(--soft); stroke-width: 2 } .point { fill: var(--read); fill-opacity: 0.5 }
.whole { fill: var(--token) }
"""
_KEY = [
    ("busy", "works"),
    ("data", "waits for memory or a result tile"),
    ("token", "waits for another unit"),
    ("read", "reads"),
    ("written", "writes"),
]


@dataclass(frozen=True)
class Bits:
    """A comparison of all output values, bit for bit.

    reference : URI of the executor that is right. values : compared. differences : how many differ.
    first : the first one, or none.
    """

    reference: str
    values: int
    differences: int
    first: Difference | None

    def __str__(self) -> str:
        if self.first is None:
            return f"{self.values:,} output values compared with {self.reference}: the same bits."
        counts = f"{self.differences:,} of {self.values:,} output values"
        return f"{counts} differ from {self.reference}, first {self.first}."


def compare_bits(reference: str, device: str, expected: Sequence[np.ndarray], actual: Sequence[np.ndarray]) -> Bits:
    """How ``actual`` differs from ``expected``: ``float32[tokens, features]`` for each sequence."""
    values = sum(array.size for array in expected)
    differences = sum(int(differing(e, a).sum()) for e, a in zip(expected, actual, strict=True))
    return Bits(reference, values, differences, first_difference(device, expected, actual))


def page(title: str, config: CoreConfig, found: Profile, said: Explanation, bits: Bits) -> str:
    """The page; ``found`` has timelines."""
    total, parts = found.total, layers(found.timelines)
    macs = (total.mac_cycles + total.skipped_chunks * config.rows) * config.macs_per_cycle
    moved = (total.read_beats + total.write_beats) * config.bus_bytes
    whole = Layer("the whole run", total.cycles, macs, moved, total.units["MATRIX"]["busy"])
    figures = [
        (f"{total.cycles:,}", "cycles"),
        (f"{total.mac_cycles / max(1, total.cycles):.1%}", "array busy"),
        (f"{moved:,}", "bytes moved"),
        (f"{total.instructions:,}", "instructions"),
        ("the same" if bits.first is None else f"{bits.differences:,} differ", f"bits, beside {bits.reference}"),
    ]
    core = (
        f"Core {config.name}: an array of {config.rows} x {config.columns}, {config.lanes} vector lanes, a bus of "
        f"{8 * config.bus_bytes} bit."
    )
    key = "".join(f'<i style="background: var(--{kind})"></i>{text}' for kind, text in _KEY)
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="note">{escape(core)} {escape(said.device)}.</p>',
        '<div class="figures">' + "".join(f"<div><b>{a}</b><span>{b}</span></div>" for a, b in figures) + "</div>",
        f"<p>{escape(str(bits))}</p>",
        "<h2>What bounds it</h2>",
        "".join(f"<p>{escape(sentence)}</p>" for sentence in said.sentences),
        "<h2>Timeline</h2>",
        f'<p class="key note">{key}</p>',
        timeline_chart(found.timelines),
        "<h2>Roofline</h2>",
        '<p class="note">The red point is the whole run, the others are layers. Padded rows count as work, and so do '
        "zeros that were passed over.</p>",
        roofline_chart(config, parts, whole),
        "<h2>Cycles of each layer</h2>",
        _table([*parts, whole], total.cycles),
    ]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>' + "\n".join(body) + "</body></html>\n"


def _table(rows: Sequence[Layer], total: int) -> str:
    names = ("layer", "cycles", "share", "", "array busy", "bytes", "multiplications a byte")
    lines = ["<tr>" + "".join(f"<th>{name}</th>" for name in names) + "</tr>"]
    for layer in rows:
        share = layer.cycles / max(1, total)
        intensity = "" if layer.intensity is None or not layer.macs else f"{layer.intensity:.1f}"
        busy = f"{min(1.0, layer.matrix_cycles / layer.cycles):.0%}" if layer.cycles and layer.macs else ""
        cells = [escape(layer.name), f"{layer.cycles:,}", f"{share:.1%}"]
        bar = f'<td class="bar"><div style="width: {100 * min(1.0, share):.2f}%"></div></td>'
        more = [busy, f"{layer.bytes_moved:,}", intensity]
        lines.append(f"<tr>{_cells(cells)}{bar}{_cells(more)}</tr>")
    return "<table>" + "".join(lines) + "</table>"


def _cells(texts: Sequence[str]) -> str:
    return "".join(f"<td>{text}</td>" for text in texts)
