"""Sizes of values: row tiles of batches, features of every value, and where values cross between host and device."""

from __future__ import annotations

from dataclasses import dataclass

from lockstep.graph import (
    Activation,
    Add,
    Attention,
    Constant,
    Experts,
    Gather,
    Graph,
    Input,
    LayerNorm,
    Linear,
    Multiply,
    Quantise,
    RMSNorm,
    Rotary,
    Value,
)
from lockstep.pruning import KeepTokens

from .attention import Sequence
from .layout import panel_count


@dataclass(frozen=True)
class Binding:
    """Where a value crosses between host and device: its byte address and features, panels of all sequences."""

    address: int
    features: int


def sequences_of(lengths: tuple[int, ...], rows: int) -> list[Sequence]:
    """Row tiles of a batch: each sequence begins on a row tile of its own."""
    result, first = [], 0
    for tokens in lengths:
        tiles = panel_count(tokens, rows)
        result.append(Sequence(first, tiles, tokens))
        first += tiles
    return result


def feature_counts(graph: Graph) -> dict[Value, int]:
    """Features of every value whose node tells them, or whose inputs do; those of fallbacks are not among them."""
    features: dict[Value, int] = {}
    for node in graph:
        match node:
            case Gather():
                features[node.value] = graph.tensors[node.table].shape[1]
            case Constant():
                features[node.value] = graph.tensors[node.tensor].shape[1]
            case Input(shape=(None, int(size))):
                features[node.value] = size
            case Linear():
                features[node.value] = graph.tensors[node.weight].shape[0]
                features.setdefault(node.quantised, graph.tensors[node.weight].shape[1])
            case Attention():
                features[node.value] = node.heads * node.head_dim
            case Experts():
                features[node.value] = graph.tensors[node.experts[0].down].shape[0]
            case LayerNorm():
                features[node.value] = graph.tensors[node.gamma].size
            case RMSNorm() | Rotary():
                if node.x in features:
                    features[node.value] = features[node.x]
            case Add() | Multiply():
                known = [features[v] for v in node.inputs if v in features]
                if known:
                    features[node.value] = max(known)
            case Activation() | Quantise() | KeepTokens():
                if node.x in features:
                    features[node.value] = features[node.x]
    return features
