"""Row reductions: 64 strided partial sums with their tree, and running maxima.

Two lanes that take columns of one row side by side share its sums: one has the partial sums of even columns, the other
one those of odd columns, 32 each. All levels of the tree but the last stay within a lane.
"""

from amaranth.hdl import Array, Cat, Const, Module, Mux, Shape, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from lockstep_isa.config import CoreConfig

from .fp import QUIET_NAN, FloatAdd, Parts
from .timing import PARTIALS, SUM_TURNAROUND, level_additions, level_cycles


class SumControls(wiring.Signature):
    """What SumControl tells the PartialSums of every lane.

    Cycle 0: ``touch`` writes x to ``address`` of ``fill``; ``accumulate`` reads there; ``fold`` reads ``address`` and
    ``other`` of the other half. Cycle 1: the second operand is x where ``accumulating``, the other lane's word where
    ``crossing``, +0 where ``blank``. ``enables`` of the operands and of the adder behind them, and in cycle 7 ``store``
    writes the sum to ``target`` of half ``store_half``.
    """

    def __init__(self, subwords: int) -> None:
        bits = (PARTIALS * subwords - 1).bit_length()
        super().__init__(
            {
                "fill": Out(1),
                "touch": Out(1),
                "read": Out(1),
                "address": Out(bits),
                "other": Out(bits),
                "touch_address": Out(bits),
                "accumulating": Out(1),
                "crossing": Out(1),
                "folded_half": Out(1),
                "blank": Out(1),
                "enables": Out(6),
                "store": Out(1),
                "store_half": Out(1),
                "target": Out(bits),
            }
        )


class PartialSums(wiring.Component):
    """The partial sums of one lane: two halves of 64 * subwords words, and one adder for rows and trees.

    Ports
    -----
    controls : In(SumControls). ``x`` : In(32) with ``valid`` In(1), in cycle 0.
    sum : Out(32), the adder's result, seven cycles behind its read.
    partial : Out(32), the first word, one cycle behind its read; ``other`` : In(32), that of the lane that shares
        its row with this one.

    The first 64 columns of a row only fill their half, so the adder folds the other half, that of the row before,
    meanwhile. What is filled in has not passed the adder; every partial sum does before the end, where signs of zero,
    subnormals and NaNs become what the contract says.
    """

    def __init__(self, subwords: int) -> None:
        self.subwords = subwords
        words = {name: In(32) for name in ("x", "other")} | {name: Out(32) for name in ("sum", "partial")}
        super().__init__({"controls": In(SumControls(subwords)), "valid": In(1)} | words)

    def elaborate(self, platform):
        m = Module()
        c = self.controls
        m.submodules.adder = adder = FloatAdd()

        # Cycle 0: fill, or read.
        firsts, seconds = [], []
        for half in range(2):
            name = f"half{half}"
            m.submodules[name] = memory = Memory(shape=Shape(32), depth=PARTIALS * self.subwords, init=[])
            write, first, second = memory.write_port(), memory.read_port(), memory.read_port()
            fill = c.touch & (c.fill == half)
            m.d.comb += [
                write.en.eq(fill | (c.store & (c.store_half == half))),
                write.addr.eq(Mux(fill, c.touch_address, c.target)),
                write.data.eq(Mux(fill, self.x, adder.z)),
                first.en.eq(c.read),
                first.addr.eq(c.address),
                second.en.eq(c.read),
                second.addr.eq(c.other),
            ]
            firsts.append(first.data)
            seconds.append(second.data)
        x = Signal(32)
        with m.If(self.valid):
            m.d.sync += x.eq(self.x)

        # Cycle 1: the operands; block RAM answers too late in a cycle to add in it.
        half = c.folded_half
        folded = Mux(c.blank, 0, Mux(c.crossing, self.other, Mux(half, seconds[1], seconds[0])))
        a, b = Signal(32), Signal(32)
        m.d.comb += self.partial.eq(Mux(half, firsts[1], firsts[0]))
        with m.If(c.enables[0]):
            m.d.sync += [a.eq(self.partial), b.eq(Mux(c.accumulating, x, folded))]

        # Cycles 2 to 6: add.
        m.d.comb += [
            adder.a.eq(a),
            adder.b.eq(b),
            adder.enables.eq(c.enables[1:]),
            self.sum.eq(adder.z),
        ]
        return m


