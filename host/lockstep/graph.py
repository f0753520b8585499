"""The contract graph: what a model computes, as operations of the numeric contract on values of one sequence.

A value is a small integer. Unless a node says otherwise it stands for ``float32[tokens, features]``, where
``tokens`` is a run-time number; a batch is several sequences, run one after the other. Nodes stand in
topological order: a node reads only values of nodes before it. Parameters live in ``Graph.tensors`` under the
name they have in the checkpoint and nodes hold those names, so that a weight used twice is stored once.

A graph comes in two stages. Capture gives the *float* stage, whose products are ``Dense``. Quantisation
(``lockstep.quantise``) replaces each ``Dense`` by ``Quantise`` and ``Linear`` and gives the *contract* stage, the one
that is compiled and executed; every ``Dense`` that reads the same value then shares one ``Quantise``.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from lockstep.quantisation.formats import QuantisedWeight

Value = int

#: Keys that attention takes at a time. It is part of a result's bits, so it is a field of the graph and of every
#: program made from it, never of a device.
ATTENTION_TILE = 512


@dataclass(frozen=True)
class Node:
    """One operation; ``value`` names its result."""

    value: Value

    @property
    def inputs(self) -> tuple[Value, ...]:
        """The values that this node reads, in the order of its fields."""
        return ()


@dataclass(frozen=True)
class Input(Node):
    """An input of the model.

    ``shape`` holds the sizes without the batch, ``None`` for the number of tokens: ``int64[tokens]`` for token ids is
    ``shape=(None,)``, ``float32[tokens, features]`` is ``shape=(None, features)``.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str


@dataclass(frozen=True)
class Constant(Node):
    """A parameter that takes part as a value: ``float32[rows, features]``, one row meaning "for every token"."""

    tensor: str


@dataclass(frozen=True)
class Indices(Node):
    """Integers that only say what to fetch (positions, token types): ``int64[tokens]``.

    ``function`` maps the arrays of ``reads`` to the indices. It holds integer and Boolean operations alone, which
    are exact on every machine, so the host computes it wherever the rest of the graph runs.
    """

    reads: tuple[Value, ...]
    function: Callable[..., np.ndarray] = dataclasses.field(compare=False, repr=False)
    operations: tuple[str, ...] = ()

    @property
    def inputs(self) -> tuple[Value, ...]:
        return self.reads


@dataclass(frozen=True)
class Gather(Node):
    """Rows of a table: ``out[t] = table[indices[t]]``, ``table: float32[entries, features]``. Pure data movement."""

    table: str
    indices: Value

    @property
    def inputs(self) -> tuple[Value, ...]:
        return (self.indices,)


@dataclass(frozen=True)
class Add(Node):
    """``out = x + y``; an operand with one row is added to every token."""

    x: Value
    y: Value

    @property
    def inputs(self) -> tuple[Value, ...]:
        return (self.x, self.y)


@dataclass(frozen=True)
class Multiply(Node):
    """``out = x * y``; an operand with one row multiplies every token."""

    x: Value
    y: Value

    @property
    def inputs(self) -> tuple[Value, ...]:
        return (self.x, self.y)


@dataclass(frozen=True)
class LayerNorm(Node):
    """``out = (x - mean) * rsqrt(variance + eps) * gamma + beta`` over features; gamma, beta: ``float32[features]``."""

    x: Value
    gamma: str
    beta: str
    eps: float

    @property
    def inputs(self) -> tuple[Value, ...]:
        return (self.x,)


@dataclass(frozen=True)
class RMSNorm(Node):
    """``out = x * rsqrt(mean(x^2) + eps) * gamma``, by itself over each of ``groups`` equal pieces of the features.

    gamma: ``float32[features / groups]``. Several groups are the heads of a norm on queries or keys.
    """

    x: Value
    gamma: str
    eps: float
    groups: int = 1

    @property
    def inputs(self) -> tuple[Value, ...]:
        return (self.x,)


@dataclass(frozen=True)
class Rotary(Node):
    """Rotary position embedding (Su et al., 2021, https://arxiv.org/abs/2104.09864) of ``heads`` heads.

    cos, sin: ``float32[positions, pairs]``, row = absolute position of the token. The first ``2 * pairs`` features of
    each head are rotated, the rest pass. Feature i turns with feature i + pairs, or with its neighbour if
    ``interleaved``.
    """

    x: Value
    cos: str
    sin: str
    heads: int
    head_dim: int
    interleaved: bool = False

    @property
    def inputs(self) -> tuple[Value, ...]:
        return (self.x,)


