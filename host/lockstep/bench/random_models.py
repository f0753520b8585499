"""Contract graphs of the shapes of Llama and GPT-2, made by hand from any weights: for measurements, and for tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lockstep.graph import (
    Activation,
    Add,
    Attention,
    Gather,
    Graph,
    Indices,
    Input,
    LayerNorm,
    Linear,
    Multiply,
    Node,
    Quantise,
    RMSNorm,
    Rotary,
    Value,
)
from lockstep.quantisation.formats import Format, QuantisedWeight

from .random_weights import INT8, in_format


@dataclass(frozen=True)
class LlamaShape:
    """The sizes of a model.

    ``window`` is that of every second layer, or none; ``head_norm`` normalises queries and keys by head. Without
    ``head`` the graph ends with the last norm, and the vocabulary is that of the embeddings alone.
    """

    vocabulary: int
    features: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    max_tokens: int
    tile: int = 512
    window: int | None = None
    head_norm: bool = False
    theta: float = 10000.0
    eps: float = 1e-5
    head: bool = True

    @property
    def head_dim(self) -> int:
        return self.features // self.heads

    def weights(self) -> dict[str, tuple[int, ...]]:
        """The shape of every weight, under the names of ``transformers.LlamaForCausalLM``."""
        keys = self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.features)}
        for layer in (f"model.layers.{i}." for i in range(self.layers)):
            shapes[layer + "input_layernorm.weight"] = (self.features,)
            shapes[layer + "post_attention_layernorm.weight"] = (self.features,)
            for name, size in (("q", self.features), ("k", keys), ("v", keys), ("o", self.features)):
                shapes[f"{layer}self_attn.{name}_proj.weight"] = (size, self.features)
            shapes[layer + "mlp.gate_proj.weight"] = (self.hidden, self.features)
            shapes[layer + "mlp.up_proj.weight"] = (self.hidden, self.features)
            shapes[layer + "mlp.down_proj.weight"] = (self.features, self.hidden)
        shapes["model.norm.weight"] = (self.features,)
        return shapes | ({"lm_head.weight": (self.vocabulary, self.features)} if self.head else {})


@dataclass(frozen=True)
class Gpt2Shape:
    """The sizes of a model of GPT-2's architecture; ``head`` as for :class:`LlamaShape`."""

    vocabulary: int
    features: int
    hidden: int
    layers: int
    heads: int
    max_tokens: int
    tile: int = 512
    eps: float = 1e-5
    head: bool = True

    @property
    def head_dim(self) -> int:
        return self.features // self.heads

    def weights(self) -> dict[str, tuple[int, ...]]:
        """The shape of every weight; queries, keys and values have weights of their own."""
        features, hidden = self.features, self.hidden
        shapes: dict[str, tuple[int, ...]] = {"wte": (self.vocabulary, features), "wpe": (self.max_tokens, features)}
        for layer in (f"h.{i}." for i in range(self.layers)):
            for norm in ("ln_1", "ln_2"):
                shapes |= {f"{layer}{norm}.weight": (features,), f"{layer}{norm}.bias": (features,)}
            for name, size in {
                **{f"attn.{part}": (features, features) for part in ("q", "k", "v", "o")},
                "mlp.up": (hidden, features),
                "mlp.down": (features, hidden),
            }.items():
                shapes |= {f"{layer}{name}.weight": size, f"{layer}{name}.bias": (size[0],)}
        shapes |= {"ln_f.weight": (features,), "ln_f.bias": (features,)}
        return shapes | ({"lm_head.weight": (self.vocabulary, features)} if self.head else {})


