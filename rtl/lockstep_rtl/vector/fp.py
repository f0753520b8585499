"""Floating-point pipelines of one lane: add, multiply, int32 to fp32, fp32 to 8 bits.

All follow the numeric contract: binary32, round to nearest even, subnormal inputs read as zero, results that are tiny
after rounding become a signed zero, NaN results are 0x7FC00000. None of them stalls. ``enables`` In(LATENCY) has one
bit per stage; the registers of a stage load only where its bit is set, so that idle stages do not toggle. Bit i belongs
to the value that entered i cycles ago; whoever uses a pipeline shifts one valid bit along for all lanes.
"""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, ValueLike, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

QUIET_NAN = 0x7FC00000
ONE = 0x3F800000


class Parts:
    """Fields and class of a binary32 word; subnormals count as zero."""

    def __init__(self, word: ValueLike) -> None:
        self.word = word
        self.sign = word[31]
        self.exponent = word[23:31]
        self.fraction = word[:23]
        self.nonzero = self.exponent.any()
        self.special = self.exponent.all()
        self.nan = self.special & self.fraction.any()
        self.infinite = self.special & ~self.fraction.any()
        self.significand = Cat(self.fraction, 1)


def round_and_pack(
    m: Module, sign: ValueLike, exponent: ValueLike, significand: ValueLike, up: ValueLike, raw: ValueLike = 0
) -> ValueLike:
    """binary32 word of a normalised 24-bit significand and a signed exponent, plus one unit where ``up``.

    Exponents that end at or below 0 give a signed zero, at or above 255 infinity, unless ``raw``.
    """
    rounded = Signal(24)
    # Whether rounding carries out is known without the sum, and the exponent for both cases without the carry: the
    # chains of the two additions need not follow each other.
    carry = Signal()
    m.d.comb += [rounded.eq(significand + up), carry.eq(up & significand.all())]
    words = []
    for more in (0, 1):
        final = Signal(signed(len(exponent) + 1))
        tiny, huge = exponent <= -more, exponent >= 255 - more
        m.d.comb += final.eq(exponent + more)
        words.append(Cat(~tiny & ~huge | raw, Mux(raw, final[:8], Mux(tiny, 0, Mux(huge, 255, final[:8])))))
    chosen = Mux(carry, words[1], words[0])
    # Where rounding carries out, the low 23 bits are zero, as they must be.
    return Cat(Mux(chosen[0], rounded[:23], 0), chosen[1:], sign)


