"""Table interpolation of one lane: address split, table memory, quadratic.

I = RNE(u * 2^k);  d = u - I * 2^-k;  y = c0 + d * (c1 + d * c2)
"""

from amaranth.hdl import Cat, Const, Module, Mux, Shape, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from lockstep_isa.instructions import TABLE_ENTRIES, TABLE_SLOTS

from .delay import delayed
from .fp import FloatAdd, FloatMultiply, shift_up

#: Bits of one entry: c0 fp32, the top 24 bits of c1, the top 16 bits of c2, lowest first.
ENTRY_BITS = 72
INTEGER_BITS = 21


class TableInterpolation(wiring.Component):
    """The address split and the quadratic.

    Ports
    -----
    u : In(32), finite, not subnormal; abs(u) * 2^k < 2^20.
    bias : In(8), 126 - k. ``base`` : In(7), the integer that addresses entry 0 of the table (modulo 128).
    mask : In(7), bits of the index that count. ``slot`` : In(2). These four hold still during a pass.
    write_enable, write_address, write_data : In(1), In(9), In(72), fill the table; not during a pass that uses it.
    valid : In(17), bit i: a beat is in stage i. ``time`` : In(6), counts cycles.
    interpolate : In(1), holds still during a pass; without it only the address split works.
    integer : Out(signed(21)), I, two cycles behind u. ``y`` : Out(32), LATENCY cycles behind u.

    One value per cycle. NaN, infinity and arguments outside the table are the business of whoever gives u.
    """

    LATENCY = 22
    INTEGER_LATENCY = 2

    u: In(32)
    bias: In(8)
    base: In(7)
    mask: In(7)
    slot: In(2)
    write_enable: In(1)
    write_address: In(9)
    write_data: In(ENTRY_BITS)
    valid: In(22)
    time: In(6)
    interpolate: In(1)
    integer: Out(signed(INTEGER_BITS))
    y: Out(32)

    def elaborate(self, platform):
        m = Module()
        m.submodules.memory = memory = Memory(shape=Shape(ENTRY_BITS), depth=TABLE_SLOTS * TABLE_ENTRIES, init=[])
        write, read = memory.write_port(), memory.read_port()
        m.d.comb += [
            write.en.eq(self.write_enable),
            write.addr.eq(self.write_address),
            write.data.eq(self.write_data),
        ]

        # Stage 0: u * 2^k with its binary point at bit 24. Below a half the integer is 0 and d is u itself.
        exponent = self.u[23:31]
        shift = Signal(signed(10))
        m.d.comb += shift.eq(exponent - self.bias)
        fixed = Signal(44)
        small0, sign0 = Signal(), Signal()
        original0 = Signal(31)
        with m.If(self.valid[0]):
            m.d.sync += [
                fixed.eq(Cat(self.u[:23], 1) << shift[:5]),
                small0.eq((shift < 0) | ~exponent.any()),
                sign0.eq(self.u[31]),
                original0.eq(self.u[:31]),
            ]

        # Stage 1: round to the nearest even integer; what is left lies in [-1/2, 1/2].
        up = Signal()
        magnitude = Signal(20)
        left = Signal(24)
        m.d.comb += [
            up.eq(fixed[23] & (fixed[:23].any() | fixed[24])),
            magnitude.eq(fixed[24:] + up),
        ]
        small1, sign1 = Signal(), Signal()
        original1 = Signal(31)
        with m.If(self.valid[1]):
            m.d.sync += [
                self.integer.eq(Mux(small0, 0, Mux(sign0, -magnitude, magnitude))),
                left.eq(Mux(up, -fixed[:24], fixed[:24])),
                sign1.eq(sign0 ^ (up & ~small0)),
                small1.eq(small0),
                original1.eq(original0),
            ]

        # Stage 2: the leading one of d comes near the top; which entry is read.
        coarse, by_coarse = shift_up(m, left, (16, 8), "coarse")
        near = Signal(24)
        coarse_count = Signal(2)
        small2, sign2 = Signal(), Signal()
        original2 = Signal(31)
        entry = Signal(9)
        with m.If(self.valid[2] & self.interpolate):
            m.d.sync += [
                near.eq(coarse),
                coarse_count.eq(by_coarse),
                small2.eq(small1),
                sign2.eq(sign1),
                original2.eq(original1),
                entry.eq(Cat((self.integer[:7] - self.base)[:7] & self.mask, self.slot)),
            ]

        # Stage 3: d as fp32; the table is read.
        value, by_fine = shift_up(m, near, (4, 2, 1), "fine")
        d = Signal(32)
        d_exponent = Signal(8)
        exact = Mux(value[-1], Cat(value[:23], d_exponent, sign2), 0)
        m.d.comb += [
            d_exponent.eq(self.bias - Cat(by_fine, coarse_count)),
            read.en.eq(self.valid[3] & self.interpolate),
            read.addr.eq(entry),
        ]
        with m.If(self.valid[3] & self.interpolate):
            m.d.sync += d.eq(Mux(small2, Cat(original2, sign2), exact))

        # Stage 4: the entry is there.
        c0, c1, c2 = read.data[:32], read.data[32:56], read.data[56:72]
        active = self.interpolate
        valid, time = self.valid, self.time

        def gate(first, latency):
            return valid[first : first + latency] & active.replicate(latency)

        c0_later = delayed(m, "delay_c0", c0, 4, 17, valid, time, active)
        c1_later = delayed(m, "delay_c1", c1, 4, 8, valid, time, active)
        d_later = delayed(m, "delay_d", d, 4, 13, valid, time, active)
        m.submodules.square = square = FloatMultiply()
        m.d.comb += [square.a.eq(d), square.b.eq(Cat(Const(0, 16), c2)), square.enables.eq(gate(4, 4))]
        # Stage 8.
        m.submodules.slope = slope = FloatAdd()
        m.d.comb += [slope.a.eq(Cat(Const(0, 8), c1_later)), slope.b.eq(square.z), slope.enables.eq(gate(8, 5))]
        # Stage 13.
        m.submodules.rise = rise = FloatMultiply()
        m.d.comb += [rise.a.eq(d_later), rise.b.eq(slope.z), rise.enables.eq(gate(13, 4))]
        # Stage 17.
        m.submodules.sum = total = FloatAdd()
        m.d.comb += [total.a.eq(c0_later), total.b.eq(rise.z), total.enables.eq(gate(17, 5)), self.y.eq(total.z)]
        return m
