"""The text that an emulated engine generates, token by token, by vLLM's rules.

Only complete characters are sent, and text that may become a stop string is held back. A prompt
that ends within a character is repeated, as by vLLM's detokenizer.
"""

import itertools
from collections.abc import Mapping, Sequence

from oserve.sim.tokenizer_stub import TokenizerStub

_seeds = itertools.count()


class GeneratedText:
    """``text``: the client's text, held back parts included; ``tokens``: those generated so far."""

    def __init__(
        self, tokenizer: TokenizerStub, body: Mapping[str, object], prompt: Sequence[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._context = list(prompt)
        stop, stop_tokens = body.get("stop"), body.get("stop_token_ids")
        self._stop: list[str] = [stop] if isinstance(stop, str) and stop else []
        if isinstance(stop, list):
            self._stop = [str(item) for item in stop]
        self._stop_tokens = set(stop_tokens) if isinstance(stop_tokens, list) else set()
        self._included = bool(body.get("include_stop_str_in_output"))
        least = body.get("min_tokens")
        self._least = least if isinstance(least, int) else 0
        longest = max((len(item) for item in self._stop), default=0)
        self._held = 0 if self._included else max(0, longest - 1)
        self._seed: int | None = None
        if body.get("temperature"):
            seed = body.get("seed")
            self._seed = seed if isinstance(seed, int) and seed else next(_seeds)
        self._bytes = self._unfinished()
        self._shown = 0
        self.tokens: list[int] = []
        self.text = ""
        self.stop_reason: str | int | None = None

    def _unfinished(self) -> bytes:
        """The bytes of the whole prompt if it ends within a character."""
        pieces = [self._tokenizer.piece(token) for token in self._context[-1:]]
        try:
            b"".join(pieces).decode()
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":
                return b"".join(self._tokenizer.piece(token) for token in self._context)
        return b""

    def generate(self, limit: int) -> tuple[str, str | None]:
        """Generate the next token; returns the text to send, and the finish reason at the end."""
        seed = None if self._seed is None else self._seed + len(self.tokens)
        token = self._tokenizer.following(self._context, seed)
        self._context.append(token)
        self.tokens.append(token)
        before = len(self.text)
        if token in self._stop_tokens and len(self.tokens) > self._least:
            self.stop_reason = token
            return self.flush(), "stop"
        self._bytes += self._tokenizer.piece(token)
        try:
            self.text += self._bytes.decode()
            self._bytes = b""
        except UnicodeDecodeError:
            pass  # Part of a character; the next token brings the rest.
        if len(self.tokens) > self._least and self._stopped(before):
            return self.flush(), "stop"
        if len(self.tokens) >= limit:
            return self.flush(), "length"
        end = len(self.text) - self._held
        if end <= self._shown:
            return "", None
        text, self._shown = self.text[self._shown : end], end
        return text, None

    def flush(self) -> str:
        """All text that was held back."""
        text, self._shown = self.text[self._shown :], len(self.text)
        return text

    def _stopped(self, before: int) -> bool:
        """Whether the text from ``before`` on completes a stop string; cuts the text there."""
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