class FloatMultiply(wiring.Component):
    """z = a * b, or z = a untouched where ``bypass``.

    Ports: ``a``, ``b`` In(32), ``bypass`` In(1), ``enables`` In(4), ``z`` Out(32).
    One product per cycle, LATENCY cycles later.
    """

    LATENCY = 4

    a: In(32)
    b: In(32)
    bypass: In(1)
    enables: In(4)
    z: Out(32)

    def elaborate(self, platform):
        m = Module()
        a, b = Parts(self.a), Parts(self.b)

        # Stage 0: multiply halves of the significands, add exponents. A bypassed word is multiplied by exactly 1.
        low, middle0, middle1, high = (Signal(24) for _ in range(4))
        exponent = Signal(signed(10))
        sign, bypass = Signal(), Signal()
        # One of each operand: its exponent is not zero, its exponent is all ones, its fraction is not zero.
        nonzeros, specials, fractions = Signal(2), Signal(2), Signal(2)
        factor = Mux(self.bypass, 1 << 23, b.significand)
        with m.If(self.enables[0]):
            m.d.sync += [
                low.eq(a.significand[:12] * factor[:12]),
                middle0.eq(a.significand[12:] * factor[:12]),
                middle1.eq(a.significand[:12] * factor[12:]),
                high.eq(a.significand[12:] * factor[12:]),
                exponent.eq(a.exponent + Mux(self.bypass, 0, b.exponent - 127)),
                sign.eq(a.sign ^ (b.sign & ~self.bypass)),
                nonzeros.eq(Cat(a.nonzero, b.nonzero)),
                specials.eq(Cat(a.special, b.special)),
                fractions.eq(Cat(a.fraction.any(), b.fraction.any())),
                bypass.eq(self.bypass),
            ]

        # Stage 1: the product, and what it is where it is none.
        is_nan, is_infinite = specials & fractions, specials & ~fractions
        infinite_times_zero = (is_infinite & Cat(~nonzeros[1], ~nonzeros[0])).any()
        product = Signal(48)
        exponent0 = Signal(signed(10))
        sign0, zero0, infinite0, nan0, bypass0 = (Signal() for _ in range(5))
        with m.If(self.enables[1]):
            m.d.sync += [
                product.eq(Cat(low, high) + ((middle0 + middle1) << 12)),
                exponent0.eq(exponent),
                sign0.eq(sign),
                zero0.eq(~nonzeros.all() & ~bypass),
                infinite0.eq(is_infinite.any() & ~bypass),
                nan0.eq((is_nan.any() | infinite_times_zero) & ~bypass),
                bypass0.eq(bypass),
            ]

        # Stage 2: the leading one is in bit 47 or 46; find what rounding needs.
        top = product[47]
        normal = Mux(top, product[1:], product[:47])
        guard, sticky = normal[22], normal[:22].any() | (top & product[0])
        significand = Signal(24)
        up = Signal()
        exponent1 = Signal(signed(10))
        sign1, zero1, infinite1, nan1, bypass1 = Signal(), Signal(), Signal(), Signal(), Signal()
        with m.If(self.enables[2]):
            m.d.sync += [
                significand.eq(normal[23:]),
                up.eq(guard & (sticky | normal[23])),
                exponent1.eq(exponent0 + top),
                sign1.eq(sign0),
                zero1.eq(zero0),
                infinite1.eq(infinite0),
                nan1.eq(nan0),
                bypass1.eq(bypass0),
            ]

        # Stage 3: round, pack, special cases.
        packed = round_and_pack(m, sign1, exponent1, significand, up, bypass1)
        special = Mux(nan1, QUIET_NAN, Cat(Const(0, 23), infinite1.replicate(8), sign1))
        with m.If(self.enables[3]):
            m.d.sync += self.z.eq(Mux(nan1 | infinite1 | zero1, special, packed))
        return m


def shift_up(m: Module, value: ValueLike, steps: tuple[int, ...], name: str) -> tuple[ValueLike, ValueLike]:
    """(value shifted left by those of ``steps`` that only push out zeros, which ones: lowest step first).

    With (16, 8, 4, 2, 1), the highest bit that is set comes to the top, of up to 32 bits. The whole is too slow for
    one stage: callers give (16, 8) in one and (4, 2, 1) in the next.
    """
    width = len(value)
    shift = []
    for step in steps:
        empty = Signal(name=f"{name}_empty{step}")
        shifted = Signal(width, name=f"{name}_shift{step}")
        m.d.comb += [empty.eq(~value[width - step :].any()), shifted.eq(Mux(empty, value << step, value))]
        value = shifted
        shift.insert(0, empty)
    return value, Cat(shift)


