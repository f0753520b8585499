"""Building programs: instructions in the order of their meaning, tokens found by themselves.

A program means what its instructions do one after the other. The core runs them on four units at once, so whoever
builds one must place tokens wherever two units touch the same words. :class:`ProgramBuilder` does: it remembers for
every on-chip word, and for every piece of device memory that the program writes, who touched it last.
"""

from __future__ import annotations

import numpy as np
from lockstep_isa.choices import Internal
from lockstep_isa.config import CoreConfig
from lockstep_isa.instructions import (
    INDEX_ENTRIES,
    LOAD,
    STORE,
    VECTOR,
    Instruction,
    InstructionType,
    Memory,
    Unit,
    resolve,
    selector,
)
from lockstep_isa.program import (
    Operand,
    Program,
    ProgramError,
    Region,
    check_operand,
    depth_of,
    reads,
    transfer_bytes,
    writes,
)

_NEVER = -1


class ProgramBuilder:
    """Collects instructions and places their tokens.

    An instruction waits for another unit only where a word that it reads was written there, or a word that it
    writes was read or written there, and only if no earlier wait of its unit already covers that. Where operands move
    or stretch what an instruction touches, it is taken to touch everything between the least and the greatest.

    Parameters
    ----------
    config : the core that the program is for.
    """

    def __init__(self, config: CoreConfig) -> None:
        self.config = config
        self._operands: list[Operand] = []
        self._instructions: list[Instruction] = []
        self._wait: list[int] = []
        self._signal: list[int] = []
        # Per memory: index of the last instruction of each unit that read and that wrote each word.
        memories: tuple[Memory | Internal, ...] = (*Memory, *Internal)
        self._read = {m: np.full((len(Unit), depth_of(config, m)), _NEVER, np.int32) for m in memories}
        self._written = {m: np.full((len(Unit), depth_of(config, m)), _NEVER, np.int32) for m in memories}
        self._selected = np.full(INDEX_ENTRIES, INDEX_ENTRIES)  # greater than what each entry of INDEX may hold
        self._stored: list[tuple[int, int, int]] = []  # device memory: first byte, end, index of the STORE
        self._fetched: list[tuple[int, int, int]] = []  # the same for LOADs
        # covered[v][u]: every instruction of unit u up to this index is known to be complete for unit v.
        self._covered = np.full((len(Unit), len(Unit)), _NEVER, np.int64)

    def __len__(self) -> int:
        return len(self._instructions)

    def operand(self, name: str, least: int, greatest: int, step: int = 1) -> int:
        """Declare a run-time operand with its limits, both legal, and every ``step``-th value between them; returns the
        number that selects it.

        ``emit(VECTOR, columns=0, columns_operand=number, ...)`` adds its value to ``columns`` at each run. Raises
        :class:`ProgramError` for a name that is taken, limits that do not fit 32 bits, and a 64th operand.
        """
        declared = Operand(name, least, greatest, step)
        check_operand(declared, self._operands)
        self._operands.append(declared)
        return len(self._operands)

    def emit(self, type: InstructionType, **fields: int) -> int:
        """Append an instruction, without tokens; returns its index.

        A field NAME that has an operand takes its number as ``NAME_operand``; NAME itself is what is added to it.
        """
        instruction = Instruction(type, **fields)
        unit, index = type.unit, len(self._instructions)
        needed = np.full(len(Unit), _NEVER, np.int64)
        extremes = self._extremes(instruction)
        read = self._union([reads(self.config, i) for i in extremes], instruction)
        written = self._union([writes(self.config, i) for i in extremes], instruction)
        for region in read:
            self._latest(self._written, region, needed)
        for region in written:
            self._latest(self._written, region, needed)
            self._latest(self._read, region, needed)
        self._transfer(extremes, index, needed)

        wait = 0
        for other in Unit:
            if other != unit and needed[other] > self._covered[unit][other]:
                wait |= 1 << other
                self._signal[needed[other]] |= 1 << unit
                self._covered[unit][other] = needed[other]
        self._instructions.append(instruction)
        self._wait.append(wait)
        self._signal.append(0)
        for region in read:
            self._mark(self._read, region, unit, index)
        for region in written:
            self._mark(self._written, region, unit, index)
            if type is VECTOR and region.memory == Internal.INDEX:
                self._selected[region.start : region.end] = max(i.columns for i in extremes)
        return index

    def finish(self) -> Program:
        """The program with its tokens."""
        return Program(
            self.config.crc,
            tuple(
                i.replace(wait=w, signal=s) if w or s else i
                for i, w, s in zip(self._instructions, self._wait, self._signal, strict=True)
            ),
            tuple(self._operands),
        )

    def _extremes(self, instruction: Instruction) -> list[Instruction]:
        """The instruction at its greatest size, moved least and moved most; nothing where it never runs."""
        variable = instruction.type.variable
        numbers = [instruction.values[selector(field.name)] for field in variable]
        if not any(numbers):
            return [instruction]
        if max(numbers) > len(self._operands):
            raise ProgramError(
                f"instruction {len(self._instructions)} ({instruction.type.name}) selects operand {max(numbers)}, "
                f"{len(self._operands)} are declared; call operand() first"
            )
        most = resolve(instruction, [o.greatest for o in self._operands])
        if most is None:
            return []
        counts = {field.name: most.values[field.name] for field in variable if field.minimum}
        sized = instruction.replace(**counts, **{selector(name): 0 for name in counts})
        return [i for i in (resolve(sized, [o.least for o in self._operands]), most) if i is not None]

    @staticmethod
    def _union(extremes: list[list[Region]], instruction: Instruction) -> list[Region]:
        """The regions of all extremes; one without gaps where an operand moves the block on chip."""
        regions = list(dict.fromkeys(region for touched in extremes for region in touched))
        if len(regions) > 1 and instruction.type in (LOAD, STORE) and instruction.local_operand:
            start, end = min(r.start for r in regions), max(r.end for r in regions)
            return [Region(regions[0].memory, start, end - start)]
        return regions

    @staticmethod
    def _runs(region: Region) -> list[slice]:
        if region.count == 1 or region.stride == region.words:
            return [slice(region.start, region.start + region.words * region.count)]
        return [slice(s, s + region.words) for s in range(region.start, region.end, region.stride or region.end)]

    def _latest(self, table: dict[Memory | Internal, np.ndarray], region: Region, needed: np.ndarray) -> None:
        for run in self._runs(region):
            np.maximum(needed, table[region.memory][:, run].max(axis=1, initial=_NEVER), out=needed)

    def _mark(self, table: dict[Memory | Internal, np.ndarray], region: Region, unit: Unit, index: int) -> None:
        for run in self._runs(region):
            table[region.memory][unit, run] = index

    def _transfer(self, extremes: list[Instruction], index: int, needed: np.ndarray) -> None:
        """Order in device memory: LOAD behind an overlapping STORE, STORE behind an overlapping LOAD."""
        if not extremes or extremes[0].type not in (LOAD, STORE):
            return
        begin = min(i.address for i in extremes)
        end = max(i.address + self._last_row(i) * i.stride + i.words * transfer_bytes(self.config, i) for i in extremes)
        mine, others, other = (
            (self._fetched, self._stored, Unit.STORE)
            if extremes[0].type is LOAD
            else (self._stored, self._fetched, Unit.LOAD)
        )
        # Recent ones last: the first overlap found from behind is the latest.
        for first, last, at in reversed(others):
            if first < end and begin < last:
                needed[other] = max(needed[other], at)
                break
        mine.append((begin, end, index))

    def _last_row(self, i: Instruction) -> int:
        """The last row of device memory, counted from its address, that a LOAD or STORE may touch."""
        if i.type is LOAD and i.gather:
            return int(self._selected[i.gather_from : i.gather_from + i.rows].max(initial=1)) - 1
        return i.rows - 1
