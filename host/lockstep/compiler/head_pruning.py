"""Attention of which only some heads are there, and a sequence says which.

How many heads stay is known when a program is built, so it has as many turns as heads that stay. Which head has which
turn is known when it runs: operands move the LOADs of its weights to those of that head, and its results to where that
head's columns are. VECTOR has no such operands, so results go there by way of device memory: a STORE of what a
turn left, and a LOAD to the head's columns while the next turns compute. Nothing is loaded or computed for others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from lockstep_driver.builder import ProgramBuilder
from lockstep_isa.instructions import LOAD, OPERANDS, Memory

from lockstep.graph import Attention, Graph, Linear, Node, PositionBias, Value
from lockstep.head_pruning import KeepHeads, Present, spread_heads

from .allocation import CapacityError
from .attention import AttentionLowering, Head, Part, Projection
from .attention import Sequence as Tokens
from .compile import StageCompiler
from .image import HeadRecords, LinearImage
from .onchip import Panels, rows_of
from .stages import Stage


@dataclass(frozen=True)
class HeadOffset:
    """What an operand is worth: the number of a head that stays, or of its keys and values, times ``factor``.

    choice : the value that says which heads stay. sequence : of the batch. turn : counts the heads that stay, or with
    ``group`` heads to one their keys and values.
    """

    choice: Value
    sequence: int
    turn: int
    factor: int
    group: int = 1

    def value(self, present: Present) -> int:
        """The operand, if these heads stay."""
        return int(np.flatnonzero(present[:: self.group])[self.turn]) * self.factor


class HeadOperands:
    """The operands of one program that say which heads are there, declared while it is built.

    Attributes
    ----------
    offsets : what they are worth, by name.
    """

    def __init__(self, builder: ProgramBuilder, choices: Mapping[Value, KeepHeads]) -> None:
        self.choices = choices
        self.offsets: dict[str, HeadOffset] = {}
        self._builder = builder
        self._numbers: dict[HeadOffset, int] = {}

    def of(self, offset: HeadOffset) -> int:
        """The number of an operand, declared once; raises :class:`CapacityError` where there are too many."""
        if offset not in self._numbers:
            if len(self._numbers) == OPERANDS - 1:
                raise CapacityError(
                    f"the places of heads that stay take more than the {OPERANDS - 1} operands of a program; let fewer "
                    "heads stay, or run on the cpu"
                )
            keep, factor = self.choices[offset.choice], offset.factor
            gone = (keep.heads - keep.kept) // offset.group
            kind = "head" if offset.group == 1 else "keys"
            name = f"choice{offset.choice}_{offset.sequence}_{kind}{offset.turn}_x{factor}"
            limits = (offset.turn * factor, (offset.turn + gone) * factor, factor)
            self._numbers[offset] = self._builder.operand(name, *limits)
            self.offsets[name] = offset
        return self._numbers[offset]


def operand_values(offsets: Mapping[str, HeadOffset], values: Sequence[Mapping[Value, Any]]) -> dict[str, int]:
    """Operands by name; ``values`` has which heads are there, by their choice, for each sequence."""
    return {name: offset.value(values[offset.sequence][offset.choice]) for name, offset in offsets.items()}


def most_sequences(graph: Graph, count: int) -> int:
    """Sequences of ``count`` whose heads one program can place; at least 1."""
    biased = 1 if graph.of(PositionBias) else 0
    needed = [(2 + biased) * keep.kept + (keep.kept_kv if keep.group > 1 else 0) for keep in graph.of(KeepHeads)]
    return max(1, (OPERANDS - 1) // max(needed)) if needed else count


def crossing_features(graph: Graph, stage: Stage) -> dict[Value, int]:
    """Features of values of a stage that cross in another form than they have: queries, keys and values of heads that
    are there, side by side, and for each choice of heads what holds all results of an attention on their way.
    """
    choices = {keep.value: keep for keep in graph.of(KeepHeads)}
    features: dict[Value, int] = {}
    for node in stage.device:
        if isinstance(node, Attention) and node.present is not None:
            own = choices[node.present].kept * node.head_dim
            features[node.present] = max(features.get(node.present, 0), own)
        elif isinstance(node, Linear) and node.present is not None:
            keep = choices[node.present]
            features[node.value] = len(graph.tensors[node.weight]) * keep.kept_kv // keep.kv_heads
    return features


def whole_columns(node: Linear, array: np.ndarray, values: Mapping[Value, Any]) -> np.ndarray:
    """A product that crossed, with the columns of heads that are not there; ``values`` has which those are."""
    if node.present is None:
        return array
    present = values[node.present]
    group = int(present.sum()) * node.head_dim // array.shape[1]
    return spread_heads(array, present[::group], node.head_dim)


class PresentHeadsLowering(AttentionLowering):
    """Emits an attention of the heads that are there.

    Parameters
    ----------
    operands, choice : what says which they are. records : of queries, keys and values, with how many heads share one.
    columns : byte address of head 0's columns of the pre-scale of ``absmax``, and bytes to the next head's.
    transit : byte address of the memory through which results go to their columns. stored : byte addresses of queries,
    keys and values that leave the device, as panels of the heads that are there; the rest is as for
    :class:`AttentionLowering`, with ``heads`` and ``kv_heads`` of those that are there.
    """

    def __init__(
        self,
        *arguments: Any,
        operands: HeadOperands,
        choice: Value,
        sequences: list[Tokens],
        records: Mapping[str, tuple[LinearImage, int, int]],
        columns: tuple[int, int],
        transit: int,
        stored: Mapping[str, int],
    ) -> None:
        super().__init__(*arguments)
        self.operands, self.choice, self.records, self.columns = operands, choice, records, columns
        self.transit, self.stored = transit, stored
        self.numbers = {tokens.first: number for number, tokens in enumerate(sequences)}
        self.word = self.low.config.vector_word_bytes
        # Results of two turns: one that is computed, one that is stored.
        size = max(tokens.tiles for tokens in sequences) * self.head_dim
        self.results = [self.low.vectors.take(size) for _ in range(2)]
        self._turns = 0
        self._on_its_way: Head | None = None
        self._prescales: dict[tuple[int, int], int] = {}

    def emit(self, sequences: list[Tokens], ready: int) -> None:
        super().emit(sequences, ready)
        self._bring_back()
        for words in self.results:
            self.low.vectors.give(words)

    def _clear(self) -> None:
        """Fill the columns of all heads with zeros."""
        into, rows = self.into, self.low.config.rows
        zeros = self.low.image.constant(("zeros", into.features), np.zeros((into.features, rows), np.float32))
        self.low.builder.emit(
            LOAD,
            memory=Memory.VECTOR,
            rows=into.tiles,
            words=into.features,
            address=zeros,
            local=into.start,
            local_stride=into.features,
        )

    def _offset(self, head: Head, factor: int, group: int = 1) -> int:
        """The operand that is a head's number, or that of its keys and values, times ``factor``."""
        return self.operands.of(
            HeadOffset(self.choice, self.numbers[head.sequence.first], head.head // group, factor, group)
        )

    def _part(self, head: Head, name: str) -> Part:
        image, stride, group = self.records[name]
        moved = self._offset(head, stride, group)
        quantised = self.projections["qkv".index(name)].quantised
        assert quantised is not None
        if name == "q" and self.absmax is not None and self.absmax[0] is not None:
            self._load_prescale(head)
        rows = rows_of(quantised, head.sequence.first, head.sequence.tiles)
        return Part(name, rows, image, tuple(replace(chunk, operand=moved) for chunk in image.chunks))

    def _load_prescale(self, head: Head) -> None:
        """The head's columns of the pre-scale of what the results become."""
        address, stride = self.columns
        words = self.head_dim // self.low.config.rows
        start = self.low.parameters.take(words)
        self._prescales[head.sequence.first, head.head] = start
        self.low.builder.emit(
            LOAD,
            memory=Memory.PARAMETER,
            words=words,
            address=address,
            address_operand=self._offset(head, stride),
            local=start,
        )

    def _convert(self, head: Head, part: Part) -> None:
        turn, count = (head.head, self.heads) if part.name == "q" else self._kv(head)
        shared = self.heads // count
        if part.name in self.stored and head.head == turn * shared:
            s, d = head.sequence, self.head_dim
            address = self.stored[part.name] + (s.first * count + turn) * d * self.word
            self.low.store(Panels(part.value, d, s.tiles), address, count * d * self.word)
        super()._convert(head, part)

    def _bias_of(self, head: Head, address: int, size: int) -> dict[str, int]:
        return {"address": address, "address_operand": self._offset(head, size)}

    def _maxima(self, head: Head, prescale: str | None) -> dict[str, int]:
        fields = self.low.absmax_fields(self.into, prescale, 0, head.head > 0)
        own = self._prescales.get((head.sequence.first, head.head))
        return fields if own is None else fields | {"column2": own}

    def _place(self, head: Head, first: int) -> dict[str, int]:
        return {"to": self.results[self._turns % 2] + first * self.head_dim, "to_stride": self.head_dim}

    def _forget(self, head: Head) -> None:
        """Send a head's results on their way, and those of the head before from there to their columns."""
        super()._forget(head)
        if self._turns == 0:
            # Not sooner: the weights of the next turn are asked for by now, and those of the one behind it can wait.
            self._clear()
        self._bring_back()
        s, d = head.sequence, self.head_dim
        self.low.store(Panels(self.results[self._turns % 2], d, s.tiles), self._transit_of(head))
        self._turns += 1
        self._on_its_way = head
        if (words := self._prescales.pop((s.first, head.head), None)) is not None:
            self.low.parameters.give(words)

    def _bring_back(self) -> None:
        """Load the results that are in device memory to the columns of their head."""
        head, self._on_its_way = self._on_its_way, None
        if head is None:
            return
        s, d, features = head.sequence, self.head_dim, self.into.features
        self.low.builder.emit(
            LOAD,
            memory=Memory.VECTOR,
            rows=s.tiles,
            words=d,
            address=self._transit_of(head),
            stride=d * self.word,
            local=self.into.start + s.first * features,
            local_operand=self._offset(head, d),
            local_stride=features,
        )

    def _transit_of(self, head: Head) -> int:
        s = head.sequence
        return self.transit + (s.first * self.heads + head.head * s.tiles) * self.head_dim * self.word


class PresentHeadsCompiler(StageCompiler):
    """Compiles a stage some of whose attentions have heads that are not there.

    Attributes
    ----------
    operands : what says which they are; ``bindings`` of a choice are memory for its results on their way.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.operands = HeadOperands(self.low.builder, {keep.value: keep for keep in self.graph.of(KeepHeads)})
        self._products = {node.value: node for node in self.stage.device if isinstance(node, Linear)}

    def _defer(self, node: Node) -> bool:
        if isinstance(node, Linear) and node.present is not None:
            self.deferred[node.value] = node
            return True
        return super()._defer(node)

    def _records(self, node: Attention) -> tuple[dict[str, tuple[LinearImage, int, int]], HeadRecords]:
        """Queries, keys and values head by head, and what comes with queries. One operand serves all three, unless
        heads share keys and values.
        """
        products = [self._products[value] for value in (node.q, node.k, node.v)]
        names = tuple((p.weight, p.scales, p.bias) for p in products)
        most = min(self.low.panels_per_chunk(p.weight) for p in products)
        prescale = next(iter(self.readers.wanted_maxima(node.value) or ()), None)
        group = node.heads // node.kv_heads
        if group == 1:
            record = self.image.records(names, prescale, node.head_dim, most)
            return {name: (image, record.stride, 1) for name, image in zip("qkv", record.images, strict=True)}, record
        record = self.image.records(names[:1], prescale, node.head_dim, most)
        shared = self.image.records(names[1:], None, node.head_dim, most)
        images = {name: (image, shared.stride, group) for name, image in zip("kv", shared.images, strict=True)}
        return {"q": (record.images[0], record.stride, 1), **images}, record

    def _projection(self, value: Value, node: Attention) -> Projection:
        if node.present is None:
            return super()._projection(value, node)
        product = self.deferred.pop(value)
        assert isinstance(product, Linear)
        name = "qkv"[(node.q, node.k, node.v).index(value)]
        return Projection(self.quantised[product.quantised], self._records(node)[0][name][0], None)

    def _lowering_of(self, node: Attention) -> Callable[..., AttentionLowering]:
        if node.present is None:
            return super()._lowering_of(node)
        keep = self.operands.choices[node.present]
        images, record = self._records(node)
        values = zip("qkv", (node.q, node.k, node.v), strict=True)
        stored = {name: self.bindings[value].address for name, value in values if value in self.stage.outputs}
        transit = self.bindings[node.present].address
        choice = node.present

        def lowering(
            low: Any, q: Projection, k: Projection, v: Projection, heads: int, d: int, scale: float,
            into: Panels, absmax: Any, kv_heads: int, bias: Any,
        ) -> AttentionLowering:  # fmt: skip
            return PresentHeadsLowering(
                *(low, q, k, v, keep.kept, d, scale, into, absmax, keep.kept_kv, bias),
                operands=self.operands,
                choice=choice,
                sequences=self.sequences,
                records=images,
                columns=(record.columns, record.stride),
                transit=transit,
                stored=stored,
            )

        return lowering
