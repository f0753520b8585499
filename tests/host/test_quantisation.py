"""Choosing int4 and sparse weights: grids, sweeps, the walk through a model, and budgets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lockstep.errors import WeightFormatError
from lockstep.evaluate import run_float, run_reference
from lockstep.graph import Dense, Graph, Linear
from lockstep.model import Model, load
from lockstep.quantisation.budget import Sensitivity, choose_formats
from lockstep.quantisation.formats import Format, QuantisedWeight
from lockstep.quantisation.methods import METHODS, nearest
from lockstep.quantisation.recipe import Recipe, check_layers, quantise_model
from lockstep.quantisation.sweep import DAMPING, sweep
from lockstep.quantisation.walk import Layer, layer_names, quantise_layers
from lockstep.quantise import prescales_of, quantise, quantise_weight
from lockstep_isa import operations
from lockstep_isa.weights import PatternError
from sample_models import random_bert

INT4 = Format(4, 32)
INPUTS = [{"input_ids": np.arange(start, start + 9)} for start in range(0, 90, 9)]


@pytest.fixture(scope="module")
def bert() -> Model:
    return load(random_bert())


def correlated(inputs: int, seed: int) -> torch.Tensor:
    """The Hessian of activations of which a few directions carry most."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * inputs, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    return (x.T @ x).double()


def layer(channels: int, inputs: int, seed: int) -> Layer:
    weight = torch.randn(channels, inputs, generator=torch.Generator().manual_seed(seed))
    return Layer("layer", weight, correlated(inputs, seed + 1))


# --- Grids -----------------------------------------------------------------------------------------------------------


def test_weights_on_the_grid_come_back() -> None:
    rng = np.random.default_rng(0)
    w4 = rng.integers(-7, 8, (20, 96)).astype(np.int8)
    w4[:, 0::32], k = 7, rng.integers(5, 19, (20, 3)).astype(np.uint8)
    k[:, 1] = 18
    k[:, 2] = 17  # no common factor with 18
    scale = np.exp2(rng.integers(-9, 3, 20)).astype(np.float32) * np.float32(1.25)
    given = QuantisedWeight(w4, scale, k)
    found = nearest(torch.from_numpy(given.dequantised()), INT4)
    assert np.array_equal(found.dequantised(), given.dequantised())
    assert found.multipliers is not None
    assert np.array_equal(found.multipliers, k)


def test_int8_is_as_the_contract_rounds_it() -> None:
    weight = torch.randn(9, 40, generator=torch.Generator().manual_seed(1))
    found = nearest(weight, Format())
    q, scale = quantise_weight(weight.numpy())
    assert np.array_equal(found.w8, q)
    assert np.array_equal(found.scale, scale)


def test_multipliers_follow_groups_of_different_size() -> None:
    """The error of a small group is that of its own step, not that of the channel's largest."""
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(2))
    weight[:, 32:64] /= 6
    found = nearest(weight, INT4)
    error = (torch.from_numpy(found.dequantised()) - weight).abs().reshape(16, 4, 32).amax(dim=2)
    largest = weight.abs().reshape(16, 4, 32).amax(dim=2)
    # Half a step of largest / 7, up to a quarter more for multipliers that are whole, and what clipping takes.
    assert (error[:, 1] / largest[:, 1]).mean() < 0.5 / 7 * 2
    assert (error / largest).max() < 0.36


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4)])
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.sparse])
@pytest.mark.parametrize("group", [None, 32])
def test_every_sparse_method_keeps_its_pattern(method: str, pattern: tuple[int, int], group: int | None) -> None:
    format = Format(8 if group is None else 4, group, pattern)
    found = METHODS[method].choose(layer(12, 64, 3), format)
    kept = (found.w8.reshape(12, -1, 4) != 0).sum(axis=2)
    assert kept.max() <= pattern[0]
    assert kept.mean() > 0.8 * pattern[0]
    assert found.format == format


def test_a_weight_that_breaks_its_pattern_cannot_be_made() -> None:
    with pytest.raises(PatternError):
        QuantisedWeight(np.ones((2, 8), np.int8), np.ones(2, np.float32), None, (2, 4))


def test_a_channel_of_zeros_stays_zero() -> None:
    weight = torch.randn(4, 64)
    weight[2] = 0
    for found in (
        nearest(weight, INT4),
        sweep(weight, correlated(64, 1), INT4),
        sweep(weight, correlated(64, 1), Format()),
    ):
        assert found.scale[2] == 0
        assert (found.w8[2] == 0).all()
        assert np.isfinite(found.dequantised()).all()


# --- Sweeps ----------------------------------------------------------------------------------------------------------


