"""One answer of an emulated engine, token by token, with vLLM's rules for text.

Characters come out whole; text that may become a stop string is held back; a prompt that ends
within a character is, as by vLLM's detokeniser, said again.
"""

import itertools
from collections.abc import Sequence
from typing import Any

from oserve.sim.tokenizer_stub import TokenizerStub

_drawn = itertools.count()


class GeneratedText:
    """``text`` so far is what the client may see in the end; ``tokens`` are those generated."""

    def __init__(
        self, tokenizer: TokenizerStub, body: dict[str, Any], prompt: Sequence[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._context = list(prompt)
        stop = body.get("stop") or []
        self._stop: list[str] = [stop] if isinstance(stop, str) else stop
        self._stop_tokens = set(body.get("stop_token_ids") or [])
        self._included = bool(body.get("include_stop_str_in_output"))
        self._least = int(body.get("min_tokens") or 0)
        longest = max((len(item) for item in self._stop), default=0)
        self._held = 0 if self._included else max(0, longest - 1)
        self._draw: int | None = None
        if body.get("temperature"):
            self._draw = body.get("seed") or next(_drawn)
        self._bytes = self._unfinished()
        self._shown = 0
        self.tokens: list[int] = []
        self.text = ""
        self.stop_reason: str | int | None = None

    def _unfinished(self) -> bytes:
        pieces = [self._tokenizer.piece(token) for token in self._context[-1:]]
        try:
            b"".join(pieces).decode()
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":
                return b"".join(self._tokenizer.piece(token) for token in self._context)
        return b""

    def say(self, limit: int) -> tuple[str, str | None]:
        """The next token: text to show, and why it was the last, if it was."""
        draw = None if self._draw is None else self._draw + len(self.tokens)
        token = self._tokenizer.following(self._context, draw)
        self._context.append(token)
        self.tokens.append(token)
        before = len(self.text)
        if token in self._stop_tokens and len(self.tokens) > self._least:
            self.stop_reason = token
            return self.flushed(), "stop"
        self._bytes += self._tokenizer.piece(token)
        try:
            self.text += self._bytes.decode()
            self._bytes = b""
        except UnicodeDecodeError:
            pass
        if len(self.tokens) > self._least and self._stopped(before):
            return self.flushed(), "stop"
        if len(self.tokens) >= limit:
            return self.flushed(), "length"
        end = len(self.text) - self._held
        if end <= self._shown:
            return "", None
        said, self._shown = self.text[self._shown : end], end
        return said, None

    def flushed(self) -> str:
        """All that was held back."""
        said, self._shown = self.text[self._shown :], len(self.text)
        return said

    def _stopped(self, before: int) -> bool:
        ends = []
        for item in self._stop:
            at = self.text.find(item, max(0, before - len(item) + 1))
            if at >= 0:
                ends.append((at + len(item), at, item))
        if not ends or len(self.text) == before:
            return False
        end, at, item = min(ends, key=lambda found: found[0])
        self.stop_reason = item
        self.text = self.text[: end if self._included else at]
        return True
