"""The arithmetic of Lockstep in NumPy: the normative text that every executor equals bit for bit.

Values are float32, rounded to nearest even after every single operation and flushed to zero: a result whose
magnitude *after rounding*, as if exponents had no lower bound, is under 2**-126 becomes a zero of its sign, and a
subnormal operand reads as one. Every NaN result is 0x7FC00000 here; elsewhere its payload and sign may be anything.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lockstep_isa.tables import FUNCTIONS, TableFunction

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
U8 = npt.NDArray[np.uint8]

#: Strided partial sums of :func:`rowsum`, whatever the number of lanes.
PARTIAL_SUMS = 64
#: Scores (in powers of two) are held inside +-SCORE_LIMIT before :func:`exp2_parts`.
SCORE_LIMIT = np.float32(32000)
#: The exponent that a masked key is given: the least that a score can have.
MASKED_EXPONENT = -32000

_SMALLEST_NORMAL = 2.0**-126
_NAN = np.uint32(0x7FC00000)
_SIGN = np.uint32(0x80000000)
_INFINITY = np.uint32(0x7F800000)
_FRACTION = np.uint32(0x007FFFFF)


def bits(x: npt.ArrayLike) -> npt.NDArray[np.uint32]:
    """The bit patterns of a float32 array."""
    return np.ascontiguousarray(x, np.float32).view(np.uint32).reshape(np.shape(x))


def from_bits(pattern: npt.ArrayLike) -> F32:
    """The float32 array with these bit patterns."""
    return np.ascontiguousarray(pattern, np.uint32).view(np.float32).reshape(np.shape(pattern))


# --- Primitives --------------------------------------------------------------------------------------------------


def flush(x: npt.ArrayLike) -> F32:
    """What a load gives: subnormals become zeros of their sign, NaNs the canonical one."""
    pattern = bits(x)
    magnitude = pattern & ~_SIGN
    pattern = np.where(magnitude <= _FRACTION, pattern & _SIGN, pattern)
    return from_bits(np.where(magnitude > _INFINITY, _NAN, pattern))


def add(a: npt.ArrayLike, b: npt.ArrayLike) -> F32:
    """a + b. A sum in the subnormal range is exact, so flushing afterwards is the whole of tininess."""
    with np.errstate(all="ignore"):
        return flush(flush(a) + flush(b))


def sub(a: npt.ArrayLike, b: npt.ArrayLike) -> F32:
    """a - b."""
    return add(a, -flush(b))


def mul(a: npt.ArrayLike, b: npt.ArrayLike) -> F32:
    """a * b. The product is exact in float64; from 2**-126 - 2**-151 upwards it rounds to a normal number."""
    with np.errstate(all="ignore"):
        product = flush(a).astype(np.float64) * flush(b)
        tiny = np.abs(product) < _SMALLEST_NORMAL - 2.0**-151
        return flush(np.where(tiny, np.copysign(0.0, product), product).astype(np.float32))


def int_to_float(n: npt.ArrayLike) -> F32:
    """int32 to float32, to nearest even."""
    return np.asarray(n, np.int32).astype(np.float32)


def scale2(m: npt.ArrayLike, n: npt.ArrayLike) -> F32:
    """m * 2**n by adding to the exponent field: underflow gives a signed zero, overflow infinity.

    m : float32[...]; zero, infinity and NaN stay what they are.  n : int32[...].
    """
    pattern, shift = np.broadcast_arrays(bits(flush(m)), np.asarray(n, np.int64))
    field = (pattern & _INFINITY) >> 23
    scaled = field + shift
    inside = (pattern & ~_INFINITY) | (np.clip(scaled, 0, 255).astype(np.uint32) << 23)
    result = np.where(scaled <= 0, pattern & _SIGN, np.where(scaled >= 255, pattern & _SIGN | _INFINITY, inside))
    return from_bits(np.where((field == 0) | (field == 255), pattern, result))


def round_to_int(x: npt.ArrayLike) -> I32:
    """RNE(x) where abs(x) < 2**22, elsewhere (and for NaN) 0."""
    x = flush(x)
    with np.errstate(invalid="ignore"):
        return np.where(np.abs(x) < 2**22, np.rint(x), 0).astype(np.int32)


def round_to_int8bits(x: npt.ArrayLike) -> U8:
    """The low 8 bits of RNE(x) where abs(x) < 2**22, elsewhere (and for NaN) 0."""
    return round_to_int(x).astype(np.uint8)


# --- Function tables ---------------------------------------------------------------------------------------------


def split(table: TableFunction, u: npt.ArrayLike) -> tuple[I32, F32]:
    """(I, d) with I = RNE(u * 2**k), 0 for NaN, and d = u - I * 2**-k, which is exact."""
    integer = round_to_int(mul(u, np.float32(2**table.k)))
    return integer, sub(u, int_to_float(integer) * np.float32(2.0**-table.k))


def interpolate(table: TableFunction, u: npt.ArrayLike) -> F32:
    """c0 + d * (c1 + d * c2) at ``u``, which lies inside the table (``exp2`` repeats with period 1)."""
    integer, d = split(table, u)
    inside = integer % table.entries if table.kind == "exp2" else integer - table.base
    index = np.where(np.isnan(d), 0, inside)
    return add(table.c0[index], mul(d, add(table.c1[index], mul(d, table.c2[index]))))


def clamp_score(z: npt.ArrayLike) -> F32:
    """z held inside +-32000; NaN passes."""
    return np.clip(flush(z), -SCORE_LIMIT, SCORE_LIMIT)


def exp2_parts(z: npt.ArrayLike, table: TableFunction = FUNCTIONS["exp2"]) -> tuple[F32, I32]:
    """(m, n) with 2**z = m * 2**n, for z inside +-32000.

    n is the floor of z rounded to 1/32, so that m lies in [0.989, 1.98]. NaN gives m = NaN and n = 0.
    """
    integer, _ = split(table, z)
    return interpolate(table, z), integer >> table.k


def exp2(x: npt.ArrayLike) -> F32:
    """2**x."""
    return scale2(*exp2_parts(clamp_score(x)))


def recip(x: npt.ArrayLike, table: TableFunction = FUNCTIONS["recip"]) -> F32:
    """1 / x. Zeros give a zero of their sign, infinities and NaN give +0: a bad row requantises to 0."""
    pattern = bits(flush(x))
    exponent = ((pattern & _INFINITY) >> 23).astype(np.int32) - 127
    u = from_bits(pattern & _FRACTION | np.uint32(127 << 23))
    y = scale2(interpolate(table, u), -exponent)
    signed = np.where(exponent == -127, pattern & _SIGN, bits(y) | pattern & _SIGN)
    return from_bits(np.where(exponent == 128, np.uint32(0), signed))


def rsqrt(x: npt.ArrayLike, table: TableFunction = FUNCTIONS["rsqrt"]) -> F32:
    """1 / sqrt(x) for finite x > 0, everything else gives +0."""
    pattern = bits(flush(x))
    valid = (pattern - np.uint32(1)) < _INFINITY - np.uint32(1)
    exponent = ((pattern & _INFINITY) >> 23).astype(np.int32) - 127
    odd = exponent & 1
    u = from_bits(pattern & _FRACTION | (127 + odd).astype(np.uint32) << 23)
    return np.where(valid, scale2(interpolate(table, u), -(exponent >> 1)), np.float32(0))


def relu(x: npt.ArrayLike) -> F32:
    """max(x, +0): -0 gives +0, NaN passes."""
    x = flush(x)
    return np.where(x <= 0, np.float32(0), x)


def evaluate(table: TableFunction, x: npt.ArrayLike) -> F32:
    """The elementwise function that ``table`` stands for, at any x: float32[...]."""
    if table.kind in ("exp2", "recip", "rsqrt"):
        return exp2(x) if table.kind == "exp2" else recip(x, table) if table.kind == "recip" else rsqrt(x, table)
    x = flush(x)
    g = interpolate(table, np.minimum(np.abs(x), table.limit))
    if table.kind == "relu_minus":
        return sub(relu(x), g)
    if table.kind == "odd":
        return flush(np.copysign(g, x))
    if table.kind == "sigmoid":
        return np.where(x < 0, sub(np.float32(1), g), g)
    raise ValueError(f"table '{table.name}' has unknown kind '{table.kind}'")


# --- Reductions --------------------------------------------------------------------------------------------------


def rowsum(x: npt.ArrayLike) -> F32:
    """The sum of each row of x: float32[rows, n], as 64 strided partial sums and a tree; never -0."""
    x = flush(x)
    rows, n = x.shape
    padded = np.zeros((rows, -(-n // PARTIAL_SUMS) * PARTIAL_SUMS), np.float32)
    padded[:, :n] = x
    total = np.zeros((rows, PARTIAL_SUMS), np.float32)
    for start in range(0, n, PARTIAL_SUMS):
        total = add(total, padded[:, start : start + PARTIAL_SUMS])
    while total.shape[1] > 1:
        half = total.shape[1] // 2
        total = add(total[:, :half], total[:, half:])
    return add(total[:, 0], np.float32(0))


def order(x: npt.ArrayLike) -> npt.NDArray[np.uint32]:
    """Numbers in the order of the values, as VECTOR selects by them: NaN is the least, and -0 is less than +0."""
    pattern = bits(x)
    number = np.where(pattern & _SIGN, ~pattern, pattern | _SIGN)
    return np.where((pattern & ~_SIGN) > _INFINITY, np.uint32(0), number)


def absmax(x: npt.ArrayLike) -> F32:
    """The largest magnitude of each row of x: float32[rows, n], as an integer maximum over bit patterns.

    NaN is the greatest pattern, infinity the next.
    """
    return from_bits((bits(flush(x)) & ~_SIGN).max(axis=1, initial=0))
