"""Which sequences share words of k bases, on either strand; clusters of those that share many."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Int32, Int64, UInt8, UInt64
from numpy import ndarray
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components

from pipelines.genomics.alphabet import NUM_BASES, PADDING
from pipelines.genomics.progress import BaseCount, track
from pipelines.genomics.store import SequenceStore

LEAK_K = 50
"""Words so long are not shared by chance."""
CLUSTER_K = 21
CLUSTER_SHARE = 0.3
MAX_K = 62

_EXACT_K = 31
_STRETCH = 1 << 17
"""Bases hashed at a time, so that the codes stay in the processor's cache."""
_JOINED = 1 << 20
_CLUSTER_WORDS = 8_000_000
"""Words that clusters are made of at most, about; of more, a sample."""
_SAMPLE_PER_RECORD = 200
_BLOCK_PAIRS = 20_000_000
_MAX_HOLDERS = 4_096


@dataclass(frozen=True, slots=True, eq=False)
class Words:
    """The words of some sequences, as often as they occur; sequences ascend."""

    hashes: UInt64[ndarray, "V"]
    owners: Int32[ndarray, "V"]
    """The sequence of each word, counted from 0."""


def hash_words(tokens: UInt8[ndarray, "T"], k: int) -> UInt64[ndarray, "V"]:
    """Number each word of k unambiguous bases, in their order; its reverse complement is alike.

    Up to k = 31 equal numbers mean equal words: the smaller one of both strands' 2-bit codes, mixed
    by a bijection. From 32 to 62 the codes of the first and the last bases of a word are mixed into
    64 bits, the smaller one of both strands counts, and two unequal words have one number with a
    probability of 2**-63 at most: n words and m others share about n * m / 2**63 by mistake, which
    is 0.0003 between two sets of 50 million words.
    """
    return _hash_with_places(tokens, k)[0]


def collect_words(
    store: SequenceStore,
    records: Sequence[int] | Int64[ndarray, "S"],
    k: int,
    *,
    sampled: int = 1,
    progress: str | None = None,
) -> Words:
    """Collect the words of records; `progress` is the title of a bar.

    With `sampled` = s a word is kept where its number lies in the lowest s-th part of all numbers,
    the same words in all sequences, so that shares stay what they are on average (FracMinHash,
    Irber et al. 2022).
    """
    chosen = np.asarray(records, dtype=np.int64)
    total = int(store.lengths[chosen].sum())
    hashes, owners = np.empty(total, np.uint64), np.empty(total, np.int32)
    size = 0
    with BaseCount(progress, total) as bar:
        for found, owner, bases in _hash_records(store, chosen, k):
            found, owner = _sample(found, owner, sampled)
            hashes[size : size + found.size] = found
            owners[size : size + found.size] = owner
            size += found.size
            bar.add(bases)
    return Words(hashes[:size], owners[:size])


def shared_words(
    store: SequenceStore,
    records: Sequence[int] | Int64[ndarray, "S"],
    known: UInt64[ndarray, "V"],
    k: int,
    *,
    sampled: int = 1,
    progress: str | None = None,
) -> tuple[Int64[ndarray, "S"], Int64[ndarray, "S"]]:
    """Count each record's words, and those of them among `known` (ascending) words.

    With `sampled`, as in `collect_words`, only the words of the sample count.
    """
    chosen = np.asarray(records, dtype=np.int64)
    words, shared = np.zeros(chosen.size, np.int64), np.zeros(chosen.size, np.int64)
    total = int(store.lengths[chosen].sum())
    with BaseCount(progress, total) as bar:
        for found, owner, bases in _hash_records(store, chosen, k):
            found, owner = _sample(found, owner, sampled)
            order = np.argsort(found)  # neighbours are looked up in neighbouring places
            near = np.searchsorted(known, found[order]).clip(max=max(known.size - 1, 0))
            hit = known[near] == found[order] if known.size else np.zeros(found.size, np.bool_)
            words += np.bincount(owner, minlength=chosen.size)
            shared += np.bincount(owner[order[hit]], minlength=chosen.size)
            bar.add(bases)
    return words, shared