def eliminated(
    weight: np.ndarray, hessian: np.ndarray, scale: np.ndarray, pattern: tuple[int, int] | None
) -> np.ndarray:
    """GPTQ by its definition: round a column, spread its error by the inverse Hessian, take the column out of it."""
    hessian = hessian + DAMPING * np.diag(hessian).mean() * np.eye(len(hessian))
    left, inverse = weight.astype(np.float64), np.linalg.inv(hessian)
    values, kept = np.zeros_like(left), np.ones(left.shape, bool)
    for j in range(weight.shape[1]):
        if pattern is not None and j % pattern[1] == 0:
            # What a column would cost if the ones before it in its four were gone: the diagonal after their removal.
            rest, spread = inverse.copy(), []
            for i in range(j, j + pattern[1]):
                spread.append(rest[i, i])
                rest -= np.outer(rest[:, i], rest[i]) / rest[i, i]
            worth = left[:, j : j + pattern[1]] ** 2 / np.array(spread)
            order = np.argsort(worth, axis=1)[:, : pattern[1] - pattern[0]]
            np.put_along_axis(kept[:, j : j + pattern[1]], order, False, axis=1)
        values[:, j] = np.where(kept[:, j], np.clip(np.rint(left[:, j] / scale), -127, 127), 0)
        error = (left[:, j] - values[:, j] * scale) / inverse[j, j]
        left -= np.outer(error, inverse[j])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, :] = inverse[:, j] = 0
        inverse[j, j] = 1
    return values


@pytest.mark.parametrize("pattern", [None, (2, 4), (1, 4)])
def test_the_sweep_is_elimination_by_the_inverse_hessian(pattern: tuple[int, int] | None) -> None:
    given = layer(24, 72, 5)
    found = sweep(given.weight, given.hessian, Format(8, None, pattern))
    wanted = eliminated(given.weight.numpy(), given.hessian.numpy(), found.scale, pattern)
    assert (found.w8 != wanted).mean() < 0.005, "but for ties in float32"


@pytest.mark.parametrize(
    ("format", "order"),
    [
        (INT4, ("gptq", "rtn")),
        (Format(4, 64), ("gptq", "rtn")),
        (Format(8, None, (2, 4)), ("sparsegpt", "wanda", "rtn")),
        (Format(4, 32, (2, 4)), ("sparsegpt", "wanda", "rtn")),
    ],
)
def test_methods_that_know_more_lose_less(format: Format, order: tuple[str, ...]) -> None:
    given = layer(64, 128, 9)
    loud = torch.exp2(torch.arange(128) % 5 - 2.0)
    given = Layer("layer", given.weight, given.hessian * loud.double() * loud.double()[:, None])
    losses = [given.loss(METHODS[method].choose(given, format)) for method in order]
    assert losses == sorted(losses), dict(zip(order, losses, strict=True))
    assert losses[0] < 0.8 * losses[-1]


def test_loss_is_the_relative_error_of_products() -> None:
    x, weight = torch.randn(50, 64), torch.randn(8, 64)
    found = nearest(weight, INT4)
    got = x.double() @ torch.from_numpy(found.dequantised()).double().T
    wanted = x.double() @ weight.double().T
    relative = float(((got - wanted) ** 2).sum() / (wanted**2).sum())
    assert Layer("layer", weight, (x.double().T @ x.double())).loss(found) == pytest.approx(relative, rel=1e-6)


# --- Models ----------------------------------------------------------------------------------------------------------


def test_every_layer_sees_what_the_quantised_layers_before_it_give(bert: Model) -> None:
    """The walk's last layer reads what the float graph computes with the chosen weights, up to int8 activations."""
    graph, seen = bert.float_graph, {}

    def choose(layer: Layer) -> QuantisedWeight:
        seen[layer.name] = layer.hessian
        return nearest(layer.weight, INT4)

    chosen = quantise_layers(graph, INPUTS, {}, choose)
    assert list(chosen) == layer_names(graph)
    tensors = {**graph.tensors, **{name: weight.dequantised() for name, weight in chosen.items()}}
    for graph_now, far in ((Graph(graph.nodes, graph.output, tensors, graph.max_tokens), 0.01), (graph, 0.3)):
        hessians: dict[str, np.ndarray] = {}

        def observe(node: object, given: list[np.ndarray], into: dict[str, np.ndarray] = hessians) -> None:
            if isinstance(node, Dense):
                into[node.weight] = into.get(node.weight, 0) + given[0].T.astype(np.float64) @ given[0]

        for inputs in INPUTS:
            run_float(graph_now, inputs, observe)
        last = list(chosen)[-1]
        difference = np.linalg.norm(hessians[last] - seen[last].numpy()) / np.linalg.norm(hessians[last])
        assert difference < far
    assert difference > 0.01, "float weights would have given something else"


