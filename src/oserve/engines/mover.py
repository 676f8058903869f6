"""Has engines transfer weights among themselves: all of a transfer, or none of it.

Rank orders (``oserve.switch.orders``) say what moves; bytes never pass through this process. If one
rank fails, the transfer ends on all of them. Every step has a time limit.
"""

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import TypeVar

from oserve.core import Clock, Endpoint
from oserve.engines.control import EngineControl, EngineControlError
from oserve.engines.rank_commands import (
    AbortJob,
    CommandDone,
    DescribeLayout,
    JobReport,
    LayoutReply,
    ListenerReply,
    MoveShards,
    OpenListener,
    RankCommand,
    ReportJob,
    SumShards,
    TakeUpWeights,
)
from oserve.engines.weights.sockets import addresses_from
from oserve.switch.rank_order import RankOrder, ShardPart
from oserve.switching.weights import Moved, MoveError

Value = TypeVar("Value")

_POLL_S = 0.05
_ROUNDS = 20
_ABORT_S = 5.0
_PROMPT = [5] * 8
_FORGET_TRIES = 20
_PROBE_TOKENS = 192
PROBE = (
    "The bridge was closed for repairs in the spring, so everyone who worked on the island took "
    "the ferry. It left at twenty past seven and again at eight. On most mornings the second one "
    "was late, because the harbour master let the fishing boats go first.\n\n"
    "def mean(values: list[float]) -> float:\n"
    '    """The sum of all values, divided by how many there are."""\n'
    "    if not values:\n"
    "        raise ValueError('the mean of nothing is not defined')\n"
    "    return sum(values) / len(values)\n\n"
    "Water boils at 100 degrees Celsius at sea level; on a mountain of 3,000 metres it does so at "
    "about 90. Question: why does rice take longer to cook up there? Answer: because"
)
"""Prose, code and a question: the text by whose perplexity converted weights are checked."""


