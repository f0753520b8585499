"""Bits per byte of a causal language model."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from bytelm.tokenizer import BOS


def text_bits(
    model: PreTrainedModel,
    text: bytes,
    window: int,
    stride: int,
    batch: int = 8,
    progress: Callable[[int], None] = lambda count: None,
) -> float:
    """-log2 of the probability that ``model`` gives to ``text`` after BOS.

    The text is read in windows of ``window`` tokens that start every ``stride`` tokens; each byte is scored once, in
    the first window that holds it, so all but the first ``window`` bytes have at least ``window - stride`` tokens
    before them. ``progress`` hears the number of bytes scored.
    """
    tokens = torch.tensor([BOS, *text])
    pieces: dict[int, list[tuple[torch.Tensor, int]]] = {}
    scored = 0
    for start in range(0, len(text), stride):
        end = min(start + window, len(text))
        if end > scored:
            # Inputs are tokens start..end, of which the last is only a target.
            pieces.setdefault(end - start, []).append((tokens[start : end + 1], scored - start))
            scored = end
    bits = 0.0
    for group in pieces.values():
        for first in range(0, len(group), batch):
            ids = torch.stack([piece for piece, _ in group[first : first + batch]])
            with torch.inference_mode():
                logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
            losses = functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            for row, (_, skipped) in zip(losses, group[first : first + batch], strict=True):
                bits += row[skipped:].double().sum().item() / math.log(2.0)
                progress(len(row) - skipped)
    return bits