def cluster_records(
    store: SequenceStore,
    records: Sequence[int] | Int64[ndarray, "S"],
    *,
    k: int = CLUSTER_K,
    share: float = CLUSTER_SHARE,
    progress: bool = False,
) -> Int64[ndarray, "S"]:
    """Number each record's cluster: records are linked, over others too, by the words they share.

    Two are linked if they share at least `share` of the distinct words (either strand) of the one
    that has fewer. Records without words are clusters of their own, unless they are the same bases.
    Words of more than 4,096 records link none (adapters, low complexity). Of more than 8 million
    words a sample is taken, but at least some 200 of a record of median length.
    """
    chosen = np.asarray(records, dtype=np.int64)
    sampled = choose_sampling(store.lengths[chosen])
    title = "words" if progress else None
    words = collect_words(store, chosen, k, sampled=sampled, progress=title)
    held = _incidence(words, chosen.size)
    sizes = np.asarray(held.sum(axis=1)).ravel()
    holders = np.asarray(held.sum(axis=0)).ravel()
    held = csr_array(held[:, (holders > 1) & (holders <= _MAX_HOLDERS)])
    links = [_same_bases(store, chosen)]
    links += list(_linked_pairs(held, sizes, share, progress=progress))
    one, two = np.concatenate(links, axis=1)
    graph = coo_array((np.ones(one.size, np.int8), (one, two)), shape=(chosen.size, chosen.size))
    return np.asarray(connected_components(graph, directed=False)[1], dtype=np.int64)


