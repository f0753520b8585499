"""What an attention mask means: shown by computing it for many lengths, not assumed from how it is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from lockstep.graph import PositionBias, Value
from lockstep.recogniser import Recogniser, Unrecognised

#: An additive mask of at most this much hides a key: its exponential is zero beside any score that can occur.
HIDDEN = -1e9


@dataclass(frozen=True)
class Mask:
    """The keys that a token sees, as ``Attention`` says it, and what is added to their scores."""

    causal: bool = False
    window: int | None = None
    bias: Value | None = None

    def visible(self, tokens: int) -> torch.Tensor:
        """``bool[tokens, tokens]``: the keys that each query sees."""
        query, key = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
        shown = key <= query if self.causal else torch.ones(tokens, tokens, dtype=torch.bool)
        return shown if self.window is None else shown & (key > query - self.window)


def read_mask(state: Recogniser, mask: fx.Node, heads: int) -> Mask:
    """The meaning of the mask of an attention with ``heads`` heads.

    The mask must depend on nothing but the length of the sequence. It is computed for the longest sequence, which
    gives the meaning, and must have it for all short lengths and samples of the longer ones.

    Raises
    ------
    Unrecognised
        if it depends on something else, or hides keys in another way than ``Attention`` can say.
    """
    key = ("mask", mask, heads)
    if key not in state.memory:
        try:
            state.memory[key] = _read(state, mask, heads)
        except Unrecognised as reason:
            state.memory[key] = str(reason)
    found = state.memory[key]
    if isinstance(found, str):
        raise Unrecognised(found)
    return found


def _read(state: Recogniser, mask: fx.Node, heads: int) -> Mask:
    if mask not in state.constants and mask not in state.fixed:
        raise Unrecognised("the attention mask depends on more than the length of the sequence")

    def at(tokens: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        try:
            contents = state.constants[mask] if mask in state.constants else state.evaluate(mask, tokens)
            return _parts(contents, tokens)
        except (RuntimeError, IndexError):
            raise Unrecognised(f"the attention mask cannot be computed for {tokens} tokens") from None

    longest = _longest(state, mask)
    visible, added = at(longest)
    meaning = _meaning(visible)
    relative = None if added is None else _relative(added)
    lengths = [longest] if state.fixed_length else state.lengths()
    if meaning.window is not None and not state.fixed_length:
        lengths += [tokens for tokens in range(meaning.window, meaning.window + 3) if tokens <= longest]
    for tokens in lengths:
        visible, added = at(tokens)
        wanted = meaning.visible(tokens)
        if not torch.equal(visible, wanted.expand_as(visible)):
            raise Unrecognised(f"the attention mask hides keys in a sequence of {tokens} tokens in a way of its own")
        if relative is not None:
            known = torch.zeros_like(visible, dtype=torch.float32) if added is None else added
            if not torch.equal(known, torch.where(wanted, _placed(relative, tokens), 0.0).expand_as(known)):
                raise Unrecognised("what is added to attention scores depends on more than the distance of tokens")
        elif added is not None:
            raise Unrecognised("the attention mask is a bias for some lengths only")
    if relative is None:
        return meaning
    return Mask(meaning.causal, meaning.window, _position_bias(state, mask, relative, heads))


def _longest(state: Recogniser, mask: fx.Node) -> int:
    if state.fixed_length and mask in state.constants and state.constants[mask].ndim:
        return state.constants[mask].shape[-1]
    return state.max_tokens


def _parts(mask: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Which keys are seen, ``bool[heads or 1, tokens, tokens]``, and what is added to their scores, if anything."""
    while mask.ndim > 3:
        if mask.shape[0] > 1 and mask.stride(0) != 0:
            raise IndexError
        mask = mask[0]
    if mask.ndim == 3 and mask.shape[0] > 1 and mask.stride(0) == 0:
        mask = mask[:1]
    mask = mask.expand(mask.shape[0] if mask.ndim == 3 else 1, tokens, tokens)
    if mask.dtype == torch.bool:
        return mask, None
    visible = mask > HIDDEN
    added = torch.where(visible, mask.to(torch.float32), 0.0)
    return visible, added if bool(added.any()) else None


def _meaning(visible: torch.Tensor) -> Mask:
    if bool(visible.all()):
        return Mask()
    last = visible[0, -1]
    first = int(last.to(torch.int8).argmax())
    return Mask(not bool(visible[0, 0, -1]), len(last) - first if first else None)


def _relative(added: torch.Tensor) -> torch.Tensor:
    """``float32[heads or 1, 2 * tokens - 1]``: what is added for each distance, from key far before to far after."""
    return torch.cat([added[:, 1:, 0].flip(1), added[:, 0, :]], 1).contiguous()


def _placed(relative: torch.Tensor, tokens: int) -> torch.Tensor:
    centre = relative.shape[1] // 2
    distance = torch.arange(tokens)[None] - torch.arange(tokens)[:, None]
    return relative[:, distance + centre]


def _position_bias(state: Recogniser, mask: fx.Node, relative: torch.Tensor, heads: int) -> Value:
    if relative.shape[0] not in (1, heads):
        raise Unrecognised("the attention mask has another number of heads than attention")
    reads = state.fragment(mask).reads
    key = ("bias", reads, heads, relative.numpy().tobytes())
    if key not in state.memory:
        state.memory[key] = state.emit(PositionBias, reads, _biases(relative.expand(heads, -1).numpy()), heads)
    return state.memory[key]


def _biases(relative: np.ndarray) -> Callable[..., np.ndarray]:
    centre = relative.shape[1] // 2

    def bias(*arrays: np.ndarray) -> np.ndarray:
        positions = np.arange(len(arrays[0]))
        return relative[:, positions[None] - positions[:, None] + centre]

    return bias
