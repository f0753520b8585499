"""Rotary positions and shared heads in the ways that models write them, and what must not be taken for them."""

from __future__ import annotations

import pytest
import torch
from lockstep.capture import capture
from lockstep.evaluate import run_float
from lockstep.graph import Attention, Fallback, Graph, RMSNorm, Rotary
from lockstep.recognise import recognise
from sample_models import FEATURES
from torch import nn
from torch.nn import functional

WIDTH, LAST = 8, 64
#: Larger than one, as models with stretched positions have it.
FACTOR = 1.3


class Turning(nn.Module):
    """Causal attention with ``kv`` heads for 4 of queries and the rotation written as ``style`` says."""

    def __init__(self, style: str, kv: int = 2, sharing: str = "flag", heads: int = 4) -> None:
        super().__init__()
        self.style, self.sharing, self.heads, self.kv = style, sharing, heads, kv
        self.q, self.k, self.v = (nn.Linear(FEATURES, count * WIDTH) for count in (heads, kv, kv))
        self.out, self.norm = nn.Linear(heads * WIDTH, FEATURES), nn.RMSNorm(WIDTH)
        self.register_buffer("speeds", 100.0 ** -(torch.arange(0, WIDTH, 2) / WIDTH))
        angles = torch.arange(LAST)[:, None] * self.speeds
        self.register_buffer("cosines", angles.cos())
        self.register_buffer("sines", angles.sin())

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        tokens, half = x.shape[2], WIDTH // 2
        angles = torch.arange(tokens)[:, None] * self.speeds
        if self.style == "of the length":
            angles = angles / tokens
        cos, sin = angles.cos() * FACTOR, angles.sin() * FACTOR
        if self.style == "table":
            cos, sin = self.cosines[:tokens], self.sines[:tokens]
        if self.style == "complex":
            pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], half, 2))
            return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
        if self.style == "stacked":
            low, high = x[..., ::2], x[..., 1::2]
            return torch.stack([low * cos - high * sin, high * cos + low * sin], -1).flatten(-2)
        if self.style == "negated neighbours":
            cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
            return x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin
        if self.style == "partial":
            low, rest = x[..., :half], x[..., half:]
            cos, sin = (torch.cat([table[:, : half // 2]] * 2, -1) for table in (cos, sin))
            swapped = torch.cat([-low[..., half // 2 :], low[..., : half // 2]], -1)
            return torch.cat([low * cos + swapped * sin, rest], -1)
        if self.style == "negated halves":
            cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
            return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin
        if self.style == "normalised":
            x = self.norm(x)
        low, high = x[..., :half], x[..., half:]
        sign = -1 if self.style == "mirrored" else 1
        return torch.cat([low * cos - high * sin, sign * (high * cos + low * sin)], -1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (product(x).unflatten(-1, (-1, WIDTH)).transpose(1, 2) for product in (self.q, self.k, self.v))
        q, k = self.turn(q), self.turn(k)
        if self.sharing != "flag":
            k, v = (self.repeated(item) for item in (k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.sharing == "flag")
        return x + self.out(mixed.transpose(1, 2).flatten(-2))

    def repeated(self, x: torch.Tensor) -> torch.Tensor:
        times = self.heads // self.kv
        if self.sharing == "interleave":
            return x.repeat_interleave(times, 1)
        return x[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2)


def read(module: nn.Module) -> Graph:
    """The graph of ``module``, after a comparison of its values."""
    graph = recognise(capture(module, {"x": torch.zeros(1, 8, FEATURES)}, LAST))
    for tokens in (1, 7, LAST):
        x = torch.randn(1, tokens, FEATURES)
        with torch.no_grad():
            difference = run_float(graph, {"x": x[0].numpy()}) - module(x)[0].numpy()
        assert abs(difference).max() < 1e-5
    return graph


@pytest.mark.parametrize(
    ("style", "interleaved", "pairs"),
    [
        ("halves", False, 4),
        ("negated halves", False, 4),
        ("normalised", False, 4),
        ("table", False, 4),
        ("partial", False, 2),
        ("stacked", True, 4),
        ("negated neighbours", True, 4),
        ("complex", True, 4),
    ],
)
def test_rotations_are_recognised_however_they_are_written(style: str, interleaved: bool, pairs: int) -> None:
    torch.manual_seed(4)
    graph = read(Turning(style).eval())
    assert graph.of(Fallback) == []
    assert {(node.interleaved, node.head_dim) for node in graph.of(Rotary)} == {(interleaved, WIDTH)}
    assert sorted(node.heads for node in graph.of(Rotary)) == [2, 4]
    ((cos, sin),) = {(node.cos, node.sin) for node in graph.of(Rotary)}
    assert graph.tensors[cos].shape == graph.tensors[sin].shape == (LAST, pairs)
    assert graph.tensors[cos][0] == pytest.approx(1.0 if style in ("table", "complex") else FACTOR)
    assert len(graph.of(RMSNorm)) == (2 if style == "normalised" else 0)


@pytest.mark.parametrize("style", ["of the length", "mirrored"])
def test_what_is_no_rotation_of_the_position_stays_what_it_is(style: str) -> None:
    graph = read(Turning(style).eval())
    assert graph.of(Rotary) == graph.of(Attention) == []
    assert any("rotary embedding" in node.reason for node in graph.of(Fallback))


@pytest.mark.parametrize("sharing", ["flag", "interleave", "expand"])
@pytest.mark.parametrize("kv", [1, 2, 4])
def test_heads_of_keys_are_kept_once(kv: int, sharing: str) -> None:
    graph = read(Turning("negated halves", kv, sharing).eval())
    assert graph.of(Fallback) == []
    (node,) = graph.of(Attention)
    assert (node.heads, node.kv_heads, node.causal) == (4, kv, True)


def test_a_single_head_is_rotated() -> None:
    graph = read(Turning("partial", 1, heads=1).eval())
    assert graph.of(Fallback) == []
    assert [node.heads for node in graph.of(Rotary)] == [1, 1]
