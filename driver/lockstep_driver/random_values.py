"""Random data: floats of every kind, and operands."""

from __future__ import annotations

import numpy as np
from lockstep_isa.config import CoreConfig
from numpy.typing import NDArray


def random_floats(rng: np.random.Generator, count: int) -> NDArray[np.float32]:
    """Mostly ordinary values; some tiny, huge, zero, infinite, NaN and subnormal."""
    kind = rng.random(count)
    values = rng.normal(0, 1, count) * np.exp2(rng.integers(-6, 7, count))
    values = np.where(kind < 0.02, values * 2.0**-120, values)
    values = np.where((kind >= 0.02) & (kind < 0.04), values * 2.0**118, values)
    floats = values.astype(np.float32)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-42, 2.0**-126, 1.0], np.float32)
    chosen = kind > 0.99
    floats[chosen] = rng.choice(special, int(chosen.sum()))
    return floats


def random_operands(rng: np.random.Generator, config: CoreConfig, words: int) -> NDArray[np.int8]:
    """``words`` words of ACTIVATION, int8[words, R]: any values, and runs of zeros where the core looks for them."""
    data = rng.integers(-128, 128, (words, config.rows)).astype(np.int8)
    if config.zero_skipping:
        begin = 0
        while (begin := begin + int(rng.integers(0, 5 * config.rows))) < words:
            end = begin + int(rng.integers(1, 6 * config.rows))
            data[begin:end] = 0
            begin = end
    return data
