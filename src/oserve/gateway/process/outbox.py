"""Request records of a gateway process on another node, on their way to the server."""

from collections import deque
from itertools import islice

from oserve.core import RequestRecord

_BACKLOG = 50_000
_MOST_AT_ONCE = 1000


class RecordOutbox:
    """Records by number, kept until the hub has them; see ``records.RecordSink``.

    While no hub answers, the newest beyond the limit are dropped.
    """

    def __init__(self) -> None:
        self._waiting: deque[RequestRecord] = deque()
        self._first = 0

    def put(self, record: RequestRecord) -> bool:
        """See ``RecordSink.put``."""
        if len(self._waiting) >= _BACKLOG:
            return False
        self._waiting.append(record)
        return True

    def close(self) -> None:
        """What is left goes with the last reports."""

    @property
    def empty(self) -> bool:
        """Whether the hub has all of them."""
        return not self._waiting

    def next(self) -> tuple[int, list[RequestRecord]]:
        """The number of the oldest record that waits, and some records from there on."""
        return self._first, list(islice(self._waiting, _MOST_AT_ONCE))

    def acknowledge(self, count: int) -> None:
        """The hub has all records with numbers below ``count``."""
        while self._waiting and self._first < count:
            self._waiting.popleft()
            self._first += 1


class RecordInbox:
    """What the hub has of each process's records: each is passed on once, whatever comes twice.

    A hub that has just started knows nothing of an earlier one's: at its first report a process
    may send again what that one had taken, and not acknowledged.
    """

    def __init__(self) -> None:
        self._taken: dict[int, int] = {}

    def fresh(
        self, incarnation: int, first: int, records: list[RequestRecord]
    ) -> list[RequestRecord]:
        """Those of ``records``, the first of which has the number ``first``, that are new."""
        taken = self._taken.get(incarnation, first)
        new = records[max(0, taken - first) :]
        self._taken[incarnation] = max(taken, first + len(records))
        return new

    def taken(self, incarnation: int) -> int:
        """All records with numbers below this are here."""
        return self._taken.get(incarnation, 0)

    def forget(self, incarnation: int) -> None:
        """The process has ended."""
        self._taken.pop(incarnation, None)
