"""DNA letters as uint8 tokens: A C G T N and the ten IUPAC codes, complemented by one table."""

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

LETTERS = "ACGTNRYSWKMBDHV"
"""Token t > 0 is `LETTERS[t - 1]`; token 0 is padding."""

PADDING = 0
NUM_TOKENS = len(LETTERS) + 1
NUM_BASES = 4
"""Tokens 1 to 4 are A C G T; what is above them is ambiguous."""

_COMPLEMENTS = "TGCANYRSWMKVHDB"
_BAD = 255
_PADDING_SIGN = "-"
PROTEIN_LETTERS = b"EFILPQZJOX"
"""Letters of amino acids that no DNA file holds; real proteins have about a third of them."""


class BadCharacterError(ValueError):
    """A character that is no DNA letter, with its position in the text."""

    def __init__(self, character: str, position: int) -> None:
        super().__init__(
            f"{character!r} at position {position:,} is no DNA letter; "
            f"allowed are {LETTERS} and U, upper or lower case"
        )
        self.character = character
        self.position = position
        """Counted from 1."""


def encode(text: str | bytes) -> UInt8[ndarray, "T"]:
    """Turn letters into tokens; lower case counts as upper case and U as T.

    Raises BadCharacterError for the first character that is no DNA letter.
    """
    raw = to_bytes(text)
    encoded = raw.translate(_ENCODE_TABLE)
    position = encoded.find(_BAD)
    if position >= 0:
        character = text[position] if isinstance(text, str) else chr(text[position])
        raise BadCharacterError(character, position + 1)
    return np.frombuffer(bytearray(encoded), dtype=np.uint8)


def decode(tokens: UInt8[ndarray, "T"]) -> str:
    """Turn tokens into upper-case letters; padding reads as `-`."""
    if tokens.size and int(tokens.max()) >= NUM_TOKENS:
        raise ValueError(f"tokens lie in 0..{NUM_TOKENS - 1}; got {int(tokens.max())}")
    return tokens.astype(np.uint8, copy=False).tobytes().translate(_DECODE_TABLE).decode("ascii")


def reverse_complement(tokens: UInt8[ndarray, "T"]) -> UInt8[ndarray, "T"]:
    """Read the other strand: reversed, each letter complemented by the IUPAC table."""
    return np.take(COMPLEMENT, tokens[::-1])


def to_bytes(text: str | bytes) -> bytes:
    """One byte per character, whatever the characters are; `?` for those outside Latin-1."""
    return text.encode("latin-1", errors="replace") if isinstance(text, str) else text


def _encode_table() -> bytes:
    table = bytearray([_BAD] * 256)
    for token, letter in enumerate(LETTERS, start=1):
        table[ord(letter)] = table[ord(letter.lower())] = token
    table[ord("U")] = table[ord("u")] = table[ord("T")]
    return bytes(table)


def _decode_table() -> bytes:
    return (_PADDING_SIGN + LETTERS).encode().ljust(256, b"?")


def _complement_table() -> UInt8[ndarray, "16"]:
    return np.array([PADDING, *(LETTERS.index(c) + 1 for c in _COMPLEMENTS)], dtype=np.uint8)


_ENCODE_TABLE = _encode_table()
_DECODE_TABLE = _decode_table()
COMPLEMENT = _complement_table()
COMPLEMENT.flags.writeable = False
