"""Functions that some models write out of smaller operations, found again in a captured graph."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import fx

from lockstep.fragment import operation_name

#: Operations that copy, where data and types stay what they are.
_COPIES = ("clone", "dropout", "contiguous", "alias", "_to_copy", "to", "type_as")


def behind(node: Any) -> Any:
    """``node`` without copies, such as dropout leaves in evaluation mode."""
    while isinstance(node, fx.Node) and operation_name(node) in _COPIES:
        source = node.args[0]
        if not isinstance(source, fx.Node) or source.meta["val"].dtype != node.meta["val"].dtype:
            break
        node = source
    return node


def written_out_rms_norm(node: fx.Node) -> tuple[fx.Node, float] | None:
    """``(x, eps)`` if ``node`` is ``x / sqrt(mean(x^2) + eps)`` with the mean over the last dimension, else none."""
    if len(node.args) < 2:
        return None
    first, second = (behind(operand) for operand in node.args[:2])
    for x, scale in ((first, second), (second, first)):
        if not isinstance(x, fx.Node) or not isinstance(scale, fx.Node):
            continue
        inside = _under_root(scale, divided=operation_name(node) == "div")
        if inside is None or (operation_name(node) == "div" and x is second):
            continue
        mean, eps = inside
        if operation_name(mean) != "mean" or not (len(mean.args) > 2 and mean.args[2]):
            continue
        dimensions = mean.args[1]
        squared = behind(mean.args[0])
        if dimensions in ([-1], [squared.meta["val"].ndim - 1]) and _is_square(squared, x):
            return x, eps
    return None


def _under_root(node: fx.Node, divided: bool) -> tuple[fx.Node, float] | None:
    """``(y, eps)`` if ``node`` is ``rsqrt(y + eps)``, or ``sqrt(y + eps)`` where it is divided by."""
    name = operation_name(node)
    power = node.args[1] if name == "pow" else {"sqrt": 0.5, "rsqrt": -0.5}.get(name)
    if power != (0.5 if divided else -0.5):
        return None
    inner = behind(node.args[0])
    if operation_name(inner) != "add":
        return inner, 0.0
    y, eps = (inner.args[0], inner.args[1]) if isinstance(inner.args[0], fx.Node) else (inner.args[1], inner.args[0])
    return (behind(y), float(eps)) if isinstance(eps, int | float) and isinstance(y, fx.Node) else None


def _is_square(node: Any, x: fx.Node) -> bool:
    name = operation_name(node)
    if name == "mul":
        return behind(node.args[0]) is x and behind(node.args[1]) is x
    return behind(node.args[0]) is x and (name == "square" or (name == "pow" and node.args[1] == 2))


def written_out_gelu(node: fx.Node) -> tuple[str, fx.Node] | None:
    """``(function, x)`` if the product ``node`` is a GELU of ``x``, else none.

    ``gelu_erf`` is ``0.5 x (1 + erf(x / sqrt 2))``; ``gelu_tanh`` is ``0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715
    x^3)))``. Factors may stand in any order and be grouped in any way.
    """
    factors, number = _product(node)
    for x, other in _pairs(factors):
        if not math.isclose(number, 0.5, rel_tol=1e-6) or not _adds_one(other):
            continue
        inner: Any = other.args[0]
        argument, scale = _product(inner.args[0])
        if len(argument) != 1:
            continue
        if operation_name(inner) == "erf" and argument[0] is x and math.isclose(scale, math.sqrt(0.5), rel_tol=1e-6):
            return "gelu_erf", x
        if (
            operation_name(inner) == "tanh"
            and _is_cubic(argument[0], x)
            and math.isclose(scale, math.sqrt(2 / math.pi), rel_tol=1e-6)
        ):
            return "gelu_tanh", x
    return None


def _product(node: fx.Node) -> tuple[list[fx.Node], float]:
    """The factors of a product that are tensors, and the product of those that are plain numbers."""
    name = operation_name(node)
    if name == "div" and isinstance(node.args[1], int | float):
        factors, number = _product(node.args[0])  # type: ignore[arg-type]
        return factors, number / node.args[1]
    if name != "mul":
        return [node], 1.0
    factors, number = [], 1.0
    for operand in node.args[:2]:
        if isinstance(operand, int | float):
            number *= operand
        elif isinstance(operand, fx.Node):
            more, times = _product(operand)
            factors.extend(more)
            number *= times
    return factors, number


def _pairs(factors: list[fx.Node]) -> Iterator[tuple[fx.Node, fx.Node]]:
    if len(factors) == 2:
        yield factors[0], factors[1]
        yield factors[1], factors[0]


def _adds_one(node: fx.Node) -> bool:
    inner: Any = node.args[0] if node.args else None
    return operation_name(node) == "add" and bool(node.args[1] == 1) and operation_name(inner) in ("erf", "tanh")


def _is_cubic(node: fx.Node, x: fx.Node) -> bool:
    """Whether ``node`` is ``x + 0.044715 x^3``."""
    if operation_name(node) != "add":
        return False
    for first, second in (node.args[:2], node.args[1::-1]):
        if first is not x or not isinstance(second, fx.Node):
            continue
        factors, number = _product(second)
        cube = len(factors) == 3 and all(factor is x for factor in factors)
        power = len(factors) == 1 and operation_name(factors[0]) == "pow" and factors[0].args == (x, 3)
        if (cube or power) and math.isclose(number, 0.044715, rel_tol=1e-6):
            return True
    return False
