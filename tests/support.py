"""What several test modules use: bit-exact comparison, and values that provoke differences."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

DATA = Path(__file__).parent / "data"


def assert_same_bits(actual: npt.ArrayLike, expected: npt.ArrayLike, **inputs: npt.ArrayLike) -> None:
    """Fail unless both arrays have the same shape, dtype and bits; NaN equals NaN.

    The message names the first difference by its coordinates, with the ``inputs`` of the same shape at that place.
    """
    a, e = np.asarray(actual), np.asarray(expected)
    assert (a.shape, a.dtype) == (e.shape, e.dtype), f"{a.dtype}{list(a.shape)} is not {e.dtype}{list(e.shape)}"
    word = f"u{a.dtype.itemsize}"
    differs = np.ascontiguousarray(a).view(word).reshape(a.shape) != np.ascontiguousarray(e).view(word).reshape(e.shape)
    if a.dtype.kind == "f":
        differs &= ~(np.isnan(a) & np.isnan(e))
    if not differs.any():
        return
    at = tuple(int(i) for i in np.argwhere(differs)[0])
    here = "".join(f", {name} = {np.asarray(x)[at]!r}" for name, x in inputs.items())
    raise AssertionError(
        f"{int(differs.sum())} of {a.size} differ, the first at {list(at)}: {_show(a[at])} is not {_show(e[at])}{here}"
    )


def _show(value: np.generic) -> str:
    return f"{value!r} (0x{int.from_bytes(value.tobytes(), 'little'):0{2 * value.itemsize}x})"


_MAGNITUDES = [0, 1e-45, 1e-40, 1.1754942e-38, 2**-126, 1.5 * 2**-126, 2**-125, 0.5, 1, 1.5, 2, 2.5, 127, 127.5, 2**21]
_MAGNITUDES += [2**22 - 0.5, 2**22, 2**23, 32000, 32001, 1e30, 2**127, 3.4028235e38, np.inf]

#: Zeros, subnormals, the edges of the exponent range, halves, powers of two, infinities and NaNs of both signs.
SPECIALS = np.concatenate(
    [
        np.array(_MAGNITUDES, np.float32),
        -np.array(_MAGNITUDES, np.float32),
        np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32),
    ]
)


def adversarial_floats(count: int, seed: int) -> npt.NDArray[np.float32]:
    """float32[count]: the specials, random bit patterns, and as many values of ordinary size."""
    rng = np.random.default_rng(seed)
    patterns = rng.integers(0, 2**32, count // 2, dtype=np.uint32).view(np.float32)
    ordinary = (rng.normal(size=count - len(patterns)) * 2.0 ** rng.integers(-8, 6, count - len(patterns))).astype(
        np.float32
    )
    values = np.concatenate([patterns, ordinary])
    values[: len(SPECIALS)] = SPECIALS
    return values
