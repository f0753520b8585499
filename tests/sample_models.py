"""Small models with random weights, for tests of the host."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

FEATURES, HEADS, HIDDEN = 32, 4, 64


class Block(nn.Module):
    """An encoder layer on ``float32[1, tokens, 32]`` with packed projections, as many libraries write it."""

    def __init__(self, pre_norm: bool = True, splitting: str = "reshape", activation: str = "gelu") -> None:
        super().__init__()
        self.pre_norm, self.splitting, self.activation = pre_norm, splitting, activation
        self.packed = nn.Linear(FEATURES, 3 * FEATURES)
        self.out = nn.Linear(FEATURES, FEATURES, bias=False)
        self.first, self.second = nn.LayerNorm(FEATURES), nn.LayerNorm(FEATURES)
        self.up, self.down = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, FEATURES)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, features = x.shape
        packed = self.packed(x)
        if self.splitting == "reshape":
            q, k, v = packed.reshape(batch, tokens, 3, HEADS, features // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            parts = packed.chunk(3, -1) if self.splitting == "chunk" else packed.split(FEATURES, -1)
            q, k, v = (part.view(batch, tokens, HEADS, -1).transpose(1, 2) for part in parts)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, features))

    def feed(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(getattr(functional, self.activation)(self.up(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.pre_norm:
            x = x + self.attend(self.first(x))
            return x + self.feed(self.second(x))
        x = self.first(x + self.attend(x))
        return self.second(x + self.feed(x))


class Between(nn.Module):
    """Two blocks with something between them."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.before, self.middle, self.after = Block(), middle, Block(pre_norm=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.middle(self.before(x)))


class Sine(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x)


class Convolution(nn.Module):
    """A convolution over tokens, added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(FEATURES, FEATURES, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.convolution(x.transpose(1, 2)).transpose(1, 2)


class Causal(nn.Module):
    """Attention in which a token sees only those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(FEATURES, FEATURES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.project(x)[:, None]
        return functional.scaled_dot_product_attention(y, y, y, is_causal=True)[:, 0]


def random_bert(**changes: object) -> nn.Module:
    """A BERT of two layers that nobody trained."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(5)
    return BertModel(BertConfig(**{**SMALL, **changes})).eval()


#: Sizes of a small model in the words of transformers.
SMALL = {
    "hidden_size": FEATURES,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": HIDDEN,
    "vocab_size": 100,
    "max_position_embeddings": 64,
}
