"""From hidden states to one vector, as a sentence-transformers folder says, in NumPy float32 with a fixed order of
additions.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lockstep_isa.numerics import rowsum

from lockstep.errors import PoolingError

#: Ways to pool, in the order in which sentence-transformers joins them, with the names that older folders use.
MODES = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}


@dataclass(frozen=True)
class Pooling:
    """How a model makes one vector of a sequence.

    Attributes
    ----------
    modes : names from ``MODES``; the results of several are joined.
    normalise : divide by the Euclidean length at the end.
    max_tokens : longer texts are cut to this many tokens, special ones included; none if the folder does not say.
    lower_case : texts are put in lower case before the tokenizer sees them.
    """

    modes: tuple[str, ...] = ("mean",)
    normalise: bool = False
    max_tokens: int | None = None
    lower_case: bool = False

    def __call__(self, hidden: np.ndarray) -> np.ndarray:
        """``float32[features * len(modes)]`` from ``hidden: float32[tokens, features]`` without padding."""
        hidden = np.asarray(hidden, np.float32)
        vector = np.concatenate([_pool(hidden, mode) for mode in self.modes])
        if not self.normalise:
            return vector
        length = np.sqrt(rowsum((vector * vector)[None, :])[0])
        return vector / np.maximum(length, np.float32(1e-12))


def _pool(hidden: np.ndarray, mode: str) -> np.ndarray:
    if mode == "cls":
        return hidden[0]
    if mode == "lasttoken":
        return hidden[-1]
    if mode == "max":
        return hidden.max(axis=0)
    total = np.zeros(hidden.shape[1], np.float32)
    for row in hidden:  # token by token: the order is part of the result's bits
        total += row
    count = np.float32(len(hidden))
    return total / (count if mode == "mean" else np.sqrt(count))


def read_pooling(folder: Path) -> Pooling:
    """What ``folder`` says in ``modules.json`` and the files it points to; the mean of all tokens if it says nothing.

    Raises
    ------
    PoolingError
        if a file cannot be read, or asks for a module or a mode that is not known.
    """
    settings = _read(folder / "sentence_bert_config.json", {})
    modules = _read(folder / "modules.json", [])
    modes: tuple[str, ...] = ("mean",)
    normalise = False
    for module in modules if isinstance(modules, list) else []:
        kind = str(module.get("type", "")).rsplit(".", 1)[-1]
        if kind == "Pooling":
            modes = _modes(folder / str(module.get("path", "")) / "config.json")
        elif kind == "Normalize":
            normalise = True
        elif kind != "Transformer":
            raise PoolingError(
                f"{folder / 'modules.json'} lists a module {kind!r}; only Transformer, Pooling and Normalize are known"
            )
    return Pooling(modes, normalise, settings.get("max_seq_length"), bool(settings.get("do_lower_case", False)))


def _modes(path: Path) -> tuple[str, ...]:
    config = _read(path, None)
    if not isinstance(config, dict):
        raise PoolingError(f"modules.json asks for pooling but there is no {path}; fetch the file")
    named = config.get("pooling_mode")
    if named is None:
        flags = {flag: mode for mode, flag in MODES.items()}
        on = [name for name, value in config.items() if name.startswith("pooling_mode_") and value]
        unknown = [name for name in on if name not in flags]
        modes = unknown or [mode for mode, flag in MODES.items() if flag in on] or ["mean"]
    else:
        modes = [named] if isinstance(named, str) else list(named)
    for mode in modes:
        if mode not in MODES:
            raise PoolingError(f"{path} asks for the pooling {mode!r}; known are {', '.join(MODES)}")
    return tuple(modes)


def _read(path: Path, default: Any) -> Any:
    if not path.is_file():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        raise PoolingError(f"{path} is not readable JSON; fetch the file again") from None
