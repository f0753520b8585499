"""One fused lane: convert, add, scale twice, add, function, scale; row sum, row maximum, rounding to 8 bits."""

from amaranth.hdl import Module, Mux, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out
from lockstep_isa.instructions import (
    FirstAdd,
    FirstMultiply,
    Function,
    Maximum,
    SecondAdd,
    SecondMultiply,
    Source,
    Tap,
    ThirdMultiply,
)

from .delay import delayed
from .fp import FloatAdd, FloatMultiply, IntToFloat, RoundToInt8
from .function import FunctionMode, FunctionStage, function_mode
from .function_table import ENTRY_BITS
from .reduce import PartialSums, RunningMaximum, SumControls
from .timing import ADD1, ADD2, CONVERT, DEPTH, FUNCTION, MUL1, MUL2, MUL3, RESULT, ROUNDED, SELECT, SUM


class LaneMode(data.Struct):
    """What holds still during a pass, worked out once for all lanes: no lane decodes a field."""

    integer: 1  # x is an int32
    add1: 1
    add1_y: 1
    mul1: 1
    mul1_self: 1
    mul1_immediate: 1
    mul1_lane: 1
    mul1_waits: 1
    mul2: 1
    mul2_lane: 1
    add2: 1
    add2_y: 1
    mul3: 1
    mul3_y: 1
    early: 1  # the value in front of the third multiplier is written
    sum: 1
    maximum: 1
    exponents: 1  # the maximum is that of exponents
    has_exponents: 1
    max_continue: 1
    rounded: 1  # the destination takes 8 bits
    immediate0: 32
    function: FunctionMode


def lane_mode(m: Module, instruction, rounded) -> Signal:
    """The LaneMode of an instruction, in registers: right one cycle behind it."""
    mode, i = Signal(LaneMode), instruction
    m.d.sync += [
        mode.integer.eq(i.source.matches(Source.ACCUMULATOR, Source.INTEGER)),
        mode.add1.eq(i.add1 != FirstAdd.NONE),
        mode.add1_y.eq(i.add1 == FirstAdd.Y),
        mode.mul1.eq(i.mul1 != FirstMultiply.NONE),
        mode.mul1_self.eq(i.mul1 == FirstMultiply.SELF),
        mode.mul1_immediate.eq(i.mul1 == FirstMultiply.IMMEDIATE0),
        mode.mul1_lane.eq(i.mul1 == FirstMultiply.LANE1),
        mode.mul1_waits.eq((i.mul1 == FirstMultiply.LANE1) | (i.mul1 == FirstMultiply.COLUMN0)),
        mode.mul2.eq(i.mul2 != SecondMultiply.NONE),
        mode.mul2_lane.eq(i.mul2 == SecondMultiply.LANE0),
        mode.add2.eq(i.add2 != SecondAdd.NONE),
        mode.add2_y.eq(i.add2 == SecondAdd.Y),
        mode.mul3.eq(i.mul3 != ThirdMultiply.NONE),
        mode.mul3_y.eq(i.mul3 == ThirdMultiply.Y),
        mode.early.eq((i.tap == Tap.BEFORE) & (i.mul3 != ThirdMultiply.NONE)),
        mode.sum.eq(i.sum),
        mode.maximum.eq(i.maximum != Maximum.NONE),
        mode.exponents.eq(i.maximum == Maximum.EXPONENT),
        mode.has_exponents.eq(i.function == Function.SCORE),
        mode.max_continue.eq(i.max_continue),
        mode.rounded.eq(rounded),
        mode.immediate0.eq(i.immediate0),
        mode.function.eq(function_mode(m, i)),
    ]
    return mode