def test_chosen_weights_are_what_the_contract_graph_multiplies_by(bert: Model) -> None:
    point = layer_names(bert.float_graph)[0]
    prescale = np.exp2(np.arange(32) % 3 - 1).astype(np.float32)
    found = quantise_model(bert, Recipe(INT4, "gptq"), INPUTS, {point: prescale})
    contract = quantise(bert.float_graph, found.prescales, found.weights)
    for node in contract.of(Linear):
        weight = found.weights[node.weight.partition(".int8")[0]]
        assert np.array_equal(contract.tensors[node.weight], weight.w8)
        assert np.array_equal(contract.tensors[node.scales], weight.scale)
    assert np.array_equal(prescales_of(contract)[point], prescale)
    first = found.weights[point].dequantised() * prescale
    assert np.corrcoef(first.ravel(), bert.float_graph.tensors[point].ravel())[0, 1] > 0.97
    inputs = {"input_ids": np.arange(30, 41)}
    wanted, got = run_float(bert.float_graph, inputs), run_reference(contract, inputs, operations)
    assert np.corrcoef(wanted.ravel(), got.ravel())[0, 1] > 0.98


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.prescale])
def test_methods_with_a_pre_scale_fit_one_for_the_format(bert: Model, method: str) -> None:
    graph = bert.float_graph
    name = "embeddings.LayerNorm.weight"
    spread = np.exp2(np.arange(32) % 6).astype(np.float32)
    loud = Model(
        bert.graph,
        Graph(graph.nodes, graph.output, {**graph.tensors, name: graph.tensors[name] * spread}, graph.max_tokens),
        bert.pooling,
        None,
    )
    inputs = {"input_ids": np.arange(30, 41)}
    wanted = run_float(loud.float_graph, inputs)

    def error(method: str) -> float:
        found = quantise_model(loud, Recipe(INT4, method), INPUTS, {})
        assert bool(found.prescales) == (METHODS[method].prescale is not None)
        got = run_reference(quantise(loud.float_graph, found.prescales, found.weights), inputs, operations)
        return float(((got - wanted) ** 2).mean())

    assert error(method) < error("rtn")


def test_a_group_that_does_not_divide_the_inputs_names_the_layer(bert: Model) -> None:
    with pytest.raises(WeightFormatError, match=r"groups of 64 do not divide the 32 inputs of 'encoder.layer.0"):
        check_layers(bert.float_graph, Format(4, 64), layer_names(bert.float_graph))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Recipe(INT4, "magic"), "no method 'magic'; there are rtn"),
        (lambda: Recipe(Format(8, None, (2, 4)), "gptq"), "gptq is not for weights with sparsity; .* wanda, sparsegpt"),
        (lambda: Recipe(INT4, "wanda"), "wanda is not for weights without"),
        (lambda: Recipe(Format(), "rtn", 6.0), "ask for int4"),
        (lambda: Format(4, 48), "a group of 48; it may be 32, 64, 128"),
        (lambda: Format(3), "weights of 3 bits"),
        (lambda: Format(8, None, (3, 4)), "sparsity of 3:4"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(make: object, named: str) -> None:
    assert callable(make)
    with pytest.raises(WeightFormatError, match=named):
        make()


@pytest.mark.parametrize(
    ("format", "bits"),
    [
        (Format(), 8),
        (INT4, 4.25),
        (Format(8, None, (2, 4)), 8 / 1.6),
        (Format(4, 32, (2, 4)), 3.25),
        (Format(4, 128, (1, 4)), 1.5625),
    ],
)
def test_bits_of_a_weight(format: Format, bits: float) -> None:
    assert format.bits_per_weight == bits


# --- Budgets ---------------------------------------------------------------------------------------------------------


def test_a_budget_is_met_by_the_layers_that_lose_least_for_a_byte() -> None:
    layers = [
        Sensitivity("large", 1000, 0.0, 0.4),
        Sensitivity("dear", 100, 0.0, 0.3),
        Sensitivity("cheap", 100, 0.01, 0.02),
    ]
    formats, points = choose_formats(layers, Format(), INT4, 6.0)
    assert {name: format.bits for name, format in formats.items()} == {"large": 4, "dear": 8, "cheap": 4}
    assert [point.layer for point in points] == [None, "cheap", "large", "dear"]
    assert [point.bits for point in points] == pytest.approx([8, 8 - 3.75 / 12, 8 - 3.75 * 11 / 12, 4.25])
    assert [point.loss for point in points] == pytest.approx([0.01, 0.02, 0.42, 0.72])
    with pytest.raises(WeightFormatError, match=r"4 bits a weight; int4 g32 alone takes 4\.25"):
        choose_formats(layers, Format(), INT4, 4.0)


def test_a_model_under_a_budget_mixes_formats(bert: Model) -> None:
    found = quantise_model(bert, Recipe(INT4, "gptq", 6.0), INPUTS, {})
    assert {weight.format.bits for weight in found.weights.values()} == {4, 8}
    assert 5 < found.bits <= 6
    assert [point.bits for point in found.curve] == sorted((point.bits for point in found.curve), reverse=True)
    all_narrow = quantise_model(bert, Recipe(INT4, "gptq"), INPUTS, {})
    assert sum(found.losses.values()) < 0.7 * sum(all_narrow.losses.values())
