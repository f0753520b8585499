"""Following views, transpositions and slices without moving data: each rule maps the axes of one tensor to those of
another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
        elif source and _divides(source[0], size):
            inner = source[0].size // size
            axes.append(Axis("feature", size, source[0].stride * inner))
            source[0] = Axis("feature", inner, source[0].stride)
        else:
            return None
    if any(axis.size != 1 for axis in source):
        return None
    return View(view.value, tuple(axes), view.offset)


def _divides(axis: Axis, size: Any) -> bool:
    return axis.kind == "feature" and axis.repeat == 1 and isinstance(size, int) and size > 0 and axis.size % size == 0


def _merge(outer: Axis, inner: Axis) -> Axis | None:
    if inner.kind != "feature" or outer.repeat != 1 or inner.repeat != 1:
        return None
    if inner.stride == 0 and outer.stride != 0:  # every entry of the outer axis is shown inner.size times
        return Axis("feature", outer.size * inner.size, outer.stride, inner.size)
    if outer.stride != inner.stride * inner.size:
        return None
    return Axis("feature", outer.size * inner.size, inner.stride)


def expand(view: View, shape: Sequence[Any]) -> View | None:
    """``view`` with sizes of one repeated to those of ``shape``, new dimensions first; none if tokens would be."""
    axes = [ONE] * (len(shape) - len(view.axes)) + list(view.axes)
    for index, size in enumerate(shape):
        if axes[index].size == size:
            continue
        if axes[index].kind != "one" or not isinstance(size, int):
            return None
        axes[index] = Axis("feature", size, 0)
    return View(view.value, tuple(axes), view.offset)


def repeat(view: View, dimension: int, times: int) -> View | None:
    """``view`` with every entry of a feature dimension shown ``times`` times in a row; none for another dimension."""
    axis = view.axes[dimension]
    if axis.kind == "one":
        axis = Axis("feature", times, 0)
    elif axis.kind == "feature" and axis.repeat == 1:
        axis = Axis("feature", axis.size * times, axis.stride, times)
    else:
        return None
    axes = list(view.axes)
    axes[dimension] = axis
    return View(view.value, tuple(axes), view.offset)


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
    if axis.kind != "feature" or axis.repeat != 1:
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


@dataclass(frozen=True)
class Heads:
    """``heads`` heads of ``width`` neighbouring features each; ``repeat`` queries share each of them."""

    heads: int
    width: int
    repeat: int = 1


def head_shape(view: View) -> Heads | None:
    """The heads if ``view`` is ``[heads, tokens, width]`` but for sizes of one, else none."""
    kinds = [axis.kind for axis in view.axes if axis.kind != "one"]
    if kinds[-2:] != ["token", "feature"]:
        return None
    return heads(view)


def heads(view: View) -> Heads | None:
    """The heads if ``view`` shows tokens and heads in any order, the features of a head last, else none.

    Rows of features are one head.
    """
    axes = [axis for axis in view.axes if axis.kind != "one"]
    features = [axis for axis in axes if axis.kind == "feature"]
    if len(axes) != len(features) + 1 or not 1 <= len(features) <= 2:
        return None
    inner = features[-1]
    if inner is not axes[-1] or inner.stride != 1 or inner.repeat != 1:
        return None
    if len(features) == 1:
        return Heads(1, inner.size)
    outer = features[0]
    if outer.stride == 0:
        return Heads(1, inner.size, outer.size)
    return Heads(outer.size // outer.repeat, inner.size, outer.repeat) if outer.stride == inner.size else None
