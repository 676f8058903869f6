"""Which replicas have the beginning of a request cached: by its session, by its system prompt.

What is cached need not be computed again, so a replica that has it costs less for this request, by
the tokens it has. The router adds that to what it knows of load: a session stays where it is until
the queue there is longer than computing everything anew elsewhere. Memory is bounded.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping

_NOTHING: Mapping[str, int] = {}
_REPLICAS_PER_KEY = 4


class Affinity:
    """Remembers ``most`` sessions and as many shared prefixes, those used last."""

    def __init__(self, most: int = 16384) -> None:
        self._most = most
        self._sessions: OrderedDict[str, dict[str, int]] = OrderedDict()
        self._prefixes: OrderedDict[str, dict[str, int]] = OrderedDict()

    def cached(self, session: str, prefix: str, prompt_tokens: int) -> Mapping[str, int]:
        """Tokens of this prompt that replicas have, by their names; empty keys are none."""
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
        """A request goes to a replica, which has its prompt from then on."""
        if session:
            self._keep(self._sessions, session, replica, prompt_tokens)
        if prefix:
            self._keep(self._prefixes, prefix, replica, prefix_tokens)

    def forget(self, replicas: Iterable[str]) -> None:
        """These replicas are gone, or new ones under their name."""
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
