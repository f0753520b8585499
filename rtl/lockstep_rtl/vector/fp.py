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
    rounded = Signal(25)
    final = Signal(signed(len(exponent) + 1))
    m.d.comb += [rounded.eq(significand + up), final.eq(exponent + rounded[24])]
    tiny, huge = final <= 0, final >= 255
    keep = ~tiny & ~huge | raw
    # Where rounding carries out, the low 23 bits are zero, as they must be.
    return Cat(Mux(keep, rounded[:23], 0), Mux(keep, final[:8], Mux(tiny, 0, 255)), sign)


class FloatMultiply(wiring.Component):
    """z = a * b, or z = a untouched where ``bypass``.

    Ports: ``a``, ``b`` In(32), ``bypass`` In(1), ``enables`` In(3), ``z`` Out(32).
    One product per cycle, LATENCY cycles later.
    """

    LATENCY = 3

    a: In(32)
    b: In(32)
    bypass: In(1)
    enables: In(3)
    z: Out(32)

    def elaborate(self, platform):
        m = Module()
        a, b = Parts(self.a), Parts(self.b)

        # Stage 0: multiply significands, add exponents. A bypassed word is multiplied by exactly 1.
        product = Signal(48)
        exponent = Signal(signed(10))
        sign = Signal()
        zero, infinite, nan, bypass = Signal(), Signal(), Signal(), Signal()
        factor = Mux(self.bypass, 1 << 23, b.significand)
        with m.If(self.enables[0]):
            m.d.sync += [
                product.eq(a.significand * factor),
                exponent.eq(a.exponent + Mux(self.bypass, 0, b.exponent - 127)),
                sign.eq(a.sign ^ (b.sign & ~self.bypass)),
                zero.eq(~(a.nonzero & b.nonzero)),
                infinite.eq(a.infinite | b.infinite),
                nan.eq(a.nan | b.nan | (a.infinite & ~b.nonzero) | (b.infinite & ~a.nonzero)),
                bypass.eq(self.bypass),
            ]

        # Stage 1: the leading one is in bit 47 or 46; find what rounding needs.
        top = product[47]
        normal = Mux(top, product[1:], product[:47])
        guard, sticky = normal[22], normal[:22].any() | (top & product[0])
        significand = Signal(24)
        up = Signal()
        exponent1 = Signal(signed(10))
        sign1, zero1, infinite1, nan1, bypass1 = Signal(), Signal(), Signal(), Signal(), Signal()
        with m.If(self.enables[1]):
            m.d.sync += [
                significand.eq(normal[23:]),
                up.eq(guard & (sticky | normal[23])),
                exponent1.eq(exponent + top),
                sign1.eq(sign),
                zero1.eq(zero & ~bypass),
                infinite1.eq(infinite & ~bypass),
                nan1.eq(nan & ~bypass),
                bypass1.eq(bypass),
            ]

        # Stage 2: round, pack, special cases.
        packed = round_and_pack(m, sign1, exponent1, significand, up, bypass1)
        special = Mux(nan1, QUIET_NAN, Cat(Const(0, 23), infinite1.replicate(8), sign1))
        with m.If(self.enables[2]):
            m.d.sync += self.z.eq(Mux(nan1 | infinite1 | zero1, special, packed))
        return m
