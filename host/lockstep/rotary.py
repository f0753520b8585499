"""Rotary position embeddings, found by what they compute.

Models write the rotation in many ways (halves or neighbours, concatenated, stacked or negated, whole heads or the
first features). What they have in common is that it is linear in one value and otherwise depends on positions alone.
So a candidate is probed with unit vectors, which gives the pairs of features that turn together; with ones in the
first of each pair, which gives the table of cosines and sines for all positions; and then with random numbers, which
must come out as ``Rotary`` says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from lockstep import layout
from lockstep.fragment import Axis, Fragment, View, extent, operation_name
from lockstep.graph import Rotary
from lockstep.recogniser import Recogniser, is_floating

#: Tokens for which the pairs are looked for, and numbers that a random probe may have.
PROBE_TOKENS, PROBE_NUMBERS = 8, 2**22
#: Largest difference to the captured rotation of numbers around one: rounding.
TOLERANCE = 1e-4

#: Operations that only say where data is.
_PLACING = {"view", "reshape", "unsqueeze", "squeeze", "expand", "alias", "clone", "contiguous", "_to_copy", "to"}


@dataclass(frozen=True)
class Turn:
    """A rotation of the first ``2 * pairs`` features of every head; cos, sin: ``float32[positions, pairs]``."""

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool

    def features(self) -> tuple[slice, slice]:
        """The first and the second features of the pairs."""
        pairs = self.cos.shape[1]
        if self.interleaved:
            return slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
        return slice(0, pairs), slice(pairs, 2 * pairs)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The rotation of x: ``float32[tokens, heads, features]`` at positions from 0."""
        first, second = self.features()
        cos, sin = (table[: len(x), None] for table in (self.cos, self.sin))
        y = x.clone()
        y[..., first] = x[..., first] * cos - x[..., second] * sin
        y[..., second] = x[..., second] * cos + x[..., first] * sin
        return y


def resolve(state: Recogniser, node: object) -> View | None:
    """The reading of ``node`` as a view; where it has none, it may be a value with rotary positions."""
    if not isinstance(node, fx.Node):
        return None
    reading = state.views.get(node)
    if isinstance(reading, View):
        return reading
    if reading is not None or node in state.constants or node in state.fixed or not is_floating(node):
        return None
    key = ("rotary", node)
    if key not in state.memory:
        state.memory[key] = None
        view = _rotation(state, node)
        if view is not None:
            state.memory[key] = state.views[node] = view
    return state.memory[key]


def _rotation(state: Recogniser, node: fx.Node) -> View | None:
    fragment = state.fragment(node)
    inside = set(fragment.nodes)
    met = [item for item in fragment.nodes if _meets_others(state, item, inside)]
    positions = [item for item in met if item in state.fixed and is_floating(item)]
    sources = [view for item in met if isinstance(view := state.views.get(item), View)]
    known = (state.fixed, state.constants, state.views)
    if not positions or len({view.value for view in sources}) != 1:
        return None
    if any(item.op == "placeholder" and not any(item in kind for kind in known) for item in met):
        return None
    whole = _whole(node, sources)
    found = None if whole is None else state.canonical(whole)
    if whole is None or found is None:
        return None
    value, shape = found

    def rotate(x: torch.Tensor) -> torch.Tensor:
        return _run(state, fragment, whole, x)

    sizes = (shape.heads, shape.width)
    key = ("turn", tuple(_placed(item) for item in positions), shape.width)
    turn = state.memory.get(key)
    if turn is None or not _agrees(rotate, turn, sizes, [_probe(state)]):
        turn = _probed(state, node, rotate, sizes)
        if turn is None:
            return None
        state.memory[key] = turn
    cos, sin = _stored(state, turn)
    rotated = state.emit(Rotary, value, cos, sin, shape.heads, shape.width, turn.interleaved)
    return state.reuse(rotated, whole, shape.heads * shape.width)


