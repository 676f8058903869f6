"""Prompt length before it is known, and the class it puts a request in."""

from collections.abc import Sequence

from oserve.core import LengthClass


def classify(prompt_tokens: int, classes: Sequence[LengthClass]) -> LengthClass:
    """The first class whose bound holds the prompt (classes ascend; the last has no bound)."""
    for length_class in classes:
        bound = length_class.max_prompt_tokens
        if bound is None or prompt_tokens <= bound:
            return length_class
    return classes[-1]


# How many bytes of observation the starting ratio is worth.
_PRIOR_BYTES = 200.0


class PromptLengthEstimator:
    """Tokens of a prompt from its bytes of JSON, by a ratio learned online.

    The ratio (tokens per byte) starts at the 1/4 usual for English and follows
    an exponential average of reported counts, weighted by length, since a long prompt says more.
    """

    def __init__(self, tokens_per_byte: float = 0.25, memory_bytes: float = 200_000.0) -> None:
        self._tokens = tokens_per_byte * _PRIOR_BYTES
        self._bytes = _PRIOR_BYTES
        self._memory_bytes = memory_bytes

    @property
    def tokens_per_byte(self) -> float:
        return self._tokens / self._bytes

    def estimate(self, size_bytes: int) -> int:
        """Expected prompt tokens, at least 1."""
        return max(1, round(size_bytes * self.tokens_per_byte))

    def learn(self, size_bytes: int, prompt_tokens: int) -> None:
        """Take in one reported count."""
        if size_bytes <= 0 or prompt_tokens <= 0:
            return
        keep = max(0.0, 1.0 - size_bytes / self._memory_bytes)
        self._tokens = keep * self._tokens + prompt_tokens
        self._bytes = keep * self._bytes + size_bytes
