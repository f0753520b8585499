"""The whole VECTOR unit against the golden executor: random passes of every mode, their results and their cycles."""

import cocotb
import numpy as np
import pytest
from cocotb.triggers import RisingEdge
from lockstep_isa.instructions import (
    INDEX_ENTRIES,
    SECTIONS,
    VECTOR,
    Destination,
    FirstAdd,
    FirstMultiply,
    Function,
    Instruction,
    Mask,
    Maximum,
    SecondAdd,
    SecondMultiply,
    Source,
    Tap,
    ThirdMultiply,
)
from lockstep_isa.selection import section_fault
from lockstep_isa.tables import FUNCTIONS
from lockstep_rtl.vector.timing import vector_cycles
from lockstep_rtl.vector.unit import VectorUnit
from rtl.axi_models import word_of
from rtl.harness import parameters, run_cocotb, stalls, start
from rtl.vector.floats import nasty_words
from rtl.vector.machine import Machine, config_of

TABLES = {
    Function.EXP2: ["exp2"],
    Function.RECIP: ["recip"],
    Function.RSQRT: ["rsqrt"],
    Function.RELU_MINUS: ["gelu_erf", "gelu_tanh", "silu"],
    Function.ODD: ["tanh"],
    Function.SIGMOID: ["sigmoid"],
}
# Where random passes read and write PARAMETER (512 words): operands, results, row statistics.
OPERANDS, RESULTS, SUMS, MAXIMA = 256, 256, 480, 496
STARTS = {
    Destination.VECTOR: 600,
    Destination.BYTES: 600,
    Destination.BYTES_TRANSPOSED: 600,
    Destination.PARAMETER: RESULTS,
}


async def machine_of(dut, seed, probability=0.0):
    given = parameters()
    dut.table_write__enable.value = 0
    await start(dut)
    await RisingEdge(dut.clk)
    return Machine(dut, config_of(given["rows"], given["lanes"], given["selection"]), seed, stalls(probability, seed))


def float_bits(value):
    return int(np.float32(value).view(np.uint32))


