"""Results of query blocks that keep no key: zeros, stored while the array is busy with others."""

from __future__ import annotations

from dataclasses import dataclass

from lockstep_driver.builder import ProgramBuilder
from lockstep_isa.instructions import (
    STORE,
    VECTOR,
    Destination,
    Function,
    Memory,
    Source,
)

from .block_mask import BlockSparse
from .passes import scaling


@dataclass
class EmptyBlocks:
    """Emits what query blocks that keep nothing need.

    Attributes
    ----------
    builder : of the program. work : the attention. row_tiles : of a block. at : VECTOR word of a block of zeros.
    out : byte address of the results. stored : query blocks that are done.
    """

    builder: ProgramBuilder
    work: BlockSparse
    row_tiles: int
    at: int
    out: int
    stored: int = 0

    def begin(self) -> None:
        """Make the zeros."""
        if not self.work.empty:
            return
        # Of whatever PARAMETER holds: as an integer, it is no NaN.
        self.builder.emit(
            VECTOR,
            source=Source.INTEGER,
            destination=Destination.VECTOR,
            **scaling(0.0),
            function=Function.RELU,
            tiles=self.row_tiles,
            columns=self.work.head_dim,
            to=self.at,
            to_stride=self.work.head_dim,
        )

    def store(self, done: int, whole: int) -> None:
        """Store as large a share of them as that of the work that is done: STORE has time for a few behind each strip,
        in whose place the results of strips would wait.
        """
        end = len(self.work.empty) * done // whole
        for head, block in self.work.empty[self.stored : end]:
            tokens = head * self.work.tokens + block * self.work.block
            self.builder.emit(
                STORE,
                memory=Memory.VECTOR,
                words=self.row_tiles * self.work.head_dim,
                address=self.out + tokens * self.work.head_dim * 4,
                local=self.at,
            )
        self.stored = end
