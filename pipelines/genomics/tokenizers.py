"""From bases to token ids, each with the bases that it stands for: base, k-mer and BPE.

A reverse complement is always taken of bases, before they are tokenised: the k-mers or merges of
the other strand are not those of this one.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from jaxtyping import Int64, UInt8
from numpy import ndarray

from pipelines.genomics.alphabet import (
    LETTERS,
    NUM_BASES,
    NUM_TOKENS,
    decode,
    encode,
    reverse_complement,
)
from pipelines.shared.errors import InputError

if TYPE_CHECKING:
    from types import ModuleType

    from tokenizers import Tokenizer as BpeModel

KINDS = ("base", "kmer", "bpe")
MIN_K, MAX_K = 3, 8

_N = NUM_BASES + 1
_FRAGMENT = 4096
"""Bases in one piece of training text: merges do not see beyond it."""
_SPECIAL = ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")
_GAP = "-"


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """Ids of a sequence's tokens; token i stands for its bases [starts[i], ends[i])."""

    ids: Int64[ndarray, "L"]
    starts: Int64[ndarray, "L"]
    ends: Int64[ndarray, "L"]

    def __len__(self) -> int:
        return self.ids.size


class Tokenizer(Protocol):
    """What the data set, the network and a checkpoint ask of a tokenizer.

    Every base lies in some token; `starts` ascend, so a token's coordinate is its first base.
    """

    @property
    def num_tokens(self) -> int:
        """One more than the largest id."""

    @property
    def config(self) -> dict[str, object]:
        """Plain values that `restore_tokenizer` makes the same tokenizer of."""

    def encode(self, bases: UInt8[ndarray, "T"]) -> Tokens:
        """Tokenise bases (tokens of the alphabet)."""

    def decode(self, tokens: Tokens) -> UInt8[ndarray, "T"]:
        """Put the bases together again from ids, starts and ends."""


