"""Following views, transpositions and slices without moving data: each rule maps the axes of one tensor to those of
another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lockstep.fragment import ONE, Axis, View


def reshape(view: View, shape: Sequence[Any]) -> View | None:
    """``view`` with another shape (row-major order kept), or none if some dimension would mix tokens with features."""
    source = [axis for axis in view.axes if axis.kind != "one"]
    axes: list[Axis] = []
    for size in shape:
        while source and source[0].kind == "feature" and isinstance(size, int) and source[0].size < size:
            merged = _merge(source[0], source[1]) if len(source) > 1 else None
            if merged is None:
                return None
            source[:2] = [merged]
        if source and source[0].size == size:
            axes.append(source.pop(0))
        elif size == 1:
            axes.append(ONE)
        elif source and source[0].kind == "feature" and isinstance(size, int) and source[0].size % size == 0:
            inner = source[0].size // size
            axes.append(Axis("feature", size, source[0].stride * inner))
            source[0] = Axis("feature", inner, source[0].stride)
        else:
            return None
    if any(axis.size != 1 for axis in source):
        return None
    return View(view.value, tuple(axes), view.offset)


def _merge(outer: Axis, inner: Axis) -> Axis | None:
    if inner.kind != "feature" or outer.stride != inner.stride * inner.size:
        return None
    return Axis("feature", outer.size * inner.size, inner.stride)


def permute(view: View, order: Sequence[int]) -> View:
    """``view`` with its dimensions in another order."""
    return View(view.value, tuple(view.axes[index] for index in order), view.offset)


def transpose(view: View, first: int, second: int) -> View:
    """``view`` with two dimensions exchanged; negative ones count from the end."""
    order = list(range(len(view.axes)))
    order[first], order[second] = order[second], order[first]
    return permute(view, order)


def narrow(view: View, dimension: int, start: int, size: int) -> View | None:
    """``size`` entries of a feature dimension from ``start``, or none if the dimension is another one."""
    axis = view.axes[dimension]
    if axis.kind == "one" and (start, size) == (0, 1):
        return view
    if axis.kind != "feature":
        return None
    axes = list(view.axes)
    axes[dimension] = Axis("feature", size, axis.stride)
    return View(view.value, tuple(axes), view.offset + start * axis.stride)


def select(view: View, dimension: int, index: int) -> View | None:
    """Entry ``index`` of a feature dimension, which goes away, or none if the dimension is another one."""
    axis = view.axes[dimension]
    if axis.kind == "token":
        return None
    position = index if index >= 0 else index + axis.size
    part = narrow(view, dimension, position, 1)
    if part is None:
        return None
    axes = list(part.axes)
    del axes[dimension]
    return View(part.value, tuple(axes), part.offset)


def row_width(view: View) -> int | None:
    """The number of features if ``view`` is ``[tokens, features]`` but for sizes of one, else none."""
    axes = [axis for axis in view.axes if axis.kind != "one"]
    if [axis.kind for axis in axes] != ["token", "feature"] or axes[1].stride != 1:
        return None
    return axes[1].size


def head_shape(view: View) -> tuple[int, int] | None:
    """``(heads, head_dim)`` if ``view`` is ``[heads, tokens, head_dim]`` but for sizes of one, else none."""
    axes = [axis for axis in view.axes if axis.kind != "one"]
    kinds = [axis.kind for axis in axes]
    if kinds == ["token", "feature"] and axes[1].stride == 1:
        return 1, axes[1].size
    if kinds == ["feature", "token", "feature"] and axes[2].stride == 1 and axes[0].stride == axes[2].size:
        return axes[0].size, axes[2].size
    return None
