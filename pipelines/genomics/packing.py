"""Four bases to a byte: A C G T as 0 to 3, the first base in the lowest bits.

What is none of the four gets some base, and its true letter in a list of runs beside (as UCSC's
2bit files do it). Both directions are arithmetic on whole arrays, in pieces that fit a cache.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Int64, UInt8
from numpy import ndarray

PER_BYTE = 4
WORD_BASES = 32
"""Bases to the words by which `count_bases` counts."""

_PIECE = 1 << 20
"""Bases handled at once: few enough for a cache, and many, as threads wait between two steps."""
_RUNS_PIECE = 1 << 24
_WORD = np.dtype("<u4")
_U32 = np.uint32
_GATHER = _U32(1 << 24 | 1 << 18 | 1 << 12 | 1 << 6)
"""Moves the codes of four bytes into the highest one."""
_LOW_BITS = np.uint64(0x5555555555555555)


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


def pack_plain(letters: UInt8[ndarray, "T"]) -> UInt8[ndarray, "P"] | None:
    """Pack letters as `pack` does; None where one is not A, C, G or T in upper case.

    T is a multiple of 4. Bit 3 is set in none of the four, so that bits 1 and 2, each modulo the
    bit above it, are the code. Without them A C G are 0x41 and T is 0x50: 0x41 once 0x11 is flipped
    where the code is 3.
    """
    words = letters.view(_WORD)
    packed = np.empty(words.size, dtype=np.uint8)
    size = min(_PIECE // PER_BYTE, words.size)
    scratch = np.empty((2, size), dtype=_WORD)
    for start in range(0, words.size, size or 1):
        piece = words[start : start + size]
        codes, rest = scratch[:, : piece.size]
        np.right_shift(piece, _U32(1), out=codes)
        np.right_shift(piece, _U32(2), out=rest)
        np.bitwise_xor(codes, rest, out=codes)
        np.bitwise_and(codes, _each(0x03), out=codes)
        np.bitwise_and(rest, codes, out=rest)
        np.multiply(rest, _U32(0x11), out=rest)
        np.bitwise_xor(rest, piece, out=rest)
        np.bitwise_and(rest, _each(0xF9), out=rest)
        if (rest != _each(0x41)).any():
            return None
        np.multiply(codes, _GATHER, out=codes)
        np.right_shift(codes, _U32(24), out=packed[start : start + piece.size], casting="unsafe")
    return packed


def count_bases(
    packed: UInt8[ndarray, "P"], starts: Int64[ndarray, "R"], lengths: Int64[ndarray, "R"]
) -> Int64[ndarray, "R 4"]:
    """Count A C G T in stretches of packed bases, each filled up with A.

    Stretches follow one another; each begins at a word of 32 bases, and `starts` counts these.
    """
    words = packed.view("<u8")
    first, second = words & _LOW_BITS, (words >> np.uint64(1)) & _LOW_BITS
    c_t, g_t, t = (
        np.add.reduceat(np.bitwise_count(bits), starts, dtype=np.int64)
        for bits in (first, second, first & second)
    )
    return np.stack([lengths - c_t - g_t + t, c_t - t, g_t - t, t], axis=1)


def find_runs(values: ndarray) -> Int64[ndarray, "R 2"]:
    """Find the runs of equal values: half-open ranges that cover all of `values`."""
    changes = np.flatnonzero(values[1:] != values[:-1]) + 1
    bounds = np.concatenate(([0], changes, [values.size])) if values.size else np.zeros(1, int)
    return np.stack([bounds[:-1], bounds[1:]], axis=1).astype(np.int64)


def find_runs_of(
    letters: UInt8[ndarray, "T"], values_of: Callable[[UInt8[ndarray, "T"]], UInt8[ndarray, "T"]]
) -> tuple[Int64[ndarray, "K 2"], UInt8[ndarray, "K"]]:
    """Find the runs where `values_of` the letters is not 0, and their values.

    Works through a chromosome piece by piece: its values are never there as a whole.
    """
    bounds, found = [np.empty((0, 2), dtype=np.int64)], [np.empty(0, dtype=np.uint8)]
    for start in range(0, letters.size, _RUNS_PIECE):
        values = values_of(letters[start : start + _RUNS_PIECE])
        runs = find_runs(values)
        kept = values[runs[:, 0]]
        bounds.append(runs[kept > 0] + start)
        found.append(kept[kept > 0])
    runs, kept = np.concatenate(bounds), np.concatenate(found)
    joined = (runs[1:, 0] == runs[:-1, 1]) & (kept[1:] == kept[:-1])  # where pieces meet
    first, last = (np.insert(~joined, place, True) for place in (0, joined.size))
    if not runs.size:
        return runs, kept
    return np.stack([runs[first, 0], runs[last, 1]], axis=1), kept[first]


def _pack_words(words: ndarray) -> ndarray:
    codes = (words >> np.uint32(1)) & np.uint32(0x03030303)
    codes ^= (codes >> np.uint32(1)) & np.uint32(0x01010101)
    codes *= _GATHER
    codes >>= np.uint32(24)
    return codes


def _each(value: int) -> np.uint32:
    """A word of four equal bytes."""
    return _U32(0x01010101 * value)
