"""What a generation cost: tokens, cycles, bytes and time, for the prompt and for the tokens behind it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

#: Weights that a line names before it counts the rest.
_NAMED = 3


def expanded_lines(expanded: Iterable[tuple[str, str]]) -> list[str]:
    """A line for each reason why weights of fewer bits are dense int8 on a core."""
    names: dict[str, list[str]] = {}
    for name, reason in expanded:
        names.setdefault(reason, []).append(name)
    return [
        f"expanded to int8: {', '.join(found[:_NAMED])}"
        + (f" and {len(found) - _NAMED} more" if len(found) > _NAMED else "")
        + f" ({reason})"
        for reason, found in names.items()
    ]


@dataclass(frozen=True)
class Phase:
    """A part of a run.

    Attributes
    ----------
    tokens : that went through the model.
    seconds : on the clock of this machine, which for a simulation says nothing about a core.
    cycles, mac_cycles : of the core, and those in which its array multiplied; none where the host executes.
    bytes_moved : between the core and its memory; none where the host executes.
    """

    tokens: int = 0
    seconds: float = 0.0
    cycles: int | None = None
    mac_cycles: int | None = None
    bytes_moved: int | None = None

    def __add__(self, other: Phase) -> Phase:
        def plus(a: int | None, b: int | None) -> int | None:
            return None if a is None and b is None else (a or 0) + (b or 0)

        return Phase(
            self.tokens + other.tokens,
            self.seconds + other.seconds,
            plus(self.cycles, other.cycles),
            plus(self.mac_cycles, other.mac_cycles),
            plus(self.bytes_moved, other.bytes_moved),
        )


@dataclass(frozen=True)
class Report:
    """What one prompt and the text behind it cost.

    Attributes
    ----------
    device : URI of the executor.
    prompt_tokens : of the prompt, those included that the session still had.
    new_tokens : tokens that were generated.
    prefill : the prompt's tokens that had to be computed, and with them the first new token.
    decode : one pass per new token behind the first.
    fallbacks : parts of the model that PyTorch runs on the CPU, with the reasons.
    expanded : weights of fewer bits that the core takes as dense int8, with the reasons.
    hosted : parts that a core could run, and that the host does, with the reasons.
    """

    device: str
    prompt_tokens: int
    new_tokens: int
    prefill: Phase
    decode: Phase
    fallbacks: tuple[tuple[str, str], ...] = ()
    expanded: tuple[tuple[str, str], ...] = ()
    hosted: tuple[tuple[str, str], ...] = ()

    @property
    def total(self) -> Phase:
        """Both phases together."""
        return self.prefill + self.decode

    @property
    def cycles(self) -> int | None:
        """Cycles of all programs; none on the host, which counts none."""
        return self.total.cycles

    @property
    def bytes_moved(self) -> int | None:
        """Bytes between the core and its memory; none on the host."""
        return self.total.bytes_moved

    @property
    def seconds(self) -> float:
        """Time on the clock of this machine."""
        return self.total.seconds

    @property
    def utilisation(self) -> float | None:
        """Share of the cycles in which the array multiplied; none on the host."""
        total = self.total
        return None if not total.cycles or total.mac_cycles is None else total.mac_cycles / total.cycles

    def tokens_per_second(self, clock_hz: float) -> float | None:
        """New tokens a second behind the first one, of a core at ``clock_hz``; none if nothing was counted."""
        if clock_hz <= 0:
            raise ValueError(f"a clock of {clock_hz} Hz is none; give a positive number")
        return self.decode.tokens * clock_hz / self.decode.cycles if self.decode.cycles else None

    def first_token_seconds(self, clock_hz: float) -> float | None:
        """Time to the first new token, of a core at ``clock_hz``; none if nothing was counted."""
        if clock_hz <= 0:
            raise ValueError(f"a clock of {clock_hz} Hz is none; give a positive number")
        return self.prefill.cycles / clock_hz if self.prefill.cycles else None

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON has it."""
        return {
            "device": self.device,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "seconds": self.seconds,
            "cycles": self.cycles,
            "utilisation": self.utilisation,
            "bytes_moved": self.bytes_moved,
            "prefill": asdict(self.prefill),
            "decode": asdict(self.decode),
            "fallbacks": [{"operations": name, "reason": reason} for name, reason in self.fallbacks],
            "expanded": [{"weight": name, "reason": reason} for name, reason in self.expanded],
            "hosted": [{"part": name, "reason": reason} for name, reason in self.hosted],
        }

    def __str__(self) -> str:
        lines = [
            f"{self.prompt_tokens:,} tokens of prompt, {self.new_tokens:,} new ones in {self.seconds:.1f} s "
            f"on {self.device}"
        ]
        if self.cycles is not None and self.bytes_moved is not None:
            lines.append(
                f"{self.cycles:,} cycles, the array busy in {self.utilisation or 0:.1%} of them; "
                f"{self.bytes_moved:,} bytes moved"
            )
        lines.extend(f"on the CPU in PyTorch: {name} ({reason})" for name, reason in self.fallbacks)
        lines.extend(f"on the host: {name} ({reason})" for name, reason in self.hosted)
        lines.extend(expanded_lines(self.expanded))
        return "\n".join(lines)
