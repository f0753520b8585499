"""Words that find mistakes in floating-point units."""

import numpy as np

SPECIALS = np.array(
    [
        *(0x00000000, 0x80000000, 0x00000001, 0x807FFFFF, 0x00800000, 0x80800000, 0x00800001, 0x3F800000, 0xBF800000),
        *(0x3F7FFFFF, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC12345, 0x4A800000, 0x4A7FFFFE),
        *(0x46FA0000, 0xC6FA0000, 0x46FA0001, 0x3C800000, 0x3F000000, 0xBF000000),
    ],
    np.uint32,
)


def nasty_words(random, count):
    """uint32[count]: a third any bits, a third of moderate size, the rest special or with short significands."""
    anything = random.integers(0, 2**32, count, np.uint32)
    moderate = (random.standard_normal(count) * 2.0 ** random.integers(-12, 12, count)).astype(np.float32)
    short = anything & np.uint32(0xFFF00000)
    special = SPECIALS[random.integers(0, len(SPECIALS), count)]
    return np.choose(
        random.integers(0, 6, count),
        [anything, anything, moderate.view(np.uint32), moderate.view(np.uint32), short, special],
    )
