"""Which nodes of a cluster are in use: from what is seen of them and what an operator says.

Pure: sightings and times come in, states go out.

```
up <--> silent --> lost --> held down --> up        an operator's word: cordoned, draining
          ^                    |  ^
          +--------------------+  +-- the hold-down doubles with each loss
```

A node that is up, but lacks the model's files, is fetching: it is not used before it has them.

A node is lost after ``lost_after_s`` without a sign of life, or as soon as the cluster says that it
is dead. One that comes back is held down: a node that was lost is often lost again, and each time
costs its running requests. An operator's word holds whatever happens to the node. Silence while the
server itself stood still does not count.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from oserve.core import NodePhase, NodeSighting, NodeState, OServeError

_CORDONED, _DRAINING = NodePhase.CORDONED.value, NodePhase.DRAINING.value
_WORDS = {"", _CORDONED, _DRAINING}


@dataclass(frozen=True, slots=True, kw_only=True)
class NodePolicy:
    """Limits in seconds.

    A node without a sign of life is silent after ``silent_after_s`` and lost after
    ``lost_after_s``. After its k-th loss it is held down for ``hold_s * 2**(k-1)``, at most
    ``max_hold_s``. A node that was in use for ``forget_s`` without a loss has a clean record.
    Of the time between two rounds at most ``round_s`` counts as silence: for the rest the server
    stood still.
    """

    silent_after_s: float = 2.5
    lost_after_s: float = 5.0
    hold_s: float = 60.0
    max_hold_s: float = 1800.0
    forget_s: float = 3600.0
    round_s: float = 2.0

    def hold_down_s(self, losses: int) -> float:
        """How long a node is held down after so many losses."""
        return min(self.hold_s * 2.0 ** min(max(0, losses - 1), 64), self.max_hold_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRecord:
    """The condition of one node: up, silent, lost or held down, and the operator's word.

    ``heard_s``: the last sign of life, in seconds in which the server did not stand still.
    ``lacks``: see ``NodeSighting``.
    """

    name: str
    condition: NodePhase = NodePhase.UP
    since_s: float = 0.0
    until_s: float = 0.0
    heard_s: float = 0.0
    losses: int = 0
    word: str = ""
    reason: str = ""
    lacks: str | None = ""

    @property
    def state(self) -> NodeState:
        """The state, without its silence."""
        condition = self.condition
        reachable = condition in {NodePhase.UP, NodePhase.SILENT}
        phase = condition
        if self.lacks and reachable:
            phase = NodePhase.FETCHING
        if self.word and condition is not NodePhase.LOST:
            phase = NodePhase(self.word)
        return NodeState(
            name=self.name,
            phase=phase,
            since_s=self.since_s,
            until_s=self.until_s if condition is NodePhase.HELD_DOWN else 0.0,
            losses=self.losses,
            word=self.word,
            reason=self.lacks if self.lacks and reachable else self.reason,
            startable=condition is NodePhase.UP and not self.word and self.lacks == "",
            usable=reachable and not self.word and not self.lacks,
            reachable=reachable,
        )


def next_record(
    record: NodeRecord, sighting: NodeSighting, now_s: float, policy: NodePolicy
) -> NodeRecord:
    """The record after one more sighting; one step, so call it at least once a second."""
    silent_s = sighting.silent_s
    if sighting.dead or silent_s >= policy.lost_after_s:
        return _lost(record, sighting.dead or f"no sign of life for {silent_s:.0f} s", now_s)
    return _alive(record, now_s, policy, heard=silent_s < policy.silent_after_s)


def _alive(record: NodeRecord, now_s: float, policy: NodePolicy, *, heard: bool) -> NodeRecord:
    until_s = record.until_s
    match record.condition:
        case NodePhase.LOST if heard:
            condition, until_s = NodePhase.HELD_DOWN, now_s + policy.hold_down_s(record.losses)
        case NodePhase.HELD_DOWN if heard and now_s >= until_s:
            return replace(record, condition=NodePhase.UP, since_s=now_s, reason="")
        case NodePhase.UP if not heard:
            condition = NodePhase.SILENT
        case NodePhase.SILENT if heard:
            condition = NodePhase.UP
        case NodePhase.UP if record.losses and now_s - record.since_s >= policy.forget_s:
            return replace(record, losses=0)
        case _:
            return record
    return replace(record, condition=condition, since_s=now_s, until_s=until_s)


def _lost(record: NodeRecord, reason: str, now_s: float) -> NodeRecord:
    if record.condition is NodePhase.LOST:
        return record
    return replace(
        record,
        condition=NodePhase.LOST,
        since_s=now_s,
        until_s=0.0,
        losses=record.losses + 1,
        reason=reason,
    )


class NodeBook:
    """The records of all nodes. Nodes join when they are first seen, and are in use at once.

    ``version`` changes with each word of the operator, so that they can be saved.
    """

    def __init__(self, policy: NodePolicy | None = None) -> None:
        self.policy = policy or NodePolicy()
        self.version = 0
        self._records: dict[str, NodeRecord] = {}
        # Of nodes that were not seen since the start: word, losses, and whether they were not in
        # use because of a loss.
        self._words: dict[str, tuple[str, int, bool]] = {}
        self._last_s: float | None = None
        self._awake_s = 0.0
        # The last round's sightings and states, while every node is heard, up and of clean record:
        # on a virtual clock all rounds are alike, and there are many.
        self._calm: tuple[object, tuple[NodeState, ...]] | None = None
        self._calm_s = float("-inf")

    def observe(self, now_s: float, sightings: Iterable[NodeSighting]) -> tuple[NodeState, ...]:
        """The states after what is seen now, by name. A node that is not seen is silent."""
        passed_s = 0.0 if self._last_s is None else now_s - self._last_s
        self._last_s = now_s
        self._awake_s += max(0.0, min(passed_s, self.policy.round_s))
        if self._calm is not None and self._calm[0] is sightings:
            self._calm_s = self._awake_s
            return self._calm[1]
        seen = {sighting.name: sighting for sighting in sightings}
        for name in seen.keys() - self._records.keys():
            word, losses, lost = self._words.pop(name, ("", 0, False))
            self._records[name] = NodeRecord(
                name=name,
                condition=NodePhase.LOST if lost else NodePhase.UP,
                since_s=now_s,
                heard_s=self._awake_s,
                word=word,
                losses=losses,
                reason="lost before the server was restarted" if lost else "",
            )
        states = []
        for name in sorted(self._records):
            record = self._records[name]
            sighting = seen.get(name, NodeSighting(name=name, silent_s=float("inf")))
            heard_s = max(record.heard_s, self._calm_s, self._awake_s - sighting.silent_s)
            silent_s = min(sighting.silent_s, self._awake_s - heard_s)
            record = next_record(
                replace(record, heard_s=heard_s, lacks=sighting.lacks),
                replace(sighting, silent_s=silent_s),
                now_s,
                self.policy,
            )
            self._records[name] = record
            states.append(replace(record.state, silent_s=silent_s))
        found = tuple(states)
        heard = seen.keys() == self._records.keys() and all(
            sighting.silent_s == 0.0 and not sighting.dead for sighting in seen.values()
        )
        calm = heard and all(state.startable and not state.losses for state in found)
        self._calm = (sightings, found) if calm else None
        return found

    # -- the operator's words -------------------------------------------------------------------
    def cordon(self, name: str) -> None:
        """Start nothing new on a node. Raises OServeError for an unknown one."""
        self._say(name, _CORDONED)

    def drain(self, name: str) -> None:
        """Empty a node, too. Raises OServeError for an unknown one."""
        self._say(name, _DRAINING)

    def uncordon(self, name: str) -> None:
        """Use a node again; this ends its hold-down. Raises OServeError for an unknown one."""
        self._say(name, "")
        record = self._records[name]
        if record.condition is NodePhase.HELD_DOWN:
            self._records[name] = replace(record, until_s=0.0, losses=0)
        else:
            self._records[name] = replace(record, losses=0)

    def _say(self, name: str, word: str) -> None:
        record = self._records.get(name)
        if record is None:
            known = ", ".join(sorted(self._records)) or "this cluster is one machine"
            raise OServeError(
                f"there is no node {name!r}", place="node", remedy=f"nodes are: {known}"
            )
        self._records[name] = replace(record, word=word)
        self._calm = None
        self.version += 1

    # -- memory ---------------------------------------------------------------------------------
    def state(self) -> dict[str, Any]:
        """Words and losses as plain data, for ``restore``. A hold-down begins anew with that."""
        away = {NodePhase.LOST, NodePhase.HELD_DOWN}
        records = {
            record.name: [record.word, record.losses, record.condition in away]
            for record in self._records.values()
            if record.word or record.losses or record.condition in away
        }
        unseen = {name: list(said) for name, said in self._words.items()}
        return {"nodes": {**unseen, **records}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``. Raises ValueError if it is not one."""
        found = state.get("nodes", {})
        if not isinstance(found, Mapping):
            raise ValueError("nodes must be an object")
        words = {}
        for name, said in found.items():
            word, losses, lost = said
            if word not in _WORDS or not isinstance(losses, int) or losses < 0:
                raise ValueError(f"the state of node {name!r} is not known")
            words[str(name)] = (str(word), losses, bool(lost))
        self._words = words
