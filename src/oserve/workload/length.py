"""Prompt length before it is known, and the class it puts a request in."""

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from oserve.core import LengthClass


def classify(prompt_tokens: int, classes: Sequence[LengthClass]) -> LengthClass:
    """The first class whose bound holds the prompt (classes ascend; the last has no bound)."""
    for length_class in classes:
        bound = length_class.max_prompt_tokens
        if bound is None or prompt_tokens <= bound:
            return length_class
    return classes[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSize:
    """What a prompt is made from.

    ``text_bytes``: of JSON text, by the field of the request that it stands in. ``parts``: images,
    sounds and the like. ``tokens``: given as ids, so they are certain. ``most_tokens``: the prompt
    is cut to so many.
    """

    text_bytes: Mapping[str, int] = field(default_factory=dict)
    parts: int = 0
    tokens: int = 0
    most_tokens: int | None = None


_USUAL = 0.25
# Of fields that are no text; vectors of thousands of numbers stand for a token.
_USUAL_OF = {"prompt_embeds": 1e-4}
_USUAL_PART_TOKENS = 500.0
# What one report may say at most: no text has more tokens than this per byte, whatever the count.
_MOST_PER_BYTE = 1.5
_MOST_PART_TOKENS = 20_000.0
_REMEMBERED = 31
# Below so many reports what is usual is one of them.
_FEW = 3


class _Median:
    """Of the last reports: half of them would have to be odd to spoil it."""

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
    """Tokens per byte of one field, by size: a template's share is larger in short texts."""

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
        """Learned of texts about as long as this, or of the nearest to it."""
        step = size_bytes.bit_length() // 3
        found = self._by_size.get(step)
        if found is not None:
            return found.value
        if not self._by_size:
            return self._usual
        return self._by_size[min(self._by_size, key=lambda known: abs(known - step))].value


class PromptLengthEstimator:
    """Tokens of a prompt from what it is made from, by ratios learned online.

    Each field of a request (messages, tools, documents) has its own tokens per byte, since not
    every model's template puts every field into the prompt; all start at the 1/4 usual for English.
    What an engine reports is told of the field with the most bytes, less what is expected of the
    others. A ratio is the median of the last reports of texts about as long.
    """

    def __init__(self) -> None:
        self._ratios: dict[str, _Ratio] = {}
        self._part_tokens = _Median(_USUAL_PART_TOKENS, _MOST_PART_TOKENS)

    def tokens_per_byte(self, name: str, size_bytes: int) -> float:
        """Of so much text in that field."""
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
        """Take in one reported count."""
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
