"""Fit a model's pre-scale: ``python -m lockstep.calibrate MODEL [--sentences FILE] [--output FILE]``.

The samples are the sentences in ``data/calibration.txt`` unless a file with one text per line is given. The result
does not depend on chance: the same sentences give the same file.
"""

from __future__ import annotations

import argparse
import sys
from importlib import resources
from pathlib import Path

from safetensors.numpy import save

from lockstep.checkpoint import BUNDLED
from lockstep.errors import InputError, ModelError
from lockstep.model import PRESCALE_FILE, load
from lockstep.quantise import fit_prescales


def sentences(path: Path | None = None) -> list[str]:
    """The texts in ``path``, one per line, or those that come with the package.

    Raises ``InputError`` for a file that holds none, or that is no text in UTF-8.
    """
    if path is None:
        text = (resources.files("lockstep") / "data" / "calibration.txt").read_text(encoding="utf-8")
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{path} is no text in UTF-8; give a text file for calibration") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise InputError(f"{path} holds no text; give a file with some for calibration")
    return lines


def calibrate(name: str, texts: list[str], output: Path | None = None) -> tuple[Path, dict[str, float]]:
    """Fit the pre-scale of a model and write it; the path, and the migration strength at each point that has one.

    Without ``output`` the file goes where ``load`` looks for it: next to the weights, or for a bundled model into the
    package.
    """
    model = load(name, prescale=None)
    prescales, chosen = fit_prescales(model.float_graph, [{model.input_name: ids} for ids in model.tokenize(texts)])
    if output is None and model.folder is not None:
        data = Path(__file__).parent / "data"
        output = data / f"{name}_prescale.safetensors" if name in BUNDLED else model.folder / PRESCALE_FILE
    assert output is not None, "a model that is loaded by name has a folder"
    strengths = ", ".join(f"{point}={alpha}" for point, alpha in chosen.items())
    output.write_bytes(save(prescales, metadata={"model": name, "alpha": strengths}))
    return output, chosen


def main(arguments: list[str] | None = None) -> int:
    """The command; prints the choice at every point and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lockstep.calibrate", description="Fit a model's pre-scale.")
    parser.add_argument("model", help="a folder, a Hub id in the local cache, or: " + ", ".join(BUNDLED))
    parser.add_argument("--sentences", type=Path, help="a file with one sample text per line")
    parser.add_argument("--output", type=Path, help="where to write the pre-scale")
    given = parser.parse_args(arguments)
    try:
        output, chosen = calibrate(given.model, sentences(given.sentences), given.output)
    except (ModelError, OSError) as error:
        sentence = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
        print(f"error: {sentence}", file=sys.stderr)
        return 2
    for name, alpha in chosen.items():
        print(f"alpha {alpha:.2f}  {name}")
    print(f"{len(chosen)} pre-scales written to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