class Mover:
    """Moves weights between the engines at these endpoints, by replica.

    ``bytes_per_s`` bounds what each rank sends, and what it receives (0: no bound). ``node_of``
    tells the node of a replica's rank; ranks of different nodes reach each other by their hatches.
    """

    def __init__(
        self,
        endpoints: Mapping[str, Endpoint],
        clock: Clock,
        *,
        bytes_per_s: float = 0.0,
        node_of: Callable[[str, int], str] = lambda _replica, _rank: "",
    ) -> None:
        self._clock = clock
        self._bytes_per_s = bytes_per_s
        self._node_of = node_of
        self._engines = {name: EngineControl(place) for name, place in endpoints.items()}

    async def close(self) -> None:
        """Disconnect."""
        await asyncio.gather(*(engine.close() for engine in self._engines.values()))

    async def layouts(self, replica: str) -> list[dict[str, tuple[int, ...]]]:
        """Names and shapes of what each rank of a replica holds. Raises MoveError."""
        try:
            found = await self._engines[replica].command(DescribeLayout(), LayoutReply)
        except EngineControlError as error:
            raise MoveError(f"{replica}: {error}") from None
        return [{name: one.shape for name, one in rank.parameters.items()} for rank in found]

    async def generate(self, replica: str, model: str, *, limit_s: float) -> None:
        """One short greedy completion. Raises MoveError if there is none."""
        try:
            await self._engines[replica].complete(model, _PROMPT, 2, limit_s)
        except EngineControlError as error:
            raise MoveError(f"{replica}: {error}") from None

    async def surprise(self, replica: str, model: str, *, limit_s: float) -> float:
        """Mean negative log-likelihood of ``PROBE`` at a replica, in nats per token.

        Raises MoveError.
        """
        try:
            return await self._engines[replica].surprise(
                model, PROBE, most_tokens=_PROBE_TOKENS, timeout_s=limit_s
            )
        except EngineControlError as error:
            raise MoveError(f"{replica}: {error}") from None

    async def move(
        self,
        name: str,
        orders: Sequence[RankOrder],
        *,
        limit_s: float,
        progress: Callable[[int], None] = lambda _bytes: None,
    ) -> Moved:
        """Carry the orders out; ``progress`` receives the bytes so far. Raises MoveError.

        When it returns, the targets compute with the new weights, and their prefix caches are
        empty.
        """
        replicas = list(dict.fromkeys(order.replica for order in orders))
        targets = [name for name in replicas if any(o.receives for o in _of(orders, name))]
        started_s = self._clock.now()
        try:
            await self._start(name, orders, replicas, limit_s)
            reports = await self._reports(replicas, started_s + limit_s, progress)
            moved_s = self._clock.now() - started_s
            left_s = max(1.0, limit_s - moved_s)
            await self._all(
                targets, lambda one: one.command(TakeUpWeights(), CommandDone, timeout_s=left_s)
            )
            await self._all(targets, self._forget)
        except BaseException:  # also when this is cancelled: no rank goes on alone
            await self._abort(replicas)
            raise
        size = sum(report.received_bytes for report in reports)
        taken_s = self._clock.now() - started_s - moved_s
        return Moved(size_bytes=size, seconds=moved_s, take_up_s=taken_s)

    async def _start(
        self, name: str, orders: Sequence[RankOrder], replicas: Sequence[str], limit_s: float
    ) -> None:
        """Open a listener on every rank, then start the transfer on all of them."""
        opened = await self._all(replicas, lambda one: one.command(OpenListener(), ListenerReply))
        paths = [reply.address for reply in itertools.chain(*opened)]
        nodes = [self._node_of(order.replica, order.rank) for order in orders]
        commands = [
            MoveShards(
                name=name,
                number=number,
                addresses=addresses_from(number, paths, nodes),
                limit_s=limit_s,
                order=order,
                bytes_per_s=self._bytes_per_s,
            )
            for number, order in enumerate(orders)
        ]
        await self._command(replicas, orders, commands)

    async def check(self, name: str, orders: Sequence[RankOrder], *, limit_s: float) -> int:
        """Compare the checksums of every part at both ends; the number of parts.

        Raises MoveError if one differs.
        """
        replicas = list(dict.fromkeys(order.replica for order in orders))
        deadline_s = self._clock.now() + limit_s
        commands = [
            SumShards(name=name, parts=_all_parts(order), as_received=True) for order in orders
        ]
        await self._command(replicas, orders, commands)
        sums = [report.sums for report in await self._reports(replicas, deadline_s)]
        sent = {
            (number, peer): _sums_of(order.sends, peer, sums[number])
            for number, order in enumerate(orders)
            for peer in order.sends
        }
        count = 0
        for number, order in enumerate(orders):
            received = sums[number][sum(map(len, order.sends.values())) :]
            for peer, parts in order.receives.items():
                own = _sums_of(order.receives, peer, received)
                for part, mine, theirs in zip(parts, own, sent[peer, number], strict=True):
                    count += 1
                    if mine != theirs:
                        raise MoveError(
                            f"the checksum of {part.parameter} on {order.replica} rank "
                            f"{order.rank} differs from that on {orders[peer].replica}"
                        )
        return count

    async def _reports(
        self,
        replicas: Sequence[str],
        deadline_s: float,
        progress: Callable[[int], None] = lambda _bytes: None,
    ) -> list[JobReport]:
        """The reports of all ranks once all are done. Raises MoveError.

        A replica that is done is polled in every ``_ROUNDS``-th round only: each call interrupts an
        engine that serves.
        """
        last: dict[str, list[JobReport]] = {}
        for round_ in itertools.count():
            asked = [
                one for one in replicas if round_ % _ROUNDS == 0 or not _done(last.get(one, ()))
            ]
            answers = await self._all(asked, lambda one: one.command(ReportJob(), JobReport))
            for replica, ranks in zip(asked, answers, strict=True):
                last[replica] = ranks
                for rank, report in enumerate(ranks):
                    if report.state not in {"running", "done"}:
                        raise MoveError(f"{replica} rank {rank}: {report.reason or report.state}")
            reports = list(itertools.chain(*(last[replica] for replica in replicas)))
            progress(sum(report.received_bytes for report in reports))
            if _done(reports):
                break
            if self._clock.now() >= deadline_s:
                raise MoveError("the ranks were not done within the time limit")
            await self._clock.sleep(_POLL_S)
        return reports

    async def _forget(self, engine: EngineControl) -> None:
        for _ in range(_FORGET_TRIES):
            if await engine.forget_prefixes():
                return
            await self._clock.sleep(_POLL_S)
        raise EngineControlError("its prefix cache stays in use and cannot be emptied")

    async def _command(
        self, replicas: Sequence[str], orders: Sequence[RankOrder], commands: Sequence[RankCommand]
    ) -> None:
        """Send every rank its own command; both sequences are by number of rank."""
        calls = [
            self._engines[name].command(_of_replica(commands, orders, name), CommandDone)
            for name in replicas
        ]
        await _answers(replicas, calls)

    async def _all(
        self,
        replicas: Sequence[str],
        call: Callable[[EngineControl], Coroutine[None, None, Value]],
    ) -> list[Value]:
        return await _answers(replicas, [call(self._engines[name]) for name in replicas])

    async def _abort(self, replicas: Sequence[str]) -> None:
        async def end(name: str) -> None:
            with contextlib.suppress(EngineControlError):
                await self._engines[name].command(AbortJob(), CommandDone, timeout_s=_ABORT_S)

        await asyncio.gather(*(end(name) for name in replicas))


async def _answers(replicas: Sequence[str], calls: Sequence[Awaitable[Value]]) -> list[Value]:
    """Await all; the first that failed is the failure."""
    answers = await asyncio.gather(*calls, return_exceptions=True)
    found: list[Value] = []
    for name, answer in zip(replicas, answers, strict=True):
        if isinstance(answer, EngineControlError):
            raise MoveError(f"{name}: {answer}")
        if isinstance(answer, BaseException):
            raise answer
        found.append(answer)
    return found


def _done(reports: Sequence[JobReport]) -> bool:
    return bool(reports) and all(report.state == "done" for report in reports)


def _of(orders: Sequence[RankOrder], replica: str) -> list[RankOrder]:
    return [order for order in orders if order.replica == replica]


def _of_replica(values: Sequence[Value], orders: Sequence[RankOrder], replica: str) -> list[Value]:
    """Of values by number of rank, those of a replica, by its own ranks."""
    own = [
        (order.rank, value)
        for order, value in zip(orders, values, strict=True)
        if order.replica == replica
    ]
    return [value for _, value in sorted(own, key=lambda item: item[0])]


def _all_parts(order: RankOrder) -> list[ShardPart]:
    """The parts that a rank sends, then those that it receives."""
    return [*itertools.chain(*order.sends.values()), *itertools.chain(*order.receives.values())]


def _sums_of(
    parts: Mapping[int, Sequence[ShardPart]], peer: int, sums: Sequence[int]
) -> Sequence[int]:
    """Of the sums of all parts, those of a peer's."""
    start = 0
    for other, own in parts.items():
        if other == peer:
            return sums[start : start + len(own)]
        start += len(own)
    return ()