def digest(tokenizer: Tokenizer) -> str:
    """SHA-256 of everything that decides what a tokenizer makes of bases."""
    text = json.dumps(tokenizer.config, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


class BaseTokenizer:
    """One token a base: its number in the alphabet."""

    num_tokens = NUM_TOKENS

    @property
    def config(self) -> dict[str, object]:
        """Plain values that `restore_tokenizer` makes the same tokenizer of."""
        return {"kind": "base", "letters": LETTERS}

    def encode(self, bases: UInt8[ndarray, "T"]) -> Tokens:
        """Tokenise bases."""
        starts = np.arange(bases.size, dtype=np.int64)
        return Tokens(bases.astype(np.int64), starts, starts + 1)

    def decode(self, tokens: Tokens) -> UInt8[ndarray, "T"]:
        """Put the bases together again."""
        return tokens.ids.astype(np.uint8)


class KmerTokenizer:
    """One token for each word of k bases, at every base (`stride=1`) or end to end (`stride=k`).

    Words are made of A C G T alone. Where none fits, a base is a token of its own, with its number
    in the alphabet: an ambiguous base, a base with fewer than k unambiguous ones before the next
    ambiguous one or the end. End to end, words begin anew after each ambiguous base, so that one N
    shifts no words but those up to the next (Nucleotide Transformer v1 falls back in this way).
    """

    def __init__(self, k: int, *, stride: int) -> None:
        if not MIN_K <= k <= MAX_K:
            raise InputError(f"tokenizer.k lies in {MIN_K} to {MAX_K}; got {k}")
        if stride not in (1, k):
            raise InputError(f"tokenizer.stride is 1 or k={k}; got {stride}")
        self.k, self.stride = k, stride
        self.num_tokens = NUM_TOKENS + NUM_BASES**k

    @property
    def config(self) -> dict[str, object]:
        """Plain values that `restore_tokenizer` makes the same tokenizer of."""
        return {"kind": "kmer", "k": self.k, "stride": self.stride, "letters": LETTERS}

    def encode(self, bases: UInt8[ndarray, "T"]) -> Tokens:
        """Tokenise bases."""
        place = np.arange(bases.size, dtype=np.int64)
        room = _unambiguous_ahead(bases)
        is_word = room >= self.k
        if self.stride == 1:
            starts = place
        else:
            in_run = _place_in_run(bases)
            in_word = (in_run % self.k != 0) & (in_run - in_run % self.k + self.k <= in_run + room)
            starts = place[~in_word]
            is_word = is_word[starts] & (in_run[starts] % self.k == 0)
        ids = bases[starts].astype(np.int64)
        ids[is_word] = NUM_TOKENS + self._numbers(bases, starts[is_word])
        return Tokens(ids, starts, starts + np.where(is_word, self.k, 1))

    def decode(self, tokens: Tokens) -> UInt8[ndarray, "T"]:
        """Put the bases together again."""
        length = int(tokens.ends.max(initial=0))
        bases = np.zeros(length, dtype=np.uint8)
        single = tokens.ids < NUM_TOKENS
        bases[tokens.starts[single]] = tokens.ids[single]
        words, starts = tokens.ids[~single] - NUM_TOKENS, tokens.starts[~single]
        for place in range(self.k):
            bases[starts + place] = words // NUM_BASES ** (self.k - 1 - place) % NUM_BASES + 1
        return bases

    def _numbers(
        self, bases: UInt8[ndarray, "T"], starts: Int64[ndarray, "W"]
    ) -> Int64[ndarray, "W"]:
        numbers = np.zeros(starts.size, dtype=np.int64)
        for place in range(self.k):
            numbers = numbers * NUM_BASES + (bases[starts + place].astype(np.int64) - 1)
        return numbers


class BpeTokenizer:
    """Byte-pair encoding (Sennrich et al. 2016) by Hugging Face's `tokenizers`.

    `text` is the content of a `tokenizer.json`, from `train_bpe` or another tool. Runs of N may be
    one gap token, as in GENA-LM's files; what its rule of replacement leaves stays letters, and a
    letter that the vocabulary lacks is its unknown token. Special tokens are never added.
    """

    def __init__(self, text: str, *, name: str = "tokenizer") -> None:
        self._text, self._name = _normal_json(text, name), name
        self._check()

    @property
    def config(self) -> dict[str, object]:
        """Plain values that `restore_tokenizer` makes the same tokenizer of."""
        return {"kind": "bpe", "json": self._text}

    @cached_property
    def num_tokens(self) -> int:
        """One more than the largest id."""
        return max(self._model.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, bases: UInt8[ndarray, "T"]) -> Tokens:
        """Tokenise bases; raises ValueError if the tokens do not cover them all."""
        text = decode(bases)
        encoding = self._model.encode(text, add_special_tokens=False)
        ids = np.array(encoding.ids, dtype=np.int64)
        # After N runs are replaced, the library's offset of a gap begins at its last N: tokens lie
        # end to end, so each begins where the one before ends.
        ends = np.array([end for _, end in encoding.offsets], dtype=np.int64)
        starts = np.concatenate([[0], ends[:-1]]).astype(np.int64) if ids.size else ends
        if int(ends[-1] if ids.size else 0) != bases.size or (ends <= starts).any():
            raise ValueError(f"{self._name}: tokens do not cover the {bases.size:,} bases")
        return Tokens(ids, starts, ends)

    def decode(self, tokens: Tokens) -> UInt8[ndarray, "T"]:
        """Put the bases together again; gaps are runs of N, and unknown letters become N."""
        spans = zip(tokens.ids.tolist(), (tokens.ends - tokens.starts).tolist(), strict=True)
        pieces = [self._spell(number, length) for number, length in spans]
        return encode("".join(pieces))

    def save(self, path: str | Path) -> None:
        """Write a `tokenizer.json`."""
        self._model.save(str(path), pretty=True)

    def __getstate__(self) -> dict[str, object]:
        return {"_text": self._text, "_name": self._name}

    @cached_property
    def _model(self) -> "BpeModel":
        return _bpe_library().Tokenizer.from_str(self._text)

    @cached_property
    def _letters(self) -> dict[int, str]:
        known = self._model.get_vocab(with_added_tokens=True)
        return {number: word for word, number in known.items() if _is_dna(word)}

    def _spell(self, number: int, length: int) -> str:
        word = self._letters.get(number, "")
        return word if len(word) == length else "N" * length

    def _check(self) -> None:
        """Refuse a file whose tokens are not stretches of DNA letters."""
        if not set("ACGT") <= set(self._letters.values()):
            raise InputError(
                f"{self._name} has no tokens for A, C, G and T; give a tokenizer of DNA letters"
            )
        probe = encode("ACGTTGCAAC" * 3 + "N" * 37 + "GATTACA" + "N" + "CCGG")
        try:
            same = np.array_equal(self.decode(self.encode(probe)), probe)
        except ValueError:
            same = False
        if not same:
            raise InputError(
                f"{self._name} does not keep the letters it is given (it changes, drops or splits "
                "them otherwise); give a BPE tokenizer.json of DNA letters"
            )


def build_tokenizer(
    settings: Mapping[str, object], sequences: Callable[[], Iterable[UInt8[ndarray, "T"]]]
) -> Tokenizer:
    """Make the tokenizer that the settings `tokenizer` ask for.

    BPE is loaded from `file`, or else trained on `sequences()`: give the training records alone.
    Raises InputError for settings that make none, and for a file that is none.
    """
    kind = settings["kind"]
    if kind == "base":
        return BaseTokenizer()
    if kind == "kmer":
        k = _whole(settings, "k")
        stride = k if settings["stride"] == "k" else _whole(settings, "stride")
        return KmerTokenizer(k, stride=stride)
    if kind == "bpe":
        if settings.get("file"):
            return load_bpe(Path(str(settings["file"])))
        return train_bpe(
            sequences(),
            vocab_size=_whole(settings, "vocab_size"),
            max_bases=_whole(settings, "train_bases"),
        )
    raise InputError(f"tokenizer is {', '.join(KINDS)}; got {kind!r}")


def restore_tokenizer(config: Mapping[str, object]) -> Tokenizer:
    """Make a tokenizer of the `config` of another; raises InputError if it is of none."""
    kind = config.get("kind")
    if kind in ("base", "kmer") and config.get("letters") != LETTERS:
        raise InputError(
            f"the tokenizer was made for the letters {config.get('letters')!r}, this installation "
            f"numbers {LETTERS!r}; train again, or use the version that trained it"
        )
    if kind == "base":
        return BaseTokenizer()
    if kind == "kmer":
        return KmerTokenizer(_whole(config, "k"), stride=_whole(config, "stride"))
    if kind == "bpe":
        return BpeTokenizer(str(config["json"]), name="the model's tokenizer")
    raise InputError(f"a tokenizer is {', '.join(KINDS)}; the model's is {kind!r}")


def load_bpe(path: Path) -> BpeTokenizer:
    """Read a `tokenizer.json` of Hugging Face's format; raises InputError for what is none."""
    if not path.is_file():
        raise InputError(f"tokenizer.file={path}: no such file; give a tokenizer.json")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"tokenizer.file={path} cannot be read as UTF-8 text ({error})") from None
    return BpeTokenizer(text, name=f"tokenizer.file={path}")


