"""Operations as instructions: the fused passes that every contract operation becomes.

A :class:`Lowering` builds one program. Values are panels of ``tiles`` row tiles in the VECTOR scratchpad; quantised
values lie in the ACTIVATION scratchpad with their scales in PARAMETER words, one per row tile. Nothing here waits or
signals: the builder finds the tokens, so the order of emission decides only what can overlap.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from lockstep_driver.builder import ProgramBuilder
from lockstep_isa.config import CoreConfig
from lockstep_isa.instructions import (
    LOAD,
    MATRIX,
    STORE,
    TABLE_ENTRIES,
    VECTOR,
    Destination,
    FirstAdd,
    FirstMultiply,
    Function,
    InstructionType,
    Maximum,
    Memory,
    SecondAdd,
    SecondMultiply,
    Source,
    Tap,
    ThirdMultiply,
)
from lockstep_isa.tables import FUNCTIONS

from .allocation import Pieces, Ring
from .image import Chunk, Image, LinearImage
from .joins import Joins
from .onchip import Ahead, Fetched, Panels, QuantisedPanels
from .packing import Packing, activation_unit
from .passes import ACTIVATION_SLOT, RECIPROCAL, SLOTS, rounding, scaling

_KINDS = {
    "relu_minus": Function.RELU_MINUS,
    "odd": Function.ODD,
    "sigmoid": Function.SIGMOID,
}
#: Share of the WEIGHT and PARAMETER memories that streamed parameters may fill, unless said otherwise.
WEIGHT_RING, PARAMETER_RING = 0.75, 0.5


#: Chunks that a prefetch loads at once.
_AHEAD_NOW = 2
#: Emits one or a few instructions of one unit.
Step = Callable[[], object]


class Lowering:
    """Emits operations into one program.

    Parameters
    ----------
    config : the core. image : the model's parameters in device memory. weight_ring, parameter_ring : share of the
    WEIGHT and PARAMETER memories that streamed parameters may fill; keys, values and statistics have the rest.
    """

    def __init__(
        self,
        config: CoreConfig,
        image: Image,
        weight_ring: float = WEIGHT_RING,
        parameter_ring: float = PARAMETER_RING,
    ) -> None:
        self.config, self.image = config, image
        self.builder = ProgramBuilder(config)
        weight_words = int(config.weight_words * weight_ring)
        parameter_words = int(config.parameter_words * parameter_ring)
        self.vectors = Pieces("VECTOR", 0, config.vector_words)
        self.activations = Pieces("ACTIVATION", 0, config.activation_words, activation_unit(config))
        self.weight_ring = Ring("WEIGHT", 0, weight_words)
        self.weights = Pieces("WEIGHT", weight_words, config.weight_words)
        self.parameter_ring = Ring("PARAMETER", 0, parameter_words)
        self.parameters = Pieces("PARAMETER", parameter_words, config.parameter_words)
        self._later: deque[Step] = deque()
        self.joins = Joins()
        # Chunks on chip that wait for their products, by the address of their weights.
        self._ahead: dict[int, Ahead] = {}
        # The product whose chunks are being loaded ahead, and how much of the weight ring they may fill.
        self._next_product: tuple[LinearImage, float] | None = None
        self._loaded_activation: str | None = None
        self._column_words: dict[str, int] = {}
        for name, slot in SLOTS.items():
            self._load_table(name, slot)

    # --- Instructions that can wait ----------------------------------------------------------------------------

    def later(self, type: InstructionType, **fields: int) -> None:
        """Emit an instruction between the chunks of the products to come, at the latest with :meth:`catch_up`.

        For STOREs that nobody waits for: many of them in a row fill the queue of their unit, and the dispatcher, which
        goes in order, then stops LOAD as well.
        """
        self._later.append(lambda: self.builder.emit(type, **fields))

    def steps_later(self, steps: Sequence[Step]) -> None:
        """Emit steps one by one beside the products to come, as :meth:`later` does; nothing that they read or write
        may be given back before.
        """
        self._later += steps

    def give_later(self, words: int) -> None:
        """Give VECTOR words back behind the instructions that wait."""
        self._later.append(lambda: self.vectors.give(words))

    def catch_up(self, chunks: int = 1) -> None:
        """Emit what waits; with ``chunks`` of a product still to come, the share of one of them.

        Between a chunk's MATRIX and its VECTOR instruction, VECTOR works on it while it would wait for results.
        """
        for _ in range(-(-len(self._later) // chunks)):
            self._later.popleft()()

    # --- Transfers ---------------------------------------------------------------------------------------------

    def _load_table(self, name: str, slot: int) -> None:
        self.builder.emit(
            LOAD, memory=Memory.TABLE, words=TABLE_ENTRIES, address=self.image.table(name), local=slot * TABLE_ENTRIES
        )

    def function_fields(self, name: str) -> dict[str, int]:
        """Fields that make a pass apply an activation; loads its table where another one stands."""
        if name == "relu":
            return {"function": Function.RELU}
        table = FUNCTIONS[name]
        if self._loaded_activation != name:
            self._load_table(name, ACTIVATION_SLOT)
            self._loaded_activation = name
        return {"function": _KINDS[table.kind], "table": ACTIVATION_SLOT, "shift": table.k}

    def load_columns(self, name: str) -> int:
        """PARAMETER words with a value per column; they live until :meth:`drop_columns`."""
        if name not in self._column_words:
            address, words = self.image.columns(name)
            # LOAD goes in order: were these the words of a pass that is not done yet, all weights would wait for it.
            self._column_words[name] = self.parameters.take_last(words)
            self.builder.emit(
                LOAD, memory=Memory.PARAMETER, words=words, address=address, local=self._column_words[name]
            )
        return self._column_words[name]

    def drop_columns(self, name: str | None) -> None:
        """The words of :meth:`load_columns` are not needed any more."""
        if name is not None and name in self._column_words:
            self.parameters.give(self._column_words.pop(name))

    def load(self, address: int, features: int, tiles: int) -> Panels:
        """Panels from device memory, packed there one behind the other."""
        start = self.vectors.take(tiles * features)
        self.builder.emit(
            LOAD,
            memory=Memory.VECTOR,
            rows=tiles,
            words=features,
            address=address,
            stride=features * self.config.vector_word_bytes,
            local=start,
            local_stride=features,
        )
        return Panels(start, features, tiles)

    def store(self, x: Panels, address: int, stride: int | None = None) -> None:
        """Panels to device memory, ``stride`` bytes apart, or packed one behind the other."""
        self.builder.emit(
            STORE,
            memory=Memory.VECTOR,
            rows=x.tiles,
            words=x.features,
            address=address,
            stride=stride or x.features * self.config.vector_word_bytes,
            local=x.start,
            local_stride=x.features,
        )

    def free(self, x: Panels) -> None:
        """The value is not needed any more."""
        self.vectors.give(x.start)
        for words in x.absmax.values():
            self.parameters.give(words)
        x.absmax = {}
        if x.head_maxima is not None:
            self.parameters.give(x.head_maxima)
            x.head_maxima = None

    def free_quantised(self, q: QuantisedPanels) -> None:
        """The quantised value is not needed any more."""
        self.activations.give(q.start)
        self.parameters.give(q.scales)

    # --- Passes ------------------------------------------------------------------------------------------------

    def emit_pass(self, **fields: int) -> None:
        """One VECTOR instruction."""
        self.builder.emit(VECTOR, **fields)
        if self._next_product is not None and fields["source"] == Source.VECTOR:
            self._fetch_ahead(1)

    def scalars(self, x: int, to: int, tiles: int, operand: int = 0, **fields: int) -> None:
        """One value per row: PARAMETER words x .. x + tiles become words to .. to + tiles.

        ``operand`` : a run-time operand that stands for ``tiles``, which is then its greatest value; 0: none.
        """
        self.emit_pass(
            source=Source.PARAMETER,
            destination=Destination.PARAMETER,
            tiles=1,
            columns=0 if operand else tiles,
            columns_operand=operand,
            x=x,
            to=to,
            **fields,
        )

    def absmax_fields(self, into: Panels, prescale: str | None, first_column: int, continued: bool) -> dict[str, int]:
        """Fields that make a pass keep the absolute maxima of the rows that it writes to ``into``."""
        if prescale not in into.absmax:
            into.absmax[prescale] = self.parameters.take(into.tiles)
        fields = {
            "maximum": Maximum.ABSOLUTE,
            "max_to": into.absmax[prescale],
            "max_continue": int(continued),
            "tap": Tap.BEFORE,
        }
        if prescale is not None:
            fields |= {
                "mul3": ThirdMultiply.COLUMN2,
                "column2": self.load_columns(prescale) + first_column // self.config.rows,
            }
        return fields

    def add(self, x: Panels, y: Panels, into: Panels, **fields: int) -> None:
        """into = x + y."""
        self.emit_pass(
            source=Source.VECTOR,
            destination=Destination.VECTOR,
            add1=FirstAdd.Y,
            tiles=x.tiles,
            columns=x.features,
            x=x.start,
            x_stride=x.features,
            y=y.start,
            y_stride=y.features,
            to=into.start,
            to_stride=into.features,
            **fields,
        )

    def elementwise(self, x: Panels, into: Panels, **fields: int) -> None:
        """into = f(x) with whatever ``fields`` say."""
        self.emit_pass(
            source=Source.VECTOR,
            destination=Destination.VECTOR,
            tiles=x.tiles,
            columns=x.features,
            x=x.start,
            x_stride=x.features,
            to=into.start,
            to_stride=into.features,
            **fields,
        )

    def multiply(self, x: Panels, y: Panels, into: Panels, **fields: int) -> None:
        """into = x * y, element by element."""
        fields |= {"mul3": ThirdMultiply.Y, "tap": Tap.AFTER, "y": y.start, "y_stride": y.features}
        self.elementwise(x, into, **fields)

    # --- Quantisation ------------------------------------------------------------------------------------------

    def scale_and_inverse(
        self, absmax: int, tiles: int, steps: int, scale: int, inverse: int, operand: int = 0
    ) -> None:
        """scale = absmax / steps and inverse = 1 / scale, one value per row; ``operand`` may stand for ``tiles``."""
        self.scalars(absmax, scale, tiles, operand, **scaling(1 / steps))
        self.scalars(scale, inverse, tiles, operand, **RECIPROCAL)

    def row_maxima(self, x: Panels, prescale: str | None) -> int:
        """PARAMETER words with the absolute maxima of the rows of x, computed now if no pass has left them."""
        if prescale not in x.absmax:
            fields = self.absmax_fields(x, prescale, 0, False)
            self.emit_pass(
                source=Source.VECTOR, tiles=x.tiles, columns=x.features, x=x.start, x_stride=x.features, **fields
            )
        return x.absmax[prescale]

    def quantise(self, x: Panels, prescale: str | None) -> QuantisedPanels:
        """Per-row int8 of x * prescale, as the left operand of products."""
        q = self.new_quantised(x)
        for step in self.quantise_steps(x, prescale, q):
            step()
        self.drop_columns(prescale)
        return q

    def new_quantised(self, x: Panels) -> QuantisedPanels:
        """Where the quantised rows of ``x`` will lie."""
        start = self.activations.take(x.tiles * x.features)
        return QuantisedPanels(start, x.features, x.tiles, self.parameters.take(x.tiles))

    def quantise_steps(self, x: Panels, prescale: str | None, q: QuantisedPanels) -> list[Step]:
        """The passes of q = x * prescale, per row; ``prescale`` is not dropped."""
        inverse: list[int] = []

        def scales() -> None:
            absmax = self.row_maxima(x, prescale)
            inverse.append(self.parameters.take(x.tiles))
            self.scale_and_inverse(absmax, x.tiles, 127, q.scales, inverse[0])

        def values() -> None:
            fields = {}
            if prescale is not None:
                fields = {"mul1": FirstMultiply.COLUMN0, "column0": self.load_columns(prescale)}
            self.emit_pass(
                **rounding(inverse[0], Destination.ACTIVATION),
                tiles=x.tiles,
                columns=x.features,
                x=x.start,
                x_stride=x.features,
                to=q.start,
                to_stride=q.features,
                **fields,
            )
            self.parameters.give(inverse[0])

        return [scales, values]

    # --- Products ----------------------------------------------------------------------------------------------

    def panels_per_chunk(self, weight: str) -> int:
        """Panels of a linear layer that one chunk may hold: at least three chunks fit the weight ring; packed ones are
        done sooner, and four fit.
        """
        form = self.image.packing(weight)
        chunks = 3 if form == Packing(form.words) else 4
        return max(1, min(8, self.weights.start // (chunks * form.words)))

    def fetch(self, linear: LinearImage, chunk: Chunk) -> Fetched:
        """Load a chunk of a linear layer. It stays until the rings have come around once."""
        words, parameters = self._chunk_words(linear, chunk)
        self._make_room(words)
        weights, scales = self.weight_ring.take(words), self.parameter_ring.take(parameters)
        # What waits there for a product that comes later is lost, and will be loaded again.
        for key, ahead in list(self._ahead.items()):
            if ahead.touches(weights, words, scales, parameters):
                del self._ahead[key]
        moved = {"address_operand": chunk.operand}
        emit = self.builder.emit
        emit(LOAD, memory=Memory.WEIGHT, words=words, address=chunk.weights, local=weights, **moved)
        emit(LOAD, memory=Memory.PARAMETER, words=parameters, address=chunk.parameters, local=scales, **moved)
        return Fetched(weights, scales)

    def scratch_weights(self, words: int) -> int:
        """WEIGHT words of the ring for what VECTOR writes and MATRIX reads; ``joins`` hold them until then."""
        self._make_room(words)
        start = self.weight_ring.take(words)
        self._ahead = {key: ahead for key, ahead in self._ahead.items() if not ahead.touches(start, words, 0, 0)}
        self.joins.hold(start, words)
        return start

    def _make_room(self, words: int) -> None:
        """Let nothing in scratch words wait where the next piece of the ring will lie."""
        start = self.weight_ring.following(words)
        if self.joins.touch(start, words):
            self.joins.emit_ready()
        if self.joins.touch(start, words):
            self.joins.emit()

    @staticmethod
    def _chunk_words(linear: LinearImage, chunk: Chunk) -> tuple[int, int]:
        """WEIGHT and PARAMETER words of a chunk."""
        return chunk.panels * linear.packing.words, chunk.panels * (2 if linear.has_bias else 1)

    def widen_ring(self) -> None:
        """Let weights stream through all of the WEIGHT memory, as long as nothing else lies there."""
        if self.weights.empty:
            self.weight_ring.resize(self.config.weight_words)

    def narrow_ring(self) -> None:
        """Keep streamed weights to their share of the WEIGHT memory; what waits beyond it will be loaded again."""
        self.weight_ring.resize(self.weights.start)
        self._ahead = {
            key: ahead for key, ahead in self._ahead.items() if ahead.weights + ahead.words <= self.weights.start
        }

    def prefetch(self, linear: LinearImage, share: float = 1) -> None:
        """Load chunks well before their products: a few now, one more behind each long pass to come.

        At most this ``share`` of the weight ring, and no more than it holds beside chunks that wait there already. Not
        all at once: the dispatcher goes in order, so LOADs that fill their queue would stop the passes behind them.
        """
        self._next_product = linear, share
        self._fetch_ahead(_AHEAD_NOW)

    def _fetch_ahead(self, most: int) -> None:
        """Load at most so many chunks of the next product."""
        assert self._next_product is not None
        (linear, share), words = self._next_product, 0
        for chunk in linear.chunks:
            if chunk.weights in self._ahead:
                words += self._ahead[chunk.weights].words
                continue
            own, parameters = self._chunk_words(linear, chunk)
            words += own
            if most == 0 or words > share * self.weight_ring.size:
                break
            start, scales = self.weight_ring.following(own), self.parameter_ring.following(parameters)
            waiting = self._ahead.values()
            if self.joins.touch(start, own) or any(a.touches(start, own, scales, parameters) for a in waiting):
                break
            self._ahead[chunk.weights] = Ahead(*self.fetch(linear, chunk), own, parameters)
            most -= 1

    def product(self, q: QuantisedPanels, linear: LinearImage, chunk: Chunk) -> tuple[int, int]:
        """Load a chunk, if it is not there yet, and start its products; returns the PARAMETER words of its scales and
        biases.
        """
        self._next_product = None
        ahead = self._ahead.pop(chunk.weights, None)
        weights, scales = self.fetch(linear, chunk) if ahead is None else (ahead.weights, ahead.scales)
        self.builder.emit(
            MATRIX,
            depth=linear.depth,
            outer=q.tiles,
            inner=chunk.panels,
            a=q.start,
            a_outer=q.features,
            w=weights,
            w_inner=linear.packing.words,
            **linear.packing.fields,
        )
        return scales, scales + chunk.panels

    def drain(
        self,
        q: QuantisedPanels,
        linear: LinearImage,
        chunk: Chunk,
        words: tuple[int, int],
        to: int,
        stride: int,
        **fields: int,
    ) -> None:
        """Results of :meth:`product` to VECTOR words: scaled by row and column, biased, and whatever ``fields`` add."""
        scales, biases = words
        if linear.has_bias:
            fields |= {"add2": SecondAdd.COLUMN1, "column1": biases}
        self.emit_pass(
            source=Source.ACCUMULATOR,
            destination=Destination.VECTOR,
            mul1=FirstMultiply.LANE1,
            lane1=q.scales,
            mul2=SecondMultiply.COLUMN0,
            column0=scales,
            tiles=q.tiles,
            columns=chunk.columns,
            to=to,
            to_stride=stride,
            **fields,
        )

    def linear(
        self,
        q: QuantisedPanels,
        linear: LinearImage,
        into: Panels,
        absmax: tuple[str | None] | None = None,
        activation: str | None = None,
        residual: Panels | None = None,
        factor: Panels | None = None,
    ) -> None:
        """into = activation(q . weight + bias), chunk by chunk.

        ``residual`` is added in the place of a bias; ``factor`` multiplies the result, and then ``absmax`` names no
        pre-scale. Both may be ``into`` itself.
        """
        function = {} if activation is None else self.function_fields(activation)
        for n, chunk in enumerate(linear.chunks):
            fields = dict(function)
            if absmax is not None:
                fields |= self.absmax_fields(into, absmax[0], chunk.first, n > 0)
            if residual is not None:
                fields |= {"add2": SecondAdd.Y, "y": residual.start + chunk.first, "y_stride": residual.features}
            if factor is not None:
                fields |= {"mul3": ThirdMultiply.Y, "tap": Tap.AFTER}
                fields |= {"y": factor.start + chunk.first, "y_stride": factor.features}
            words, left = self.product(q, linear, chunk), len(linear.chunks) - n
            self.catch_up(left)
            self.joins.beside(left)
            self.drain(q, linear, chunk, words, into.start + chunk.first, into.features, **fields)
            self.joins.behind(left)