def random_pass(random, config, function=None):
    """An instruction with everything chosen at random, within memories of 1024, 512, 256 and 256 words."""
    rows = config.rows

    def choose(enumeration, none=0.4):
        members = list(enumeration)
        return members[0] if random.random() < none else members[random.integers(len(members))]

    def upto(limit):
        return int(random.integers(0, limit))

    source = choose(Source, 0)
    destination = choose(Destination, 0)
    columns = int(random.choice([1, 2, 3, rows, rows + 1, 2 * rows, 15, 31, 63, 64, 65, 70]))
    tiles = int(random.integers(1, 4))
    if source in (Source.PARAMETER, Source.INTEGER) or destination not in (Destination.NONE, Destination.VECTOR):
        columns = min(columns, 66)
    function = choose(Function, 0.2) if function is None else function
    maximum = choose(Maximum, 0.5)
    selection = {}
    if config.selection and random.random() < 0.3:
        tiles, selection = 1, random_selection(random, rows, columns)
    to_stride = columns + upto(3)
    if destination in (Destination.WEIGHT_TRANSPOSED, Destination.BYTES_TRANSPOSED):
        to_stride = -(-columns // rows) * rows + upto(3)
    i = Instruction(
        VECTOR,
        source=source,
        destination=destination,
        add1=choose(FirstAdd),
        mul1=choose(FirstMultiply),
        mul2=choose(SecondMultiply),
        add2=choose(SecondAdd),
        function=function,
        table=upto(4),
        mul3=choose(ThirdMultiply),
        tap=choose(Tap, 0),
        sum=upto(2),
        maximum=maximum,
        max_continue=upto(2),
        tiles=tiles,
        columns=columns,
        x=upto(40),
        x_stride=upto(70),
        y=upto(100),
        y_stride=upto(100),
        to=STARTS.get(destination, 0) + upto(3),
        to_stride=to_stride,
        to_group=rows,
        lane0=upto(OPERANDS - 4),
        lane1=upto(OPERANDS - 4),
        column0=upto(200),
        column1=upto(200),
        column2=upto(200),
        sum_to=SUMS + upto(8),
        max_to=MAXIMA + upto(8),
        immediate0=float_bits(random.standard_normal() * 2.0 ** random.integers(-4, 5)),
        immediate1=float_bits(random.standard_normal()),
        mask=choose(Mask, 0.3),
        first_row=int(random.integers(-columns - 20, columns + 20)) % (1 << 20),
        window=int(random.choice([0, 0, 1, 2, rows, columns, 65535])),
        **selection,
    )
    if i.maximum and random.random() < 0.5:
        # Where results do not go to PARAMETER, there is room for maxima.
        sections = i.replace(max_columns=int(random.choice(SECTIONS, 2).min()), max_to=RESULTS + upto(8))
        return i if section_fault(config, sections) else sections
    return i


def random_selection(random, rows, columns):
    """Fields of a selection among ``columns`` columns."""
    select = int(random.choice([1, columns, random.integers(1, columns + 1)]))
    lane, first = int(random.integers(0, rows)), int(random.choice([0, random.integers(0, select + 1)]))
    return {
        "select": select,
        "select_to": int(random.integers(0, INDEX_ENTRIES - select + 1)),
        "select_lane": lane,
        "select_more_lanes": int(random.integers(0, rows - lane)),
        "select_first": first,
        "select_last": int(random.choice([0, random.integers(0, select - first + 1)])),
    }


async def prepare(machine, instruction):
    """Table and accumulator tiles that the instruction uses; the instruction, with its table's k."""
    names = TABLES.get(Function(instruction.function))
    if names:
        name = str(machine.random.choice(names))
        await machine.load_table(instruction.table, name)
        instruction = instruction.replace(shift=FUNCTIONS[name].k)
    if instruction.source == Source.ACCUMULATOR:
        machine.push_tiles(instruction.tiles * -(-instruction.columns // machine.config.columns))
    return instruction


async def check(machine, instruction, exact_cycles=True):
    instruction = await prepare(machine, instruction)
    cycles = await machine.execute(instruction)
    if exact_cycles:
        expected = vector_cycles(machine.config, instruction)
        assert cycles == expected, f"{instruction!r} takes {cycles} cycles, predicted {expected}"
    return cycles


@cocotb.test()
async def random_passes_equal_golden_in_the_predicted_cycles(dut):
    machine = await machine_of(dut, 1)
    for function in [*Function] * 4 + [None] * parameters()["passes"]:
        await machine.step()
        # All tiles are there before the pass starts, so that nothing stalls it.
        await check(machine, random_pass(machine.random, machine.config, function))


@cocotb.test()
async def random_passes_wait_for_late_accumulator_tiles(dut):
    machine = await machine_of(dut, 2, probability=0.8)
    stalled = 0
    for _ in range(parameters()["passes"] // 3):
        instruction = random_pass(machine.random, machine.config).replace(source=Source.ACCUMULATOR)
        await check(machine, instruction, exact_cycles=False)
        stalled += machine.stalled
    assert stalled > 50, "the stalls of this test did not happen"


@cocotb.test(skip=not parameters().get("selection"))
async def maxima_of_sections_take_no_cycle_of_their_own(dut):
    """Fresh and continued, of rows of any length, with the only words of columns that continued ones leave time for."""
    machine = await machine_of(dut, 10)
    random, config = machine.random, machine.config
    for columns in (1, 2, 3, 4, 5, 8, 9, 16, 63, 64, 65, 130, 200):
        for size, resume in ((4, 0), (4, 1), (8, 1), (64, 1)):
            i = Instruction(
                VECTOR,
                source=random.choice([Source.ACCUMULATOR, Source.VECTOR]),
                destination=random.choice([Destination.NONE, Destination.VECTOR, Destination.ACTIVATION]),
                mul1=random.choice([FirstMultiply.NONE, FirstMultiply.LANE1, FirstMultiply.COLUMN0]),
                mul2=random.choice([SecondMultiply.LANE0, SecondMultiply.COLUMN0]),
                mul3=random.choice([ThirdMultiply.NONE, ThirdMultiply.Y]),
                tap=Tap.BEFORE,
                tiles=int(random.integers(1, 4)),
                columns=columns,
                x=int(random.integers(0, 100)),
                x_stride=columns,
                to=0 if columns > 80 else 16,
                lane0=int(random.integers(0, 100)),
                lane1=int(random.integers(0, 100)),
                column0=int(random.integers(0, 100)),
                sum=int(random.integers(0, 2)),
                sum_to=SUMS,
                maximum=Maximum.ABSOLUTE,
                max_continue=resume,
                max_columns=size,
                max_to=RESULTS,
            )
            if section_fault(config, i):
                i = i.replace(max_continue=0)
            if i.destination == Destination.VECTOR:
                i = i.replace(to=800, tiles=1, y=0, x=0)
            with_sections = await check(machine, i)
            whole = i.replace(max_columns=0, max_to=MAXIMA)
            assert with_sections == vector_cycles(config, whole), f"{i!r}"


@cocotb.test()
async def masks_hide_the_scores_that_golden_hides(dut):
    machine = await machine_of(dut, 6, probability=0.3)
    random = machine.random
    # Around the diagonal, far in front of it, far behind it; the last ones at the ends of 20 bits.
    ends = [(1 << 19) - 1, -(1 << 19), 65534, -65536]
    cases = [(int(random.integers(-60, 60)), int(random.choice([0, 1, 2, 5, 64, 65535]))) for _ in range(24)]
    hidden = 0
    for first_row, window in [*cases, *((e, w) for e in ends for w in (0, 1, 65535))]:
        score = Instruction(
            VECTOR,
            source=random.choice([Source.ACCUMULATOR, Source.VECTOR]),
            destination=Destination.VECTOR,
            function=Function.SCORE,
            mul1=FirstMultiply.IMMEDIATE0,
            immediate0=float_bits(2.0**-20),
            tiles=3,
            columns=int(random.integers(1, 70)),
            x_stride=70,
            to=600,
            to_stride=70,
            maximum=Maximum.EXPONENT,
            max_to=MAXIMA,
            mask=Mask.CAUSAL,
            first_row=first_row % (1 << 20),
            window=window,
        )
        await check(machine, score, exact_cycles=False)
        words = machine.memories["vector"][600 : 600 + 3 * 70]
        hidden += int((words == 0xFF800000).sum())
        # A row that sees nothing has the least exponent.
        nothing = [(words[70 * t :][: score.columns] == 0xFF800000).all(0) for t in range(3)]
        least = machine.memories["parameter"][MAXIMA : MAXIMA + 3].view(np.int32) == -32000
        assert (least | ~np.array(nothing)).all()
    assert hidden > 1000


@cocotb.test()
async def hidden_scores_have_no_weight_whatever_the_maximum(dut):
    machine = await machine_of(dut, 7)
    for scale in (0, 5, -32000, 31999, -(2**31), 2**31 - 1):
        machine.memories["vector"][0:2] = 0xFF800000
        machine.golden.vector[0:2] = -np.inf
        machine.memories["parameter"][7] = scale & 0xFFFFFFFF
        machine.golden.parameter.view(np.int32)[7] = scale
        exp2 = Instruction(
            VECTOR,
            source=Source.VECTOR,
            destination=Destination.VECTOR,
            function=Function.EXP2,
            columns=2,
            lane0=7,
            to=600,
        )
        await check(machine, exp2)
        assert not machine.memories["vector"][600:602].any()


@cocotb.test()
async def untouched_words_stay_untouched(dut):
    machine = await machine_of(dut, 3)
    # Integers and NaNs with payloads: no arithmetic is asked for, so none may show.
    anything = machine.random.integers(0, 2**32, (40, machine.config.rows), np.uint32)
    anything[::3] &= 0x807FFFFF
    machine.memories["parameter"][:40] = anything
    machine.golden.parameter.view(np.uint32)[:40] = anything
    copy = Instruction(VECTOR, source=Source.PARAMETER, destination=Destination.VECTOR, columns=40, to=600)
    await check(machine, copy)
    assert (machine.memories["vector"][600:640] == anything).all()


@cocotb.test()
async def plain_columns_flow_without_a_pause(dut):
    machine = await machine_of(dut, 4)
    columns, tiles = 64, 3
    copy = Instruction(
        VECTOR,
        source=Source.VECTOR,
        destination=Destination.ACTIVATION,
        columns=columns,
        tiles=tiles,
        to_stride=columns,
    )
    cycles = await check(machine, copy)
    assert cycles == 62 + tiles * (1 + columns * machine.config.rows // machine.config.lanes)


@cocotb.test()
async def reciprocals_of_bad_rows_raise_their_flags(dut):
    machine = await machine_of(dut, 5)
    words = machine.golden.vector.view(np.uint32)
    words[0] = machine.memories["vector"][0] = 0x40400000
    for value, flags in ((0x3F800000, 0), (0x80000000, 1), (0x7F800000, 2), (0x7FC00000, 2)):
        words[0, 1] = machine.memories["vector"][0, 1] = value
        recip = Instruction(
            VECTOR, source=Source.VECTOR, destination=Destination.VECTOR, function=Function.RECIP, to=900
        )
        await check(machine, recip)
        assert machine.flags == flags, f"1 / {value:#x} raises {machine.flags}, expected {flags}"


@cocotb.test(skip=not parameters().get("selection"))
async def a_selection_of_any_size_has_the_least_cycles_of_its_columns(dut):
    """Few values, so that most are equal; a value that only one lane has; as many columns as there may be."""
    machine = await machine_of(dut, 8, probability=0.3)
    words = machine.golden.vector.view(np.uint32)
    for columns in (1, 2, 3, 7, 64, 65, INDEX_ENTRIES):
        for equal in (0xFFFFFFFF, 0xC0000003, 0xFF800000, 0):
            words[:] = machine.memories["vector"] = nasty_words(machine.random, words.size).reshape(words.shape) & equal
            fields = random_selection(machine.random, machine.config.rows, columns)
            if columns == INDEX_ENTRIES:
                fields |= {"select": fields["select"] % 300, "select_to": INDEX_ENTRIES - 300}
                fields |= {"select_first": 0, "select_last": 0}
            select = Instruction(VECTOR, source=Source.VECTOR, columns=columns, **fields)
            cycles = await check(machine, select)
            lanes, beat = machine.config.lanes, machine.config.rows // machine.config.lanes
            beats = -(-columns // machine.config.columns_per_beat) * max(1, beat)
            levels = (min(lanes, machine.config.rows) - 1).bit_length()
            if fields["select"]:
                assert cycles == 2 + beats + 1 + 57 + levels + 7 * (-(-columns // 2) + 1) + columns + 5


@cocotb.test(skip=not parameters().get("selection"))
async def lists_beyond_the_index_memory_are_told(dut):
    machine = await machine_of(dut, 9)
    inside = {"columns": 8, "select": 8, "select_to": INDEX_ENTRIES - 8}
    for fields, beyond in ((inside, 0), (inside | {"select_to": INDEX_ENTRIES - 7}, 1), ({"columns": 1025}, 1)):
        select = Instruction(VECTOR, source=Source.ACCUMULATOR, **{"select": 1, **fields})
        machine.push_tiles(-(-select.columns // machine.config.columns))
        dut.instruction__payload.value, dut.instruction__valid.value = word_of(select), 1
        told = 0
        machine.done_at = None
        while machine.done_at is None:
            await machine.step()
            told += int(dut.select_beyond.value)
        assert told == beyond, f"{fields}"


SHAPES = [
    (4, 4, 120),
    (4, 2, 100),
    (2, 2, 100),
    (4, 8, 100),
    (2, 4, 60),
    pytest.param(8, 2, 300, marks=pytest.mark.slow),
    pytest.param(8, 16, 300, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("rows", "lanes", "passes"), SHAPES)
def test_vector_unit_equals_golden(rows, lanes, passes):
    # The greatest shapes without, as their tests take longest.
    selection = rows <= 4
    given = {"rows": rows, "lanes": lanes, "passes": passes, "selection": selection}
    run_cocotb(lambda: VectorUnit(config_of(rows, lanes, selection)), __name__, f"vector_unit_{rows}x{lanes}", given)
