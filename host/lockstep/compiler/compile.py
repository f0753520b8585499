"""One stage of a graph as one program for one core and one batch of sequence lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

from lockstep_isa.config import CoreConfig
from lockstep_isa.instructions import LOAD, Memory
from lockstep_isa.program import Program
from lockstep_sim.timeline import Section

from lockstep.graph import (
    Activation,
    Add,
    Attention,
    Graph,
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
from .attention import AttentionLowering, Projection
from .image import Image, LinearImage
from .labels import Labels
from .lowering import WEIGHT_RING, Lowering, Step
from .norms import layer_norm, rms_norm
from .onchip import Panels, QuantisedPanels, panel_rows, rows_of
from .post_norm import LEAST_BLOCK, PostNorm, PostNormLowering, row_blocks
from .readers import FeedForward, Readers
from .rotary import ColumnAngles, PanelAngles, rotary
from .shapes import Binding, sequences_of
from .stages import Stage


class StageCompiler:
    """Compiles the device work of a stage.

    Parameters
    ----------
    config : the core. graph, stage : what to compile. image : the parameters. lengths : tokens of each sequence.
    bindings : where inputs and outputs lie in device memory. weight_ring : as for :class:`Lowering`.

    Attributes
    ----------
    sections : the parts of the program, named after modules of the model.
    """

    def __init__(
        self,
        config: CoreConfig,
        graph: Graph,
        stage: Stage,
        image: Image,
        lengths: tuple[int, ...],
        bindings: Mapping[Value, Binding],
        weight_ring: float = WEIGHT_RING,
    ) -> None:
        self.config, self.graph, self.stage = config, graph, stage
        self.low = Lowering(config, image, weight_ring)
        self.image = image
        self.angles: dict[tuple[str, str], PanelAngles | ColumnAngles] = {}
        self.sequences = sequences_of(lengths, config.rows)
        self.tiles = sum(s.tiles for s in self.sequences)
        self.bindings = bindings
        self.readers = Readers(graph, stage)
        self.sections: list[Section] = []
        self._labels = Labels(graph)
        # Per instruction: what it computes, where that is not the node at hand.
        self._names: dict[int, str] = {}
        # Values that were computed with one before them; row tiles that are ready, where others are still postponed.
        self._computed: set[Value] = set()
        self._ready = self.tiles
        self.panels: dict[Value, Panels] = {}
        self.quantised: dict[Value, QuantisedPanels] = {}
        self.deferred: dict[Value, Node] = {}
        self.chains: dict[Value, FeedForward] = {}
        self.pending_reads = {v: len(r) for v, r in self.readers.of.items()}
        for value in stage.outputs:
            self.pending_reads[value] = self.pending_reads.get(value, 0) + 1

    def compile(self) -> Program:
        """The program; raises :class:`CapacityError` where the batch does not fit the core."""
        for node in self.order():
            first = len(self.low.builder)
            self.emit(node)
            self._name(first, node)
        self.low.catch_up()
        return self.low.builder.finish()

    def order(self) -> Iterable[Node]:
        """The stage's nodes in the order of their emission."""
        return self.stage.device

    def _name(self, first: int, node: Node) -> None:
        """Call the instructions from ``first`` on by what they compute."""
        chain = self.chains.get(node.value)
        name = self._labels.of(node) if chain is None else self._labels.of(chain.first, chain.second)
        for index in range(first, len(self.low.builder)):
            own = self._names.pop(index, name)
            if not self.sections or self.sections[-1].name != own:
                self.sections.append(Section(index, own))

    def _named(self, node: Node, step: Step) -> Step:
        """A step whose instructions are called by ``node`` wherever they are emitted."""

        def named() -> None:
            first = len(self.low.builder)
            step()
            self._names |= dict.fromkeys(range(first, len(self.low.builder)), self._labels.of(node))

        return named

    def emit(self, node: Node) -> None:
        """Emit a node, or leave it to its only reader."""
        if node.value not in self._computed and not self._defer(node):
            if not isinstance(node, Attention) and node.value not in self.chains:
                self._settle()
            self._lower(node)

    def _settle(self) -> None:
        """All row tiles are ready."""
        if self._ready < self.tiles:
            self.low.catch_up()
            self._ready = self.tiles

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
        if self.low.vectors.largest < self.tiles * features:
            self._settle()
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
        if node.value in self.stage.outputs:
            self.low.store(panels, self.bindings[node.value].address)
            self._done(node.value)
        elif node.value not in self.pending_reads:
            self.low.free(self.panels.pop(node.value))

    def _defer(self, node: Node) -> bool:
        """Whether a node is emitted together with its only reader."""
        if node.value in self.deferred:
            return True
        if node.value in self.chains:
            return False
        if isinstance(node, Linear) and (chain := self.readers.feed_forward_chain(node)):
            self.chains[chain.second.value] = chain
            self.deferred |= {n.value: n for n in (node, chain.activation, chain.quantise) if n is not None}
            return True
        reader = self.readers.only_reader(node.value)
        if isinstance(node, Linear) and isinstance(reader, Attention):
            together = self._per_head(node, reader)
        else:
            together = self.readers.together(node, self.deferred)
        if together:
            self.deferred[node.value] = node
        return together

    def _per_head(self, node: Linear, reader: Attention) -> bool:
        """Whether a projection is computed head by head, with its attention."""
        heads = reader.heads if node.value == reader.q else reader.kv_heads
        return self.graph.tensors[node.weight].shape[0] == heads * reader.head_dim

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
            case Linear():
                self._linear(node, node, None)
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
        absmax = self.readers.wanted_maxima(node.value)
        fields = self.low.absmax_fields(into, None, 0, False) if absmax == (None,) else {}
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
        image = self._image_of(linear)
        into = self._reuse_or_new(other, operand.features)
        absmax = self.readers.wanted_maxima(node.value)
        residual, factor = (operand, None) if isinstance(node, Add) else (None, operand)
        self.low.linear(q, image, into, absmax, residual=residual, factor=factor)
        self._done(linear.quantised)
        self._done(other)
        return into

    def _layer_norm(self, node: LayerNorm) -> None:
        absmax = self.readers.wanted_maxima(node.value)
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
        absmax = self.readers.wanted_maxima(node.value)
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
            self.angles[key] = self._load_angles(*key)
        return self.angles[key]

    def _load_angles(self, cos: str, sin: str, operand: int = 0) -> PanelAngles | ColumnAngles:
        """Rows of a rotary table for every row tile; ``operand`` names the offset of the first in bytes."""
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
                address_operand=operand,
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
        absmax = self.readers.wanted_maxima(node.value)
        if absmax is not None:
            fields |= self.low.absmax_fields(into, absmax[0], 0, False)
        self.low.elementwise(x, into, **fields)
        self._done(node.x)
        self._finish(node, into)

    def _linear(self, node: Linear, result: Node, activation: str | None) -> None:
        q = self.quantised[node.quantised]
        image = self._image_of(node)
        into = self._new(self.graph.tensors[node.weight].shape[0])
        blocks = row_blocks(self.tiles)
        post = self._post_norm(node, 0) if len(blocks) > 1 and result is node else None
        if post is None:
            self.low.linear(q, image, into, self.readers.wanted_maxima(result.value), activation)
            self._done(node.quantised)
            self._finish(result, into)
            return
        self._finish(result, into)
        lowering = self._begin_post_norm(post)
        for first, tiles in blocks:
            self.low.linear(rows_of(q, first, tiles), image, panel_rows(into, first, tiles))
            self._postpone(lowering, first, tiles)
        self._done(node.quantised)

    # --- Norms behind products ---------------------------------------------------------------------------------

    def _post_norm(self, product: Linear, beside: int) -> PostNorm | None:
        """The layer norm of a sum with a product, if nothing else reads that, the other operand is there, and its
        quantised rows fit beside so many ACTIVATION words.
        """
        add = self.readers.only_reader(product.value)
        if not isinstance(add, Add) or add.x == add.y:
            return None
        norm, other = self.readers.only_reader(add.value), add.y if add.x == product.value else add.x
        if not isinstance(norm, LayerNorm) or (other not in self.panels and other not in self.stage.inputs):
            return None
        if not self.low.activations.fit(self.tiles * self.graph.tensors[norm.gamma].size, beside):
            return None
        quantise = [r for r in self.readers.of.get(norm.value, []) if isinstance(r, Quantise)]
        return PostNorm(add, norm, quantise[0] if quantise else None)

    def _begin_post_norm(self, post: PostNorm) -> PostNormLowering:
        """Places for the norm and its quantised rows, which are emitted from here on."""
        add, norm, low = post.add, post.norm, self.low
        x, y = self._read(add.x), self._read(add.y)
        into, quantised = self._reuse_or_new(add.x, x.features), None
        self.panels[norm.value] = into
        self._computed |= {add.value, norm.value}
        if post.quantise is not None:
            quantised = self.quantised[post.quantise.value] = low.new_quantised(into)
            into.absmax[post.quantise.prescale] = low.parameters.take(self.tiles)
            self._computed.add(post.quantise.value)
        return PostNormLowering(low, post, x, y, into, quantised, self._named)

    def _postpone(self, lowering: PostNormLowering, first: int, tiles: int) -> None:
        """Leave some row tiles of a norm to the products to come."""
        then: list[Step] = []
        nodes, into = lowering.nodes, lowering.into
        if nodes.norm.value in self.stage.outputs:
            address = self.bindings[nodes.norm.value].address + first * into.features * self.config.vector_word_bytes
            then.append(self._named(nodes.norm, lambda: self.low.store(panel_rows(into, first, tiles), address)))
        if first + tiles == self.tiles:
            done = [nodes.add.x, nodes.add.y]
            done += [nodes.norm.value] * (nodes.norm.value in self.stage.outputs)
            done += [] if nodes.quantise is None else [nodes.norm.value]
            then += [lowering.drop_columns, *(partial(self._done, value) for value in done)]
            self._ready = first
        lowering.postpone(first, tiles, then)

    def _image_of(self, linear: Linear) -> LinearImage:
        most = self.low.panels_per_chunk(linear.weight)
        return self.image.linear(linear.weight, linear.scales, linear.bias, None, most)

    def _feed_forward(self, chain: FeedForward) -> None:
        """A block's second product runs behind the next block's first one, so that requantisation hides behind that."""
        low, first, second = self.low, chain.first, chain.second
        q = self.quantised[first.quantised]
        middle = self.graph.tensors[first.weight].shape[0]
        image1 = self._image_of(first)
        image2 = self._image_of(second)
        into = self._new(self.graph.tensors[second.weight].shape[0])
        norm = None
        if post := self._post_norm(second, 2 * LEAST_BLOCK * middle):
            self._finish(second, into)
            norm = self._begin_post_norm(post)
        tiles = max(LEAST_BLOCK, -(-self.tiles // 2))
        if low.vectors.largest < tiles * middle:
            self._settle()
        fits = min(low.vectors.largest // middle, low.activations.largest // (2 * middle))
        tiles = max(1, min(fits, tiles))
        before: tuple[int, QuantisedPanels] | None = None
        for start in range(0, self.tiles, tiles):
            count = min(tiles, self.tiles - start)
            if start + count > self._ready:
                self._settle()
            block = Panels(low.vectors.take(count * middle), middle, count)
            activation = None if chain.activation is None else chain.activation.function
            low.linear(rows_of(q, start, count), image1, block, (chain.quantise.prescale,), activation)
            if self.tiles == 1:
                # While VECTOR quantises, the bus has nothing else to do.
                low.prefetch(image2)
            quantised = low.quantise(block, chain.quantise.prescale)
            low.free(block)
            if before is not None:
                self._second_product(before, image2, into, norm)
            before = (start, quantised)
        assert before is not None
        self._second_product(before, image2, into, norm)
        self._done(first.quantised)
        if norm is None:
            self._finish(second, into)

    def _second_product(
        self, block: tuple[int, QuantisedPanels], image: LinearImage, into: Panels, norm: PostNormLowering | None
    ) -> None:
        start, quantised = block
        self.low.linear(quantised, image, panel_rows(into, start, quantised.tiles))
        self.low.free_quantised(quantised)
        if norm is not None:
            self._postpone(norm, start, quantised.tiles)

    def _projection(self, value: Value, node: Attention) -> Projection:
        producer = self.deferred.pop(value, None)
        if not isinstance(producer, Linear):
            return Projection(None, None, self._read(value))
        q = self.quantised[producer.quantised]
        most = self.low.panels_per_chunk(producer.weight)
        image = self.image.linear(producer.weight, producer.scales, producer.bias, node.head_dim, most)
        return Projection(q, image, None)

    def _attention(self, node: Attention) -> None:
        longest = max(s.tokens for s in self.sequences)
        if longest > node.tile:
            raise CapacityError(
                f"a sequence of {longest} tokens is longer than the {node.tile} keys that attention on a core takes; "
                "split the text"
            )
        if node.window is not None:
            raise CapacityError("windows of attention in both directions are not built for cores; run on the cpu")
        operands = (node.q, node.k, node.v)
        producers = {v: self.deferred.get(v) for v in operands}
        q, k, v = (self._projection(value, node) for value in operands)
        into = self._new(node.heads * node.head_dim)
        absmax = self.readers.wanted_maxima(node.value)
        bias = None
        if node.bias is not None:
            bias = (self.bindings[node.bias].address, self.bindings[node.bias].features)
            self.pending_reads[node.bias] -= 1
        shape = (node.heads, node.head_dim, node.scale)
        lowering = self._lowering_of(node)(self.low, q, k, v, *shape, into, absmax, node.kv_heads, bias)
        lowering.emit(self.sequences, self._ready)
        self._ready = self.tiles
        for value, producer in producers.items():
            self._done(producer.quantised if isinstance(producer, Linear) else value)
        self._finish(node, into)

    def _lowering_of(self, node: Attention) -> Callable[..., AttentionLowering]:
        """What makes the lowering of an attention."""
        return AttentionLowering