def _meets_others(state: Recogniser, node: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether more than the length of ``node`` matters to what is no function of the length."""
    return any(user in inside and user not in state.fixed for user in node.users)


def _placed(node: fx.Node) -> fx.Node:
    while operation_name(node) in _PLACING:
        node = node.all_input_nodes[0]
    return node


def _whole(node: fx.Node, sources: list[View]) -> View | None:
    """The heads that ``node`` rotates, whole, given views of parts of them."""
    sizes = [extent(size) for size in node.meta["val"].shape]
    start = min(view.offset for view in sources)
    if not isinstance(sizes[-1], int):
        return None
    for view in sources:
        axes = list(view.axes)
        if (reshaped := layout.reshape(view, sizes)) is not None:
            return View(view.value, reshaped.axes, start)
        if len(axes) == len(sizes) and axes[-1].kind == "feature" and [axis.size for axis in axes[:-1]] == sizes[:-1]:
            axes[-1] = Axis("feature", sizes[-1], axes[-1].stride)
            return View(view.value, tuple(axes), start)
    return None


def _run(state: Recogniser, fragment: Fragment, whole: View, x: torch.Tensor) -> torch.Tensor:
    """What the captured operations make of x: ``float32[tokens, heads, features]``."""
    tokens, heads, width = x.shape
    arrays = [state.blank(value, tokens) for value in fragment.reads]
    given = np.random.default_rng(1).standard_normal(state.blank(whole.value, tokens).shape).astype(np.float32)
    given[:, whole.offset : whole.offset + heads * width] = x.reshape(tokens, -1).numpy()
    arrays[fragment.reads.index(whole.value)] = given
    result = fragment.tensor(*arrays)
    order = sorted(range(result.ndim), key=lambda index: {"one": 0, "token": 1}.get(whole.axes[index].kind, 2))
    return result.permute(order).reshape(tokens, heads, width)


def _probe(state: Recogniser) -> int:
    return state.max_tokens if state.fixed_length else min(max(state.min_tokens, PROBE_TOKENS), state.max_tokens)


def _probed(
    state: Recogniser, node: fx.Node, rotate: Callable[[torch.Tensor], torch.Tensor], sizes: tuple[int, int]
) -> Turn | None:
    heads, width = sizes
    pairs, interleaved = _pairs(rotate, _probe(state), sizes)
    if pairs == 0:
        return None
    empty = torch.zeros(state.max_tokens, pairs)
    first, second = Turn(empty, empty, interleaved).features()
    x = torch.zeros(state.max_tokens, heads, width)
    x[..., first] = 1
    y = rotate(x)[:, 0]
    turn = Turn(y[:, first].contiguous(), y[:, second].contiguous(), interleaved)
    most = min(state.max_tokens, max(PROBE_TOKENS, PROBE_NUMBERS // (heads * width)))
    lengths = [state.max_tokens] if state.fixed_length else [_probe(state), (_probe(state) + most) // 2, most]
    if _agrees(rotate, turn, sizes, lengths):
        return turn
    state.reasons[node] = "what looks like a rotary embedding changes with the length of the sequence, or does more"
    return None


def _pairs(rotate: Callable[[torch.Tensor], torch.Tensor], tokens: int, sizes: tuple[int, int]) -> tuple[int, bool]:
    """The number of pairs of features that turn together, and whether they are neighbours."""
    heads, width = sizes
    involved: list[tuple[int, int]] = []
    for feature in range(width):
        x = torch.zeros(tokens, heads, width)
        x[..., feature] = 1
        touched = rotate(x).abs().amax(dim=(0, 1)).nonzero()[:, 0].tolist()
        involved.extend((feature, other) for other in touched if other > feature)
    if not involved:
        return 0, False
    first, second = involved[0]
    if second - first == 1 and len(involved) > 1:
        return involved[-1][1] // 2 + 1, True
    return second - first, False


def _agrees(
    rotate: Callable[[torch.Tensor], torch.Tensor], turn: Turn, sizes: tuple[int, int], lengths: list[int]
) -> bool:
    heads, width = sizes
    generator = torch.Generator().manual_seed(2)
    for tokens in lengths:
        x = torch.randn(tokens, heads, width, generator=generator)
        if 2 * turn.cos.shape[1] > width or not torch.allclose(rotate(x), turn(x), TOLERANCE, TOLERANCE):
            return False
    return True


def _stored(state: Recogniser, turn: Turn) -> tuple[str, str]:
    names = []
    for kind, table in (("cos", turn.cos), ("sin", turn.sin)):
        key = ("rotary table", table.shape, table.numpy().tobytes())
        if key not in state.memory:
            state.memory[key] = state.store(f"rotary.{kind}", table)
        names.append(state.memory[key])
    return names[0], names[1]
