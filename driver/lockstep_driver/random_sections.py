"""Random maxima of sections of rows, for cores that have them."""

from __future__ import annotations

import numpy as np
from lockstep_isa.config import CoreConfig
from lockstep_isa.instructions import SECTIONS, Instruction
from lockstep_isa.program import maxima_region
from lockstep_isa.selection import section_fault


def random_sections(
    rng: np.random.Generator, config: CoreConfig, i: Instruction, words: tuple[int, int]
) -> Instruction:
    """The pass ``i``, often with a maximum of each section of its columns in the place of one of the row, if it may.

    words : the first PARAMETER word for maxima, and the one behind the last.
    """
    if not config.selection or not i.maximum or not rng.integers(2):
        return i
    sections = i.replace(max_columns=int(rng.choice(SECTIONS, 2).min()))
    room = words[1] - words[0] - maxima_region(sections).words
    if room < 0 or section_fault(config, sections):
        return i
    return sections.replace(max_to=words[0] + int(rng.integers(0, room + 1)))
