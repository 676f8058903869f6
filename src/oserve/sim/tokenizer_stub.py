"""What an emulated engine says: tokens that follow from the tokens before them, as greedy ones do.

A continuation whose prompt holds the tokens generated so far therefore says what an undisturbed
answer would have said.
"""

import zlib
from collections.abc import Sequence
from typing import Protocol

_FIRST = 1000
_WORDS = 900
_CALM = ("a", "b", "ab", " the", " end", "\n", " STOP", "x y", ".", " é", "ST", "OP")
_SPLIT = ("ö", "日", "🙂", "本 ")


class TokenizerStub(Protocol):
    """``following`` draws by ``draw`` where it is not ``None``; else the context alone decides."""

    def encode(self, text: str) -> list[int]: ...

    def following(self, context: Sequence[int], draw: int | None) -> int: ...

    def piece(self, token: int) -> bytes: ...


class CountingTokenizer:
    """The n-th token is `` tn``."""

    def encode(self, text: str) -> list[int]:
        return [1 + zlib.crc32(word.encode()) % _WORDS for word in text.split()]

    def following(self, context: Sequence[int], draw: int | None) -> int:
        del draw
        last = context[-1] if context else 0
        return last + 1 if last > _FIRST else _FIRST + 1

    def piece(self, token: int) -> bytes:
        return b" t%d" % (token - _FIRST) if token > _FIRST else b" w%d" % token


class BabblingTokenizer:
    """Pieces of text that look random; some characters take two tokens."""

    def __init__(self) -> None:
        whole = [text.encode() for text in _CALM]
        split = [text.encode() for text in _SPLIT]
        self._pieces = [*whole, *(data[:1] for data in split), *(data[1:] for data in split)]
        self._drawn = len(whole) + len(split)
        self._begins = range(len(whole), self._drawn)

    def encode(self, text: str) -> list[int]:
        return [zlib.crc32(word.encode()) % len(_CALM) for word in text.split()]

    def following(self, context: Sequence[int], draw: int | None) -> int:
        if context and context[-1] in self._begins:
            return context[-1] + len(_SPLIT)
        told = f"{list(context)} {draw}".encode()
        return zlib.crc32(told) // 7 % self._drawn

    def piece(self, token: int) -> bytes:
        return self._pieces[token % len(self._pieces)]
