"""Training: windows of tokens, the optimisers, and the schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaForCausalLM

from bytelm.corpus import Document
from bytelm.tokenizer import BOS, EOS


@dataclass(frozen=True)
class Recipe:
    """How the model is trained; counted in steps and tokens, not in time, so that a run can be repeated."""

    steps: int = 1000
    #: Tokens of a step: windows of ``window`` tokens, in the last part of the steps of ``last_window`` tokens.
    tokens_per_step: int = 3072
    window: int = 256
    last_window: int = 1024
    last_part: float = 0.15
    warmup_steps: int = 50
    #: The part of the steps in which the rates fall, linearly and to zero; before it they stay.
    decay_part: float = 0.4
    #: Muon's rate for matrices, and AdamW's for embeddings and norms.
    matrix_rate: float = 0.02
    other_rate: float = 0.003
    weight_decay: float = 0.05
    seed: int = 20
    compiled: bool = True


def token_stream(documents: tuple[Document, ...], rng: np.random.Generator) -> np.ndarray:
    """int64[tokens]: every document between BOS and EOS, in random order."""
    pieces: list[np.ndarray] = []
    for index in rng.permutation(len(documents)):
        text = np.frombuffer(documents[index].text, dtype=np.uint8).astype(np.int64)
        pieces.append(np.concatenate([[BOS], text, [EOS]]))
    return np.concatenate(pieces)


def windows(stream: np.ndarray, length: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Windows int64[length + 1] without end: each pass cuts the stream at another phase and shuffles the pieces."""
    while True:
        phase = int(rng.integers(length))
        count = (len(stream) - phase - 1) // length
        for index in rng.permutation(count):
            start = phase + int(index) * length
            yield stream[start : start + length + 1]


def rate_factor(step: int, recipe: Recipe) -> float:
    """The share of the full rate at ``step``: a linear rise, the full rate, a linear fall to zero."""
    rise = (step + 1) / recipe.warmup_steps
    fall = (recipe.steps - step) / (recipe.steps * recipe.decay_part)
    return min(rise, 1.0, fall)


def optimisers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in name)]
    return [
        torch.optim.Muon(matrices, lr=recipe.matrix_rate, momentum=0.95, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(others, lr=recipe.other_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(
    model: LlamaForCausalLM,
    documents: tuple[Document, ...],
    recipe: Recipe,
    report: Callable[[int, float], None] = lambda step, bits: None,
) -> None:
    """Train ``model`` in place; ``report(step, bits)`` hears the bits per token of every step.

    Activations are bfloat16, weights and optimiser states float32.
    """
    rng = np.random.default_rng(recipe.seed)
    stream = token_stream(documents, rng)
    both = optimisers(model, recipe)
    full_rates = [optimiser.param_groups[0]["lr"] for optimiser in both]
    forward = torch.compile(model, dynamic=False) if recipe.compiled else model
    first_long = recipe.steps - round(recipe.steps * recipe.last_part)
    short, long = (windows(stream, length, rng) for length in (recipe.window, recipe.last_window))
    model.train()
    for step in range(recipe.steps):
        length, source = (recipe.window, short) if step < first_long else (recipe.last_window, long)
        batch = torch.from_numpy(np.stack([next(source) for _ in range(recipe.tokens_per_step // length)]))
        with torch.autocast("cpu", torch.bfloat16):
            logits = forward(input_ids=batch[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser, full in zip(both, full_rates, strict=True):
            optimiser.param_groups[0]["lr"] = full * rate_factor(step, recipe)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        report(step, loss.item() / float(np.log(2.0)))
    model.eval()
