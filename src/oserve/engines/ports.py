"""Ports at which the ranks of a replica over several nodes meet."""

import random
from collections.abc import Sequence

# Outside the range from which kernels pick ports of outgoing connections (from 32768 on), and
# outside Kubernetes' node ports (from 30000 on).
MASTER_PORTS = range(25500, 26500)


class MasterPorts:
    """Hands out ports of leaders' addresses; none twice in ``ports`` until all had their turn.

    A port may be taken by somebody else on that machine. Then the engine ends, and its next start
    gets another port. ``first``: the place in ``ports`` to begin at, random by default, so that two
    servers do not ask for the same ones.
    """

    def __init__(self, ports: Sequence[int] = MASTER_PORTS, first: int | None = None) -> None:
        self._ports = ports
        self._first = random.randrange(len(ports)) if first is None else first
        self._taken: dict[str, int] = {}

    def take(self, address: str) -> int:
        """The next port of that address."""
        number = self._taken.get(address, 0)
        self._taken[address] = number + 1
        return self._ports[(self._first + number) % len(self._ports)]
