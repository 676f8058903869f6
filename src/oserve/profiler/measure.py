"""Measures steps of one running engine over HTTP: what it can do as its clients see it.

Prompts alone: the time to the first token. Decoding: the gap between tokens while a number of
streams all decode. Both together: by how much streams fall behind when a prompt arrives among them.
Prompts are token ids, so that lengths are exact, and random, so that no prefix cache has them;
streams that only decode begin alike every time, so that their prompts are cached and soon done.

vLLM schedules at once all sequences that can run. With pipeline parallel, a micro-batch is thus who
happened to be admitted together, and stays together: streams are started one after another to
spread them as arriving requests would be, and count as evenly spread.
"""

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial

from msgspec.structs import astuple

from oserve.core import OServeError
from oserve.perf.profile import ProfileStep
from oserve.profiler.client import EngineClient, EngineFacts, MeasuredStream
from oserve.profiler.contention import foreign_cpu_s

# Tokens of each stream that one sample of the gap spans.
_WINDOW = 24
# After a prompt, so many more tokens until streams count as undisturbed again.
_AFTER = 4
_WARM_TOKENS = 4
_PROMPT_REPEATS = 3
# Cores that others may use while a step is measured, how often to look, and how long to wait for
# it in all.
_CALM_CORES = 0.2
_CALM_LOOK_S = 0.25
_PATIENCE_S = 120.0
# Share of the KV cache that streams may fill; more, and the engine would preempt.
_FILLED = 0.8
# Tokens that streams with long contexts hold together: computing them first takes most of the time.
_LONG_TOTAL = 16384


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredPoint:
    """``seqs`` streams of ``context`` tokens decode, and ``prompts`` of these lengths join them."""

    seqs: int
    context: int
    prompts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSeries:
    """What is measured, ``rounds`` times over: prompts alone, and points."""

    prompts: tuple[int, ...]
    points: tuple[MeasuredPoint, ...]
    rounds: int = 3

    @property
    def step_count(self) -> int:
        """Different steps."""
        return len(self.prompts) + sum(1 + len(point.prompts) for point in self.points)


