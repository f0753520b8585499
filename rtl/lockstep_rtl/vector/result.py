"""Where results go: the vector unit's writes."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from lockstep_isa.instructions import VECTOR, Destination, Maximum

from ..interfaces import ADDRESS_BITS, WritePort, instruction_layout
from .transpose import Transposer, lanes_mask


class ResultWriter(wiring.Component):
    """Writes results beat by beat, row sums at the end of their rows, and maxima at the end of rows or sections.

    Ports
    -----
    fields : In(instruction layout), held still; ``begin`` : In(1), one cycle before a pass.
    result_valid : In(columns_per_beat), bit c: column c of a beat is there, ``result_last`` : In(1), ``result_sub`` :
        In, with ``result`` : In(32 * lanes).
    rounded_valid, rounded_last, rounded_sub, ``rounded`` : In(8 * lanes): the same two cycles later, as bytes;
        ``maximum`` : In(32 * rows) is complete in the cycle of the row's last beat, or on cores with selection
        of each beat with ``maximum_last`` : In(1).
    sum_done : In(1) with ``sum_sub``, ``sum`` : In(32 * lanes, or 32 * rows where there are more lanes than rows).
    vector_write, parameter_write, activation_write, weight_write : Out(WritePort).
    idle : Out(1), nothing waits to be written.

    Nothing ever stalls: results and maxima are written in their cycle, a row sum in the next one that leaves the
    PARAMETER port free. There is one in every row, because the prologues of such passes take two cycles.
    """

    def __init__(self, config) -> None:
        self.config = config
        rows, lanes, sub = config.rows, config.lanes, range(config.subwords)
        side = config.columns_per_beat
        super().__init__(
            {
                "fields": In(instruction_layout(VECTOR, config)),
                "begin": In(1),
                "result_valid": In(side),
                "result_last": In(1),
                "result_sub": In(sub),
                "result": In(32 * lanes),
                "rounded_valid": In(side),
                "rounded_last": In(1),
                "rounded_sub": In(sub),
                "rounded": In(8 * lanes),
                "maximum": In(32 * rows),
                "sum_done": In(1),
                "sum_sub": In(sub),
                "sum": In(32 * lanes // side),
                "vector_write": Out(WritePort(32 * rows, rows, side)),
                "parameter_write": Out(WritePort(32 * rows, rows, side)),
                "activation_write": Out(WritePort(8 * rows, rows, side)),
                "weight_write": Out(WritePort(8 * rows, rows, side)),
                "idle": Out(1),
            }
            | ({"maximum_last": In(1)} if config.selection else {})
        )

    def elaborate(self, platform):
        m = Module()
        config, i = self.config, self.fields
        rows, subwords, side = config.rows, config.subwords, config.columns_per_beat
        rows_per_beat = config.lanes // side
        to_vector = i.destination == Destination.VECTOR
        to_parameter = i.destination == Destination.PARAMETER
        to_activation = i.destination == Destination.ACTIVATION
        to_weight = i.destination == Destination.WEIGHT
        to_bytes = i.destination == Destination.BYTES
        transposes_bytes = i.destination == Destination.BYTES_TRANSPOSED
        transposed = (i.destination == Destination.WEIGHT_TRANSPOSED) | transposes_bytes
        is_float = to_vector | to_parameter

        # Result addresses: beat by beat, row tile by row tile.
        row_base, address = Signal(ADDRESS_BITS), Signal(ADDRESS_BITS)
        valid = Mux(is_float, self.result_valid, self.rounded_valid)
        last = Mux(is_float, self.result_last, self.rounded_last)
        sub = Mux(is_float, self.result_sub, self.rounded_sub)
        mask = lanes_mask(config, sub)
        with m.If(self.begin):
            m.d.sync += [row_base.eq(i.to), address.eq(i.to)]
        with m.Elif(valid[0] & (sub == subwords - 1)):
            m.d.sync += address.eq(address + side)
            with m.If(last):
                m.d.sync += [row_base.eq(row_base + i.to_stride), address.eq(row_base + i.to_stride)]

        # Row sums, put together from the lanes' parts.
        sums = Signal(32 * rows)
        sum_waits, write_sum = Signal(), Signal()
        with m.If(write_sum):
            m.d.sync += sum_waits.eq(0)
        with m.If(self.sum_done):
            m.d.sync += sums.word_select(self.sum_sub, 32 * rows_per_beat).eq(self.sum)
            with m.If(self.sum_sub == subwords - 1):
                m.d.sync += sum_waits.eq(1)
        sum_address, maximum_address = Signal(ADDRESS_BITS), Signal(ADDRESS_BITS)
        write_maximum = Signal()
        maximum_last = self.maximum_last if config.selection else self.rounded_last
        with m.If(self.begin):
            m.d.sync += [sum_address.eq(i.sum_to), maximum_address.eq(i.max_to)]
        with m.Else():
            m.d.sync += [sum_address.eq(sum_address + write_sum), maximum_address.eq(maximum_address + write_maximum)]

        # PARAMETER takes the result, the maximum or the sum.
        m.d.comb += [
            write_maximum.eq(
                (i.maximum != Maximum.NONE)
                & (self.rounded_valid[0] & maximum_last & (self.rounded_sub == subwords - 1))
            ),
            write_sum.eq(sum_waits & ~write_maximum & ~(to_parameter & self.result_valid[0])),
        ]
        port = self.parameter_write
        m.d.comb += [
            port.enable.eq(Mux(to_parameter, self.result_valid, 0) | write_maximum | write_sum),
            port.mask.eq(~0),
            port.address.eq(sum_address),
            port.data.eq(sums),
        ]
        with m.If(write_maximum):
            m.d.comb += [port.address.eq(maximum_address), port.data.eq(self.maximum)]
        with m.Elif(to_parameter & self.result_valid[0]):
            m.d.comb += [port.address.eq(address), port.data.eq(self.result.replicate(subwords)), port.mask.eq(mask)]

        m.d.comb += [
            self.activation_write.enable.eq(Mux(to_activation, self.rounded_valid, 0)),
            self.activation_write.address.eq(address),
            self.activation_write.data.eq(self.rounded.replicate(subwords)),
            self.activation_write.mask.eq(mask),
        ]

        # WEIGHT and, as bytes, VECTOR take columns as they are, or transposed.
        m.submodules.transposer = transposer = Transposer(config)
        packed = Signal(8 * rows * side)
        m.d.comb += [
            transposer.begin.eq(self.begin),
            transposer.to.eq(i.to),
            transposer.to_stride.eq(i.to_stride),
            transposer.to_group.eq(i.to_group),
            transposer.valid.eq(Mux(transposed, self.rounded_valid, 0)),
            transposer.last.eq(self.rounded_last),
            transposer.sub.eq(self.rounded_sub),
            transposer.bytes.eq(self.rounded),
            packed.eq(Mux(transposed, transposer.write.data, self.rounded.replicate(subwords))),
            self.weight_write.enable.eq(
                Mux(transposes_bytes, 0, transposer.write.enable) | Mux(to_weight, self.rounded_valid, 0)
            ),
            self.weight_write.address.eq(Mux(transposed, transposer.write.address, address)),
            self.weight_write.data.eq(packed),
            self.weight_write.mask.eq(Mux(transposed, transposer.write.mask, mask)),
            self.vector_write.enable.eq(
                Mux(to_vector, self.result_valid, 0)
                | Mux(to_bytes, self.rounded_valid, 0)
                | Mux(transposes_bytes, transposer.write.enable, 0)
            ),
            self.vector_write.address.eq(self.weight_write.address),
            self.vector_write.data.eq(
                Mux(
                    to_vector,
                    self.result.replicate(subwords),
                    Cat(Cat(packed.word_select(r, 8), Const(0, 24)) for r in range(rows * side)),
                )
            ),
            self.vector_write.mask.eq(self.weight_write.mask),
            self.idle.eq(~sum_waits & transposer.idle),
        ]
        return m
