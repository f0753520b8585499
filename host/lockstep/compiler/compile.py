"""One stage of a graph as one program for one core and one batch of sequence lengths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lockstep_isa.config import CoreConfig
from lockstep_isa.instructions import LOAD, Memory
from lockstep_isa.program import Program

from lockstep.graph import (
    Activation,
    Add,
    Attention,
    Constant,
    Experts,
    Gather,
    Graph,
    Input,
    LayerNorm,
    Linear,
    Multiply,
    Node,
    Quantise,
    RMSNorm,
    Rotary,
    Value,
)

from .allocation import CapacityError
from .attention import AttentionLowering, Projection, Sequence
from .causal import CausalAttentionLowering
from .context import CausalRun, Context
from .image import Image, LinearImage
from .layout import panel_count
from .lowering import PARAMETER_RING, WEIGHT_RING, Fetched, Lowering, Panels, QuantisedPanels, rows_of
from .norms import layer_norm, rms_norm
from .rotary import ColumnAngles, PanelAngles, rotary
from .stages import Stage


@dataclass(frozen=True)
class Binding:
    """Where a value crosses between host and device: its byte address and features, panels of all sequences."""

    address: int
    features: int


def sequences_of(lengths: tuple[int, ...], rows: int) -> list[Sequence]:
    """Row tiles of a batch: each sequence begins on a row tile of its own."""
    result, first = [], 0
    for tokens in lengths:
        tiles = panel_count(tokens, rows)
        result.append(Sequence(first, tiles, tokens))
        first += tiles
    return result


def feature_counts(graph: Graph) -> dict[Value, int]:
    """Features of every value whose node tells them, or whose inputs do; those of fallbacks are not among them."""
    features: dict[Value, int] = {}
    for node in graph:
        match node:
            case Gather():
                features[node.value] = graph.tensors[node.table].shape[1]
            case Constant():
                features[node.value] = graph.tensors[node.tensor].shape[1]
            case Input(shape=(None, int(size))):
                features[node.value] = size
            case Linear():
                features[node.value] = graph.tensors[node.weight].shape[0]
                features.setdefault(node.quantised, graph.tensors[node.weight].shape[1])
            case Attention():
                features[node.value] = node.heads * node.head_dim
            case Experts():
                features[node.value] = graph.tensors[node.experts[0].down].shape[0]
            case LayerNorm():
                features[node.value] = graph.tensors[node.gamma].size
            case RMSNorm() | Rotary():
                if node.x in features:
                    features[node.value] = features[node.x]
            case Add() | Multiply():
                known = [features[v] for v in node.inputs if v in features]
                if known:
                    features[node.value] = max(known)
            case Activation() | Quantise():
                if node.x in features:
                    features[node.value] = features[node.x]
    return features


#: Share of the WEIGHT memory for streamed weights where the rest holds tiles of a key-value cache.
_CACHED_WEIGHT_RING = 0.5
#: Fewest row tiles in a block of a feed-forward layer: weights are streamed once per block.
_LEAST_BLOCK = 3


@dataclass(frozen=True)
class _FeedForward:
    first: Linear
    activation: Activation | None
    quantise: Quantise
    second: Linear


class StageCompiler:
    """Compiles the device work of a stage.

    Parameters
    ----------
    config : the core. graph, stage : what to compile. image : the parameters. lengths : tokens of each sequence.
    bindings : where inputs and outputs lie in device memory. run : for new tokens of one cached sequence, which are
    then all rows of its tiles.

    Attributes
    ----------
    context : the program's run-time operands; none without ``run``.
    """

    def __init__(
        self,
        config: CoreConfig,
        graph: Graph,
        stage: Stage,
        image: Image,
        lengths: tuple[int, ...],
        bindings: Mapping[Value, Binding],
        run: CausalRun | None = None,
    ) -> None:
        self.config, self.graph, self.stage, self.run = config, graph, stage, run
        self.low = Lowering(config, image, WEIGHT_RING if run is None else _CACHED_WEIGHT_RING, PARAMETER_RING)
        self.context = None if run is None else Context(self.low.builder, config, run.capacity, run.tiles, run.single)
        self.image = image
        self.angles: dict[tuple[str, str], PanelAngles | ColumnAngles] = {}
        self.fetched: dict[Value, list[Fetched]] = {}
        self.attentions: dict[Value, CausalAttentionLowering] = {}
        self.appended: set[Value] = set()
        self.sequences = sequences_of(lengths, config.rows)
        self.tiles = sum(s.tiles for s in self.sequences)
        self.bindings = bindings
        self.readers: dict[Value, list[Node]] = {}
        for node in stage.device:
            for value in node.inputs:
                self.readers.setdefault(value, []).append(node)
        self.panels: dict[Value, Panels] = {}
        self.quantised: dict[Value, QuantisedPanels] = {}
        self.deferred: dict[Value, Node] = {}
        self.chains: dict[Value, _FeedForward] = {}
        self.pending_reads = {v: len(r) for v, r in self.readers.items()}
        for value in stage.outputs:
            self.pending_reads[value] = self.pending_reads.get(value, 0) + 1

    def compile(self) -> Program:
        """The program; raises :class:`CapacityError` where the batch does not fit the core."""
        longest = max(s.tokens for s in self.sequences)
        for node in self.stage.device:
            if isinstance(node, Attention) and self.run is None and longest > node.tile:
                raise CapacityError(
                    f"a sequence of {longest} tokens is longer than the {node.tile} keys that attention on a core "
                    "takes; split the text"
                )
        order = self._ordered()
        last_products = {}
        for node in order:
            if isinstance(node, Linear):
                product = node.value
            elif isinstance(node, Attention) and self.run is not None:
                last_products[product] = node
        for node in order:
            if not self._defer(node):
                self._lower(node)
            if node.value in last_products:
                self._load_ahead(last_products[node.value])
        return self.low.builder.finish()

    def _ordered(self) -> tuple[Node, ...]:
        """The stage's nodes in the order of their emission.

        New keys and values go to the cache first, so that storing them hides behind the products of the queries: what
        cached attention reads is visited depth first, values before keys before queries.
        """
        if self.run is None:
            return self.stage.device
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
        return tuple(ordered.values())

    # --- Values ------------------------------------------------------------------------------------------------

    def _read(self, value: Value) -> Panels:
        """The panels of a value, loaded from device memory at their first use."""
        if value not in self.panels:
            binding = self.bindings[value]
            self.panels[value] = self.low.load(binding.address, binding.features, self.tiles)
        return self.panels[value]

    def _done(self, value: Value) -> None:
        """One reader less; behind the last one the memory is free."""
        self.pending_reads[value] -= 1
        if self.pending_reads[value] == 0:
            if value in self.panels:
                self.low.free(self.panels.pop(value))
            if value in self.quantised:
                self.low.free_quantised(self.quantised.pop(value))

    def _new(self, features: int) -> Panels:
        return Panels(self.low.vectors.take(self.tiles * features), features, self.tiles)

    def _reuse_or_new(self, value: Value, features: int) -> Panels:
        """Panels for a result: those of ``value`` itself where nobody else will read it."""
        old = self.panels[value]
        if self.pending_reads[value] == 1 and old.features == features:
            fresh = Panels(old.start, features, self.tiles)
            for words in old.absmax.values():
                self.low.parameters.give(words)
            old.absmax = {}
            del self.panels[value]
            return fresh
        return self._new(features)

    def _finish(self, node: Node, panels: Panels) -> None:
        """A result is there: store it if it leaves the device."""
        self.panels[node.value] = panels
        if self.run is not None:
            self._append(node.value, panels, self.run)
        if node.value in self.stage.outputs:
            self.low.store(panels, self.bindings[node.value].address)
            self._done(node.value)
        elif node.value not in self.pending_reads:
            self.low.free(self.panels.pop(node.value))

    def _wanted_maxima(self, value: Value) -> tuple[str | None] | None:
        """The pre-scale of the Quantise that reads a value, so that its producer can keep the maxima on the way."""
        for reader in self.readers.get(value, []):
            if isinstance(reader, Quantise):
                return (reader.prescale,)
        return None

    def _only_reader(self, value: Value) -> Node | None:
        readers = self.readers.get(value, [])
        return readers[0] if len(readers) == 1 and value not in self.stage.outputs else None

    # --- Nodes -------------------------------------------------------------------------------------------------

    def _defer(self, node: Node) -> bool:
        """Whether a node is emitted together with its only reader."""
        reader = self._only_reader(node.value)
        if node.value in self.deferred:
            return True
        if node.value in self.chains:
            return False
        if isinstance(node, Linear) and (chain := self._feed_forward_chain(node)):
            self.chains[chain.second.value] = chain
            self.deferred |= {n.value: n for n in (node, chain.activation, chain.quantise) if n is not None}
            return True
        together = (
            (isinstance(node, Linear) and isinstance(reader, Attention) and self._per_head(node, reader))
            or (isinstance(node, Linear) and isinstance(reader, Activation))
            or (isinstance(node, Linear) and isinstance(reader, Multiply) and self._rides(node, reader))
            or (
                isinstance(node, Linear) and isinstance(reader, Add) and node.bias is None and self._rides(node, reader)
            )
            or (isinstance(node, Add) and isinstance(reader, LayerNorm))
        )
        if together:
            self.deferred[node.value] = node
        return together

    def _feed_forward_chain(self, first: Linear) -> _FeedForward | None:
        """Linear, perhaps an activation, Quantise, Linear, each read by the next only: done in blocks of rows."""
        reader = self._only_reader(first.value)
        activation = reader if isinstance(reader, Activation) else None
        if activation is not None:
            reader = self._only_reader(activation.value)
        if not isinstance(reader, Quantise):
            return None
        second = self._only_reader(reader.value)
        return _FeedForward(first, activation, reader, second) if isinstance(second, Linear) else None

    def _per_head(self, node: Linear, reader: Attention) -> bool:
        heads = reader.heads if node.value == reader.q else reader.kv_heads
        return self.run is None and self.graph.tensors[node.weight].shape[0] == heads * reader.head_dim

    def _rides(self, node: Linear, reader: Add | Multiply) -> bool:
        """Whether the other operand of a sum or product can meet this linear layer's results as they are drained."""
        other = reader.y if reader.x == node.value else reader.x
        if other == node.value or other in self.deferred:
            return False
        if isinstance(reader, Multiply):
            return not self._prescaled(reader.value)
        # Sums that ride on a layer norm are left to it.
        return not isinstance(self._only_reader(reader.value), LayerNorm)

    def _prescaled(self, value: Value) -> bool:
        wanted = self._wanted_maxima(value)
        return wanted is not None and wanted[0] is not None

    def _lower(self, node: Node) -> None:
        match node:
            case Add():
                self._finish(node, self._add(node))
            case Multiply():
                self._multiply(node)
            case LayerNorm():
                self._layer_norm(node)
            case RMSNorm():
                self._rms_norm(node)
            case Rotary():
                self._rotary(node)
            case Activation():
                self._activation(node)
            case Quantise():
                self.quantised[node.value] = self.low.quantise(self._read(node.x), node.prescale)
                self._done(node.x)
            case Linear() if node.value in self.chains:
                self._feed_forward(self.chains[node.value])
            case Linear() if self.run is not None and node.value == self.graph.output:
                self._logits(node, self.run)
            case Linear():
                self._linear(node, node, None)
            case Attention() if self.run is not None:
                self._causal_attention(node, self.run)
            case Attention():
                self._attention(node)
            case _:
                raise TypeError(f"{type(node).__name__} does not run on a device")

    def _add(self, node: Add) -> Panels:
        linear, other = self._riding(node)
        if linear is not None:
            return self._linear_with(linear, node, other)
        x, y = self._read(node.x), self._read(node.y)
        into = self._reuse_or_new(node.x, x.features)
        self.low.add(x, y, into)
        self._done(node.x)
        self._done(node.y)
        return into

    def _multiply(self, node: Multiply) -> None:
        linear, other = self._riding(node)
        if linear is not None:
            self._finish(node, self._linear_with(linear, node, other))
            return
        x, y = self._read(node.x), self._read(node.y)
        into = self._reuse_or_new(node.x, x.features)
        absmax = self._wanted_maxima(node.value)
        fields = {}
        if absmax is not None and absmax[0] is None:
            fields = self.low.absmax_fields(into, None, 0, False)
        self.low.multiply(x, y, into, **fields)
        self._done(node.x)
        self._done(node.y)
        self._finish(node, into)

    def _riding(self, node: Add | Multiply) -> tuple[Linear | None, Value]:
        """The linear layer that waits for a sum or product, and the value that it meets."""
        for value, other in ((node.x, node.y), (node.y, node.x)):
            producer = self.deferred.pop(value, None)
            if isinstance(producer, Linear):
                return producer, other
        return None, node.y

    def _linear_with(self, linear: Linear, node: Add | Multiply, other: Value) -> Panels:
        """A linear layer whose results meet ``other`` while they are drained."""
        q, operand = self.quantised[linear.quantised], self._read(other)
        image, fetched = self._image_of(linear, q.features), self.fetched.pop(linear.value, [])
        into = self._reuse_or_new(other, operand.features)
        absmax = self._wanted_maxima(node.value)
        if isinstance(node, Add):
            self.low.linear(q, image, into, absmax, residual=operand, fetched=fetched)
        else:
            self.low.linear(q, image, into, absmax, factor=operand, fetched=fetched)
        self._done(linear.quantised)
        self._done(other)
        return into

    def _layer_norm(self, node: LayerNorm) -> None:
        absmax = self._wanted_maxima(node.value)
        added = self.deferred.pop(node.x, None)
        if isinstance(added, Add):
            x, y = self._read(added.x), self._read(added.y)
            into = self._reuse_or_new(added.x, x.features)
            layer_norm(self.low, x, y, into, node.gamma, node.beta, node.eps, absmax)
            self._done(added.x)
            self._done(added.y)
        else:
            x = self._read(node.x)
            into = self._reuse_or_new(node.x, x.features)
            layer_norm(self.low, x, None, into, node.gamma, node.beta, node.eps, absmax)
            self._done(node.x)
        self._finish(node, into)

    def _rms_norm(self, node: RMSNorm) -> None:
        x = self._read(node.x)
        into = self._reuse_or_new(node.x, x.features)
        absmax = self._wanted_maxima(node.value)
        rms_norm(self.low, x, into, node.gamma, node.eps, node.groups, absmax)
        self._done(node.x)
        self._finish(node, into)

    def _rotary(self, node: Rotary) -> None:
        if node.interleaved:
            raise CapacityError("rotary embeddings of neighbouring features are not built for cores; run on the cpu")
        x = self._read(node.x)
        into = self._reuse_or_new(node.x, x.features)
        if into.start != x.start:
            self.low.elementwise(x, into)
        rotary(self.low, into, self._angles(node), node.heads)
        self._done(node.x)
        self._finish(node, into)

    def _angles(self, node: Rotary) -> PanelAngles | ColumnAngles:
        """The angles of the program's tokens, loaded at their first use."""
        key = (node.cos, node.sin)
        if key not in self.angles:
            single = self.context is not None and self.context.single
            self.angles[key] = self._column_angles(*key) if single else self._panel_angles(*key)
        return self.angles[key]

    def _column_angles(self, cos: str, sin: str) -> ColumnAngles:
        assert self.context is not None
        address, words, pairs = self.image.angle_columns(cos, sin)
        start, rows = self.low.parameters.take(words), self.config.rows
        block = words * self.config.vector_word_bytes
        operand = self.context.first(block)
        self.low.builder.emit(
            LOAD, memory=Memory.PARAMETER, words=words, address=address, address_operand=operand, local=start
        )
        sines, half = start + -(-2 * pairs // rows), -(-pairs // rows)
        return ColumnAngles(start, sines, sines + half, pairs)

    def _panel_angles(self, cos: str, sin: str) -> PanelAngles:
        address, pairs = self.image.angles(cos, sin)
        words = 2 * pairs
        start = self.low.vectors.take(self.tiles * words)
        for sequence in self.sequences:
            self.low.builder.emit(
                LOAD,
                memory=Memory.VECTOR,
                rows=sequence.tiles,
                words=words,
                address=address,
                address_operand=0 if self.context is None else self.context.aligned(4 * words),
                stride=words * self.config.vector_word_bytes,
                local=start + sequence.first * words,
                local_stride=words,
            )
        return PanelAngles(start, pairs)

    def _activation(self, node: Activation) -> None:
        producer = self.deferred.pop(node.x, None)
        if isinstance(producer, Linear):
            self._linear(producer, node, node.function)
            return
        x = self._read(node.x)
        into = self._reuse_or_new(node.x, x.features)
        fields = self.low.function_fields(node.function)
        absmax = self._wanted_maxima(node.value)
        if absmax is not None:
            fields |= self.low.absmax_fields(into, absmax[0], 0, False)
        self.low.elementwise(x, into, **fields)
        self._done(node.x)
        self._finish(node, into)

    def _linear(self, node: Linear, result: Node, activation: str | None) -> None:
        q = self.quantised[node.quantised]
        image, fetched = self._image_of(node, q.features), self.fetched.pop(node.value, [])
        into = self._new(self.graph.tensors[node.weight].shape[0])
        self.low.linear(q, image, into, self._wanted_maxima(result.value), activation, fetched=fetched)
        self._done(node.quantised)
        self._finish(result, into)

    def _logits(self, node: Linear, run: CausalRun) -> None:
        """The output layer, stored chunk by chunk: a vocabulary need not fit on chip."""
        low, q = self.low, self.quantised[node.quantised]
        if run.logits != "none":
            if run.logits == "last":
                q = rows_of(q, run.tiles - 1, 1)
            image = self.image.linear(node.weight, node.scales, node.bias, None, low.panels_per_chunk(q.features))
            binding = self.bindings[node.value]
            for chunk in image.chunks:
                into = Panels(low.vectors.take(q.tiles * chunk.columns), chunk.columns, q.tiles)
                low.drain(q, image, chunk, low.product(q, image, chunk), into.start, into.features)
                word = self.config.vector_word_bytes
                low.store(into, binding.address + chunk.first * word, binding.features * word)
                low.free(into)
        self._done(node.quantised)

    def _append(self, value: Value, panels: Panels, run: CausalRun) -> None:
        """Put new keys or values into the cache as soon as they are there."""
        for reader in self.readers.get(value, []):
            if isinstance(reader, Attention) and value in (reader.k, reader.v):
                attention = self._cached(reader, run)
                self.appended.add(value)
                if value == reader.v:
                    attention.append_values(panels)
                if value == reader.k:
                    attention.append_keys(panels)

    def _cached(self, node: Attention, run: CausalRun) -> CausalAttentionLowering:
        assert self.context is not None
        if node.value not in self.attentions:
            cache = run.caches[node.value]
            self.attentions[node.value] = CausalAttentionLowering(self.low, self.context, node, cache)
        return self.attentions[node.value]

    def _causal_attention(self, node: Attention, run: CausalRun) -> None:
        attention = self._cached(node, run)
        for value in (node.k, node.v):
            if value in self.stage.inputs:
                self._append(value, self._read(value), run)
        q = self._read(node.q)
        for value in (node.k, node.v):
            self._done(value)
        into = self._new(node.heads * node.head_dim)
        attention.attend(q, into, q.head_maxima)
        self._done(node.q)
        self._finish(node, into)

    def _load_ahead(self, node: Attention) -> None:
        """While queries are made ready, the bus has nothing else to do."""
        if {node.k, node.v} <= self.appended:
            self.attentions[node.value].preload()
        self._prefetch(node.value)

    def _prefetch(self, value: Value) -> None:
        """Load the first weights that will meet a value once it is quantised."""
        quantised = self._only_reader(value)
        if not isinstance(quantised, Quantise) or not (readers := self.readers.get(quantised.value)):
            return
        linear = readers[0]
        if isinstance(linear, Linear) and linear.value != self.graph.output:
            depth = self.graph.tensors[linear.weight].shape[1]
            self.fetched[linear.value] = self.low.prefetch(self._image_of(linear, depth))

    def _image_of(self, linear: Linear, depth: int) -> LinearImage:
        most = self.low.panels_per_chunk(depth)
        return self.image.linear(linear.weight, linear.scales, linear.bias, None, most)

    def _feed_forward(self, chain: _FeedForward) -> None:
        """A block's second product runs behind the next block's first one, so that requantisation hides behind that."""
        low, first, second = self.low, chain.first, chain.second
        q = self.quantised[first.quantised]
        middle = self.graph.tensors[first.weight].shape[0]
        image1 = self.image.linear(first.weight, first.scales, first.bias, None, low.panels_per_chunk(q.features))
        image2 = self.image.linear(second.weight, second.scales, second.bias, None, low.panels_per_chunk(middle))
        into = self._new(self.graph.tensors[second.weight].shape[0])
        fits = min(low.vectors.largest // middle, low.activations.largest // (2 * middle))
        tiles = max(1, min(fits, max(_LEAST_BLOCK, -(-self.tiles // 2))))
        before: tuple[int, QuantisedPanels] | None = None
        for start in range(0, self.tiles, tiles):
            count = min(tiles, self.tiles - start)
            block = Panels(low.vectors.take(count * middle), middle, count)
            activation = None if chain.activation is None else chain.activation.function
            low.linear(rows_of(q, start, count), image1, block, (chain.quantise.prescale,), activation)
            quantised = low.quantise(block, chain.quantise.prescale)
            low.free(block)
            if before is not None:
                self._second_product(before, image2, into)
            before = (start, quantised)
        assert before is not None
        self._second_product(before, image2, into)
        self._done(first.quantised)
        self._finish(second, into)

    def _second_product(self, block: tuple[int, QuantisedPanels], image: LinearImage, into: Panels) -> None:
        start, quantised = block
        rows = Panels(into.start + start * into.features, into.features, quantised.tiles)
        self.low.linear(quantised, image, rows)
        self.low.free_quantised(quantised)

    def _projection(self, value: Value, node: Attention) -> Projection:
        producer = self.deferred.pop(value, None)
        if not isinstance(producer, Linear):
            return Projection(None, None, self._read(value))
        q = self.quantised[producer.quantised]
        most = self.low.panels_per_chunk(q.features)
        image = self.image.linear(producer.weight, producer.scales, producer.bias, node.head_dim, most)
        return Projection(q, image, None)

    def _attention(self, node: Attention) -> None:
        if node.window is not None:
            raise CapacityError("windows of attention in both directions are not built for cores; run on the cpu")
        operands = (node.q, node.k, node.v)
        producers = {v: self.deferred.get(v) for v in operands}
        q, k, v = (self._projection(value, node) for value in operands)
        into = self._new(node.heads * node.head_dim)
        absmax = self._wanted_maxima(node.value)
        bias = None
        if node.bias is not None:
            bias = (self.bindings[node.bias].address, self.bindings[node.bias].features)
            self.pending_reads[node.bias] -= 1
        shape = (node.heads, node.head_dim, node.scale)
        lowering = AttentionLowering(self.low, q, k, v, *shape, into, absmax, node.kv_heads, bias)
        lowering.emit(self.sequences)
        for value, producer in producers.items():
            self._done(producer.quantised if isinstance(producer, Linear) else value)
        self._finish(node, into)
