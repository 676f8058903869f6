"""Sees that every node has the model's files: those that have them send them to those without.

Examiners on the nodes find, send and fetch; this side decides who sends to whom (``relay_tree``)
and holds a node until it has the files. A node that is lost on the way is asked again when it is
back.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence

from oserve.core import Clock, OServeError
from oserve.nodes.directory import ClusterNode
from oserve.nodes.due_work import DueWork
from oserve.nodes.examiner import OFFER_SOCKET
from oserve.nodes.fetch_messages import (
    FetchAnswer,
    FetchEnd,
    FetchProgress,
    FetchQuery,
    FilesOffered,
    HoldingsQuery,
    ModelHoldings,
    OfferQuery,
)
from oserve.nodes.holdings import ModelSpread, spread_of
from oserve.nodes.node_standing import AGAIN_S, NodeStanding
from oserve.nodes.relay_tree import FileTransfer, next_transfers, relay_rounds, relay_s
from oserve.nodes.visit import NodeVisit

_log = logging.getLogger("oserve.nodes")

_HOLDINGS_S = 180.0
_OFFER_S = 30.0
# An examiner tells each second how far it is; before that it may read what it has already.
_TELL_S = 900.0
_VISIT_S = 86400.0
_NICE = 10
_TRIES = 2
_LINKS_S = 15.0
_GIB = 1 << 30
_COMES = "the model's files are about to come from another node"
_MISFIT = "it has other files of the model than most nodes, and not all of them: remove them"


class ModelFetch:
    """The files of ``models`` on the nodes that ``up`` returns, by name.

    ``rates``: bytes per second from node to node, where known; ``rates_known``: no more of them are
    about to be. ``visit`` is for tests.
    """

    def __init__(
        self,
        models: Sequence[str],
        up: Callable[[], Mapping[str, ClusterNode]],
        clock: Clock,
        *,
        rates: Callable[[], Mapping[tuple[str, str], float]] = dict,
        rates_known: Callable[[], bool] = lambda: True,
        visit: Callable[[ClusterNode], NodeVisit] | None = None,
    ) -> None:
        self._models = tuple(dict.fromkeys(models))
        self._up = up
        self._clock = clock
        self._rates = rates
        self._rates_known = rates_known
        self._waits_until_s: float | None = None
        self._visit = visit or (
            lambda node: NodeVisit(node, purpose="fetch", limit_s=_VISIT_S, nice=_NICE)
        )
        self._seen: dict[str, NodeStanding] = {}
        self._spreads: dict[str, ModelSpread] = {}
        self._visits: dict[str, NodeVisit] = {}
        self._busy: dict[str, FileTransfer] = {}
        self._works: dict[str, asyncio.Task[None]] = {}
        self._told: set[str] = set()
        self._foretold: dict[str, frozenset[str]] = {}
        self._looking = DueWork(self._look, clock, fault="the model's files are not looked after")
        self._alarm: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Look after the nodes from now on."""
        if self._models:
            self._looking.begin()

    def refresh(self) -> None:
        """A node has come up, or is down."""
        self._looking.refresh()

    async def close(self) -> None:
        """Leave the nodes; what was fetched stays there for the next server."""
        await self._looking.close()
        tasks = [*self._works.values(), *filter(None, (self._alarm,))]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(visit.end() for visit in self._visits.values()))
        self._visits.clear()

    def lacks(self, node: str) -> str | None:
        """What a node waits for, in words; empty if for nothing, ``None`` if that is not known."""
        if not self._models:
            return ""
        seen = self._seen.get(node)
        if seen is None or seen.holdings is None:
            return None
        if not seen.judged:
            whole = [item.complete for item in seen.holdings.values()]
            return "" if len(whole) == len(self._models) and all(whole) else None
        if any(node in spread.misfits for spread in self._spreads.values()):
            return _MISFIT
        if all(node not in spread.seekers for spread in self._spreads.values()):
            return ""
        return seen.words or _COMES

    @property
    def active(self) -> bool:
        """Whether files are under way."""
        return bool(self._busy)

    # -- what to do next ------------------------------------------------------------------------
    async def _look(self) -> None:
        try:
            await self._step()
            self._set_alarm()
        # An unforeseen fault must not hold nodes for ever: an engine says what it lacks.
        except Exception:
            _log.exception("the model's files cannot be looked after")
            self._models = ()

    async def _step(self) -> None:
        """Begin all that can be begun; what ends makes the next step due."""
        if not self._models:
            return
        nodes = self._up()
        for name in [name for name in self._seen if name not in nodes]:
            await self._drop(name)
        for name, node in nodes.items():
            if name not in self._seen:
                self._seen[name] = NodeStanding(node=node)
                self._work(name, self._examine(self._seen[name]))
        now_s = self._clock.now()
        for name, seen in self._seen.items():
            due = seen.look_at_s is not None and seen.look_at_s <= now_s
            if due and name not in self._works and name not in self._busy:
                self._work(name, self._examine(seen))
        if any(seen.holdings is None for seen in self._seen.values()):
            return  # what most nodes have is the model
        self._compare()
        if self._waits():
            return
        for model, spread in self._spreads.items():
            self._foretell(model, spread)
        for transfer in self._wanted():
            self._busy[transfer.sender] = self._busy[transfer.receiver] = transfer
            ends = self._seen[transfer.sender], self._seen[transfer.receiver]
            self._work(transfer.receiver, self._transfer(transfer, *ends))
        if not self._works:
            await self._leave()

    def _set_alarm(self) -> None:
        """Make a step due when a pause ends."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        now_s = self._clock.now()
        times = [time_s for seen in self._seen.values() if (time_s := seen.next_s(now_s))]
        if times:
            self._alarm = asyncio.create_task(self._ring(min(times) - now_s))

    async def _ring(self, pause_s: float) -> None:
        await self._clock.sleep(pause_s)
        self._looking.refresh()

    def _waits(self) -> bool:
        """Whether to wait for links that are being measured, which takes seconds."""
        if not any(spread.seekers for spread in self._spreads.values()) or self._rates_known():
            self._waits_until_s = None
            return False
        now_s = self._clock.now()
        if self._waits_until_s is None:
            self._waits_until_s = now_s + _LINKS_S
        if now_s >= self._waits_until_s:
            return False
        self._work("links", self._clock.sleep(1.0))
        return True

    def _compare(self) -> None:
        for seen in self._seen.values():
            seen.judged = True
        for model in self._models:
            found = {
                name: seen.holdings[model]
                for name, seen in self._seen.items()
                if seen.holdings is not None and model in seen.holdings
            }
            spread = self._spreads[model] = spread_of(found)
            for name in sorted(spread.strangers):
                self._tell(
                    f"node {name} has other files of {model} than most nodes; they are left alone"
                )
            for name in sorted(spread.misfits):
                self._tell(f"node {name} lacks {model}: {_MISFIT}")
                self._seen[name].look_again(self._clock.now())
            if found and not spread.holders:
                self._tell(f"no node has all files of {model}: engines look for it themselves")

    def _foretell(self, model: str, spread: ModelSpread) -> None:
        """Log what is about to go where, once."""
        fresh = spread.seekers - self._foretold.get(model, frozenset())
        self._foretold[model] = spread.seekers
        if not fresh:
            return
        rounds = relay_rounds(spread.holders, spread.seekers, self._rates())
        seconds = relay_s(rounds, spread.model.size_bytes, self._rates())
        size = spread.model.size_bytes / _GIB
        when = "" if seconds is None else f", in about {seconds:.0f} s"
        _log.info(
            "%d nodes lack %s (%.2f GiB): it goes there from %d, in %d rounds%s",
            *(len(spread.seekers), model, size, len(spread.holders), len(rounds), when),
        )

    def _wanted(self) -> list[FileTransfer]:
        """The transfers to begin now; a node lacks one model at a time."""
        now_s = self._clock.now()
        resting = {name for name, seen in self._seen.items() if seen.pause_until_s > now_s}
        found: list[FileTransfer] = []
        for spread in self._spreads.values():
            busy = {
                *self._busy,
                *self._works,
                *(end for one in found for end in (one.sender, one.receiver)),
            }
            barred = {
                (sender, name) for name in spread.seekers for sender in self._seen[name].failed_from
            }
            found += next_transfers(
                spread.holders, spread.seekers - resting, self._rates(), busy=busy, barred=barred
            )
        return found

    # -- work on nodes --------------------------------------------------------------------------
    def _work(self, name: str, work: Coroutine[None, None, None]) -> None:
        task = self._works[name] = asyncio.ensure_future(work)

        def ended(task: "asyncio.Task[None]") -> None:
            fault = None if task.cancelled() else task.exception()
            if fault is not None:
                _log.error("node %s: its model cannot be looked after", name, exc_info=fault)
            if self._works.get(name) is task:
                del self._works[name]
                if fault is not None and name in self._seen:
                    self._stumbled(self._seen[name])
            self._looking.refresh()

        task.add_done_callback(ended)

    def _stumbled(self, seen: NodeStanding) -> None:
        """An unforeseen fault must not hold a node for ever, nor be met again at once."""
        now_s = self._clock.now()
        seen.unexamined(now_s)
        seen.failed("a fault of this server, see its log", now_s, sender="", refused=True)

    async def _visited(self, node: ClusterNode) -> NodeVisit:
        """The visit to a node, which is begun if there is none. Raises OSError, OServeError."""
        visit = self._visits.get(node.name)
        if visit is not None and visit.open:
            return visit
        if visit is not None:
            await visit.end()
        visit = self._visits[node.name] = self._visit(node)
        await visit.begin()
        return visit

    async def _examine(self, seen: NodeStanding) -> None:
        name = seen.node.name
        for tries_left in reversed(range(_TRIES)):
            try:
                seen.examined(await self._asked(seen.node))
                return
            except (OSError, OServeError) as error:
                _log.warning("node %s could not be asked for the model: %s", name, _plain(error))
            if tries_left:
                await self._clock.sleep(AGAIN_S)
        seen.unexamined(self._clock.now())

    async def _asked(self, node: ClusterNode) -> dict[str, ModelHoldings]:
        """What a node has. Raises OSError, OServeError."""
        visit = await self._visited(node)
        return {
            model: await visit.ask(HoldingsQuery(model=model), ModelHoldings, _HOLDINGS_S)
            for model in self._models
        }

    async def _transfer(
        self, transfer: FileTransfer, sender: NodeStanding, receiver: NodeStanding
    ) -> None:
        try:
            for model, spread in list(self._spreads.items()):
                if transfer.receiver not in spread.seekers or transfer.sender not in spread.holders:
                    continue
                try:
                    end = await self._fetched(sender, receiver, model, spread.model)
                except (OSError, OServeError) as error:
                    end = FetchEnd(error=_plain(error))
                if end.error:
                    self._failed(sender, receiver, end)
                    # It may have lost them, or have others now.
                    if not end.refused and self._seen.get(transfer.sender) is sender:
                        await self._examine(sender)
                    return
                self._got(sender, receiver, model, spread.model, end)
        finally:
            for name in (transfer.sender, transfer.receiver):
                if self._busy.get(name) == transfer:
                    del self._busy[name]

    async def _fetched(
        self, sender: NodeStanding, receiver: NodeStanding, model: str, wanted: ModelHoldings
    ) -> FetchEnd:
        """Have a node fetch what it lacks from another. Raises OSError, OServeError."""
        if self._seen.get(sender.node.name) is not sender:
            raise ConnectionError(f"node {sender.node.name} is down")
        source = await self._visited(sender.node)
        offered = await source.ask(OfferQuery(model=model), FilesOffered, _OFFER_S)
        if offered.error or sender.node.hatch is None:
            raise ConnectionError(f"{sender.node.name}: {offered.error}")
        visit = await self._visited(receiver.node)
        visit.tell(
            FetchQuery(
                model=model,
                source=sender.node.hatch,
                name=f"{source.name}/{OFFER_SOCKET}",
                files=wanted.files,
                revision=wanted.revision,
            )
        )
        while True:
            # Two types in a union, which is no type of a parameter to mypy.
            told: FetchAnswer = await visit.heard(FetchAnswer, _TELL_S)  # type: ignore[arg-type]
            match told:
                case FetchEnd():
                    return told
                case FetchProgress(have_bytes=have, all_bytes=whole):
                    receiver.words = (
                        f"it gets the model from {sender.node.name}: "
                        f"{have / _GIB:.2f} of {whole / _GIB:.2f} GiB"
                    )

    def _got(
        self,
        sender: NodeStanding,
        receiver: NodeStanding,
        model: str,
        wanted: ModelHoldings,
        end: FetchEnd,
    ) -> None:
        receiver.got(model, wanted)
        rate = end.fetched_bytes / max(end.seconds, 1e-9) / 1e6
        _log.info(
            "node %s has %s from node %s: %.2f GiB in %.1f s (%.0f MB/s)",
            *(receiver.node.name, model, sender.node.name),
            *(end.fetched_bytes / _GIB, end.seconds, rate),
        )

    def _failed(self, sender: NodeStanding, receiver: NodeStanding, end: FetchEnd) -> None:
        now_s = self._clock.now()
        if receiver.failed(end.error, now_s, sender=sender.node.name, refused=end.refused):
            _log.warning("node %s: %s", receiver.node.name, receiver.words)

    async def _drop(self, name: str) -> None:
        """A node is down; what it had may be gone when it is back."""
        del self._seen[name]
        task = self._works.pop(name, None)
        if task is not None:
            task.cancel()
        # A fetch from it breaks at the other end by itself, and goes on from another node.
        self._busy.pop(name, None)
        visit = self._visits.pop(name, None)
        if visit is not None:
            await visit.end()

    async def _leave(self) -> None:
        visits, self._visits = self._visits, {}
        await asyncio.gather(*(visit.end() for visit in visits.values()))

    def _tell(self, line: str) -> None:
        """Log a line once."""
        if line not in self._told:
            self._told.add(line)
            _log.info("%s", line)


def _plain(error: Exception) -> str:
    return error.message if isinstance(error, OServeError) else str(error) or "no answer in time"
