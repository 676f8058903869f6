"""Has engines move weights among themselves: opens, starts, watches, ends; all or nothing.

What moves is given as rank orders (``oserve.switch.orders``); bytes never pass through here. A
failure of any rank ends the transfer on all of them, and every step has a time limit.
"""

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from oserve.core import Clock, Endpoint
from oserve.engines.control import EngineControl, EngineControlError
from oserve.switch.orders import RankOrder
from oserve.switching.weights import Moved, MoveError

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
"""What replicas are compared by whose weights were made on the way: prose, code, a question."""


class Mover:
    """Moves weights between the engines at these endpoints, by replica.

    ``bytes_per_s`` bounds what each rank sends, and what it takes (0: no bound).
    """

    def __init__(
        self, endpoints: Mapping[str, Endpoint], clock: Clock, *, bytes_per_s: float = 0.0
    ) -> None:
        self._clock = clock
        self._bytes_per_s = bytes_per_s
        self._engines = {name: EngineControl(place) for name, place in endpoints.items()}

    async def close(self) -> None:
        """Hang up."""
        await asyncio.gather(*(engine.close() for engine in self._engines.values()))

    async def layouts(self, replica: str) -> list[dict[str, tuple[int, ...]]]:
        """Names and shapes of what each rank of a replica holds. Raises MoveError."""
        try:
            found = await self._engines[replica].call("oserve_weights_layout")
        except EngineControlError as error:
            raise MoveError(f"{replica}: {error}") from None
        return [{name: tuple(one[0]) for name, one in rank.items()} for rank in found]

    async def generate(self, replica: str, model: str, *, limit_s: float) -> None:
        """One short greedy completion. Raises MoveError if there is none."""
        try:
            await self._engines[replica].complete(model, _PROMPT, 2, limit_s)
        except EngineControlError as error:
            raise MoveError(f"{replica}: {error}") from None

    async def surprise(self, replica: str, model: str, *, limit_s: float) -> float:
        """How little a replica expects of a text, nats a token. Raises MoveError."""
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
        """Carry it out; ``progress`` hears how many bytes have come. Raises MoveError.

        When it returns, the targets compute with what came, and have forgotten what they cached.
        """
        replicas = list(dict.fromkeys(order.replica for order in orders))
        targets = [name for name in replicas if any(o.receives for o in _of(orders, name))]
        started_s = self._clock.now()
        try:
            opened = await self._all(replicas, lambda one: one.call("oserve_weights_open"))
            addresses = [answer["address"] for answer in itertools.chain(*opened)]
            documents = [
                _document(order, number, name, addresses, limit_s, self._bytes_per_s)
                for number, order in enumerate(orders)
            ]
            await self._tell(
                "oserve_weights_move",
                [(one, (_part_of(documents, orders, one),)) for one in replicas],
            )
            size = await self._watch(replicas, started_s + limit_s, progress)
            moved_s = self._clock.now() - started_s
            left_s = max(1.0, limit_s - moved_s)
            await self._all(
                targets, lambda one: one.call("oserve_weights_take_up", timeout_s=left_s)
            )
            await self._all(targets, self._forget)
        except BaseException:
            await self._abort(replicas)
            raise
        taken_s = self._clock.now() - started_s - moved_s
        return Moved(size_bytes=size, seconds=moved_s, take_up_s=taken_s)

    async def check(self, name: str, orders: Sequence[RankOrder], *, limit_s: float) -> int:
        """Compare checksums of each part at both ends; how many parts. Raises MoveError."""
        parts = [_checked(order) for order in orders]
        replicas = list(dict.fromkeys(order.replica for order in orders))
        deadline_s = self._clock.now() + limit_s
        await self._tell(
            "oserve_weights_sums",
            [(one, (name, _part_of(parts, orders, one), True)) for one in replicas],
        )
        documents = await self._documents(replicas, deadline_s)
        sums = [document["sums"] for document in documents]
        given = {
            (number, peer): _slice(order.sends, peer, sums[number])
            for number, order in enumerate(orders)
            for peer in order.sends
        }
        count = 0
        for number, order in enumerate(orders):
            own = sums[number][sum(map(len, order.sends.values())) :]
            for peer in order.receives:
                got = _slice(order.receives, peer, own)
                for (part, _), mine, theirs in zip(
                    order.receives[peer], got, given[peer, number], strict=True
                ):
                    count += 1
                    if mine != theirs:
                        raise MoveError(
                            f"the checksum of {part} on {order.replica} rank {order.rank} differs "
                            f"from that on {orders[peer].replica}"
                        )
        return count

    async def _watch(
        self, replicas: Sequence[str], deadline_s: float, progress: Callable[[int], None]
    ) -> int:
        documents = await self._documents(replicas, deadline_s, progress)
        return sum(document["received_bytes"] for document in documents)

    async def _documents(
        self,
        replicas: Sequence[str],
        deadline_s: float,
        progress: Callable[[int], None] = lambda _bytes: None,
    ) -> list[dict[str, Any]]:
        """What each rank says when all are done.

        Who is done is asked now and then only whether it lives: each question holds up an engine
        that serves.
        """
        told: dict[str, list[dict[str, Any]]] = {}
        rounds = 0
        while True:
            everybody = rounds % _ROUNDS == 0
            asked = [one for one in replicas if everybody or not _done(told.get(one, ()))]
            rounds += 1
            answers = await self._all(asked, lambda one: one.call("oserve_weights_status"))
            for replica, ranks in zip(asked, answers, strict=True):
                told[replica] = ranks
                for rank, document in enumerate(ranks):
                    if document["state"] not in {"running", "done"}:
                        reason = document.get("reason") or document["state"]
                        raise MoveError(f"{replica} rank {rank}: {reason}")
            documents = list(itertools.chain(*(told[replica] for replica in replicas)))
            progress(sum(document.get("received_bytes", 0) for document in documents))
            if all(document["state"] == "done" for document in documents):
                return documents
            if self._clock.now() >= deadline_s:
                raise MoveError("it took longer than it may")
            await self._clock.sleep(_POLL_S)

    async def _forget(self, engine: EngineControl) -> None:
        for _ in range(_FORGET_TRIES):
            if await engine.forget_prefixes():
                return
            await self._clock.sleep(_POLL_S)
        raise EngineControlError("its prefix cache could not be emptied")

    async def _tell(self, method: str, asked: Sequence[tuple[str, tuple[Any, ...]]]) -> None:
        """Replicas with their own arguments."""
        calls = [self._engines[name].call(method, *arguments) for name, arguments in asked]
        await _answers([name for name, _ in asked], calls)

    async def _all(
        self, replicas: Sequence[str], ask: Callable[[EngineControl], Awaitable[Any]]
    ) -> list[Any]:
        return await _answers(replicas, [ask(self._engines[name]) for name in replicas])

    async def _abort(self, replicas: Sequence[str]) -> None:
        async def end(name: str) -> None:
            with contextlib.suppress(EngineControlError):
                await self._engines[name].call("oserve_weights_abort", timeout_s=_ABORT_S)

        await asyncio.gather(*(end(name) for name in replicas))


