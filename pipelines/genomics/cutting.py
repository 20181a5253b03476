"""Windows cut out of packed bases, many at a time: unpacked, turned, with letters but A C G T."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64, UInt8
from numpy import ndarray
from numpy.lib.stride_tricks import sliding_window_view

from pipelines.genomics.alphabet import COMPLEMENT, NUM_BASES
from pipelines.genomics.packing import PER_BYTE, unpack

_LONG = 2_048
"""Bases of a window from which on it is copied by itself."""

_OPPOSITE = np.uint8(NUM_BASES + 1)
"""A C G T are 1 to 4: a base and its complement sum up to this."""

_Column = Int64[ndarray, " R"]


@dataclass(frozen=True, slots=True, eq=False)
class Stretches:
    """Windows on the flat axis, laid end to end in a batch."""

    first: Int64[ndarray, " S"]
    lengths: Int64[ndarray, " S"]
    flipped: Bool[ndarray, " S"]

    @property
    def begins(self) -> Int64[ndarray, " S"]:
        """Where each begins in the batch."""
        return np.cumsum(self.lengths) - self.lengths

    def locate(
        self, runs: Int64[ndarray, "K 2"]
    ) -> tuple[
        Int64[ndarray, " R"], Int64[ndarray, " R"], Int64[ndarray, " R"], Int64[ndarray, " R"]
    ]:
        """Find runs (ascending) in the windows: number of the run, of the window, start and end.

        Start and end are places in the batch, of what lies within the window, turned with it.
        """
        low = np.searchsorted(runs[:, 1], self.first, side="right")
        high = np.searchsorted(runs[:, 0], self.first + self.lengths, side="left")
        counts = np.maximum(high - low, 0)
        window = np.repeat(np.arange(counts.size), counts)
        run = np.arange(window.size) + np.repeat(low - (np.cumsum(counts) - counts), counts)
        length = self.lengths[window]
        start = np.maximum(runs[run, 0] - self.first[window], 0)
        end = np.minimum(runs[run, 1] - self.first[window], length)
        turned = self.flipped[window]
        start, end = np.where(turned, length - end, start), np.where(turned, length - start, end)
        begin = self.begins[window]
        return run, window, begin + start, begin + end


def unpack_windows(
    packed: UInt8[ndarray, "P"],
    at: Int64[ndarray, " S"],
    windows: Stretches,
    out: UInt8[ndarray, " T"],
) -> None:
    """Unpack windows that begin at the bases `at` of `packed`, flipped ones complemented backwards.

    Short windows of one length are unpacked at once.
    """
    length = int(windows.lengths[0])
    width = length // PER_BYTE + 2  # whatever base of a byte the first one is
    if length < _LONG and width <= packed.size and (windows.lengths == length).all():
        byte = np.minimum(at // PER_BYTE, packed.size - width)
        lead = at - byte * PER_BYTE
        tokens = unpack(sliding_window_view(packed, width)[byte].ravel()).reshape(at.size, -1)
        rows = out.reshape(-1, length)
        for skip in np.unique(lead).tolist():
            of = lead == skip
            rows[of] = tokens[of, skip : skip + length]
        rows[windows.flipped] = _OPPOSITE - rows[windows.flipped, ::-1]
        return
    starts = windows.begins.tolist()
    columns = (starts, windows.lengths.tolist(), at.tolist(), windows.flipped.tolist())
    for start, count, base, flipped in zip(*columns, strict=True):
        byte, skip = divmod(base, PER_BYTE)
        tokens = unpack(packed[byte : -(-(base + count) // PER_BYTE)])[skip : skip + count]
        if flipped:
            np.subtract(_OPPOSITE, tokens[::-1], out=out[start : start + count])
        else:
            out[start : start + count] = tokens


def paint(
    out: UInt8[ndarray, " T"],
    windows: Stretches,
    runs: Int64[ndarray, "K 2"],
    letters: UInt8[ndarray, " K"],
) -> None:
    """Write the letters that are not A C G T, complemented where their window is flipped."""
    if not len(runs):
        return
    run, window, start, end = windows.locate(runs)
    tokens = letters[run]
    tokens = np.where(windows.flipped[window], COMPLEMENT[tokens], tokens)
    for low, high, token in zip(start.tolist(), end.tolist(), tokens.tolist(), strict=True):
        out[low:high] = token


def mark(out: UInt8[ndarray, " T"], windows: Stretches, runs: Int64[ndarray, "K 2"]) -> None:
    """Write 1 within runs and 0 elsewhere."""
    out[:] = 0
    _, _, start, end = windows.locate(runs)
    for low, high in zip(start.tolist(), end.tolist(), strict=True):
        out[low:high] = 1
