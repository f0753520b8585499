"""The function stage of one lane: x5 = f(x4)."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out
from lockstep_isa.instructions import Function

from .delay import delayed
from .fp import ONE, QUIET_NAN, FloatAdd, Parts
from .function_table import ENTRY_BITS, TableInterpolation

#: 32000 as fp32.
SCORE_LIMIT = 0x46FA0000
MINUS_INFINITY = 0xFF800000


class FunctionMode(data.Struct):
    """What holds still during a pass, worked out once for all lanes."""

    function: Function
    interpolate: 1  # the table is read
    integer: 1  # the address split is used: the table, or the exponents of SCORE
    limit: 31  # greatest magnitude that enters the table
    bias: 8  # 126 - k
    base: 7  # integer of entry 0
    mask: 7  # bits of the index that count
    slot: 2


def function_mode(m, instruction):
    """A register-free FunctionMode of an instruction."""
    mode = Signal(FunctionMode)
    function = instruction.function
    powers = (function == Function.SCORE) | (function == Function.EXP2)
    m.d.comb += [
        mode.function.eq(function),
        mode.interpolate.eq(function >= Function.EXP2),
        mode.integer.eq(function >= Function.SCORE),
        mode.slot.eq(instruction.table),
        mode.mask.eq(Mux(powers, 31, 127)),
        # 127 * 2^-k has the exponent field 133 - k and six ones in its fraction.
        mode.limit.eq(Mux(powers, SCORE_LIMIT, Cat(Const(0, 17), Const(63, 6), (133 - instruction.shift)[:8]))),
    ]
    with m.Switch(function):
        with m.Case(Function.SCORE, Function.EXP2):
            m.d.comb += mode.bias.eq(126 - 5)
        with m.Case(Function.RECIP):
            m.d.comb += [mode.bias.eq(126 - 6), mode.base.eq(64)]
        with m.Case(Function.RSQRT):
            m.d.comb += [mode.bias.eq(126 - 5), mode.base.eq(32)]
        with m.Default():
            m.d.comb += mode.bias.eq(126 - instruction.shift)
    return mode


class FunctionStage(wiring.Component):
    """x5 = f(x4) for every member of ``Function``.

    Ports
    -----
    mode : In(FunctionMode), holds still during a pass.
    x : In(32), in stage 0, with ``hidden`` : In(1), SCORE is to give -inf. ``scale`` : In(32), the integer N of EXP2,
        in stage 3.
    valid : In(29), bit i: a beat is in stage i. ``time`` : In(6), counts cycles.
    write_enable, write_address, write_data : fill the table, see TableInterpolation.
    n : Out(signed(16)), the integer exponent of SCORE, in stage 3. ``z`` : Out(32), LATENCY cycles behind x.
    zero, nonfinite : Out(1), in stage 0: RECIP meets such a value.

    The lane's word takes two ways. The argument of the table goes through TableInterpolation; a payload waits for it
    in memory: the finished result where no table is needed, the sign and exponent to put back, or relu(x).

        0        1 .. 22                       23                 24 .. 28          29
        clamp -> TableInterpolation ---------> scale, sign     -> final adder    -> z
             \\-> payload (delay) --------------^                  relu(x) - g, 1 - g, or untouched
    """

    LATENCY = 29
    SCALE = 3

    mode: In(FunctionMode)
    x: In(32)
    hidden: In(1)
    scale: In(32)
    valid: In(29)
    time: In(6)
    write_enable: In(1)
    write_address: In(9)
    write_data: In(ENTRY_BITS)
    n: Out(signed(16))
    z: Out(32)
    zero: Out(1)
    nonfinite: Out(1)

    def elaborate(self, platform):
        m = Module()
        mode, valid = self.mode, self.valid
        x = Parts(self.x)

        # Stage 0: classify, clamp, split off the exponent.
        flushed = Signal(32)
        clamped = Signal(31)
        recip = mode.function == Function.RECIP
        m.d.comb += [
            flushed.eq(Mux(x.nan, QUIET_NAN, Mux(x.nonzero, self.x, Cat(Const(0, 31), x.sign)))),
            clamped.eq(Mux(flushed[:31] > mode.limit, mode.limit, flushed[:31])),
            self.zero.eq(valid[0] & recip & ~x.nonzero),
            self.nonfinite.eq(valid[0] & recip & x.special),
        ]
        undo = Signal(signed(10))  # the power of two to put back
        u, word, force = Signal(32), Signal(32), Signal()
        next_u, next_word, next_force = Signal(32), Signal(32), Signal()
        m.d.comb += [next_u.eq(Mux(x.nan, 0, clamped)), next_word.eq(flushed), next_force.eq(x.nan)]
        with m.Switch(mode.function):
            with m.Case(Function.NONE):
                m.d.comb += [next_word.eq(self.x), next_force.eq(1)]
            with m.Case(Function.RELU):
                m.d.comb += [next_word.eq(Mux(flushed[31], 0, flushed)), next_force.eq(1)]
            with m.Case(Function.RELU_MINUS):
                m.d.comb += next_word.eq(Mux(flushed[31], 0, flushed))
            with m.Case(Function.SCORE):
                m.d.comb += [
                    next_u[31].eq(x.sign & ~x.nan),
                    next_word.eq(Mux(x.nan, QUIET_NAN, Cat(clamped, x.sign))),
                    next_force.eq(1),
                ]
                # The exponent of -32000 is what a hidden score counts as.
                with m.If(self.hidden):
                    m.d.comb += [next_u.eq(SCORE_LIMIT | 1 << 31), next_word.eq(MINUS_INFINITY)]
            with m.Case(Function.EXP2):
                m.d.comb += [
                    next_u[31].eq(x.sign & ~x.nan),
                    next_word.eq(Mux(x.nan, QUIET_NAN, 0)),
                    next_force.eq(x.nan | (x.infinite & x.sign)),
                ]
            with m.Case(Function.RECIP):
                m.d.comb += [
                    next_u.eq(Cat(x.fraction, Const(127, 8))),
                    next_force.eq(~x.nonzero | x.special),
                    undo.eq(127 - x.exponent),
                    next_word[:31].eq(Mux(next_force, 0, undo.as_unsigned())),
                    next_word[31].eq(x.sign & ~x.special),
                ]
            with m.Case(Function.RSQRT):
                m.d.comb += [
                    next_u.eq(Cat(x.fraction, 127 + ~x.exponent[0])),
                    next_force.eq(~x.nonzero | x.special | x.sign),
                    undo.eq(-((x.exponent - 127) >> 1)),
                    next_word.eq(Mux(next_force, 0, undo.as_unsigned())),
                ]
            with m.Case(Function.SIGMOID):
                m.d.comb += next_word[31].eq(flushed[31] & x.nonzero)
        with m.If(valid[0]):
            m.d.sync += [word.eq(next_word), force.eq(next_force)]
        with m.If(valid[0] & mode.integer):
            m.d.sync += u.eq(next_u)

        # Stages 1 to 22: the table.
        m.submodules.table = table = TableInterpolation()
        payload = delayed(m, "delay_payload", Cat(word, force), 1, 23, valid, self.time)
        m.d.comb += [
            table.u.eq(u),
            table.bias.eq(mode.bias),
            table.base.eq(mode.base),
            table.mask.eq(mode.mask),
            table.slot.eq(mode.slot),
            table.interpolate.eq(mode.interpolate),
            table.valid.eq(valid[1:23] & mode.integer.replicate(22)),
            table.time.eq(self.time),
            table.write_enable.eq(self.write_enable),
            table.write_address.eq(self.write_address),
            table.write_data.eq(self.write_data),
            self.n.eq(table.integer >> 5),
        ]
        # Stage 3: n - N, held inside what an exponent field can notice.
        difference = Signal(signed(34))
        m.d.comb += difference.eq(self.n - self.scale.as_signed())
        exp2 = mode.function == Function.EXP2
        amount = Signal(signed(10))
        with m.If(valid[3] & exp2):
            m.d.sync += amount.eq(Mux(difference > 511, 511, Mux(difference < -512, -512, difference)))
        amount_later = delayed(m, "delay_amount", amount, 4, 23, valid, self.time, exp2)

        # Stage 23: put sign and exponent back.
        g = Parts(table.y)
        waiting, forced = payload[:32], payload[32]
        power = Signal(signed(10))
        exponent = Signal(signed(12))
        scaled = Signal(32)
        m.d.comb += [
            power.eq(Mux(exp2, amount_later, waiting[:10])),
            exponent.eq(g.exponent + power),
            scaled.eq(table.y),
        ]
        with m.If(g.nonzero & ~g.special):
            with m.If(exponent <= 0):
                m.d.comb += scaled[:31].eq(0)
            with m.Elif(exponent >= 255):
                m.d.comb += scaled[:31].eq(0x7F800000)
            with m.Else():
                m.d.comb += scaled[23:31].eq(exponent[:8])
        next_a, next_bypass = Signal(32), Signal()
        m.d.comb += next_bypass.eq(1)
        with m.If(forced):
            m.d.comb += next_a.eq(waiting)
        with m.Else(), m.Switch(mode.function):
            with m.Case(Function.RELU_MINUS):
                m.d.comb += [next_a.eq(waiting), next_bypass.eq(0)]
            with m.Case(Function.SIGMOID):
                m.d.comb += [next_a.eq(Mux(waiting[31], ONE, table.y)), next_bypass.eq(~waiting[31])]
            with m.Case(Function.ODD):
                m.d.comb += next_a.eq(Cat(table.y[:31], waiting[31]))
            with m.Default():
                m.d.comb += next_a.eq(Cat(scaled[:31], scaled[31] | waiting[31]))
        a, b, bypass = Signal(32), Signal(32), Signal()
        with m.If(valid[23]):
            m.d.sync += [a.eq(next_a), bypass.eq(next_bypass)]
        with m.If(valid[23] & mode.interpolate):
            m.d.sync += b.eq(Cat(table.y[:31], ~table.y[31]))

        # Stages 24 to 28.
        m.submodules.final = final = FloatAdd()
        m.d.comb += [
            final.a.eq(a),
            final.b.eq(b),
            final.bypass.eq(bypass),
            final.enables.eq(valid[24:29]),
            self.z.eq(final.z),
        ]
        return m
