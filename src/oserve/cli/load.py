"""Open-loop replay of requests against an OpenAI-compatible server, with a check of every answer.

A stream is complete only if each event parses, it has a finish reason, the engine reports the
requested number of tokens, and ``[DONE]`` closes it. An ``ApiDialect`` relaxes this for servers
that behave otherwise.
"""

import asyncio
import time
from collections.abc import Callable, Sequence

import aiohttp
import msgspec

from oserve.cli.answers import BenchAnswer, error_message
from oserve.cli.prompts import PromptWriter
from oserve.cli.remote import reason_of
from oserve.cli.target import BenchTarget
from oserve.traces import FailureKind, Outcome, TraceRequest


class Replay:
    """One run. Appends to ``outcomes`` and calls ``progress`` as each request ends."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        target: BenchTarget,
        writer: PromptWriter,
        *,
        max_concurrency: int,
        progress: Callable[[], None],
    ) -> None:
        self.outcomes: list[Outcome] = []
        self.sent = 0
        self._session = session
        self._target = target
        self._writer = writer
        self._slots = asyncio.Semaphore(max_concurrency)
        self._progress = progress
        self._start_s = 0.0

    async def run(self, requests: Sequence[TraceRequest], *, speed: float) -> None:
        """Send each request at its due time, whether or not earlier ones have ended."""
        base_s = requests[0].arrival_s
        prompts = [self._writer.write(item.prompt_tokens) for item in requests]
        self._start_s = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for item, prompt in zip(requests, prompts, strict=True):
                due_s = (item.arrival_s - base_s) / speed
                wait_s = self._start_s + due_s - time.perf_counter()
                if wait_s > 0:
                    await asyncio.sleep(wait_s)
                group.create_task(self._one(item, prompt, due_s))

    async def _one(self, item: TraceRequest, prompt: str, due_s: float) -> None:
        async with self._slots:
            self.sent += 1
            sent_s = time.perf_counter() - self._start_s
            answer = BenchAnswer()
            try:
                async with asyncio.timeout(self._target.timeout_s):
                    await self._talk(item, prompt, answer)
            except TimeoutError:
                answer.fail(FailureKind.TIMEOUT, "timed out")
            except (aiohttp.ClientError, OSError) as error:
                answer.fail(FailureKind.CONNECTION, reason_of(error))
            except ValueError as error:
                answer.fail(FailureKind.BAD_EVENT, str(error))
        self.outcomes.append(self._outcome(item, answer, due_s=due_s, sent_s=sent_s))
        self._progress()

    def _outcome(
        self, item: TraceRequest, answer: BenchAnswer, *, due_s: float, sent_s: float
    ) -> Outcome:
        status, error = answer.verdict(item.output_tokens, self._target.dialect)
        now_s = time.perf_counter()
        begin_s = self._start_s + due_s
        usage = answer.usage
        return Outcome(
            due_s=due_s,
            sent_s=sent_s,
            ttft_s=(answer.first_s or now_s) - begin_s,
            e2e_s=(answer.last_s or now_s) - begin_s,
            itl_s=tuple(answer.gaps),
            prompt_tokens=(usage.prompt_tokens if usage else None) or item.prompt_tokens,
            output_tokens=answer.output_tokens,
            status=status,
            error=error,
            failure=answer.failure,
            first_answer_s=(
                answer.first_answer_s - begin_s
                if answer.reasoned and answer.first_answer_s
                else None
            ),
            reasoning_tokens=usage.reasoning_tokens if usage else 0,
            tier=item.tier,
        )

    async def _talk(self, item: TraceRequest, prompt: str, answer: BenchAnswer) -> None:
        target = self._target
        body = msgspec.json.encode(target.body(prompt, item.output_tokens))
        async with self._session.post(
            target.url + target.path, data=body, headers=self._headers(item)
        ) as got:
            if got.status != 200:
                whole = await got.read()
                kind = FailureKind.CLIENT_ERROR if got.status < 500 else FailureKind.SERVER_ERROR
                answer.fail(kind, f"status {got.status}: {error_message(whole)}")
                return
            async for data in got.content.iter_any():
                answer.feed(data, time.perf_counter())
            answer.end(time.perf_counter())

    def _headers(self, item: TraceRequest) -> dict[str, str]:
        own = {"x-oserve-tier": item.tier} if item.tier else {}
        key = self._target.tenant_keys.get(item.tenant) if item.tenant else None
        if key is not None:
            own["authorization"] = f"Bearer {key}"
        return {"content-type": "application/json", **self._target.headers, **own}


def new_session() -> aiohttp.ClientSession:
    """A client session without connection limits or timeouts."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
        read_bufsize=1 << 18,
    )
