"""The instruction table, registers and error codes as a C++ header, derived and never written by hand."""

from __future__ import annotations

import enum

from lockstep_isa import instructions as isa
from lockstep_isa.config import CoreConfig
from lockstep_isa.errors import ErrorCode
from lockstep_isa.weights import inputs_per_step
from lockstep_isa.zero_skipping import CHUNKS_AHEAD


def _camel(name: str) -> str:
    return "k" + "".join(part.capitalize() for part in name.split("_"))


def _enumeration(choices: type[enum.IntEnum]) -> str:
    members = ", ".join(f"{_camel(c.name)} = {c.value}" for c in choices)
    return f"enum class {choices.__name__} : std::uint32_t {{ {members} }};"


def _weight_formats() -> list[str]:
    """The formats of MATRIX weights: group, values kept of each four, inputs of a step."""
    groups = list(isa.WEIGHT_GROUPS.values())
    patterns = list(isa.PATTERNS.values())
    kept = [4 if pattern is None else 4 * pattern[0] // pattern[1] for pattern in patterns]
    steps = [f"{{{', '.join(str(inputs_per_step(g, p)) for p in patterns)}}}" for g in groups]
    return [
        f"constexpr std::uint32_t kWeightGroup[] = {{{', '.join(str(g or 0) for g in groups)}}};",
        f"constexpr std::uint32_t kKeptOfFour[] = {{{', '.join(map(str, kept))}}};",
        f"constexpr std::uint32_t kInputsPerStep[][{len(patterns)}] = {{{', '.join(steps)}}};",
    ]


def instruction_header(config: CoreConfig) -> str:
    """C++ text: constants of ``config``, the enumerations, and per instruction a struct that decodes itself."""
    enumerations: list[type[enum.IntEnum]] = [isa.Unit, ErrorCode]
    for type in isa.INSTRUCTION_TYPES:
        for field in type.fields:
            if field.choices is not None and field.choices not in enumerations:
                enumerations.append(field.choices)
    lines = [
        "// Generated from the instruction table.",
        "#pragma once",
        "#include <cstdint>",
        "#include <cstring>",
        "namespace lockstep {",
        "namespace isa {",
        f"constexpr int kRows = {config.rows};",
        f"constexpr std::uint32_t kLanes = {config.lanes};",
        f"constexpr std::uint32_t kSubwords = {config.subwords};",
        f"constexpr std::uint32_t kColumnsPerBeat = {config.columns_per_beat};",
        f"constexpr std::uint32_t kBusBytes = {config.bus_bytes};",
        f"constexpr std::uint32_t kActivationWords = {config.activation_words};",
        f"constexpr std::uint32_t kWeightWords = {config.weight_words};",
        f"constexpr std::uint32_t kVectorWords = {config.vector_words};",
        f"constexpr std::uint32_t kParameterWords = {config.parameter_words};",
        f"constexpr std::uint32_t kAccumulatorTiles = {config.accumulator_tiles};",
        f"constexpr std::uint32_t kQueueDepth = {config.queue_depth};",
        f"constexpr bool kPacked = {str(config.packed).lower()};",
        f"constexpr bool kZeroSkipping = {str(config.zero_skipping).lower()};",
        f"constexpr std::uint32_t kChunksAhead = {CHUNKS_AHEAD};",
        f"constexpr std::uint32_t kInstructionBytes = {isa.INSTRUCTION_BYTES};",
        f"constexpr std::uint32_t kOperands = {isa.OPERANDS};",
        f"constexpr std::uint32_t kTableEntries = {isa.TABLE_ENTRIES};",
        f"constexpr std::uint32_t kTableSlots = {isa.TABLE_SLOTS};",
        f"constexpr std::uint32_t kTableEntryBytes = {isa.TABLE_ENTRY_BYTES};",
        f"constexpr std::uint32_t kIndexEntries = {isa.INDEX_ENTRIES};",
        *map(_enumeration, enumerations),
        *_weight_formats(),
        "struct Word {",
        f"  std::uint64_t part[{isa.INSTRUCTION_BYTES // 8} + 1];",
        "  explicit Word(const std::uint8_t* bytes) : part{} { std::memcpy(part, bytes, kInstructionBytes); }",
        "  std::uint32_t bits(unsigned first, unsigned width) const {",
        "    const unsigned n = first / 64, shift = first % 64;",
        "    const std::uint64_t low = part[n] >> shift;",
        "    const std::uint64_t value = shift ? low | part[n + 1] << (64 - shift) : low;",
        "    return static_cast<std::uint32_t>(value & ((1ull << width) - 1));",
        "  }",
        "  bool clear_above(unsigned first) const {",
        "    constexpr unsigned end = 8 * kInstructionBytes;",
        "    for (unsigned n = first; n < end; n += 32)",
        "      if (bits(n, n + 32 <= end ? 32 : end - n)) return false;",
        "    return true;",
        "  }",
        "};",
    ]
    for type in isa.INSTRUCTION_TYPES:
        name = type.name.capitalize()
        lines.append(f"struct {name} {{")
        lines.append(f"  static constexpr std::uint32_t kOpcode = {type.opcode};")
        lines.append(f"  static constexpr Unit kUnit = Unit::{_camel(type.unit.name)};")
        for field_name, (_, field) in type.layout.items():
            cpp_type = "std::uint32_t" if field.choices is None else field.choices.__name__
            lines.append(f"  {cpp_type} {_safe(field_name)};")
        lines.append(f"  explicit {name}(const Word& word)")
        inits = []
        for field_name, (offset, field) in type.layout.items():
            value = f"word.bits({offset}, {field.width})"
            if field.choices is not None:
                value = f"static_cast<{field.choices.__name__}>({value})"
            inits.append(f"{_safe(field_name)}({value})")
        lines.append("      : " + ", ".join(inits) + " {}")
        lines.append(
            "  // Add the run-time operands; false where a count becomes zero, so that there is nothing to do."
        )
        lines.append("  bool resolve(const std::uint32_t* operands) {")
        for field in type.variable:
            chosen = f"{isa.selector(field.name)}"
            lines.append(f"    {field.name} = ({field.name} + operands[{chosen}]) & {(1 << field.width) - 1:#x}u;")
        counts = [f"{f.name} >= {f.minimum}u" for f in type.variable if f.minimum]
        lines.append(f"    return {' && '.join(counts) or 'true'};")
        lines.append("  }")
        choices = " + ".join(f"({isa.selector(f.name)} != 0)" for f in type.variable)
        lines.append(f"  std::uint32_t operand_count() const {{ return {choices or '0'}; }}")
        legal = [
            f"({_safe(f.name)} >= {f.minimum}u" + (f" || {isa.selector(f.name)})" if f.operand else ")")
            for f in type.fields
            if f.minimum
        ]
        legal += [
            f"static_cast<std::uint32_t>({_safe(f.name)}) < {len(f.choices)}u"
            for f in type.fields
            if f.choices is not None and len(f.choices) < 1 << f.width
        ]
        legal += [
            f"static_cast<std::uint32_t>({f.name}) == 0u"
            for f in type.encoded
            if f.feature is not None and not getattr(config, f.feature)
        ]
        if type is isa.VECTOR:
            legal.append("(select == 0u || tiles == 1u)")
        if type is isa.STORE:
            legal.append(f"memory == Memory::{_camel(isa.Memory.VECTOR.name)}")
        lines.append("  // No stray bits, no count of zero, no undefined value: what the hardware checks at dispatch.")
        lines.append(
            f"  bool well_formed(const Word& word) const {{ return word.clear_above({type.width})"
            + "".join(f" && {condition}" for condition in legal)
            + "; }"
        )
        lines.append("};")
    lines += ["}  // namespace isa", "}  // namespace lockstep", ""]
    return "\n".join(lines)


def _safe(name: str) -> str:
    """A field name that is no C++ word."""
    return name + "_" if name in ("unsigned", "signal", "wait") else name
