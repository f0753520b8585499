"""The machine configuration: one frozen object from which every width and depth of a core is derived."""

from __future__ import annotations

import dataclasses
import struct
import zlib
from dataclasses import dataclass

#: Layout version of the register map and the command ring; a driver refuses another one.
ABI_VERSION = 2
#: Version of the instruction table and of the numeric contract; a program for another one is refused.
ISA_VERSION = 2


class ConfigurationError(ValueError):
    """A core configuration that cannot be built; the message says which field and what it may be."""


def _is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


@dataclass(frozen=True)
class CoreConfig:
    """Everything that distinguishes one Lockstep core from another.

    The array is square: an operand word of ``rows`` bytes is then also one of ``columns`` bytes, so that
    activations can serve either side of the array (keys and values of attention are activations).

    Attributes
    ----------
    name : preset or user-given name; not part of the configuration hash.
    rows, columns : size of the systolic array, in processing elements; equal powers of two, 2 to 64.
    lanes : fp32 vector lanes; divides ``rows``, or is a multiple of it (several columns at a time).
    bus_bytes : bytes per beat of the AXI4 memory bus.
    activation_words : depth of the activation scratchpad, in words of ``rows`` bytes.
    weight_words : depth of the weight scratchpad, in words of ``columns`` bytes.
    vector_words : depth of the vector scratchpad, in words of ``rows`` fp32 values.
    parameter_words : depth of the parameter scratchpad, in words of ``rows`` fp32 values.
    accumulator_tiles : result tiles (``rows`` x ``columns`` int32) that the accumulator queue holds.
    queue_depth : instructions that wait in front of each unit.
    packed : whether MATRIX takes weights in the formats of :mod:`lockstep_isa.weights`, not only dense int8.
    selection : whether VECTOR selects columns into the index memory and LOAD gathers rows by it.
    zero_skipping : whether MATRIX passes over chunks of ACTIVATION that are zero; needs at least 4 rows.
    """

    name: str
    rows: int
    columns: int
    lanes: int
    bus_bytes: int
    activation_words: int
    weight_words: int
    vector_words: int
    parameter_words: int
    accumulator_tiles: int = 16
    queue_depth: int = 8
    packed: bool = False
    selection: bool = False
    zero_skipping: bool = False

    def __post_init__(self) -> None:
        if self.rows != self.columns:
            raise ConfigurationError(f"rows ({self.rows}) and columns ({self.columns}) must be equal")
        if not _is_power_of_two(self.rows) or not 2 <= self.rows <= 64:
            raise ConfigurationError(f"rows must be a power of two from 2 to 64, not {self.rows}")
        if self.lanes < 1 or (self.rows % self.lanes and self.lanes % self.rows):
            raise ConfigurationError(f"lanes ({self.lanes}) must divide rows ({self.rows}) or be a multiple of it")
        if not _is_power_of_two(self.bus_bytes) or self.bus_bytes < 4:
            raise ConfigurationError(f"bus_bytes must be a power of two of at least 4, not {self.bus_bytes}")
        for field in ("activation_words", "weight_words", "vector_words", "parameter_words"):
            value = getattr(self, field)
            if not _is_power_of_two(value) or not 16 <= value <= 65536:
                raise ConfigurationError(f"{field} must be a power of two from 16 to 65536, not {value}")
        if not _is_power_of_two(self.accumulator_tiles) or self.accumulator_tiles < 2:
            raise ConfigurationError(f"accumulator_tiles must be a power of two >= 2, not {self.accumulator_tiles}")
        if not _is_power_of_two(self.queue_depth) or self.queue_depth < 2:
            raise ConfigurationError(f"queue_depth must be a power of two >= 2, not {self.queue_depth}")
        if self.zero_skipping and (self.rows < 4 or self.activation_words < 2 * self.rows):
            raise ConfigurationError(
                f"zero_skipping needs at least 4 rows and 2 words of ACTIVATION a row, not {self.rows} and "
                f"{self.activation_words} words"
            )

    @classmethod
    def feature_names(cls) -> tuple[str, ...]:
        """The flags of what a core may have or lack."""
        return tuple(f.name for f in dataclasses.fields(cls) if f.type in (bool, "bool"))

    @property
    def operand_word_bytes(self) -> int:
        """Bytes of one word of the activation or weight scratchpad."""
        return self.rows

    @property
    def vector_word_bytes(self) -> int:
        """Bytes of one word of the vector or parameter scratchpad."""
        return 4 * self.rows

    @property
    def beats_per_vector_word(self) -> int:
        """Bus beats that fill one word of the vector or parameter scratchpad."""
        return self.vector_word_bytes // self.bus_bytes

    @property
    def subwords(self) -> int:
        """Groups of ``lanes`` rows in which the vector unit takes one column (1 where lanes >= rows)."""
        return max(1, self.rows // self.lanes)

    @property
    def columns_per_beat(self) -> int:
        """Columns of a row tile that the vector unit takes in one cycle (1 where lanes <= rows)."""
        return max(1, self.lanes // self.rows)

    @property
    def operand_words_per_beat(self) -> int:
        """Words of the activation or weight scratchpad in one bus beat (1 where a word has one or more beats)."""
        return max(1, self.bus_bytes // self.operand_word_bytes)

    @property
    def macs_per_cycle(self) -> int:
        """Multiply-accumulates that the array performs in one cycle."""
        return self.rows * self.columns

    @property
    def crc(self) -> int:
        """CRC-32 over everything that a program can depend on; programs carry it, the core checks it.

        Features count where they are there: a core without a feature is the core that it was before there was one.
        """
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "name"}
        numbers = [value for value in values.values() if not isinstance(value, bool)]
        features = "".join(f"{name} " for name, value in values.items() if value is True)
        return zlib.crc32(struct.pack(f"<{len(numbers) + 1}I", ISA_VERSION, *numbers) + features.encode())

    def replace(self, **changes: object) -> CoreConfig:
        """A copy with some fields changed, checked like a new one."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


KIB = 1024
_ALL_FEATURES = {"packed": True, "selection": True, "zero_skipping": True}

#: The named configurations. ``tiny`` keeps the memories of ``laptop`` so that the same models fit.
PRESETS: dict[str, CoreConfig] = {
    c.name: c
    for c in (
        CoreConfig("tiny", 4, 4, 4, 4, 64 * KIB, 64 * KIB, 64 * KIB, 8 * KIB, **_ALL_FEATURES),
        CoreConfig("laptop", 16, 16, 16, 16, 16 * KIB, 16 * KIB, 16 * KIB, 2 * KIB, **_ALL_FEATURES),
        CoreConfig("ulx3s", 8, 8, 2, 8, 8 * KIB, 8 * KIB, 4 * KIB, 1 * KIB),
        CoreConfig("paper", 64, 64, 128, 128, 16 * KIB, 16 * KIB, 8 * KIB, 1 * KIB, **_ALL_FEATURES),
    )
}


def preset(name: str) -> CoreConfig:
    """The configuration called ``name``; raises :class:`ConfigurationError` naming the presets there are."""
    try:
        return PRESETS[name]
    except KeyError:
        raise ConfigurationError(f"unknown core '{name}': presets are {', '.join(PRESETS)}") from None
