"""What the two blocks compute: random parameters, and the golden operations of the contract over them.

Both blocks end in the same way: what comes in as residual, and the bias of the last product, are added to that product;
the sum is normalised and quantised for the next block.

    mha   x + W_o attention(W_q x, W_k x, W_v x)          ffn   x + W_2 relu(W_1 x)

The bias is added to the residual, not to the product, since both are there before the product is. The left operand of
the last product may be quantised in several parts, each with a scale per token; then that product is a sum of products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from lockstep_isa.numerics import F32, add, relu
from lockstep_isa.operations import I8, attention, layer_norm, linear, quantise_rows
from numpy.typing import NDArray

Kind = Literal["mha", "ffn"]
#: Added to the variance by the layer norm.
EPSILON = 1e-5


@dataclass(frozen=True)
class Layer:
    """A linear layer: weight int8[N, K], scales float32[N], bias float32[N]."""

    weight: I8
    scales: F32
    bias: F32


@dataclass(frozen=True)
class Sizes:
    """What a block is built for. ``parts`` : features of each part of the last product's left operand."""

    kind: Kind
    seq: int
    d_model: int
    heads: int
    d_ff: int
    parts: tuple[int, ...]

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        return self.d_model // self.heads

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the block's products."""
        if self.kind == "ffn":
            return 2 * self.seq * self.d_model * self.d_ff
        return 4 * self.seq * self.d_model**2 + 2 * self.seq**2 * self.d_model

    @property
    def macs_formula(self) -> str:
        """How :attr:`macs` comes about."""
        return "2 seq d_model d_ff" if self.kind == "ffn" else "4 seq d_model^2 + 2 seq^2 d_model"


@dataclass(frozen=True)
class Parameters:
    """Everything that a block is given.

    Attributes
    ----------
    residual : float32[seq, d_model]. q : int8[seq, d_model] and s : float32[seq], the same quantised.
    inner : the layers in front of the last one, which are q, k and v, or the first of the feed-forward layer.
    last : that last one. gamma, beta : float32[d_model].
    """

    residual: F32
    q: I8
    s: F32
    inner: tuple[Layer, ...]
    last: Layer
    gamma: F32
    beta: F32


@dataclass(frozen=True)
class Results:
    """What a block leaves: values float32[seq, d_model], and the same as q int8[seq, d_model] with s float32[seq]."""

    values: F32
    q: NDArray[np.int8]
    s: F32


def random_parameters(sizes: Sizes, seed: int) -> Parameters:
    """Parameters of the magnitudes that trained models have."""
    generator = np.random.default_rng(seed)

    def normal(*shape: int, scale: float = 1.0) -> F32:
        return (scale * generator.standard_normal(shape)).astype(np.float32)

    def layer(outputs: int, depth: int) -> Layer:
        weight, scales = quantise_rows(normal(outputs, depth, scale=depth**-0.5))
        return Layer(weight, scales, normal(outputs, scale=0.1))

    n = sizes.d_model
    inner, wide = ((n, n, n), n) if sizes.kind == "mha" else ((sizes.d_ff,), sizes.d_ff)
    residual = normal(sizes.seq, n)
    q, s = quantise_rows(residual)
    layers = tuple(layer(outputs, n) for outputs in inner)
    return Parameters(residual, q, s, layers, layer(n, wide), 1 + normal(n, scale=0.1), normal(n, scale=0.1))


def expected(sizes: Sizes, p: Parameters) -> Results:
    """The block in golden operations."""
    if sizes.kind == "mha":
        d = sizes.head_dim
        q, k, v = (linear(p.q, p.s, layer.weight, layer.scales, layer.bias) for layer in p.inner)
        heads = [slice(h * d, (h + 1) * d) for h in range(sizes.heads)]
        wide = np.hstack([attention(q[:, at], k[:, at], v[:, at], tile=sizes.seq) for at in heads])
    else:
        (layer,) = p.inner
        wide = relu(linear(p.q, p.s, layer.weight, layer.scales, layer.bias))
    x = add(p.residual, p.last.bias)
    start = 0
    for features in sizes.parts:
        at = slice(start, start + features)
        quantised, scales = quantise_rows(wide[:, at])
        x = add(linear(quantised, scales, p.last.weight[:, at], p.last.scales), x)
        start += features
    values = layer_norm(x, p.gamma, p.beta, EPSILON)
    return Results(values, *quantise_rows(values))