@dataclass(frozen=True)
class Activation(Node):
    """A function of the contract on every element: ``gelu_erf``, ``gelu_tanh``, ``silu``, ``sigmoid``, ``tanh`` or
    ``relu``.
    """

    x: Value
    function: str

    @property
    def inputs(self) -> tuple[Value, ...]:
        return (self.x,)


@dataclass(frozen=True)
class Dense(Node):
    """``out = x @ weight.T + bias``, float stage only; weight: ``float32[N, K]``, bias: ``float32[N]`` or none.

    ``rows`` picks the output channels ``rows[0]:rows[1]`` of a packed weight, such as Q, K and V in one matrix.
    """

    x: Value
    weight: str
    bias: str | None
    rows: tuple[int, int]

    @property
    def inputs(self) -> tuple[Value, ...]:
        return (self.x,)


@dataclass(frozen=True)
class Quantise(Node):
    """Per-token int8: the value is the pair ``int8[tokens, K]``, ``float32[tokens]`` (section 5 of the contract).

    ``prescale`` names a ``float32[K]`` that multiplies the row first; the weights that read this value are divided by
    it.
    """

    x: Value
    prescale: str | None

    @property
    def inputs(self) -> tuple[Value, ...]:
        return (self.x,)


@dataclass(frozen=True)
class Linear(Node):
    """``out = (q . weight.T) * s * scales + bias`` with an exact int32 sum.

    ``quantised`` is the value of a ``Quantise``; weight: ``int8[N, K]``, scales: ``float32[N]``, bias: ``float32[N]``
    or none, all of them names in ``Graph.tensors``. ``present`` is as for ``Attention``, for queries, keys or values
    of ``head_dim`` features a head: those of other heads are +0.
    """

    quantised: Value
    weight: str
    scales: str
    bias: str | None
    present: Value | None = None
    head_dim: int = 0

    @property
    def inputs(self) -> tuple[Value, ...]:
        return (self.quantised,) if self.present is None else (self.quantised, self.present)


@dataclass(frozen=True)
class Attention(Node):
    """Attention of tokens to tokens, head by head (section 6 of the contract).

    q and the result are ``float32[tokens, heads * head_dim]``, k and v ``float32[tokens, kv_heads * head_dim]``; head
    ``h`` owns the features ``h * head_dim : (h + 1) * head_dim`` and attends to keys and values of head
    ``h // (heads / kv_heads)``. They are quantised per token and head inside. ``tile`` keys are taken at a time, tiles
    beginning at multiples of ``tile``.

    A token at position p sees keys up to p if ``causal``, and of those with a ``window`` the last ``window`` ones.
    ``bias`` is the value of a ``PositionBias`` that is added to the scaled scores, or none. ``present`` is the value of
    a ``KeepHeads``, which heads are computed (the features of others are +0), or none for all of them.
    """

    q: Value
    k: Value
    v: Value
    heads: int
    head_dim: int
    scale: float
    tile: int = ATTENTION_TILE
    kv_heads: int = 0
    causal: bool = False
    window: int | None = None
    bias: Value | None = None
    present: Value | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "kv_heads", self.kv_heads or self.heads)

    @property
    def inputs(self) -> tuple[Value, ...]:
        optional = (self.bias, self.present)
        return (self.q, self.k, self.v, *(value for value in optional if value is not None))


@dataclass(frozen=True)
class PositionBias(Node):
    """What some models add to attention scores depending on positions alone: ``float32[heads, tokens, tokens]``.

    ``function`` maps the arrays of ``reads`` (integers of the sequence) to it; the host computes it from integers and
    parameters by data movement alone, so it is exact on every machine.
    """

    reads: tuple[Value, ...]
    function: Callable[..., np.ndarray] = dataclasses.field(compare=False, repr=False)
    heads: int

    @property
    def inputs(self) -> tuple[Value, ...]:
        return self.reads


@dataclass(frozen=True)
class Route(Node):
    """The choice of a router: for each token the ``top_k`` experts with the greatest logits, and their weights.

    The value is the pair ``int64[tokens, top_k]``, ``float32[tokens, top_k]``, the greatest first and equals in the
    order of their numbers. Weights are the softmax over all logits ``float32[tokens, experts]``, or over the chosen
    ones if ``normalise``.
    """

    logits: Value
    top_k: int
    normalise: bool

    @property
    def inputs(self) -> tuple[Value, ...]:
        return (self.logits,)


@dataclass(frozen=True)
class Expert:
    """Names of the weights of one expert: gate and up ``[N, K]``, down ``[features, N]``.

    They are float32 in the float stage. In the contract stage they are int8 and ``scales`` names the ``float32`` scales
    of their output channels, in this order.
    """

    gate: str
    up: str
    down: str
    scales: tuple[str, ...] = ()

    @property
    def tensors(self) -> tuple[str, ...]:
        """All names."""
        return (self.gate, self.up, self.down, *self.scales)


