"""What a model is made of: its operations, its memory, and what a core does not do of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from lockstep.graph import Attention, Fallback, Graph, Quantise
from lockstep.quantisation.stored import StoredWeights


@dataclass(frozen=True)
class ModelReport:
    """What a model is made of.

    Attributes
    ----------
    source : where it came from.
    operations : number of nodes of each kind.
    fallbacks : for each part that PyTorch runs on the CPU, its operations and the reason.
    parameters : number of parameters in the contract graph.
    prescaled : quantise points with a pre-scale, and all of them.
    max_tokens : longest sequence.
    causal : whether it is a causal language model, which generates.
    int8_bytes, other_bytes : memory of the weights of products, and of all other parameters.
    cache_bytes : memory of the keys and values of one token, scales included; 0 if there is no cache.
    stored : number of weights that the files hold quantised, by their format here.
    rounded_again : the largest change of such a weight on reading, relative to the largest of its channel.
    """

    source: str
    operations: dict[str, int]
    fallbacks: tuple[tuple[str, str], ...]
    parameters: int
    prescaled: tuple[int, int]
    max_tokens: int
    causal: bool = False
    int8_bytes: int = 0
    other_bytes: int = 0
    cache_bytes: int = 0
    stored: dict[str, int] = field(default_factory=dict)
    rounded_again: float = 0.0

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {kind}" for kind, count in self.operations.items())
        lines = [
            f"{self.source}: {counts}",
            f"{self.parameters:,} parameters; pre-scale at {self.prescaled[0]} of {self.prescaled[1]} quantise points; "
            f"up to {self.max_tokens} tokens",
            f"{self.int8_bytes:,} bytes of int8 weights, {self.other_bytes:,} of other parameters"
            + (f", {self.cache_bytes:,} of keys and values a token" if self.cache_bytes else ""),
        ]
        if self.stored:
            formats = ", ".join(f"{count} {format}" for format, count in self.stored.items())
            lines.append(f"weights stored quantised: {formats}; changed by up to {self.rounded_again:.2%} on reading")
        lines.extend(f"on the CPU in PyTorch: {name} ({reason})" for name, reason in self.fallbacks)
        return "\n".join(lines)


def inspect(graph: Graph, stored: StoredWeights | None = None) -> ModelReport:
    """What ``graph``, of the contract stage, is made of; ``stored`` are the weights that came quantised."""
    stored = stored or StoredWeights()
    points = [node.prescale for node in graph.of(Quantise)]
    tensors = graph.tensors.values()
    return ModelReport(
        source=graph.source,
        operations=graph.counts(),
        fallbacks=tuple((node.name, node.reason) for node in graph.of(Fallback)),
        parameters=sum(array.size for array in tensors),
        prescaled=(sum(prescale is not None for prescale in points), len(points)),
        max_tokens=graph.max_tokens,
        causal=graph.causal,
        int8_bytes=sum(array.nbytes for array in tensors if array.dtype == np.int8),
        other_bytes=sum(array.nbytes for array in tensors if array.dtype != np.int8),
        cache_bytes=sum(2 * node.kv_heads * (node.head_dim + 4) for node in graph.of(Attention)) if graph.causal else 0,
        stored=dict(Counter(str(weight.format) for weight in stored.weights.values())),
        rounded_again=max(stored.errors.values(), default=0.0),
    )