class FloatAdd(wiring.Component):
    """z = a + b, or z = a untouched where ``bypass``.

    Ports: ``a``, ``b`` In(32), ``bypass`` In(1), ``enables`` In(5), ``z`` Out(32).
    One sum per cycle, LATENCY cycles later.
    """

    LATENCY = 5

    a: In(32)
    b: In(32)
    bypass: In(1)
    enables: In(5)
    z: Out(32)

    def elaborate(self, platform):
        m = Module()
        a, b = Parts(self.a), Parts(self.b)

        # Stage 0: the operand of greater magnitude first. A bypassed word counts as normal, and alone.
        swap = Signal()
        m.d.comb += swap.eq((self.b[:31] > self.a[:31]) & ~self.bypass)
        big, small = Signal(32), Signal(32)
        m.d.comb += [big.eq(Mux(swap, self.b, self.a)), small.eq(Mux(swap, self.a, self.b))]
        big_parts, small_parts = Parts(big), Parts(small)
        distance = big_parts.exponent - small_parts.exponent
        differ = (a.sign ^ b.sign) & ~self.bypass
        large, little = Signal(24), Signal(24)
        shift = Signal(5)
        exponent = Signal(8)
        sign, both_negative, minus, bypass = (Signal() for _ in range(4))
        # One of each operand: its exponent is all ones, its fraction is not zero.
        specials, fractions = Signal(2), Signal(2)
        with m.If(self.enables[0]):
            m.d.sync += [
                large.eq(Mux(big_parts.nonzero | self.bypass, big_parts.significand, 0)),
                little.eq(Mux(small_parts.nonzero & ~self.bypass, small_parts.significand, 0)),
                shift.eq(Mux(distance[5:8].any(), 31, distance[:5])),
                exponent.eq(big_parts.exponent),
                sign.eq(big_parts.sign),
                both_negative.eq(a.sign & b.sign),
                minus.eq(differ),
                specials.eq(Cat(a.special, b.special)),
                fractions.eq(Cat(a.fraction.any(), b.fraction.any())),
                bypass.eq(self.bypass),
            ]

        # Stage 1: align with guard, round and sticky bits, add or subtract.
        aligned = Signal(51)
        m.d.comb += aligned.eq(Cat(Const(0, 27), little) >> shift)
        addend = Signal(27)
        m.d.comb += addend.eq(Cat(aligned[24] | aligned[:24].any(), aligned[25:]))
        total = Signal(28)
        exponent1 = Signal(8)
        sign1, both1, infinite1, nan1, bypass1 = (Signal() for _ in range(5))
        scaled = Cat(Const(0, 3), large)
        is_nan, is_infinite = specials & fractions, specials & ~fractions
        with m.If(self.enables[1]):
            m.d.sync += [
                total.eq(Mux(minus, scaled - addend, scaled + addend)),
                exponent1.eq(exponent),
                sign1.eq(sign),
                both1.eq(both_negative),
                infinite1.eq(is_infinite.any() & ~bypass),
                nan1.eq((is_nan.any() | (is_infinite.all() & minus)) & ~bypass),
                bypass1.eq(bypass),
            ]

        # Stage 2: bring the leading one to the upper eight bits.
        coarse, by_coarse = shift_up(m, total, (16, 8), "coarse")
        near = Signal(28)
        coarse_count = Signal(2)
        exponent_near = Signal(8)
        sign_near, zero_near, infinite_near, nan_near, bypass_near = (Signal() for _ in range(5))
        with m.If(self.enables[2]):
            m.d.sync += [
                near.eq(coarse),
                coarse_count.eq(by_coarse),
                exponent_near.eq(exponent1),
                sign_near.eq(Mux(total.any(), sign1, both1)),
                zero_near.eq(~total.any()),
                infinite_near.eq(infinite1),
                nan_near.eq(nan1),
                bypass_near.eq(bypass1),
            ]

        # Stage 3: and to bit 27.
        value, by_fine = shift_up(m, near, (4, 2, 1), "fine")
        count = Cat(by_fine, coarse_count)
        normal = Signal(28)
        exponent2 = Signal(signed(10))
        sign2, zero2, infinite2, nan2, bypass2 = (Signal() for _ in range(5))
        with m.If(self.enables[3]):
            m.d.sync += [
                normal.eq(value),
                exponent2.eq(exponent_near + 1 - count),
                sign2.eq(sign_near),
                zero2.eq(zero_near),
                infinite2.eq(infinite_near),
                nan2.eq(nan_near),
                bypass2.eq(bypass_near),
            ]

        # Stage 4: round, pack, special cases.
        up = normal[3] & (normal[:3].any() | normal[4])
        packed = round_and_pack(m, sign2, exponent2, normal[4:], up, bypass2)
        special = Mux(nan2, QUIET_NAN, Cat(Const(0, 23), infinite2.replicate(8), sign2))
        with m.If(self.enables[4]):
            m.d.sync += self.z.eq(Mux(nan2 | infinite2 | zero2, special, packed))
        return m