@dataclass(frozen=True)
class Experts(Node):
    """The weighted sum of what a token's experts give: ``(function(x @ gate.T) * (x @ up.T)) @ down.T``.

    ``route`` is the value of a ``Route``. Experts that no token chooses are not computed. In the contract stage x and
    the product with the gate are quantised per token inside, as for ``Linear``.
    """

    x: Value
    route: Value
    experts: tuple[Expert, ...]
    function: str

    @property
    def inputs(self) -> tuple[Value, ...]:
        return (self.x, self.route)


@dataclass(frozen=True)
class Fallback(Node):
    """What is not recognised: a part of the captured model that PyTorch runs on the CPU.

    ``function`` maps the arrays of ``reads`` to ``float32[tokens, features]``; ``name`` lists the operations inside and
    ``reason`` says why they are here.
    """

    name: str
    reason: str
    reads: tuple[Value, ...]
    function: Callable[..., np.ndarray] = dataclasses.field(compare=False, repr=False)

    @property
    def inputs(self) -> tuple[Value, ...]:
        return self.reads


N = TypeVar("N", bound=Node)


@dataclass(frozen=True, eq=False)
class Graph:
    """A captured model.

    Attributes
    ----------
    nodes : operations in topological order.
    output : the value that the model returns.
    tensors : parameters by name; one entry per array, however many nodes use it.
    max_tokens : longest sequence for which the graph was shown to hold (positions exist, masks hide nothing).
    min_tokens : shortest sequence for which it was.
    source : where the model came from, for reports.
    stored : weights ``int8[N, K]`` that came in fewer bits, in the form in which they came, by their names in
        ``tensors``; a core may stream that form.
    """

    nodes: tuple[Node, ...]
    output: Value
    tensors: Mapping[str, np.ndarray] = dataclasses.field(repr=False)
    max_tokens: int
    min_tokens: int = 1
    source: str = "module"
    stored: Mapping[str, QuantisedWeight] = dataclasses.field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        known: set[Value] = set()
        for node in self.nodes:
            unknown = [value for value in node.inputs if value not in known]
            if unknown:
                raise ValueError(
                    f"{type(node).__name__} {node.value} reads {unknown[0]}, which no earlier node defines"
                )
            if node.value in known:
                raise ValueError(f"value {node.value} is defined twice")
            known.add(node.value)
            missing = [name for name in tensor_names(node) if name not in self.tensors]
            if missing:
                raise ValueError(
                    f"{type(node).__name__} {node.value} uses tensor {missing[0]!r}, which the graph lacks"
                )
        if self.output not in known:
            raise ValueError(f"the output {self.output} is no value of the graph")

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def of(self, kind: type[N]) -> list[N]:
        """All nodes of one kind, in order."""
        return [node for node in self.nodes if isinstance(node, kind)]

    @property
    def inputs(self) -> dict[str, Input]:
        """The model's inputs by name."""
        return {node.name: node for node in self.of(Input)}

    @property
    def causal(self) -> bool:
        """Whether it is a causal language model: all its attention is causal, and its only input is token ids.

        Then no token depends on later ones, and a sequence can be run piece by piece with a key-value cache.
        """
        attention, inputs = self.of(Attention), self.of(Input)
        return (
            bool(attention)
            and all(node.causal for node in attention)
            and len(inputs) == 1
            and inputs[0].shape == (None,)
            and inputs[0].dtype.startswith("int")
        )

    def counts(self) -> dict[str, int]:
        """How many nodes of each kind there are, by the name of the kind."""
        return dict(Counter(type(node).__name__ for node in self.nodes))


_TENSOR_FIELDS = ("tensor", "table", "gamma", "beta", "weight", "scales", "bias", "prescale", "cos", "sin")


def tensor_names(node: Node) -> list[str]:
    """Names of the parameters that ``node`` uses, in the order of its fields."""
    if isinstance(node, Experts):
        return [name for expert in node.experts for name in expert.tensors]
    values: list[Any] = [getattr(node, field) for field in _TENSOR_FIELDS if hasattr(node, field)]
    return [value for value in values if isinstance(value, str)]


def live(nodes: list[Node], output: Value) -> list[Node]:
    """``nodes`` without those that ``output`` does not need; inputs always stay, they are the model's signature."""
    needed = {output}
    kept: list[Node] = []
    for node in reversed(nodes):
        if node.value in needed or isinstance(node, Input):
            needed.update(node.inputs)
            kept.append(node)
    return kept[::-1]
