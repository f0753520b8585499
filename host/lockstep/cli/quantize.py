"""``lockstep quantize``: a model's weights in int8, int4 or with zeros, written to a new folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from .failures import UsageError, guarded
from .models import ModelArgument, open_model
from .output import JsonOption, Steps, emit, results, table

_PATTERNS = {"none": None, "2:4": (2, 4), "1:4": (1, 4)}
_BITS = {"int8": 8, "int4": 4}


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: lockstep quantize tiny --calibration notes.txt --out tiny-int4")(quantize)


@guarded
def quantize(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="The folder to write; it must be new or empty.")],
    weights: Annotated[str, typer.Option(help="int4 or int8.")] = "int4",
    group: Annotated[
        int | None, typer.Option(help="Inputs that share a multiplier of int4: 32 if not given, 64 or 128.")
    ] = None,
    sparsity: Annotated[str, typer.Option(help="none, 2:4 or 1:4.")] = "none",
    method: Annotated[
        str | None,
        typer.Option(help="rtn, smoothquant, awq, gptq; with sparsity rtn, wanda, sparsegpt. The last if not given."),
    ] = None,
    bits: Annotated[
        float | None,
        typer.Option(help="Most bits a weight on average: layers that int4 hurts most stay int8.", min=1),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Text: a line for each sentence, or one text for a language model; see the docs."),
    ] = None,
    prescale: Annotated[bool, typer.Option(help="Keep the pre-scale that the model comes with.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Quantise the weights of a model, and write them in the layout of compressed-tensors.

    The loss of a layer is the squared error of its products on the calibration text, relative to the products.
    """
    for name, given, known in (("--weights", weights, _BITS), ("--sparsity", sparsity, _PATTERNS)):
        if given not in known:
            raise UsageError(f"{name} {given} is none of {', '.join(known)}")
    if group is not None and weights != "int4":
        raise UsageError(f"--group is for int4, and {weights} has one scale for a channel; leave it out")
    with Steps() as steps:
        steps("importing PyTorch and transformers")
        from lockstep.quantisation.formats import Format
        from lockstep.quantisation.recipe import Recipe, calibration_inputs, check_layers, quantise_model, steps_of
        from lockstep.quantisation.walk import layer_names
        from lockstep.quantisation.write import check_output, names_in_files, write_folder
        from lockstep.quantise import prescales_of

        chosen = method or ("gptq" if sparsity == "none" else "sparsegpt")
        size = None if weights != "int4" else 32 if group is None else group
        wanted = Format(_BITS[weights], size, _PATTERNS[sparsity])
        recipe = Recipe(wanted, chosen, bits)
        loaded = open_model(model, steps)
        if loaded.stored.weights:
            raise UsageError(f"the weights of {model} are quantised already; give the model that they were made from")
        folder = loaded.folder
        assert folder is not None, "a model that is loaded by name has a folder"
        check_output(folder, out)
        graph = loaded.float_graph
        layers_there = layer_names(graph)
        names = names_in_files(folder, {name: graph.tensors[name] for name in layers_there})
        check_layers(graph, recipe.format, names)
        inputs = calibration_inputs(loaded, calibration)
        total = steps_of(recipe, len(names))
        with steps.bar("quantising", total, "layers") as tell:
            done = 0

            def progress(name: str) -> None:
                nonlocal done
                if tell is None:
                    steps(f"quantising {name}")
                else:
                    tell(done)
                done += 1

            prescales = prescales_of(loaded.graph) if prescale else {}
            found = quantise_model(loaded, recipe, inputs, prescales, progress, names)
        steps(f"writing {out}")
        size = write_folder(folder, out, found.weights, found.prescales, names)
    layers = [
        {"name": name, "format": str(weight.format), "weights": weight.values.size, "loss": found.losses[name]}
        for name, weight in found.weights.items()
    ]
    report: dict[str, Any] = {
        "model": model,
        "out": str(out),
        "method": chosen,
        "bits": found.bits,
        "bytes": size,
        "layers": layers,
        "curve": [dataclasses.asdict(point) for point in found.curve],
        "not_quantised": [name for name in layers_there if name not in names],
    }
    if as_json:
        emit(report)
        return
    _show(report)


def _show(report: dict[str, Any]) -> None:
    console = results()
    rows = [[each["name"], each["format"], f"{each['weights']:,}", f"{each['loss']:.2e}"] for each in report["layers"]]
    console.print(table(["layer", "format", "weights", "loss"], rows, numbers=2))
    if report["curve"]:
        points = [[f"{each['bits']:.2f}", f"{each['loss']:.2e}", each["layer"] or "-"] for each in report["curve"]]
        console.print()
        console.print(table(["bits", "sum of losses", "last to become int4"], points))
    for name in report["not_quantised"]:
        text = f"as it was: {name}, which the files do not hold as [outputs, inputs]"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"\n{report['bits']:.2f} bits a weight on average; {report['bytes']:,} bytes in {report['out']}",
        highlight=False,
        soft_wrap=True,
    )
