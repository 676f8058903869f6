"""Replicas that are to give up their running requests: which go on elsewhere, and when.

Short ones drain. The others move (see ``switch.kv``) as soon as another replica has a place for
them, and in any case when the time is up; then they wait for a place, by their rank.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

from oserve.control.dispatch.table import RoutingTable, TableReplica
from oserve.core import ReplicaPhase
from oserve.core.faults import fault
from oserve.gateway.standing import context_tokens, movable, remaining_tokens, tpot_s
from oserve.switch.kv import DrainPolicy, RunningRequest, TargetRoom, Way, decide_requests

if TYPE_CHECKING:
    from oserve.gateway.dispatch import Dispatcher
    from oserve.gateway.relay import Relay

_log = logging.getLogger("oserve.gateway")

_LOOK_S = 0.5
# Streams read and sent on between two turns of the event loop.
_AT_ONCE = 4

# What a cache moves at through files in memory.
_MOVE_BYTES_PER_S = 1e9
_ANY_TOKENS = 1 << 40

Key = tuple[str, float]


class HandOvers:
    """The orders of one gateway process; a replica is named with the time of its start."""

    def __init__(self, dispatcher: "Dispatcher", drain_limit_s: float | None) -> None:
        self._dispatcher = dispatcher
        self._drain_limit_s = drain_limit_s
        self._draining: dict[Key, asyncio.TimerHandle | None] = {}
        self._deadlines: dict[Key, float] = {}

    def follow(self, table: RoutingTable) -> None:
        """Replicas that drain hand over when their time is up; the gone are forgotten."""
        present = {(replica.id, replica.started_s): replica for replica in table.replicas}
        for key in self._draining.keys() - present.keys():
            timer = self._draining.pop(key)
            if timer is not None:
                timer.cancel()
        self._deadlines = {key: at for key, at in self._deadlines.items() if key in present}
        if self._drain_limit_s is None:
            return
        for key, replica in present.items():
            if replica.phase is ReplicaPhase.DRAINING and key not in self._draining:
                loop = asyncio.get_running_loop()
                self._draining[key] = loop.call_later(self._drain_limit_s, self.begin, key, 0.0)

    def leaving(self, replica: TableReplica) -> bool:
        """Whether it gives its requests up and gets no more."""
        return (replica.id, replica.started_s) in self._deadlines

    def begin(self, key: Key, within_s: float) -> None:
        """Have a replica give up its requests within so many seconds; asking again is harmless."""
        deadline_s = time.monotonic() + max(0.0, within_s)
        if deadline_s < self._deadlines.get(key, float("inf")):
            self._deadlines[key] = deadline_s
            self._look(key, deadline_s)

    def _look(self, key: Key, deadline_s: float) -> None:
        if self._deadlines.get(key) != deadline_s:
            return
        left_s = deadline_s - time.monotonic()
        due = left_s <= 0.0
        try:
            verdicts = self._verdicts(self._running(key), max(0.0, left_s))
        except Exception as error:
            _log.error("the requests of replica %s were not judged: %s", key[0], fault(error))
            verdicts = []
        moving = [(relay, way) for relay, way in verdicts if way is not Way.DRAIN]
        self._move(key, moving, force=due)
        if self._at(key):
            wait_s = _LOOK_S if due else min(_LOOK_S, left_s)
            asyncio.get_running_loop().call_later(wait_s, self._look, key, deadline_s)

    def _at(self, key: Key) -> bool:
        """Whether any request is still at that replica, or on its way there."""
        return any(
            relay.replica is not None and (relay.replica.id, relay.replica.started_s) == key
            for relay in self._dispatcher.active
        )

    def _running(self, key: Key) -> list["Relay"]:
        return [
            relay
            for relay in self._dispatcher.active
            if relay.placed
            and relay.replica is not None
            and relay.request is not None
            and (relay.replica.id, relay.replica.started_s) == key
        ]

    def _verdicts(self, relays: list["Relay"], left_s: float) -> list[tuple["Relay", Way]]:
        """What becomes of each; where engines cannot move caches these are computed again."""
        if not relays:
            return []
        others = self._others()
        prefill_s = min((replica.prefill_s_per_token for replica in others), default=0.0)
        target = min((replica.id for replica in others), default="")
        folders = {item.endpoint.caches for item in others} - {""}
        moves = any(
            relay.replica is not None and relay.replica.endpoint.caches in folders
            for relay in relays
        )
        # Whichever way it goes on, the engine waits until there is room for it.
        tokens = _ANY_TOKENS if moves else 0
        room = TargetRoom(
            kv_tokens=tokens,
            free_tokens=tokens,
            bandwidth=_MOVE_BYTES_PER_S,
            prefill_s_per_token=prefill_s,
        )
        requests = [
            RunningRequest(
                id=str(index),
                context_tokens=context_tokens(relay),
                remaining_tokens=remaining_tokens(relay),
                carries=movable(relay),
                target=target,
            )
            for index, relay in enumerate(relays)
        ]
        verdicts = decide_requests(
            requests,
            {target: room} if target else {},
            DrainPolicy(limit_s=left_s, decode_s_per_token=median(map(tpot_s, relays))),
            kv_bytes_per_token=max((item.kv_bytes_per_token for item in others), default=0.0),
        )
        ways = [verdict.way for verdict in verdicts]
        return list(zip(relays, ways, strict=True))

    def _others(self) -> list[TableReplica]:
        return list(self._dispatcher.serving.values())

    def _move(self, key: Key, moving: Sequence[tuple["Relay", Way]], *, force: bool) -> None:
        """A few at a time, so that other streams are not held up while these are read."""
        for relay, way in moving[:_AT_ONCE]:
            if relay.ended or relay.replica is None or not relay.placed:
                continue
            if (relay.replica.id, relay.replica.started_s) != key:
                continue
            if force or self._dispatcher.has_place(relay):
                relay.safely(partial(relay.hand_over, cache=way is Way.MOVE))
        if len(moving) > _AT_ONCE:
            loop = asyncio.get_running_loop()
            loop.call_soon(lambda: self._move(key, moving[_AT_ONCE:], force=force))
