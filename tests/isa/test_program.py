"""Programs with run-time operands: their meaning, their files, their text and their checks."""

from __future__ import annotations

import dataclasses

import pytest
from lockstep_driver.builder import ProgramBuilder
from lockstep_isa.config import preset
from lockstep_isa.instructions import (
    BY_NAME,
    LOAD,
    MATRIX,
    STORE,
    VECTOR,
    Destination,
    Function,
    Instruction,
    InstructionError,
    Mask,
    Memory,
    Source,
    Sparsity,
    Weights,
    decode,
    encode,
    resolve,
)
from lockstep_isa.program import Operand, Program, ProgramError, validate

TINY = preset("tiny")


def copy_of(least: int, greatest: int, **fields: int) -> Program:
    """A LOAD, a pass and a STORE of ``words`` words, a variable number."""
    builder = ProgramBuilder(TINY)
    words = builder.operand("words", least, greatest)
    transfer = {"memory": Memory.VECTOR, "words": 0, "words_operand": words}
    builder.emit(LOAD, address=0, **transfer, **fields)
    builder.emit(VECTOR, source=Source.VECTOR, destination=Destination.VECTOR, columns=0, columns_operand=words)
    builder.emit(STORE, address=4096, **transfer)
    return builder.finish()


@pytest.mark.parametrize(
    ("field", "width", "base", "value", "effective"),
    [
        ("words", 16, 7, 5, 12),
        ("words", 16, 7, -5, 2),
        ("words", 16, 7, 0xFFFF_FFFB, 2),
        ("words", 16, 0xFFFF, 3, 2),
        ("address", 32, 0x100, 0xFFFF_FF40, 0x40),
        ("lane", 6, 60, 7, 3),
    ],
)
def test_an_operand_is_added_modulo_the_width_of_its_field(
    field: str, width: int, base: int, value: int, effective: int
) -> None:
    instruction = Instruction(STORE, memory=Memory.VECTOR, **{field: base, f"{field}_operand": 2})
    assert STORE.layout[field][1].width == width
    resolved = resolve(instruction, (9, value))
    assert resolved == instruction.replace(**{field: effective, f"{field}_operand": 0})


def test_a_count_that_becomes_zero_leaves_nothing_to_do() -> None:
    for name, field in (("LOAD", "rows"), ("MATRIX", "depth"), ("MATRIX", "inner"), ("VECTOR", "columns")):
        instruction = Instruction(BY_NAME[name], **{field: 3, f"{field}_operand": 1})
        assert resolve(instruction, (-3,)) is None
        assert resolve(instruction, (-2,)) is not None


def test_a_count_of_zero_needs_an_operand() -> None:
    assert decode(encode(Instruction(MATRIX, depth=0, depth_operand=63))).depth_operand == 63
    with pytest.raises(InstructionError, match=r"MATRIX\.depth = 0 is outside 1"):
        Instruction(MATRIX, depth=0)
    with pytest.raises(InstructionError, match=r"MATRIX\.depth_operand = 64 is outside 0\.\.63"):
        Instruction(MATRIX, depth_operand=64)


def test_the_text_of_a_program_names_its_operands() -> None:
    lines = copy_of(0, 8).disassemble()
    assert "words=0+words" in lines[0]
    assert "columns=0+words" in lines[1]
    assert not any("_operand" in line for line in lines)


def test_operands_survive_in_program_files() -> None:
    program = dataclasses.replace(copy_of(0, 8), operands=(Operand("words", -5, 8), Operand("größe", 0, 2**31, 32)))
    assert Program.from_bytes(program.to_bytes()) == program


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (copy_of(0, 8, local=65530), "with words = 8: instruction 0 .*reaches word 65537 of the VECTOR"),
        (copy_of(0, 65536), r"instruction 0 \(LOAD\): words has 16 bits and wraps between the limits 0..65536 of"),
        (copy_of(-1, 8), r"wraps between the limits -1..8 of operand 'words'; narrow them"),
    ],
)
def test_validation_tries_both_limits(program: Program, message: str) -> None:
    with pytest.raises(ProgramError, match=message):
        validate(TINY, program)


def test_a_position_may_pass_zero_but_not_the_end_of_its_field() -> None:
    def masked(least: int, greatest: int) -> Program:
        builder = ProgramBuilder(TINY)
        position = builder.operand("position", least, greatest)
        score = {"source": Source.VECTOR, "function": Function.SCORE, "mask": Mask.CAUSAL}
        builder.emit(VECTOR, first_row=(1 << 20) - 512, first_row_operand=position, **score)
        return builder.finish()

    validate(TINY, masked(0, 4096))
    with pytest.raises(ProgramError, match="first_row has 20 bits and wraps"):
        validate(TINY, masked(0, 1 << 20))