def lane_signature(subwords: int) -> wiring.Signature:
    """The ports of :class:`Lane`."""
    return wiring.Signature(
        {
            "mode": In(LaneMode),
            "valid": In(DEPTH),
            "time": In(6),
            "x": In(32),
            "y": In(32),
            "lane0": In(32),
            "lane1": In(32),
            "column0": In(32),
            "column1": In(32),
            "column2": In(32),
            "hidden": In(1),
            "sums": In(SumControls(subwords)),
            "sum": Out(32),
            "partial": Out(32),
            "other": In(32),
            "maximum_first": In(1),
            "maximum_start": In(32),
            "maximum": Out(32 * subwords),
            "write_enable": In(1),
            "write_address": In(9),
            "write_data": In(ENTRY_BITS),
            "result": Out(32),
            "rounded": Out(8),
            "zero": Out(1),
            "nonfinite": Out(1),
        }
    )


class Lane(wiring.Component):
    """The datapath of one lane; every control bit comes from outside, the same for all lanes.

        stage 1   take x, y, lane words        19  x4 = x3 + {column1, immediate1, y}
              2   int32 to fp32                24  x5 = f(x4)
              6   x1 = x + {lane0, y}          53  x6 = x5 * {column2, y};  row sum takes x5
             11   x2 = x1 * {lane1, ...}       57  ``result``: x5 or x6;  row maximum takes x6 or n
             15   x3 = x2 * {lane0, column0}   59  ``rounded``: the low 8 bits of its rounding

    Ports
    -----
    mode : In(LaneMode), holds still during a pass.
    valid : In(DEPTH), bit i: a beat is in stage i. ``time`` : In(6), counts cycles.
    x, y, lane0, lane1 : In(32), in stage 1; ``column0`` to ``column2`` : In(32), in stage 2, ``column1`` already
        chosen between the column and the immediate. ``hidden`` : In(1), in stage FUNCTION.
    sums : In(SumControls); ``sum`` : Out(32), the row sum, when the controls say so; ``partial`` : Out(32) and
        ``other`` : In(32), see PartialSums.
    maximum_* : In, see RunningMaximum; ``maximum`` : Out(32 * subwords).
    write_* : In, fill the function table.
    result : Out(32), ``rounded`` : Out(8). ``zero``, ``nonfinite`` : Out(1), RECIP meets such a value.

    One beat per cycle. Operands wait for their stage in small memories (see ``delayed``). An operation that is NONE
    passes its word through untouched, whatever it is.
    """

    def __init__(self, subwords: int) -> None:
        self.subwords = subwords
        super().__init__(lane_signature(subwords))

    def elaborate(self, platform):
        m = Module()
        mode, valid, time = self.mode, self.valid, self.time

        def wait(name, value, start, end, enable):
            return delayed(m, f"delay_{name}", value, start, end, valid, time, enable)

        # Stage 1: operands.
        x, y, lane0, lane1 = Signal(32), Signal(32), Signal(32), Signal(32)
        with m.If(valid[SELECT]):
            m.d.sync += [x.eq(self.x), y.eq(self.y), lane0.eq(self.lane0), lane1.eq(self.lane1)]

        # Stage 2: convert; the operands of later stages go to wait.
        m.submodules.convert = convert = IntToFloat()
        m.d.comb += [
            convert.a.eq(x),
            convert.bypass.eq(~mode.integer),
            convert.enables.eq(valid[CONVERT:ADD1]),
        ]
        scale_stage = FUNCTION + FunctionStage.SCALE
        exp2 = mode.function.interpolate & (mode.function.mask == 31)
        add1_b = wait("add1", Mux(mode.add1_y, y, lane0), CONVERT, ADD1, mode.add1)
        mul1_b = wait("mul1", Mux(mode.mul1_lane, lane1, self.column0), CONVERT, MUL1, mode.mul1_waits)
        mul2_b = wait("mul2", Mux(mode.mul2_lane, lane0, self.column0), CONVERT, MUL2, mode.mul2)
        scale = wait("scale", lane0, CONVERT, scale_stage, exp2)
        # From a stage later on, its memory is half as deep.
        add2_b = Signal(32)
        with m.If(valid[CONVERT] & mode.add2):
            m.d.sync += add2_b.eq(Mux(mode.add2_y, y, self.column1))
        add2_b = wait("add2", add2_b, CONVERT + 1, ADD2, mode.add2)
        mul3_b = wait("mul3", Mux(mode.mul3_y, y, self.column2), CONVERT, MUL3, mode.mul3)

        # Stages 6 to 23.
        m.submodules.add1 = add1 = FloatAdd()
        m.d.comb += [
            add1.a.eq(convert.z),
            add1.b.eq(add1_b),
            add1.bypass.eq(~mode.add1),
            add1.enables.eq(valid[ADD1:MUL1]),
        ]
        m.submodules.mul1 = mul1 = FloatMultiply()
        m.d.comb += [
            mul1.a.eq(add1.z),
            mul1.b.eq(mul1_b),
            mul1.bypass.eq(~mode.mul1),
            mul1.enables.eq(valid[MUL1:MUL2]),
        ]
        with m.If(mode.mul1_self):
            m.d.comb += mul1.b.eq(add1.z)
        with m.Elif(mode.mul1_immediate):
            m.d.comb += mul1.b.eq(mode.immediate0)
        m.submodules.mul2 = mul2 = FloatMultiply()
        m.d.comb += [
            mul2.a.eq(mul1.z),
            mul2.b.eq(mul2_b),
            mul2.bypass.eq(~mode.mul2),
            mul2.enables.eq(valid[MUL2:ADD2]),
        ]
        m.submodules.add2 = add2 = FloatAdd()
        m.d.comb += [
            add2.a.eq(mul2.z),
            add2.b.eq(add2_b),
            add2.bypass.eq(~mode.add2),
            add2.enables.eq(valid[ADD2:FUNCTION]),
        ]

        # Stages 24 to 52.
        m.submodules.function = function = FunctionStage()
        m.d.comb += [
            function.mode.eq(mode.function),
            function.x.eq(add2.z),
            function.hidden.eq(self.hidden),
            function.scale.eq(scale),
            function.valid.eq(valid[FUNCTION:MUL3]),
            function.time.eq(time),
            function.write_enable.eq(self.write_enable),
            function.write_address.eq(self.write_address),
            function.write_data.eq(self.write_data),
            self.zero.eq(function.zero),
            self.nonfinite.eq(function.nonfinite),
        ]

        # Stages 53 to 56.
        m.submodules.mul3 = mul3 = FloatMultiply()
        m.d.comb += [
            mul3.a.eq(function.z),
            mul3.b.eq(mul3_b),
            mul3.bypass.eq(~mode.mul3),
            mul3.enables.eq(valid[MUL3:RESULT]),
        ]
        before = wait("before", function.z, MUL3, RESULT, mode.early)
        m.submodules.sums = sums = PartialSums(self.subwords)
        wiring.connect(m, wiring.flipped(self.sums), sums.controls)
        m.d.comb += [sums.x.eq(function.z), sums.valid.eq(valid[SUM] & mode.sum), self.sum.eq(sums.sum)]
        m.d.comb += [sums.other.eq(self.other), self.partial.eq(sums.partial)]

        # Stages 57 and 58.
        # Functions other than SCORE count as having the exponent 0.
        n = Mux(mode.has_exponents, function.n, 0)
        exponent = wait("exponent", n, scale_stage, RESULT, mode.exponents)
        m.submodules.maximum = maximum = RunningMaximum(self.subwords)
        m.d.comb += [
            self.result.eq(Mux(mode.early, before, mul3.z)),
            maximum.x.eq(mul3.z),
            maximum.exponent.eq(exponent),
            maximum.use_exponent.eq(mode.exponents),
            maximum.resume.eq(mode.max_continue),
            maximum.valid.eq(valid[RESULT:ROUNDED] & mode.maximum.replicate(2)),
            maximum.first.eq(self.maximum_first),
            maximum.start.eq(self.maximum_start),
            self.maximum.eq(maximum.maximum),
        ]
        m.submodules.round = rounding = RoundToInt8()
        m.d.comb += [
            rounding.a.eq(self.result),
            rounding.enables.eq(valid[RESULT:ROUNDED] & mode.rounded.replicate(2)),
            self.rounded.eq(rounding.z),
        ]
        return m
