"""Four bases to a byte: A C G T as 0 to 3, the first base in the lowest bits.

What is none of the four gets some base, and its true letter in a list of runs beside (as UCSC's
2bit files do it). Both directions are arithmetic on whole arrays, in pieces that fit a cache.
"""

import numpy as np
from jaxtyping import Int64, UInt8, UInt32
from numpy import ndarray

PER_BYTE = 4
_PIECE = 1 << 18
"""Bases handled at once."""
_WORD = np.dtype("<u4")


def pack(letters: UInt8[ndarray, "T"]) -> UInt8[ndarray, "P"]:
    """Pack ASCII letters, P = ceil(T / 4); U counts as T, case does not matter.

    Bits 1 and 2 of A C T G (U) are 0 1 2 3 in this order; taking each modulo its own upper bit
    gives the order A C G T. Multiplying a word of four then moves them into its highest byte.
    """
    packed = np.empty(-(-letters.size // PER_BYTE), dtype=np.uint8)
    whole = letters.size // PER_BYTE * PER_BYTE
    for start in range(0, whole, _PIECE):
        words = letters[start : min(start + _PIECE, whole)].view(_WORD)
        packed[start // PER_BYTE :][: words.size] = _pack_words(words)
    if whole < letters.size:
        last = np.full(PER_BYTE, ord("A"), dtype=np.uint8)
        last[: letters.size - whole] = letters[whole:]
        packed[-1:] = _pack_words(last.view(_WORD))
    return packed


def unpack(packed: UInt8[ndarray, "P"]) -> UInt8[ndarray, "4*P"]:
    """Unpack into tokens 1 to 4 (A C G T)."""
    words = np.empty(packed.size, dtype=_WORD)
    for start in range(0, packed.size, _PIECE // PER_BYTE):
        piece = words[start : start + _PIECE // PER_BYTE]
        piece[:] = packed[start : start + piece.size]
        shifted = piece << np.uint32(12)
        piece |= shifted
        piece &= np.uint32(0x000F000F)
        np.left_shift(piece, np.uint32(6), out=shifted)
        piece |= shifted
        piece &= np.uint32(0x03030303)
        piece += np.uint32(0x01010101)
    return words.view(np.uint8)


def count_gc(packed: UInt8[ndarray, "P"], starts: Int64[ndarray, "R"]) -> UInt32[ndarray, "R"]:
    """Count G and C in stretches of packed bases; `starts` ascend, and each ends at the next."""
    either = (packed ^ (packed >> 1)) & 0b01010101  # C is 1 and G is 2: one of the bits is set
    return np.add.reduceat(np.bitwise_count(either), starts, dtype=np.uint32)


def find_runs(values: ndarray) -> Int64[ndarray, "R 2"]:
    """Find the runs of equal values: half-open ranges that cover all of `values`."""
    changes = np.flatnonzero(values[1:] != values[:-1]) + 1
    bounds = np.concatenate(([0], changes, [values.size])) if values.size else np.zeros(1, int)
    return np.stack([bounds[:-1], bounds[1:]], axis=1).astype(np.int64)


def _pack_words(words: ndarray) -> ndarray:
    codes = (words >> np.uint32(1)) & np.uint32(0x03030303)
    codes ^= (codes >> np.uint32(1)) & np.uint32(0x01010101)
    codes *= np.uint32(1 << 24 | 1 << 18 | 1 << 12 | 1 << 6)
    codes >>= np.uint32(24)
    return codes
