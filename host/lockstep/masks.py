"""Masks that hide nothing: with one unpadded sequence a mask is plumbing, and this is shown, not assumed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from lockstep.fragment import extent, operation_name
from lockstep.graph import Input
from lockstep.recogniser import Recogniser


def why_not_trivial(state: Recogniser, mask: fx.Node) -> str | None:
    """Why an attention mask may hide a key, or none if it hides none in any sequence that the model takes.

    The mask must depend on nothing but the length of the sequence. It is then computed for every length, the longest
    first: a Boolean mask must be true everywhere, an additive one zero everywhere.
    """
    if mask in state.constants:
        return None if _hides_nothing(state.constants[mask]) else "a constant attention mask hides keys"
    fragment = state.fragment(mask)
    for node in fragment.nodes:
        if (
            isinstance(node.meta.get("val"), torch.Tensor)
            and node not in state.constants
            and not _only_sized(node, fragment.nodes)
        ):
            return "the attention mask depends on more than the length of the sequence"
    for tokens in [state.max_tokens] if state.fixed else range(state.max_tokens, state.min_tokens - 1, -1):
        arrays = [_blank(state, value, tokens) for value in fragment.reads]
        try:
            mask_value = fragment.tensor(*arrays)
        except (RuntimeError, IndexError):
            return f"the attention mask cannot be computed for {tokens} tokens"
        if not _hides_nothing(mask_value):
            return f"the attention mask hides keys in a sequence of {tokens} tokens"
    return None


def _only_sized(node: fx.Node, inside: list[fx.Node]) -> bool:
    """Whether ``node`` is no input of the model, or one of which only the size is read."""
    if node.op != "placeholder":
        return True
    return all(operation_name(user) == "sym_size" for user in node.users if user in inside)


def _blank(state: Recogniser, value: int, tokens: int) -> np.ndarray:
    node: Any = state.nodes[value]
    assert isinstance(node, Input)
    return np.zeros([tokens if size is None else size for size in node.shape], node.dtype)


def _hides_nothing(mask: torch.Tensor) -> bool:
    for dimension in range(mask.ndim):
        if mask.stride(dimension) == 0 and extent(mask.shape[dimension]) > 1:  # repeated, one entry tells all
            mask = mask.narrow(dimension, 0, 1)
    return bool(mask.all() if mask.dtype == torch.bool else (mask == 0).all())
