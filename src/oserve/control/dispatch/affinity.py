"""Prefix affinity: which replicas hold a request's prefix in cache, by session or system prompt.

A replica does not compute cached tokens again, so the request costs less there. The router adds
this saving to the load: a session stays at its replica until the queue there takes longer than
recomputing the prompt elsewhere. Memory is bounded.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping

_NOTHING: Mapping[str, int] = {}
_REPLICAS_PER_KEY = 4


class Affinity:
    """Least-recently-used maps of ``most`` sessions and ``most`` shared prefixes to replicas."""

    def __init__(self, most: int = 16384) -> None:
        self._most = most
        self._sessions: OrderedDict[str, dict[str, int]] = OrderedDict()
        self._prefixes: OrderedDict[str, dict[str, int]] = OrderedDict()

    def cached(self, session: str, prefix: str, prompt_tokens: int) -> Mapping[str, int]:
        """Cached tokens of this prompt by replica name; an empty key matches nothing."""
        shared = self._prefixes.get(prefix, _NOTHING) if prefix else _NOTHING
        own = self._sessions.get(session, _NOTHING) if session else _NOTHING
        if not own and not shared:
            return _NOTHING
        most = max(0, prompt_tokens - 1)
        found = {name: min(tokens, most) for name, tokens in shared.items()}
        for name, tokens in own.items():
            found[name] = max(found.get(name, 0), min(tokens, most))
        return found

    def sent(
        self, session: str, prefix: str, replica: str, *, prompt_tokens: int, prefix_tokens: int
    ) -> None:
        """Record that a request was sent to a replica, which then has its prompt in cache."""
        if session:
            self._keep(self._sessions, session, replica, prompt_tokens)
        if prefix:
            self._keep(self._prefixes, prefix, replica, prefix_tokens)

    def forget(self, replicas: Iterable[str]) -> None:
        """Drop the entries of replicas that stopped or restarted."""
        gone = set(replicas)
        if not gone:
            return
        for table in (self._sessions, self._prefixes):
            for held in table.values():
                for name in gone & held.keys():
                    del held[name]

    def _keep(
        self, table: OrderedDict[str, dict[str, int]], key: str, replica: str, tokens: int
    ) -> None:
        held = table.get(key)
        if held is None:
            table[key] = held = {}
            if len(table) > self._most:
                table.popitem(last=False)
        else:
            table.move_to_end(key)
        held.pop(replica, None)
        held[replica] = tokens
        if len(held) > _REPLICAS_PER_KEY:
            del held[next(iter(held))]