def choose_sampling(lengths: Int64[ndarray, "S"], most: int = _CLUSTER_WORDS) -> int:
    """Choose s, so that one word in s leaves about `most`, and 200 of a record of median length."""
    if lengths.size == 0:
        return 1
    wanted = -(-int(lengths.sum()) // most)
    return int(max(1, min(wanted, np.median(lengths) // _SAMPLE_PER_RECORD)))


def _hash_with_places(
    tokens: UInt8[ndarray, "T"], k: int
) -> tuple[UInt64[ndarray, "V"], Int64[ndarray, "V"]]:
    if not 1 <= k <= MAX_K:
        raise ValueError(f"k lies in 1..{MAX_K}; got {k=}")
    hashes, places = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for start in range(0, max(tokens.size - k + 1, 0), _STRETCH):
        found, at = _hash_stretch(tokens[start : start + _STRETCH + k - 1], k)
        hashes.append(found)
        places.append(at + start)
    return np.concatenate(hashes), np.concatenate(places)


def _hash_stretch(
    tokens: UInt8[ndarray, "T"], k: int
) -> tuple[UInt64[ndarray, "V"], Int64[ndarray, "V"]]:
    bases = tokens - np.uint8(1)  # padding wraps to 255: ambiguous too
    ambiguous = bases >= NUM_BASES
    bases[ambiguous] = 0
    half = k if k <= _EXACT_K else (k + 1) // 2
    forward, backward = _codes(bases.astype(np.uint64), half)
    if k <= _EXACT_K:
        hashes = _mix(np.minimum(forward, backward))
    else:
        last = k - half
        hashes = np.minimum(
            _mix(_mix(forward[:-last].copy()) + forward[last:]),
            _mix(_mix(backward[last:].copy()) + backward[:-last]),
        )
        _mix(hashes)  # the smaller of two is small: a sample would have too many
    if not ambiguous.any():
        return hashes, np.arange(hashes.size)
    seen = np.concatenate([[0], np.cumsum(ambiguous)])
    places = np.flatnonzero(seen[k:] == seen[:-k])
    return hashes[places], places


def _codes(
    bases: UInt64[ndarray, "T"], length: int
) -> tuple[UInt64[ndarray, "V"], UInt64[ndarray, "V"]]:
    """2-bit codes of the words at each place, and of their reverse complements, by doubling."""
    power = (bases, np.uint64(NUM_BASES - 1) - bases, 1)
    whole = None
    while True:
        if length & power[2]:
            whole = power if whole is None else _join_codes(whole, power)
        if power[2] * 2 > length:
            assert whole is not None, "length has a bit"
            return whole[0], whole[1]
        power = _join_codes(power, power)


_Codes = tuple[UInt64[ndarray, "V"], UInt64[ndarray, "V"], int]


def _join_codes(left: _Codes, right: _Codes) -> _Codes:
    """Codes of words whose first part `left` codes and whose second part `right` does."""
    (forward, backward, a), (next_forward, next_backward, b) = left, right
    count = next_forward.size - a
    joined = forward[:count] << np.uint64(2 * b)
    joined |= next_forward[a:]
    reverse = next_backward[a:] << np.uint64(2 * a)
    reverse |= backward[:count]
    return joined, reverse, a + b


def _mix(x: UInt64[ndarray, "V"]) -> UInt64[ndarray, "V"]:
    """Mix 64 bits in place, one to one (the finaliser of SplitMix64, Steele et al. 2014)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x ^= x >> np.uint64(shift)
        x *= np.uint64(factor)
    x ^= x >> np.uint64(31)
    return x


def _hash_records(
    store: SequenceStore, records: Int64[ndarray, "S"], k: int
) -> Iterator[tuple[UInt64[ndarray, "V"], Int64[ndarray, "V"], int]]:
    """Hash many records at a time: their words, whose each is, and how many bases these were."""
    parts: list[ndarray] = []
    first, size = 0, 0
    gap = np.array([PADDING], dtype=np.uint8)  # no word reaches over it
    for place, record in enumerate(records.tolist()):
        parts += [store.read(record), gap]
        size += parts[-2].size
        if size >= _JOINED or place + 1 == records.size:
            hashes, places = _hash_with_places(np.concatenate(parts), k)
            ends = np.cumsum([part.size + 1 for part in parts[::2]])
            counts = np.diff(np.searchsorted(places, ends), prepend=0)
            yield hashes, np.repeat(np.arange(first, place + 1), counts), size
            parts, first, size = [], place + 1, 0


def _sample(
    hashes: UInt64[ndarray, "V"], owners: Int64[ndarray, "V"], sampled: int
) -> tuple[UInt64[ndarray, "U"], Int64[ndarray, "U"]]:
    if sampled == 1:
        return hashes, owners
    low = hashes <= np.uint64((2**64 - 1) // sampled)
    return hashes[low], owners[low]


def _incidence(words: Words, num_sequences: int) -> csr_array:
    """Which sequence has which word, each once."""
    known, column = np.unique(words.hashes, return_inverse=True)
    shape = (num_sequences, max(known.size, 1))
    held = csr_array((np.ones(column.size, np.int32), (words.owners, column)), shape=shape)
    held.sum_duplicates()
    held.data[:] = 1
    return held


def _linked_pairs(
    held: csr_array, sizes: Int64[ndarray, "S"], share: float, *, progress: bool
) -> Iterator[Int64[ndarray, "2 E"]]:
    transposed = csr_array(held.T)
    holders = np.diff(transposed.indptr)
    cost = np.zeros(held.shape[0], dtype=np.int64)
    np.add.at(
        cost, np.repeat(np.arange(held.shape[0]), np.diff(held.indptr)), holders[held.indices]
    )
    block = np.cumsum(cost) // _BLOCK_PAIRS
    bounds = np.searchsorted(block, np.arange(int(block.max(initial=0)) + 2))
    spans = [(a, b) for a, b in pairwise(bounds.tolist()) if a < b]
    blocks: Iterable[tuple[int, int]] = spans
    if progress:
        blocks = track(spans, total=len(spans), label="pairs", unit="blocks of records")
    for start, end in blocks:
        shared = coo_array(held[start:end] @ transposed)
        one, two = shared.row + start, shared.col
        enough = shared.data >= share * np.minimum(sizes[one], sizes[two])
        linked = enough & (one < two)
        yield np.stack([one[linked], two[linked]]).astype(np.int64)


def _same_bases(store: SequenceStore, records: Int64[ndarray, "S"]) -> Int64[ndarray, "2 E"]:
    from pipelines.genomics.duplicates import find_copies

    pairs = [(copies[0], other) for copies in find_copies(store, records) for other in copies[1:]]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2).T