class IntToFloat(wiring.Component):
    """z = the int32 ``a`` as fp32, rounded; or z = a untouched where ``bypass``.

    Ports: ``a`` In(32), ``bypass`` In(1), held still during a pass, ``enables`` In(4), ``z`` Out(32).
    One value per cycle, LATENCY cycles later.
    """

    LATENCY = 4

    a: In(32)
    bypass: In(1)
    enables: In(4)
    z: Out(32)

    def elaborate(self, platform):
        m = Module()

        # Stage 0: sign and magnitude.
        magnitude = Signal(32)
        sign = Signal()
        with m.If(self.enables[0]):
            m.d.sync += [
                magnitude.eq(Mux(self.a[31] & ~self.bypass, -self.a, self.a)),
                sign.eq(self.a[31]),
            ]

        # Stage 1: bring the leading one to the upper eight bits.
        coarse, by_coarse = shift_up(m, magnitude, (16, 8), "coarse")
        near = Signal(32)
        coarse_count = Signal(2)
        sign_near = Signal()
        with m.If(self.enables[1]):
            m.d.sync += [
                near.eq(Mux(self.bypass, magnitude, coarse)),
                coarse_count.eq(by_coarse),
                sign_near.eq(sign),
            ]

        # Stage 2: and to bit 31.
        value, by_fine = shift_up(m, near, (4, 2, 1), "fine")
        count = Cat(by_fine, coarse_count)
        normal = Signal(32)
        exponent = Signal(signed(10))
        sign1 = Signal()
        with m.If(self.enables[2]):
            m.d.sync += [
                normal.eq(Mux(self.bypass, near, value)),
                exponent.eq(Mux(normal_is_zero(value), 0, 158 - count)),
                sign1.eq(sign_near),
            ]

        # Stage 3: round and pack.
        up = normal[7] & (normal[:7].any() | normal[8])
        packed = round_and_pack(m, sign1, exponent, normal[8:], up)
        with m.If(self.enables[3]):
            m.d.sync += self.z.eq(Mux(self.bypass, normal, packed))
        return m


def normal_is_zero(value: ValueLike) -> ValueLike:
    """Whether a normalised word was zero: it alone has no leading one."""
    return ~value[-1]


class RoundToInt8(wiring.Component):
    """z = the low 8 bits of ``a`` rounded to the nearest even integer; 0 where abs(a) >= 2^22 or a is not a number.

    Ports: ``a`` In(32), ``enables`` In(2), ``z`` Out(8). One value per cycle, LATENCY cycles later.
    """

    LATENCY = 2

    a: In(32)
    enables: In(2)
    z: Out(8)

    def elaborate(self, platform):
        m = Module()
        a = Parts(self.a)

        # Stage 0: shift the significand right until its unit is 1. Beyond 25 places nothing is left to round.
        distance = Signal(9)
        m.d.comb += distance.eq(150 - a.exponent)
        shift = Signal(5)
        m.d.comb += shift.eq(Mux(distance[5:8].any(), 31, distance[:5]))
        counts = a.nonzero & (a.exponent < 127 + 22)
        aligned = Signal(49)
        m.d.comb += aligned.eq(Cat(Const(0, 25), a.significand) >> shift)
        integer = Signal(8)
        up, sign = Signal(), Signal()
        with m.If(self.enables[0]):
            m.d.sync += [
                integer.eq(Mux(counts, aligned[25:33], 0)),
                up.eq(counts & aligned[24] & (aligned[:24].any() | aligned[25])),
                sign.eq(a.sign),
            ]

        # Stage 1: round, negate.
        rounded = integer + up
        with m.If(self.enables[1]):
            m.d.sync += self.z.eq(Mux(sign, -rounded, rounded))
        return m