def plan_course(
    *, chunk: int, seqs: int, max_model_len: int, kv_tokens: int, stages: int = 1, rounds: int = 3
) -> StepSeries:
    """About two dozen steps within an engine's limits (tokens, sequences)."""
    longest = max_model_len - 8 * _WINDOW
    prompts = [n for n in (16, 64, 256, 512, 1024, 2048, 4096, 8192) if n <= chunk]
    if chunk not in prompts:
        prompts.append(chunk)
    counts = [2**i for i in range(10) if 2**i <= seqs]
    # Prompts join only where a place is left, or they would wait for a stream to end.
    roomy = [count for count in counts if count < seqs]
    joined: dict[int, tuple[int, ...]] = {}
    for most, lengths in ((16, (64, 512, 1536)), (4, (64, 256, 1024))):
        if some := [count for count in roomy if count <= most]:
            joined[some[-1]] = lengths
    points = []
    wanted = [(32, count) for count in counts]
    wanted += [(min(1024, max(128, _LONG_TOTAL // count)), count) for count in counts]
    wanted += [(4096, 1), (4096, 4)]
    for context, count in wanted:
        room = count * (context + 8 * _WINDOW) <= _FILLED * kv_tokens
        if count > seqs or context > longest or not room:
            continue
        # In a pipeline a prompt delays each micro-batch in its own way: not told apart here.
        mixed = joined.get(count, ()) if context == 32 and stages == 1 else ()
        fitting = tuple(n for n in mixed if n + count <= chunk and n <= longest)
        points.append(MeasuredPoint(seqs=count, context=context, prompts=fitting))
    return StepSeries(
        prompts=tuple(n for n in prompts if n <= longest), points=tuple(points), rounds=rounds
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sample:
    """A measured step, and how many cores other processes used meanwhile."""

    step: ProfileStep
    foreign: float = 0.0


class StepMeter:
    """Measures the steps of a course on one engine.

    ``stages``: pipeline stages. ``progress`` is called after each step of each round. ``watch``:
    wait, within limits, while other processes keep the processors busy, and prefer what was
    measured without them. ``window``: tokens of each stream that one sample of the gap spans;
    ``repeats``: how often each prompt is sent.
    """

    def __init__(
        self,
        client: EngineClient,
        facts: EngineFacts,
        *,
        stages: int = 1,
        watch: bool = True,
        progress: Callable[[int], None] = lambda _count: None,
        window: int = _WINDOW,
        repeats: int = _PROMPT_REPEATS,
    ) -> None:
        self._client = client
        self._facts = facts
        self._stages = stages
        self._watch = watch
        self._progress = progress
        self._window = window
        self._repeats = repeats
        self._patience_s = _PATIENCE_S

    async def run(self, course: StepSeries) -> tuple[ProfileStep, ...]:
        """Medians over the rounds, step by step; rounds, so that no disturbance hits one alone."""
        samples: dict[tuple[object, int], list[_Sample]] = {}
        await self._prompts(course.prompts[0])
        for _ in range(course.rounds):
            for tokens in course.prompts:
                found = await self._watched(partial(self._prompts, tokens))
                samples.setdefault((tokens, 0), []).extend(found)
                self._progress(1)
            for point in course.points:
                found = await self._watched(partial(self._point, point))
                for index, sample in enumerate(found):
                    samples.setdefault((point, index), []).append(sample)
                self._progress(len(found))
        return tuple(_median_step(rows) for rows in samples.values())

    async def once(self, wanted: int | MeasuredPoint) -> tuple[ProfileStep, ...]:
        """The steps of a prompt of so many tokens, or of a point, measured once."""
        if isinstance(wanted, MeasuredPoint):
            return tuple(sample.step for sample in await self._point(wanted))
        return (_median_step(await self._prompts(wanted)),)

    async def _watched(self, measure: Callable[[], Awaitable[list[_Sample]]]) -> list[_Sample]:
        """What is measured, with the cores that others used meanwhile."""
        if not self._watch:
            return await measure()
        await self._calm()
        before, begin_s = foreign_cpu_s(), time.perf_counter()
        found = await measure()
        after, wall_s = foreign_cpu_s(), time.perf_counter() - begin_s
        foreign = 0.0 if before is None or after is None else (after - before) / wall_s
        return [replace(sample, foreign=foreign) for sample in found]

    async def _calm(self) -> None:
        """Wait until other processes use little of the processors, while patience lasts."""
        while self._patience_s > 0:
            before = foreign_cpu_s()
            await asyncio.sleep(_CALM_LOOK_S)
            after = foreign_cpu_s()
            if before is None or after is None or after - before <= _CALM_CORES * _CALM_LOOK_S:
                return
            self._patience_s -= _CALM_LOOK_S

    async def _prompts(self, length: int) -> list[_Sample]:
        """A prompt alone, a few times over: seconds to the first token."""
        found = []
        for _ in range(self._repeats):
            prompt = self._client.prompt(length)
            begin_s = time.perf_counter()
            seen = await self._client.stream(prompt, 1)
            found.append(_sample(seen.times[0] - begin_s, length))
        return found

    async def _point(self, point: MeasuredPoint) -> list[_Sample]:
        """The gap of the streams, then by how much each joining prompt delays them."""
        share = min(self._stages, point.seqs)
        async with self._decoding(point) as streams:
            gap_s, held = await self._gap(streams, point.context)
            found = [_sample(gap_s, 0, point.seqs / share, held / share)]
            for length in point.prompts:
                delays = [await self._delay(streams, length, gap_s) for _ in range(self._repeats)]
                seconds = gap_s + max(0.0, statistics.median(delays))
                held = point.seqs * point.context + sum(len(item.times) for item in streams)
                found.append(_sample(seconds, length, point.seqs / share, held / share))
        return found

    @asynccontextmanager
    async def _decoding(self, point: MeasuredPoint) -> AsyncIterator[list[MeasuredStream]]:
        """Streams that all decode; they end with the context."""
        streams = [MeasuredStream() for _ in range(point.seqs)]
        # Enough for what is measured and for the steps in which the others' prompts are computed.
        most = self._facts.max_model_len - point.context - 1
        output = min(most, 4000)
        tasks = []
        for index, seen in enumerate(streams):
            prompt = self._client.prompt(point.context, random.Random(index))
            tasks.append(asyncio.create_task(self._client.stream(prompt, output, seen)))
            if self._stages > 1:
                await asyncio.sleep(random.Random(index).uniform(0.0, 0.03))
        try:
            await _until(streams, [_WARM_TOKENS] * len(streams), tasks)
            yield streams
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            # The engine needs a moment to take note that nobody listens any more.
            await asyncio.sleep(0.05)

    async def _gap(self, streams: list[MeasuredStream], context: int) -> tuple[float, float]:
        """Mean gap in seconds over a window, and the tokens in the caches of all streams."""
        begin = [len(item.times) for item in streams]
        end = [count + self._window for count in begin]
        await _until(streams, end)
        gaps = [
            (item.times[last - 1] - item.times[first - 1]) / (last - first)
            for item, first, last in zip(streams, begin, end, strict=True)
        ]
        held = sum(context + first + self._window / 2 for first in begin)
        return statistics.fmean(gaps), held

    async def _delay(self, streams: list[MeasuredStream], length: int, gap_s: float) -> float:
        """Seconds that a prompt which asks for one token costs each stream."""
        begin = [len(item.times) for item in streams]
        await self._client.stream(self._client.prompt(length), 1)
        end = [len(item.times) + _AFTER for item in streams]
        await _until(streams, end)
        return statistics.fmean(
            item.times[last - 1] - item.times[first - 1] - (last - first) * gap_s
            for item, first, last in zip(streams, begin, end, strict=True)
        )


async def _until(
    streams: Sequence[MeasuredStream],
    counts: Sequence[int],
    tasks: Sequence["asyncio.Task[MeasuredStream]"] = (),
) -> None:
    """Wait until each stream has so many tokens; raises what ended one before."""
    while any(len(item.times) < count for item, count in zip(streams, counts, strict=True)):
        for task in tasks:
            if task.done():
                task.result()
        if any(item.ended for item in streams):
            raise OServeError(
                "a stream ended before it was measured",
                place="engine",
                remedy="measure with a longer context (max_model_len)",
            )
        await asyncio.sleep(0.005)


def _sample(
    seconds: float, prompt: int, decode_seqs: float = 0.0, kv_tokens: float = 0.0
) -> _Sample:
    step = ProfileStep(
        prefill_tokens=prompt,
        # Token i of a prompt attends to i tokens.
        attended_tokens=prompt * prompt / 2,
        decode_seqs=decode_seqs,
        kv_tokens=kv_tokens,
        seconds=seconds,
    )
    return _Sample(step=step)


def _median_step(samples: Sequence[_Sample]) -> ProfileStep:
    """Over those that others did not disturb; where there are none, the third least disturbed."""
    calm = [item for item in samples if item.foreign <= _CALM_CORES]
    fewest = sorted(samples, key=lambda item: item.foreign)[: max(1, len(samples) // 3)]
    rows = [astuple(item.step) for item in calm or fewest]
    medians = [statistics.median(column) for column in zip(*rows, strict=True)]
    return ProfileStep(**dict(zip(ProfileStep.__struct_fields__, medians, strict=True)))