class SumControl(wiring.Component):
    """Addresses and timing of the row sums of all lanes.

    Ports
    -----
    valid : In(columns_per_beat), a beat enters: bit c, its column c is there. ``last`` : In(1), it is the row's last
        one; ``sub`` : In(log2 subwords), which lanes.
    columns : In(16), of a row, holds still during a pass.
    controls_0, and controls_1 where a beat has two columns : Out(SumControls), of the lanes of each column.
    done : Out(1) with ``done_sub``: a sum is on its way out of the adders of column 0 now.
    idle : Out(1), nothing is left to add.

    SUM_TURNAROUND cycles behind the last beat of a row its tree starts: levels of 32, 16, ..., 1 additions per row
    (fewer where fewer columns were touched; the others count as +0), then + (+0). A level starts when its first
    addition's operands are there (``level_cycles``). The issue stage keeps the next rows far enough behind.

    Where the last beat of a row has one column, lanes of the other one add +0. That leaves no trace: signs of zero
    come from the final + (+0) alone.
    """

    def __init__(self, config: CoreConfig) -> None:
        self.config = config
        subwords = config.subwords
        super().__init__(
            {f"controls_{c}": Out(SumControls(subwords)) for c in range(config.columns_per_beat)}
            | {
                "valid": In(config.columns_per_beat),
                "last": In(1),
                "sub": In(range(subwords)),
                "columns": In(16),
                "done": Out(1),
                "done_sub": Out(range(subwords)),
                "idle": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        c = self.controls_0
        subwords, side = self.config.subwords, self.config.columns_per_beat
        side_bits = side - 1
        sub_bits = (subwords - 1).bit_length()
        bits = len(c.address)
        valid = self.valid[0]
        ends = self.sub == subwords - 1

        # The row that comes in: where its beat goes, and whether it is the first one there.
        column = Signal(6 - side_bits)
        again = Signal()
        fill = Signal()
        with m.If(valid & ends):
            m.d.sync += [column.eq(column + 1), again.eq(again | column.all())]
            with m.If(self.last):
                m.d.sync += [column.eq(0), again.eq(0), fill.eq(~fill)]
        here = Cat(self.sub, column)
        accumulate = valid & again
        m.d.comb += [c.fill.eq(fill), c.touch.eq(valid & ~again), c.touch_address.eq(here)]

        # The tree: SUM_TURNAROUND - 1 cycles of waiting, then the levels, then the final + (+0).
        partials = Signal(7)
        m.d.comb += partials.eq(Mux(self.columns[6:].any(), PARTIALS, self.columns[:6]))
        levels = Signal(range(7))
        for level in range(6):
            with m.If(partials > 1 << level):
                m.d.comb += levels.eq(level + 1)
        wait = Signal(range(SUM_TURNAROUND))
        level = Signal(range(7))
        final, first_level = Signal(), Signal()
        position = Signal(range(32 * subwords + 1))
        folding = Signal()
        tree_half = Signal()
        fold, finish = Signal(), Signal()
        with m.If(valid & self.last & ends):
            m.d.sync += [wait.eq(SUM_TURNAROUND - 1), tree_half.eq(fill)]
        with m.If(wait.any()):
            m.d.sync += wait.eq(wait - 1)
            with m.If(wait == 1):
                m.d.sync += [
                    folding.eq(1),
                    position.eq(0),
                    first_level.eq(1),
                    final.eq(levels == 0),
                    level.eq(Mux(levels == 0, 0, levels - 1)),
                ]
        lengths = Array(level_cycles(self.config, i) - 1 for i in range(6))
        counts = Array(subwords * level_additions(self.config, i) for i in range(6))
        j = position[sub_bits:]
        partner = Signal(6)
        m.d.comb += [
            partner.eq(j | Mux(final, 0, (Const(1, 6) << level) >> side_bits)),
            fold.eq(folding & (position < Mux(final, subwords, counts[level]))),
            finish.eq(fold & final),
        ]
        with m.If(folding):
            m.d.sync += position.eq(position + 1)
            with m.If(final), m.If(position == subwords - 1):
                m.d.sync += folding.eq(0)
            with m.Elif(position == lengths[level]):
                m.d.sync += [position.eq(0), first_level.eq(0), level.eq(level - 1)]
                with m.If(level == 0):
                    m.d.sync += [final.eq(1), level.eq(0)]
        own = Cat(position[:sub_bits], j[:6])
        pair = Cat(position[:sub_bits], partner)
        m.d.comb += [
            c.read.eq(accumulate | fold),
            c.address.eq(Mux(accumulate, here, own)),
            c.other.eq(pair),
        ]

        # What follows an addition through the adder.
        stages = SUM_TURNAROUND - 1
        active = Signal(stages + 1)
        targets = [Signal(bits, name=f"target{i}") for i in range(stages)]
        halves = Signal(stages)
        finishing = Signal(stages)
        half = Mux(accumulate, fill, tree_half)
        m.d.comb += active[0].eq(accumulate | fold)
        m.d.sync += [
            active[1:].eq(active[:stages]),
            c.folded_half.eq(half),
            halves.eq(Cat(half, halves)),
            finishing.eq(Cat(finish, finishing)),
        ]
        for i in range(stages):
            with m.If(active[i]):
                m.d.sync += targets[i].eq(c.address if i == 0 else targets[i - 1])
        m.d.comb += [
            c.enables.eq(active[1:7]),
            c.store.eq(active[stages] & ~finishing[-1]),
            c.store_half.eq(halves[-1]),
            c.target.eq(targets[-1]),
            self.done.eq(active[stages] & finishing[-1]),
            self.done_sub.eq(targets[-1][:sub_bits]),
            self.idle.eq(~valid & ~wait.any() & ~folding & ~active[1:].any()),
        ]

        # What differs from column to column of a beat: whether it is there, and which partial sums are its own.
        for n in range(side):
            controls = getattr(self, f"controls_{n}")
            if n:
                for name in controls.signature.members:
                    if name not in ("accumulating", "crossing", "blank"):
                        m.d.comb += getattr(controls, name).eq(getattr(c, name))
            untouched = first_level & ((partner << side_bits | n) >= partials)
            m.d.sync += [
                controls.accumulating.eq(accumulate & self.valid[n]),
                controls.crossing.eq(level == 0 if side_bits else 0),
                controls.blank.eq(Mux(accumulate, ~self.valid[n], final | untouched)),
            ]
        return m


class RunningMaximum(wiring.Component):
    """The maximum over a row: of abs(x) as bit patterns, or of integer exponents.

    Ports
    -----
    x : In(32) and ``exponent`` : In(signed(16)), in cycle 0; ``use_exponent`` and ``resume`` : In(1), hold still.
    valid : In(2), bit i: a beat is in cycle i.
    first : In(1), ``start`` : In(32), in cycle 1: the row's first column, and where the maximum starts if ``resume``.
    maximum : Out(32 * subwords), of all rows of the lane, two cycles behind the x of the last one.

    The rows of a lane take turns, so their maxima go round: the one to compare with is always the first.
    """

    def __init__(self, subwords: int) -> None:
        self.subwords = subwords
        super().__init__(
            {
                "x": In(32),
                "exponent": In(signed(16)),
                "use_exponent": In(1),
                "resume": In(1),
                "valid": In(2),
                "first": In(1),
                "start": In(32),
                "maximum": Out(32 * subwords),
            }
        )

    def elaborate(self, platform):
        m = Module()

        # Cycle 0: a key whose order as an integer is the one wanted.
        x = Parts(self.x)
        magnitude = Mux(x.nan, QUIET_NAN, Mux(x.nonzero, self.x[:31], 0))
        key = Signal(signed(32))
        with m.If(self.valid[0]):
            m.d.sync += key.eq(Mux(self.use_exponent, self.exponent, magnitude))

        # Cycle 1: compare.
        current, begin = Signal(signed(32)), Signal(signed(32))
        least = Mux(self.use_exponent, -(2**31), 0)
        m.d.comb += [
            begin.eq(Mux(self.resume, self.start.as_signed(), least)),
            current.eq(Mux(self.first, begin, self.maximum[:32].as_signed())),
        ]
        with m.If(self.valid[1]):
            m.d.sync += self.maximum.eq(Cat(self.maximum[32:], Mux(key > current, key, current)))
        return m