def train_bpe(
    sequences: Iterable[UInt8[ndarray, "T"]], *, vocab_size: int, max_bases: int
) -> BpeTokenizer:
    """Train BPE on both strands of the first `max_bases` unambiguous bases.

    Merges never cross an ambiguous base, every letter of the alphabet is a token, and ten or more N
    in a row are one gap token. The same bases give the same merges, ties being broken by token
    number. Raises InputError when there is nothing to learn from.
    """
    smallest = len(_SPECIAL) + 1 + len(LETTERS)
    if vocab_size <= smallest:
        raise InputError(f"tokenizer.vocab_size is above {smallest}; got {vocab_size}")
    pieces = list(_fragments(sequences, max_bases))
    if not pieces:
        raise InputError("no unambiguous bases to train tokenizer=bpe on; use tokenizer=base")
    library = _bpe_library()
    model = library.Tokenizer(library.models.BPE(unk_token=_SPECIAL[0]))
    gap = library.normalizers.Replace(library.Regex("N{10,}"), _GAP)
    model.normalizer = library.normalizers.Sequence([gap])
    model.pre_tokenizer = library.pre_tokenizers.Split(_GAP, "isolated")
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*_SPECIAL, _GAP],
        initial_alphabet=list(LETTERS),
        show_progress=False,
    )
    model.train_from_iterator(pieces, trainer)
    return BpeTokenizer(model.to_str(), name="the trained tokenizer")


def _fragments(sequences: Iterable[UInt8[ndarray, "T"]], max_bases: int) -> Iterator[str]:
    left = max_bases
    for bases in sequences:
        for run in re.findall("[ACGT]+", decode(bases)):
            for start in range(0, len(run), _FRAGMENT):
                piece = run[start : start + min(_FRAGMENT, left)]
                if not piece:
                    return
                left -= len(piece)
                yield piece
                yield decode(reverse_complement(encode(piece)))


def _unambiguous_ahead(bases: UInt8[ndarray, "T"]) -> Int64[ndarray, "T"]:
    """Count the unambiguous bases from each base on to the next ambiguous one, or the end."""
    place = np.arange(bases.size, dtype=np.int64)
    stops = np.where(_is_unambiguous(bases), bases.size, place)
    return np.minimum.accumulate(stops[::-1])[::-1] - place


def _place_in_run(bases: UInt8[ndarray, "T"]) -> Int64[ndarray, "T"]:
    """Count the unambiguous bases right before each base."""
    place = np.arange(bases.size, dtype=np.int64)
    before = np.where(_is_unambiguous(bases), -1, place)
    return np.where(before >= 0, 0, place - np.maximum.accumulate(before) - 1)


def _is_unambiguous(bases: UInt8[ndarray, "T"]) -> ndarray:
    return (bases >= 1) & (bases < _N)


def _normal_json(text: str, name: str) -> str:
    """One spelling of a tokenizer file, whatever its line breaks; refuses what is none."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{name} is no JSON (line {error.lineno}: {error.msg}); give a tokenizer.json"
        ) from None
    kind = content.get("model", {}).get("type") if isinstance(content, dict) else None
    if kind != "BPE":
        raise InputError(f"{name} is no BPE tokenizer.json (its model is {kind!r})")
    try:
        return str(_bpe_library().Tokenizer.from_str(text).to_str())
    except Exception as error:  # the library raises plain Exception for a bad file
        raise InputError(f"{name} is damaged: {error}; copy or make it again") from error


def _bpe_library() -> "ModuleType":
    try:
        import tokenizers
    except ImportError:
        raise InputError(
            "tokenizer=bpe needs the extra bpe: pip install 'gigasparse[bpe]'"
        ) from None
    return tokenizers


def _is_dna(word: str) -> bool:
    return bool(word) and set(word) <= set(LETTERS)


def _whole(settings: Mapping[str, object], key: str) -> int:
    value = settings.get(key)
    if type(value) is not int or value < 1:
        raise InputError(f"tokenizer.{key} is a whole number above 0; got {value!r}")
    return value