def random_weights(shape: LlamaShape | Gpt2Shape, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights that nobody trained: norms about 1, the rest such that activations keep their size."""
    rng = np.random.default_rng(seed)
    return {
        name: (
            rng.uniform(0.5, 1.5, size) if len(size) == 1 else rng.normal(size=size) / np.sqrt(size[1])
        ).astype(np.float32)
        for name, size in shape.weights().items()
    }  # fmt: skip


def llama_graph(shape: LlamaShape, weights: Mapping[str, np.ndarray], format: Format = INT8) -> Graph:
    """The contract graph of ``LlamaForCausalLM`` with these weights, those of all products in ``format``."""
    return _Llama(shape, weights, format).graph()


def gpt2_graph(shape: Gpt2Shape, weights: Mapping[str, np.ndarray], format: Format = INT8) -> Graph:
    """The contract graph of GPT-2 with these weights, those of all products in ``format``."""
    return _Gpt2(shape, weights, format).graph()


class _Builder:
    def __init__(self, weights: Mapping[str, np.ndarray], format: Format) -> None:
        self.weights, self.format = weights, format
        self.stored: dict[str, QuantisedWeight] = {}
        self.nodes: list[Node] = []
        self.tensors: dict[str, np.ndarray] = {}

    def quantise(self, x: Value) -> Value:
        return self.add(Quantise, x, None)

    def linear(self, quantised: Value, name: str, bias: str | None = None) -> Value:
        weight, scales = f"{name}.weight", f"{name}.scales"
        made = in_format(self.weights[weight], self.format)
        self.tensors[weight], self.tensors[scales] = made.w8, made.scale
        if self.format != INT8:
            self.stored[weight] = made
        return self.add(Linear, quantised, weight, scales, None if bias is None else self.tensor(bias))

    def finished(self, output: Value, max_tokens: int, source: str) -> Graph:
        return Graph(tuple(self.nodes), output, self.tensors, max_tokens, source=source, stored=self.stored)

    def tensor(self, name: str) -> str:
        self.tensors[name] = self.weights[name]
        return name

    def add(self, kind: type[Node], *fields: object) -> Value:
        self.nodes.append(kind(len(self.nodes), *fields))
        return len(self.nodes) - 1


class _Llama(_Builder):
    def __init__(self, shape: LlamaShape, weights: Mapping[str, np.ndarray], format: Format) -> None:
        super().__init__(weights, format)
        self.shape = shape

    def graph(self) -> Graph:
        shape = self.shape
        angles = np.arange(shape.max_tokens)[:, None] * shape.theta ** (
            -np.arange(0, shape.head_dim, 2) / shape.head_dim
        )
        self.tensors |= {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
        ids = self.add(Input, "input_ids", (None,), "int64")
        x = self.add(Gather, self.tensor("model.embed_tokens.weight"), ids)
        for i in range(shape.layers):
            layer = f"model.layers.{i}."
            window = shape.window if i % 2 else None
            x = self.add(Add, x, self.attention(self.norm(x, layer + "input_layernorm"), layer + "self_attn.", window))
            x = self.add(Add, x, self.feed(self.norm(x, layer + "post_attention_layernorm"), layer + "mlp."))
        output = self.norm(x, "model.norm")
        if shape.head:
            output = self.linear(self.quantise(output), "lm_head")
        return self.finished(output, shape.max_tokens, "random-llama")

    def attention(self, x: Value, layer: str, window: int | None) -> Value:
        shape, quantised = self.shape, self.quantise(x)
        q, k, v = (self.linear(quantised, f"{layer}{name}_proj") for name in "qkv")
        if shape.head_norm:
            self.tensors["head_norm"] = np.linspace(0.5, 1.5, shape.head_dim, dtype=np.float32)
            q = self.add(RMSNorm, q, "head_norm", shape.eps, shape.heads)
            k = self.add(RMSNorm, k, "head_norm", shape.eps, shape.kv_heads)
        q = self.add(Rotary, q, "cos", "sin", shape.heads, shape.head_dim)
        k = self.add(Rotary, k, "cos", "sin", shape.kv_heads, shape.head_dim)
        mixed = self.add(
            *(Attention, q, k, v, shape.heads, shape.head_dim, shape.head_dim**-0.5, shape.tile, shape.kv_heads),
            *(True, window),
        )
        return self.linear(self.quantise(mixed), layer + "o_proj")

    def feed(self, x: Value, layer: str) -> Value:
        quantised = self.quantise(x)
        gate = self.add(Activation, self.linear(quantised, layer + "gate_proj"), "silu")
        product = self.add(Multiply, gate, self.linear(quantised, layer + "up_proj"))
        return self.linear(self.quantise(product), layer + "down_proj")

    def norm(self, x: Value, name: str) -> Value:
        return self.add(RMSNorm, x, self.tensor(name + ".weight"), self.shape.eps)


class _Gpt2(_Builder):
    def __init__(self, shape: Gpt2Shape, weights: Mapping[str, np.ndarray], format: Format) -> None:
        super().__init__(weights, format)
        self.shape = shape

    def graph(self) -> Graph:
        shape = self.shape
        ids = self.add(Input, "input_ids", (None,), "int64")
        positions = self.add(Indices, (ids,), lambda ids: np.arange(len(ids)))
        x = self.add(Gather, self.tensor("wte"), ids)
        x = self.add(Add, x, self.add(Gather, self.tensor("wpe"), positions))
        for layer in (f"h.{i}." for i in range(shape.layers)):
            quantised = self.quantise(self.norm(x, layer + "ln_1"))
            q, k, v = (self.dense(quantised, f"{layer}attn.{part}") for part in "qkv")
            mixed = self.add(
                *(Attention, q, k, v, shape.heads, shape.head_dim, shape.head_dim**-0.5, shape.tile, shape.heads, True)
            )
            x = self.add(Add, x, self.dense(self.quantise(mixed), layer + "attn.o"))
            up = self.dense(self.quantise(self.norm(x, layer + "ln_2")), layer + "mlp.up")
            x = self.add(Add, x, self.dense(self.quantise(self.add(Activation, up, "gelu_tanh")), layer + "mlp.down"))
        output = self.norm(x, "ln_f")
        if shape.head:
            output = self.linear(self.quantise(output), "lm_head")
        return self.finished(output, shape.max_tokens, "random-gpt2")

    def dense(self, quantised: Value, name: str) -> Value:
        return self.linear(quantised, name, name + ".bias")

    def norm(self, x: Value, name: str) -> Value:
        return self.add(LayerNorm, x, self.tensor(name + ".weight"), self.tensor(name + ".bias"), self.shape.eps)
