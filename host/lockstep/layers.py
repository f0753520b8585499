"""What each part of a model costs on a core: cycles, products and bytes by section of its programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lockstep_isa.instructions import LOAD, MATRIX, STORE
from lockstep_isa.packed import matrix_steps
from lockstep_isa.program import transfer_bytes
from lockstep_sim.perfetto import sections
from lockstep_sim.timeline import Timeline

#: What is called so where the compiler gave no name.
WHOLE = "the whole program"


@dataclass(frozen=True)
class Layer:
    """A part of a model, over all programs that ran.

    Attributes
    ----------
    name : path of the module. cycles : from the end of the part before it to its own end.
    macs : multiplications that the array did, padded rows and columns included; of packed weights, its elements in all
    steps.
    bytes_moved : that its instructions load and store; a part may load for the next one.
    matrix_cycles : in which the array worked on it.
    """

    name: str
    cycles: int
    macs: int
    bytes_moved: int
    matrix_cycles: int

    @property
    def intensity(self) -> float | None:
        """Multiplications for each byte; none where nothing is moved."""
        return self.macs / self.bytes_moved if self.bytes_moved else None


def layers(timelines: Sequence[Timeline]) -> list[Layer]:
    """The parts of the programs that ran, those of one name added up, in the order of their first run."""
    found: dict[str, Layer] = {}
    for run in timelines:
        spans = {name: [0, 0, 0, 0] for name in (*(s.name for s in run.sections), WHOLE)}
        for name, start, end in sections(run) or [(WHOLE, 0, run.cycles)]:
            spans[name][0] += end - start
        firsts = [section.first for section in run.sections]
        position, name = 0, WHOLE
        for each in run.slices:
            while position < len(firsts) and firsts[position] <= each.index:
                name = run.sections[position].name
                position += 1
            i = run.resolved(each.index)
            if i is None:
                continue
            counts = spans[name]
            if i.type is MATRIX:
                counts[1] += matrix_steps(i) * run.config.macs_per_cycle
                counts[3] += each.end - each.start - sum(end - start for start, end in each.stalls)
            elif i.type in (LOAD, STORE):
                counts[2] += i.rows * i.words * transfer_bytes(run.config, i)
        for name, counts in spans.items():
            if any(counts):
                old = found.get(name, Layer(name, 0, 0, 0, 0))
                sums = (old.cycles, old.macs, old.bytes_moved, old.matrix_cycles)
                found[name] = Layer(name, *(a + b for a, b in zip(sums, counts, strict=True)))
    return list(found.values())