def test_validation_wants_tiles_consumed_whatever_the_operands() -> None:
    def product(columns: int) -> Program:
        builder = ProgramBuilder(TINY)
        tiles = builder.operand("tiles", 0, 3)
        width = builder.operand("width", 0, columns)
        builder.emit(MATRIX, depth=4, inner=0, inner_operand=tiles)
        builder.emit(VECTOR, source=Source.ACCUMULATOR, columns=0, columns_operand=width)
        return builder.finish()

    validate(TINY, product(3 * TINY.columns))
    with pytest.raises(ProgramError, match="with tiles = 3, width = 8: the program leaves 1 result tiles"):
        validate(TINY, product(2 * TINY.columns))
    with pytest.raises(ProgramError, match=r"with tiles = 3, width = 13: .*waits for itself"):
        validate(TINY, product(3 * TINY.columns + 1))


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        (Instruction(LOAD, words_operand=1), "words has operand 1, the program declares 0"),
        (Instruction(VECTOR, source=Source.VECTOR, mask=Mask.CAUSAL), "a mask needs the SCORE function"),
        (Instruction(STORE, memory=Memory.VECTOR, lane=TINY.rows), "lane 4 does not exist, a word has 4"),
    ],
)
def test_validation_refuses_what_has_no_meaning(instruction: Instruction, message: str) -> None:
    with pytest.raises(ProgramError, match=message):
        validate(TINY, Program(TINY.crc, (instruction,)))
    score = Instruction(VECTOR, source=Source.VECTOR, mask=Mask.CAUSAL, function=Function.SCORE)
    validate(TINY, Program(TINY.crc, (score,)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("n", 0, 1), "'n' is declared twice"),
        (("two words", 0, 1), "needs an identifier"),
        (("x" * 45, 0, 1), "needs an identifier of at most 44 bytes"),
        (("m", 2, 1), "limits 2..1"),
        (("m", 0, 2**32), r"limits 0..4294967296; legal are -2\^31"),
    ],
)
def test_operands_need_a_name_and_limits(arguments: tuple[str, int, int], message: str) -> None:
    builder = ProgramBuilder(TINY)
    assert builder.operand("n", 0, 1) == 1
    with pytest.raises(ProgramError, match=message):
        builder.operand(*arguments)
    for n in range(62):
        builder.operand(f"n{n}", 0, 1)
    with pytest.raises(ProgramError, match="at most 63"):
        builder.operand("more", 0, 1)


def packed_product(**fields: int) -> Program:
    """A product of int4 weights, and the pass that takes its tile."""
    builder = ProgramBuilder(TINY)
    builder.emit(MATRIX, **{"depth": 32, "weights": Weights.INT4_32, **fields})
    builder.emit(VECTOR, source=Source.ACCUMULATOR, columns=TINY.columns * fields.get("outer", 1))
    return builder.finish()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depth": 48}, r"\(MATRIX\): a depth of 48 does not suit its weights: groups of 32 do not divide"),
        ({"a": 3}, "a = 3 is not a multiple of the 2 ACTIVATION words that INT4_32, DENSE takes at once"),
        ({"a_outer": 33, "outer": 2}, "a_outer = 33 is not a multiple of the 2 "),
        ({"a": 2, "sparsity": Sparsity.TWO_OF_FOUR}, "a = 2 is not a multiple of the 4 .* INT4_32, TWO_OF_FOUR"),
        ({"a_inner": 2, "weights": Weights.INT8, "sparsity": Sparsity.ONE_OF_FOUR}, "a_inner = 2 is not a multiple"),
        ({"depth": 24, "weights": Weights.INT8, "sparsity": Sparsity.ONE_OF_FOUR}, "index words of 1:4 hold 4 values"),
        ({"w": TINY.weight_words - 16}, "reaches word 65536 of the WEIGHT"),
    ],
)
def test_validation_refuses_packed_weights_that_the_array_cannot_take(fields: dict[str, int], message: str) -> None:
    validate(TINY, packed_product())
    with pytest.raises(ProgramError, match=message):
        # As a bare list: the builder would refuse such depths itself.
        validate(TINY, Program(TINY.crc, (Instruction(MATRIX, **{"depth": 32, "weights": 1, **fields}),)))


def test_packed_weights_need_fewer_words_than_their_depth() -> None:
    sparse = {"depth": 64, "sparsity": Sparsity.ONE_OF_FOUR, "a": 4, "a_outer": 64, "outer": 2}
    validate(TINY, packed_product(**sparse, w=TINY.weight_words - 14))
    with pytest.raises(ProgramError, match="reaches word 65536 of the WEIGHT"):
        validate(TINY, packed_product(**sparse, w=TINY.weight_words - 13))


@pytest.mark.parametrize("fields", [{"weights": Weights.INT4_64, "depth": 64}, {"sparsity": Sparsity.TWO_OF_FOUR}])
def test_a_core_without_packed_weights_refuses_them(fields: dict[str, int]) -> None:
    core = preset("ulx3s")
    plain = Instruction(MATRIX, **{"depth": 32, **fields})
    with pytest.raises(ProgramError, match=r"instruction 0 \(MATRIX\): .* core 'ulx3s' takes INT8, DENSE only"):
        validate(core, Program(core.crc, (plain,)))


def test_the_depth_of_packed_weights_goes_in_steps_of_their_groups() -> None:
    def product(weights: Weights, sparsity: Sparsity, step: int, most: int = 256) -> Program:
        builder = ProgramBuilder(TINY)
        depth = builder.operand("depth", 0, most, step)
        count = builder.operand("count", 0, 1)
        builder.emit(
            MATRIX,
            depth=0,
            depth_operand=depth,
            inner=0,
            inner_operand=count,
            weights=weights,
            sparsity=sparsity,
        )
        builder.emit(VECTOR, source=Source.ACCUMULATOR, columns=0, columns_operand=count)
        return builder.finish()

    dense, sparse = Sparsity.DENSE, Sparsity.ONE_OF_FOUR
    for weights, sparsity, unit in ((Weights.INT4_32, dense, 32), (Weights.INT4_128, sparse, 128), (0, sparse, 16)):
        validate(TINY, product(Weights(weights), sparsity, unit))
        with pytest.raises(ProgramError, match=f"in steps of {unit // 2}, but its weights come in groups of {unit} in"):
            validate(TINY, product(Weights(weights), sparsity, unit // 2))
    with pytest.raises(ProgramError, match="goes from 0 to 70 in steps of 32, which do not come out even"):
        product(Weights.INT4_32, dense, 32, 70)
