"""Tokenizers without a vocabulary file, and greedy decoding without a model.

Each token follows from the tokens before it, as in greedy decoding. So a continuation whose prompt
holds the tokens generated so far equals the rest of the undisturbed answer.
"""

import zlib
from collections.abc import Sequence
from typing import Protocol

_FIRST = 1000
_VOCABULARY = 900
_WHOLE_CHARACTERS = ("a", "b", "ab", " the", " end", "\n", " STOP", "x y", ".", " é", "ST", "OP")
_SPLIT_CHARACTERS = ("ö", "日", "🙂", "本 ")


class TokenizerStub(Protocol):
    """``following`` generates the next token; with a ``seed`` it samples, else it is greedy."""

    def encode(self, text: str) -> list[int]: ...

    def following(self, context: Sequence[int], seed: int | None) -> int: ...

    def piece(self, token: int) -> bytes: ...


class CountingTokenizer:
    """The n-th generated token is `` tn``."""

    def encode(self, text: str) -> list[int]:
        return [1 + zlib.crc32(word.encode()) % _VOCABULARY for word in text.split()]

    def following(self, context: Sequence[int], seed: int | None) -> int:
        del seed
        last = context[-1] if context else 0
        return last + 1 if last > _FIRST else _FIRST + 1

    def piece(self, token: int) -> bytes:
        return b" t%d" % (token - _FIRST) if token > _FIRST else b" w%d" % token


class BabblingTokenizer:
    """Pieces of text that look random; some characters take two tokens."""

    def __init__(self) -> None:
        whole = [text.encode() for text in _WHOLE_CHARACTERS]
        split = [text.encode() for text in _SPLIT_CHARACTERS]
        self._pieces = [*whole, *(data[:1] for data in split), *(data[1:] for data in split)]
        # Second halves only follow first halves.
        self._drawn = len(whole) + len(split)
        self._first_halves = range(len(whole), self._drawn)

    def encode(self, text: str) -> list[int]:
        return [zlib.crc32(word.encode()) % len(_WHOLE_CHARACTERS) for word in text.split()]

    def following(self, context: Sequence[int], seed: int | None) -> int:
        if context and context[-1] in self._first_halves:
            return context[-1] + len(_SPLIT_CHARACTERS)
        key = f"{list(context)} {seed}".encode()
        return zlib.crc32(key) // 7 % self._drawn

    def piece(self, token: int) -> bytes:
        return self._pieces[token % len(self._pieces)]
