"""The measured steps of an engine: prompts alone, and points of decoding streams."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

WINDOW_TOKENS = 24
"""Tokens of each stream that one sample of the gap between tokens spans."""

_PROMPTS = (16, 64, 256, 512, 1024, 2048, 4096, 8192)
_MOST_STREAMS = 512
_SHORT_CONTEXT = 32
# Fraction of the KV cache that streams may fill; with more, the engine would preempt.
_FILLED = 0.8
# Tokens that streams with long contexts hold together; prefilling them takes most of the time.
_LONG_TOTAL = 16384
# Prompts that join streams: at most so many streams, and the lengths of the prompts.
_JOINED = ((16, (64, 512, 1536)), (4, (64, 256, 1024)))


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredPoint:
    """``seqs`` streams of ``context`` tokens decode; ``prompts`` of these lengths join them."""

    seqs: int
    context: int
    prompts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSeries:
    """The steps measured ``rounds`` times: prompts alone, by length, and points."""

    prompts: tuple[int, ...]
    points: tuple[MeasuredPoint, ...]
    rounds: int = 3

    @property
    def step_count(self) -> int:
        """Number of different steps."""
        return len(self.prompts) + sum(1 + len(point.prompts) for point in self.points)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineBounds:
    """The limits of an engine: ``chunk`` tokens per step, ``seqs`` sequences, and a KV cache.

    ``stages``: its pipeline stages.
    """

    chunk: int
    seqs: int
    max_model_len: int
    kv_tokens: int
    stages: int = 1

    @property
    def longest(self) -> int:
        """The longest context, in tokens, that leaves room to decode."""
        return self.max_model_len - 8 * WINDOW_TOKENS


def plan_series(bounds: EngineBounds, *, rounds: int = 3) -> StepSeries:
    """About two dozen steps within the bounds of an engine."""
    counts = [2**i for i in range(_MOST_STREAMS.bit_length()) if 2**i <= bounds.seqs]
    joined = _joined(counts, bounds)
    points = tuple(
        MeasuredPoint(
            seqs=count,
            context=context,
            prompts=joined.get(count, ()) if context == _SHORT_CONTEXT else (),
        )
        for context, count in _wanted(counts)
        if _fits(context, count, bounds)
    )
    return StepSeries(prompts=_prompts(bounds), points=points, rounds=rounds)


def _prompts(bounds: EngineBounds) -> tuple[int, ...]:
    """Lengths of prompts measured alone, up to the chunk budget."""
    lengths = [length for length in _PROMPTS if length <= bounds.chunk]
    if bounds.chunk not in lengths:
        lengths.append(bounds.chunk)
    return tuple(length for length in lengths if length <= bounds.longest)


def _wanted(counts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Contexts and numbers of streams: short contexts, long ones, and very long ones."""
    for count in counts:
        yield _SHORT_CONTEXT, count
    for count in counts:
        yield min(1024, max(128, _LONG_TOTAL // count)), count
    yield 4096, 1
    yield 4096, 4


def _fits(context: int, count: int, bounds: EngineBounds) -> bool:
    tokens = count * (context + 8 * WINDOW_TOKENS)
    room = tokens <= _FILLED * bounds.kv_tokens
    return count <= bounds.seqs and context <= bounds.longest and room


def _joined(counts: Sequence[int], bounds: EngineBounds) -> dict[int, tuple[int, ...]]:
    """Lengths of prompts that join so many streams.

    In a pipeline a prompt delays each micro-batch differently, which cannot be distinguished.
    """
    if bounds.stages > 1:
        return {}
    found = {}
    for most, lengths in _JOINED:
        # Without a free place a prompt would wait until a stream ends.
        roomy = [count for count in counts if count < bounds.seqs and count <= most]
        if roomy:
            count = roomy[-1]
            found[count] = tuple(
                n for n in lengths if n + count <= bounds.chunk and n <= bounds.longest
            )
    return found