async def _answers(replicas: Sequence[str], calls: Sequence[Awaitable[Any]]) -> list[Any]:
    """All at once; the first that failed is the failure."""
    answers = await asyncio.gather(*calls, return_exceptions=True)
    for name, answer in zip(replicas, answers, strict=True):
        if isinstance(answer, EngineControlError):
            raise MoveError(f"{name}: {answer}")
        if isinstance(answer, BaseException):
            raise answer
    return list(answers)


def _done(documents: Sequence[Mapping[str, Any]]) -> bool:
    return bool(documents) and all(document["state"] == "done" for document in documents)


def _of(orders: Sequence[RankOrder], replica: str) -> list[RankOrder]:
    return [order for order in orders if order.replica == replica]


def _part_of(values: Sequence[Any], orders: Sequence[RankOrder], replica: str) -> list[Any]:
    """Of values by number of rank, those of a replica, in its rank order."""
    own = [
        (order.rank, value)
        for order, value in zip(orders, values, strict=True)
        if order.replica == replica
    ]
    return [value for _, value in sorted(own, key=lambda item: item[0])]


def _document(
    order: RankOrder,
    number: int,
    name: str,
    addresses: Sequence[str],
    limit_s: float,
    bytes_per_s: float,
) -> dict[str, Any]:
    """The order as ``weights.transfer.Order`` takes it."""
    fields = asdict(order)
    del fields["replica"], fields["rank"]
    return {
        **fields,
        "name": name,
        "rank": number,
        "addresses": addresses,
        "limit_s": limit_s,
        "bytes_per_s": bytes_per_s,
        "sends": list(order.sends.items()),
        "receives": list(order.receives.items()),
    }


def _checked(order: RankOrder) -> list[Any]:
    """All parts of a rank: what it sends, then what it receives."""
    return [*itertools.chain(*order.sends.values()), *itertools.chain(*order.receives.values())]


def _slice(parts: Mapping[int, Sequence[Any]], peer: int, sums: Sequence[int]) -> Sequence[int]:
    start = 0
    for other, own in parts.items():
        if other == peer:
            return sums[start : start + len(own)]
        start += len(own)
    return ()
