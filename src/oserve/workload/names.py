"""Readable names of workload types, such as "long prompt, short answer".

Each word means the same in every trace, so plans of different days can be compared. The bounds lie
between the clusters of Azure's 2023 traces (prompts about 180, 330, 1,200 and 2,500 tokens, answers
about 12, 100 and 340; Patel et al., "Splitwise", ISCA 2024). The outer bounds mark further changes:
prompts beyond 16k exceed common chunk budgets, and answers beyond 1,000 tokens are mostly
reasoning.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TypeVar

# Each word applies below its bound, in tokens.
_PROMPT = ((64, "very short"), (512, "short"), (2048, "medium"), (16384, "long"))
_ANSWER = ((4, "very short"), (50, "short"), (250, "medium"), (1024, "long"))

_Centre = tuple[float, float]
_T = TypeVar("_T")


def type_names(centres: Sequence[_Centre]) -> tuple[str, ...]:
    """A unique name for each of the typical lengths (prompt tokens, output tokens).

    Tries short, medium and long first. Types that would share a name get "very short" and "very
    long", then token counts of prompts, of answers, or of both.
    """
    return _unique(centres, _STYLES)


def prompt_names(prompts: Sequence[float]) -> tuple[str, ...]:
    """A unique name for each typical prompt length in tokens: "short prompt"."""
    return _unique(prompts, _PROMPT_STYLES)


def count(tokens: float) -> str:
    """A token count to about two digits: 87, 1.9k, 16k."""
    if tokens < 1000:
        return f"{tokens:.0f}"
    return f"{tokens / 1000:.1f}k" if tokens < 9950 else f"{tokens / 1000:.0f}k"


def _plain(centre: _Centre) -> str:
    prompt, output = centre
    return f"{_word(prompt, _PROMPT)} prompt, {_word(output, _ANSWER)} answer"


def _very(centre: _Centre) -> str:
    prompt, output = centre
    return f"{_word(prompt, _PROMPT, True)} prompt, {_word(output, _ANSWER, True)} answer"


def _counted(
    of_prompt: Callable[[float], str] | None, of_answer: Callable[[float], str] | None
) -> Callable[[_Centre], str]:
    def style(centre: _Centre) -> str:
        prompt, output = centre
        after_prompt = f" ({of_prompt(prompt)})" if of_prompt else ""
        after_answer = f" ({of_answer(output)})" if of_answer else ""
        return (
            f"{_word(prompt, _PROMPT)} prompt{after_prompt}, "
            f"{_word(output, _ANSWER)} answer{after_answer}"
        )

    return style


def _exact(tokens: float) -> str:
    return f"{tokens:.2f}"


def _word(tokens: float, bounds: Sequence[tuple[int, str]], very: bool = False) -> str:
    word = next((word for bound, word in bounds if tokens < bound), "very long")
    return word if very else word.removeprefix("very ")


def _unique(items: Sequence[_T], styles: Sequence[Callable[[_T], str]]) -> tuple[str, ...]:
    """Name items in the first style, and duplicates in the first style that separates them.

    Each style refines the first one (except for "very"), so names stay unique across groups.
    """
    groups = defaultdict(list)
    for index, item in enumerate(items):
        groups[styles[0](item)].append(index)
    names = [""] * len(items)
    for members in groups.values():
        found: list[str] = []
        for style in styles:
            found = [style(items[index]) for index in members]
            if len(set(found)) == len(found):
                break
        else:
            # They agree in every digit shown: number them.
            found = [f"{name} {place}" for place, name in enumerate(found, start=1)]
        for index, name in zip(members, found, strict=True):
            names[index] = name
    return tuple(names)


_STYLES: tuple[Callable[[_Centre], str], ...] = (
    _plain,
    _very,
    _counted(count, None),
    _counted(None, count),
    _counted(count, count),
    _counted(_exact, _exact),
)
_PROMPT_STYLES: tuple[Callable[[float], str], ...] = (
    lambda prompt: f"{_word(prompt, _PROMPT)} prompt",
    lambda prompt: f"{_word(prompt, _PROMPT, True)} prompt",
    lambda prompt: f"{_word(prompt, _PROMPT)} prompt ({count(prompt)})",
    lambda prompt: f"{_word(prompt, _PROMPT)} prompt ({_exact(prompt)})",
)


def tokens_at(centre: _Centre) -> _Centre:
    """Typical lengths in tokens at a centre in the log1p plane."""
    return math.expm1(centre[0]), math.expm1(centre[1])
