"""What the characters of an alignment stand for. Free of torch.

Tokens are the 23 classes of AlphaFold 2's masked-MSA head (Jumper et al. 2021, Suppl. 1.9.9): the 20 amino
acids by one-letter code, X for an unknown one, '-' for a gap, and the mask, which no file holds.
"""

from __future__ import annotations

import numpy as np

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
TOKENS = (*AMINO_ACIDS, "X", "-", "[mask]")
N_TOKENS = len(TOKENS)
UNKNOWN, GAP, MASK = range(len(AMINO_ACIDS), N_TOKENS)

PADDING, INSERTED, ILLEGAL = 253, 254, 255  # what a character can be besides a token
_AMBIGUOUS = {"B": "D", "Z": "E", "U": "C", "J": "X", "O": "X"}  # as AlphaFold 2's data pipeline reads them


def _a3m_codes() -> bytes:
    """What each of the 256 bytes stands for in a row: a token, an insertion, padding, or nothing legal."""
    codes = bytearray([ILLEGAL]) * 256
    for letter in b"abcdefghijklmnopqrstuvwxyz":
        codes[letter] = INSERTED
    codes[ord(".")] = PADDING
    for token, name in enumerate(TOKENS[:MASK]):
        codes[ord(name)] = token
    for name, meaning in _AMBIGUOUS.items():
        codes[ord(name)] = codes[ord(meaning)]
    return bytes(codes)


def _either_case_codes() -> bytes:
    """The same where lower-case letters are residues like the others."""
    codes = bytearray(A3M_CODES)
    for letter in b"abcdefghijklmnopqrstuvwxyz":
        codes[letter] = codes[letter - ord("a") + ord("A")]
    return bytes(codes)


A3M_CODES = _a3m_codes()
EITHER_CASE_CODES = _either_case_codes()


def decoded(text: bytes, codes: bytes) -> np.ndarray:
    """What each character stands for by `A3M_CODES` or `EITHER_CASE_CODES`, uint8 [characters]."""
    return np.frombuffer(text.translate(codes), dtype=np.uint8)
