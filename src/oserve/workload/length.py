"""Estimates of prompt lengths, and the length class of a request."""

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median

import msgspec

from oserve.core import LengthClass


def classify(prompt_tokens: int, classes: Sequence[LengthClass]) -> LengthClass:
    """The first class whose bound holds the prompt (classes ascend; the last has no bound)."""
    for length_class in classes:
        bound = length_class.max_prompt_tokens
        if bound is None or prompt_tokens <= bound:
            return length_class
    return classes[-1]


class PromptSize(msgspec.Struct, frozen=True, kw_only=True):
    """The sizes of a prompt's components.

    ``text_bytes``: bytes of JSON text by field of the request. ``parts``: number of images, sounds
    and the like. ``tokens``: number of tokens given as ids. ``most_tokens``: the length to which
    the engine truncates the prompt.
    """

    text_bytes: Mapping[str, int] = msgspec.field(default_factory=dict)
    parts: int = 0
    tokens: int = 0
    most_tokens: int | None = None


_USUAL = 0.25
# For fields that hold no text; vectors of thousands of numbers represent a token.
_USUAL_OF = {"prompt_embeds": 1e-4}
_USUAL_PART_TOKENS = 500.0
# The largest ratios accepted from one report: no text has more tokens per byte.
_MOST_PER_BYTE = 1.5
_MOST_PART_TOKENS = 20_000.0
_REMEMBERED = 31
# With fewer reports the prior counts as one of them.
_FEW = 3


class _Median:
    """The median of the last reports, robust to outliers in up to half of them."""

    __slots__ = ("_most", "_recent", "_sorted", "_usual", "value")

    def __init__(self, usual: float, most: float) -> None:
        self._usual = usual
        self._most = most
        self._recent: deque[float] = deque(maxlen=_REMEMBERED)
        self._sorted: list[float] = []
        self.value = usual

    def learn(self, value: float) -> None:
        value = min(self._most, max(0.0, value))
        recent, ordered = self._recent, self._sorted
        if len(recent) == _REMEMBERED:
            oldest = recent[0]
            if oldest == value:
                recent.append(oldest)
                return
            del ordered[bisect_left(ordered, oldest)]
        recent.append(value)
        insort(ordered, value)
        few = len(ordered) < _FEW
        self.value = median((*ordered, self._usual)) if few else ordered[len(ordered) // 2]


class _Ratio:
    """Tokens per byte of one field, by size: templates weigh more in short texts."""

    def __init__(self, usual: float) -> None:
        self._usual = usual
        self._by_size: dict[int, _Median] = {}

    def learn(self, size_bytes: int, ratio: float) -> None:
        step = size_bytes.bit_length() // 3
        found = self._by_size.get(step)
        if found is None:
            found = self._by_size[step] = _Median(self.at(size_bytes), _MOST_PER_BYTE)
        found.learn(ratio)

    def at(self, size_bytes: int) -> float:
        """The ratio learned from texts of about this size, or of the nearest size."""
        step = size_bytes.bit_length() // 3
        found = self._by_size.get(step)
        if found is not None:
            return found.value
        if not self._by_size:
            return self._usual
        return self._by_size[min(self._by_size, key=lambda known: abs(known - step))].value


class PromptLengthEstimator:
    """Estimates the tokens of a prompt from the sizes of its components, by ratios learned online.

    Each field of a request (messages, tools, documents) has its own tokens per byte, since not
    every model's template puts every field into the prompt. All start at 1/4, usual for English.
    The count that an engine reports, less the expected tokens of the other fields, updates the
    ratio of the field with the most bytes. A ratio is the median of the last reports of texts of
    about the same size.
    """

    def __init__(self) -> None:
        self._ratios: dict[str, _Ratio] = {}
        self._part_tokens = _Median(_USUAL_PART_TOKENS, _MOST_PART_TOKENS)

    def tokens_per_byte(self, name: str, size_bytes: int) -> float:
        """The ratio for ``size_bytes`` of text in that field."""
        ratio = self._ratios.get(name)
        return ratio.at(size_bytes) if ratio is not None else _USUAL_OF.get(name, _USUAL)

    def estimate(self, size: PromptSize) -> int:
        """Expected prompt tokens, at least 1."""
        expected = size.tokens + self._text_tokens(size) + size.parts * self._part_tokens.value
        if size.most_tokens is not None:
            expected = min(expected, size.most_tokens)
        return max(1, round(expected))

    def _text_tokens(self, size: PromptSize, *, less: str = "") -> float:
        if len(size.text_bytes) == 1:
            [(name, count)] = size.text_bytes.items()
            return 0.0 if name == less else count * self.tokens_per_byte(name, count)
        return math.fsum(
            count * self.tokens_per_byte(name, count)
            for name, count in size.text_bytes.items()
            if name != less
        )

    def learn(self, size: PromptSize, prompt_tokens: int) -> None:
        """Learn from a prompt length that an engine reported."""
        if prompt_tokens <= 0 or size.most_tokens is not None:
            return
        if size.parts:
            left = prompt_tokens - size.tokens - self._text_tokens(size)
            self._part_tokens.learn(left / size.parts)
            return
        name, most = max(size.text_bytes.items(), key=lambda item: item[1], default=("", 0))
        if most <= 0:
            return
        left = prompt_tokens - size.tokens - self._text_tokens(size, less=name)
        ratio = self._ratios.get(name)
        if ratio is None:
            ratio = self._ratios[name] = _Ratio(_USUAL_OF.get(name, _USUAL))
        ratio.learn(most, left / most)
