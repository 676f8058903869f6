"""Measures steps of one running engine over HTTP, as its clients see them.

Prompts alone: the time to first token. Decoding: the gap between tokens while a number of streams
decode. Both together: the delay of streams when a prompt joins them. Prompts are random token ids,
so their lengths are exact and no prefix cache has them. Streams that only decode start with the
same prompts every time, which are cached and therefore soon done.

vLLM schedules all sequences that can run at once. With pipeline parallelism the requests that were
admitted together form a micro-batch and stay together. So streams are started one after another,
spread like arriving requests, and are counted as evenly spread.
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
from oserve.profiler.client import EngineClient, EngineDescription, MeasuredStream
from oserve.profiler.contention import foreign_cpu_s
from oserve.profiler.series import WINDOW_TOKENS, MeasuredPoint, StepSeries

# Tokens of a stream after a joining prompt until the stream counts as undisturbed again.
_AFTER = 4
_WARM_TOKENS = 4
_PROMPT_REPEATS = 3
# Cores that other processes may use during a measurement, the seconds of a check, and the bound on
# all waiting.
_MAX_FOREIGN_CORES = 0.2
_CONTENTION_CHECK_S = 0.25
_PATIENCE_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sample:
    """A measured step, and the cores that other processes used meanwhile."""

    step: ProfileStep
    foreign: float = 0.0


class StepMeter:
    """Measures the steps of a series on one engine.

    ``stages``: pipeline stages. ``progress`` is called after each step of each round.
    ``check_contention``: measure CPU contention, wait within limits until it ends, and prefer
    samples without it. ``window``: tokens of each stream that one sample of the gap spans;
    ``repeats``: how often each prompt is sent.
    """

    def __init__(
        self,
        client: EngineClient,
        facts: EngineDescription,
        *,
        stages: int = 1,
        check_contention: bool = True,
        progress: Callable[[int], None] = lambda _count: None,
        window: int = WINDOW_TOKENS,
        repeats: int = _PROMPT_REPEATS,
    ) -> None:
        self._client = client
        self._facts = facts
        self._stages = stages
        self._check_contention = check_contention
        self._progress = progress
        self._window = window
        self._repeats = repeats
        self._patience_s = _PATIENCE_S

    async def run(self, series: StepSeries) -> tuple[ProfileStep, ...]:
        """The median of each step over the rounds; a disturbance affects all steps of a round."""
        samples: dict[tuple[object, int], list[_Sample]] = {}
        await self._prompts(series.prompts[0])
        for _ in range(series.rounds):
            for tokens in series.prompts:
                found = await self._uncontended(partial(self._prompts, tokens))
                samples.setdefault((tokens, 0), []).extend(found)
                self._progress(1)
            for point in series.points:
                found = await self._uncontended(partial(self._point, point))
                for index, sample in enumerate(found):
                    samples.setdefault((point, index), []).append(sample)
                self._progress(len(found))
        return tuple(_median_step(rows) for rows in samples.values())

    async def once(self, wanted: int | MeasuredPoint) -> tuple[ProfileStep, ...]:
        """The steps of a prompt of ``wanted`` tokens, or of a point, measured once."""
        if isinstance(wanted, MeasuredPoint):
            return tuple(sample.step for sample in await self._point(wanted))
        return (_median_step(await self._prompts(wanted)),)

    async def _uncontended(self, measure: Callable[[], Awaitable[list[_Sample]]]) -> list[_Sample]:
        """The samples, with the cores that other processes used meanwhile."""
        if not self._check_contention:
            return await measure()
        await self._await_low_contention()
        before, begin_s = foreign_cpu_s(), time.perf_counter()
        found = await measure()
        after, wall_s = foreign_cpu_s(), time.perf_counter() - begin_s
        foreign = 0.0 if before is None or after is None else (after - before) / wall_s
        return [replace(sample, foreign=foreign) for sample in found]

    async def _await_low_contention(self) -> None:
        """Wait until CPU contention is low, within ``_PATIENCE_S`` over the whole measurement."""
        while self._patience_s > 0:
            before = foreign_cpu_s()
            await asyncio.sleep(_CONTENTION_CHECK_S)
            after = foreign_cpu_s()
            if (
                before is None
                or after is None
                or after - before <= _MAX_FOREIGN_CORES * _CONTENTION_CHECK_S
            ):
                return
            self._patience_s -= _CONTENTION_CHECK_S

    async def _prompts(self, length: int) -> list[_Sample]:
        """Seconds to the first token of a prompt alone, measured a few times."""
        found = []
        for _ in range(self._repeats):
            prompt = self._client.prompt(length)
            begin_s = time.perf_counter()
            seen = await self._client.stream(prompt, 1)
            found.append(_sample(seen.times[0] - begin_s, length))
        return found

    async def _point(self, point: MeasuredPoint) -> list[_Sample]:
        """The gap between tokens of the streams, then the delay by each joining prompt."""
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
        """Streams that all decode until the context ends."""
        streams = [MeasuredStream() for _ in range(point.seqs)]
        # Enough for the measurement and for the steps that prefill the other streams.
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
            # The engine needs a moment to notice the closed connections.
            await asyncio.sleep(0.05)

    async def _gap(self, streams: list[MeasuredStream], context: int) -> tuple[float, float]:
        """Mean gap in seconds over a window, and the KV cache tokens of all streams."""
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
        """Mean delay of a stream, in seconds, by a prompt that asks for one token."""
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
    """Wait until each stream has its count of tokens; raises the error that ended one early."""
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
    """The median over samples without CPU contention, else over the third with the least."""
    calm = [item for item in samples if item.foreign <= _MAX_FOREIGN_CORES]
    fewest = sorted(samples, key=lambda item: item.foreign)[: max(1, len(samples) // 3)]
    rows = [astuple(item.step) for item in calm or fewest]
    medians = [statistics.median(column) for column in zip(*rows, strict=True)]
    return ProfileStep(**dict(zip(ProfileStep.__struct_fields__, medians, strict=True)))
