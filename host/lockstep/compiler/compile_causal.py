"""New tokens of one cached sequence as a program that serves every context."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lockstep_isa.config import CoreConfig
from lockstep_isa.instructions import LOAD, Memory

from lockstep.graph import Attention, Graph, LayerNorm, Linear, Node, Quantise, RMSNorm, Value

from .causal import CausalAttentionLowering
from .compile import StageCompiler
from .context import CausalRun, Context
from .image import Image
from .int4_operands import load_operands
from .onchip import Panels, rows_of
from .rotary import ColumnAngles, PanelAngles
from .selected import SelectedAttentionLowering
from .shapes import Binding
from .stages import Stage

#: Share of the WEIGHT memory for streamed weights; the rest holds tiles of the key-value cache.
_WEIGHT_RING = 0.5
#: Share of the ring for weights that are loaded ahead of an attention; more with a cache of at most so many keys, where
#: the bus rests during softmaxes.
_AHEAD, _AHEAD_SHORT, _SHORT = 0.5, 0.625, 256
#: The same where keys are chosen: the bus rests until the first ones are.
_AHEAD_CHOSEN = 0.7


class CausalStageCompiler(StageCompiler):
    """Compiles the device work of a stage for new tokens behind a cache.

    Parameters
    ----------
    config, graph, stage, image, bindings : as for :class:`StageCompiler`. run : the cache, and how many tokens.

    Attributes
    ----------
    context : the program's run-time operands.
    """

    def __init__(
        self,
        config: CoreConfig,
        graph: Graph,
        stage: Stage,
        image: Image,
        bindings: Mapping[Value, Binding],
        run: CausalRun,
    ) -> None:
        super().__init__(config, graph, stage, image, (run.tiles * config.rows,), bindings, _WEIGHT_RING)
        self.run = run
        self.context = Context(self.low.builder, config, run.capacity, run.tiles, run.single, run.positions, run.form)
        self.attentions: dict[Value, CausalAttentionLowering | SelectedAttentionLowering] = {}
        self._int4 = load_operands(self.low, self.context) if run.form.bits == 4 else None
        self.appended: set[Value] = set()
        self.low.widen_ring()
        # The last product before an attention: behind it, queries are made ready and the bus is free.
        self.last_products: dict[Value, Attention] = {}
        # When nodes are emitted.
        self._ranks: dict[Value, int] = {}

    def order(self) -> Iterable[Node]:
        """The stage's nodes in the order of their emission.

        New keys and values go to the cache first, so that storing them hides behind the products of the queries: what
        cached attention reads is visited depth first, values before keys before queries.
        """
        by_value = {node.value: node for node in self.stage.device}
        ordered: dict[Value, Node] = {}

        def visit(node: Node) -> None:
            if node.value in ordered:
                return
            inputs = (node.v, node.k, node.q) if isinstance(node, Attention) else node.inputs
            for value in inputs:
                if value in by_value:
                    visit(by_value[value])
            ordered[node.value] = node

        for node in self.stage.device:
            if isinstance(node, Attention):
                visit(node)
        for node in self.stage.device:
            visit(node)
        product = None
        for node in ordered.values():
            if isinstance(node, Linear):
                product = node.value
            elif isinstance(node, Attention) and product is not None:
                self.last_products[product] = node
        self._ranks = {value: n for n, value in enumerate(ordered)}
        return ordered.values()

    def emit(self, node: Node) -> None:
        if node.value in self.last_products:
            self.low.narrow_ring()
        super().emit(node)
        if node.value in self.last_products:
            self._load_ahead(self.last_products[node.value])

    def _lower(self, node: Node) -> None:
        if isinstance(node, LayerNorm | RMSNorm) and self.run.single:
            # While VECTOR makes a norm, the bus has nothing else to do. What the norm itself wants goes first.
            for name in (node.gamma, *([node.beta] if isinstance(node, LayerNorm) else [])):
                self.low.load_columns(name)
            for prescale in self.readers.wanted_maxima(node.value) or ():
                if prescale is not None:
                    self.low.load_columns(prescale)
            self._prefetch(node.value)
        if isinstance(node, Linear) and node.value == self.graph.output:
            self._logits(node)
        else:
            super()._lower(node)

    def _finish(self, node: Node, panels: Panels) -> None:
        self.panels[node.value] = panels
        self._append(node.value, panels)
        super()._finish(node, panels)

    def _per_head(self, node: Linear, reader: Attention) -> bool:
        return False

    # --- Positions ---------------------------------------------------------------------------------------------

    def _load_angles(self, cos: str, sin: str, operand: int = 0) -> PanelAngles | ColumnAngles:
        if self.context.single:
            return self._column_angles(cos, sin)
        _, pairs = self.image.angles(cos, sin)
        return super()._load_angles(cos, sin, self.context.aligned(8 * pairs))

    def _column_angles(self, cos: str, sin: str) -> ColumnAngles:
        address, words, pairs = self.image.angle_columns(cos, sin)
        start, rows = self.low.parameters.take(words), self.config.rows
        block = words * self.config.vector_word_bytes
        operand = self.context.position(block)
        self.low.builder.emit(
            LOAD, memory=Memory.PARAMETER, words=words, address=address, address_operand=operand, local=start
        )
        sines, half = start + -(-2 * pairs // rows), -(-pairs // rows)
        return ColumnAngles(start, sines, sines + half, pairs)

    # --- Attention ---------------------------------------------------------------------------------------------

    def _append(self, value: Value, panels: Panels) -> None:
        """Put new keys or values into the cache as soon as they are there."""
        for reader in self.readers.of.get(value, []):
            if isinstance(reader, Attention) and value in (reader.k, reader.v):
                attention = self._cached(reader)
                self.appended.add(value)
                if self._int4 is not None:
                    self._prefetch_behind(value, reader)
                if value == reader.v:
                    attention.append.values(panels)
                if value == reader.k:
                    attention.append.keys(panels)

    def _cached(self, node: Attention) -> CausalAttentionLowering | SelectedAttentionLowering:
        if node.value not in self.attentions:
            self.attentions[node.value] = self._lowering(node)
        return self.attentions[node.value]

    def _lowering(self, node: Attention) -> CausalAttentionLowering | SelectedAttentionLowering:
        run, cache = self.run, self.run.caches[node.value]
        if run.blocks is not None:
            sketch = run.sketches[node.value]
            return SelectedAttentionLowering(self.low, self.context, node, cache, sketch, run.blocks)
        importance = run.importance.get(node.value)
        return CausalAttentionLowering(self.low, self.context, node, cache, importance, self._int4)

    def _attention(self, node: Attention) -> None:
        attention = self._cached(node)
        for value in (node.k, node.v):
            if value in self.stage.inputs:
                self._append(value, self._read(value))
        q = self._read(node.q)
        self.low.joins.emit()
        for value in (node.k, node.v):
            self._done(value)
        into = self._new(node.heads * node.head_dim)
        self.low.catch_up()
        self.low.narrow_ring()
        attention.attend(q, into, lambda: self._stream_on(node.value))
        self._done(node.q)
        self._finish(node, into)

    def _load_ahead(self, node: Attention) -> None:
        """While queries are made ready, the bus has nothing else to do."""
        if {node.k, node.v} <= self.appended:
            self.low.joins.emit()
            self.low.catch_up()
            self.attentions[node.value].preload()
        share = _AHEAD if self.run.capacity > _SHORT else _AHEAD_SHORT
        self._prefetch(node.value, share if self.run.blocks is None else _AHEAD_CHOSEN)

    def _stream_on(self, value: Value) -> None:
        """All keys and values are loaded: their words serve weights until the next attention."""
        self.low.widen_ring()
        self._prefetch(value)

    def _prefetch(self, value: Value, share: float = 1) -> None:
        """Load the first weights that will meet a value once it is quantised."""
        quantised = self.readers.only_reader(value)
        if isinstance(quantised, Quantise):
            self._prefetch_products(quantised.value, share)

    def _prefetch_behind(self, value: Value, reader: Attention) -> None:
        """Load the first weights of the product behind keys or values, in front of the many short passes that append
        them: the dispatcher goes in order, and would stop LOAD with them.
        """
        rank, last = self._ranks.get(value), self._ranks[reader.value]
        linears = [node for node in self.stage.device if isinstance(node, Linear)]
        behind = [node for node in linears if rank is not None and rank < self._ranks[node.value] < last]
        if behind:
            product = min(behind, key=lambda linear: self._ranks[linear.value])
            if product.value in self.last_products:
                self.low.narrow_ring()
            self.low.prefetch(self._image_of(product), _AHEAD)

    def _prefetch_products(self, quantised: Value, share: float) -> None:
        linears = [
            r for r in self.readers.of.get(quantised, []) if isinstance(r, Linear) and r.value != self.graph.output
        ]
        if linears:
            first = min(linears, key=lambda linear: self._ranks[linear.value])
            self.low.prefetch(self._image_of(first), share)

    # --- The output --------------------------------------------------------------------------------------------

    def _logits(self, node: Linear) -> None:
        """The output layer, stored chunk by chunk: a vocabulary need not fit on chip."""
        low, q, run = self.low, self.quantised[node.quantised], self.run
        if run.logits != "none":
            if run.logits == "last":
                q = rows_of(q, run.tiles - 1, 1)
            image = self._image_of(node)
            binding = self.bindings[node.value]
            for chunk in image.chunks:
                into = Panels(low.vectors.take(q.tiles * chunk.columns), chunk.columns, q.tiles)
                low.drain(q, image, chunk, low.product(q, image, chunk), into.start, into.features)
                word = self.config.vector_word_bytes
                low.store(into, binding.address + chunk.first * word, binding.features * word)
                low.free(into)
        self._done(node.quantised)
