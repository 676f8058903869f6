"""What lets a stream go on at another replica: what is kept of it, and how it is continued.

The first replica's events pass through and are kept in a replay buffer. When the stream has to
leave, ``prepare`` reads the buffer; from then on the continuation is known and follows by itself.
"""

from dataclasses import dataclass

from oserve.control.dispatch.table import TableReplica
from oserve.gateway.http.body import Fields
from oserve.gateway.stream.continuation import BrokenError, Continuation
from oserve.gateway.stream.continuation_fields import (
    UnmovableError,
    kept_from_moving,
    values_of,
)
from oserve.gateway.stream.replay_buffer import ReplayBudget, ReplayBuffer
from oserve.wire.caches import CacheFolder, giving, new_name, taking


@dataclass(frozen=True, slots=True, kw_only=True)
class Unmovable:
    """Why a stream stays with its replica."""

    reason: str


class StreamMigration:
    """Of one stream. ``shows_ids``: the client asked for token ids itself.

    ``continuation`` is ``None`` while the first replica serves it.
    """

    def __init__(
        self, fields: Fields, budget: ReplayBudget, *, chat: bool, shows_ids: bool
    ) -> None:
        self.buffer = ReplayBuffer(budget)
        self.shows_ids = shows_ids
        self.continuation: Continuation | None = None
        self._prepared: Continuation | None = None
        self._fields = fields
        self._chat = chat
        self._reason: str | None = None
        # The KV cache at the replica that serves it, and the one that it goes on with.
        self._cache_folder = ""
        self._cache = ""
        self._taken = ""

    def sent_to(self, replica: TableReplica) -> None:
        """A replica was chosen; its engine is told how this request's cache may be asked for."""
        self._cache_folder = replica.endpoint.caches
        self._cache = new_name() if self._cache_folder else ""

    @property
    def cache_fields(self) -> dict[str, str]:
        """What the engine is told of the request's KV cache."""
        own = giving(self._cache) if self._cache else {}
        return own | (taking(self._taken) if self._taken else {})

    def prepare(self) -> Continuation | Unmovable:
        """The stream so far, from what was kept of it; it goes on as it was until it leaves."""
        try:
            self._prepared = self.continuation or self._read()
        except (UnmovableError, BrokenError) as error:
            return Unmovable(reason=str(error))
        if not self._prepared.prompt:
            return Unmovable(reason="nothing is known of its prompt")
        return self._prepared

    def _read(self) -> Continuation:
        continuation = Continuation(self._fields, chat=self._chat)
        self.buffer.read_into(continuation)
        return continuation

    def leave(self, *, with_cache: bool) -> bool:
        """The stream leaves its replica; whether its engine was asked to keep the KV cache."""
        self.buffer.drop()
        self.continuation = self._prepared
        if self.continuation is not None:
            self.continuation.rewind()
        self._taken = self._ask_for_cache() if with_cache else ""
        return bool(self._taken)

    def _ask_for_cache(self) -> str:
        if not self._cache:
            return ""
        try:
            CacheFolder(self._cache_folder).ask(self._cache)
        except OSError:
            return ""
        return self._cache

    @property
    def movable(self) -> bool:
        """Whether nothing that is known without reading the answer keeps it from moving."""
        if self.buffer.full:
            return False
        if self._reason is None:
            try:
                values = values_of(self._fields, chat=self._chat)
            except UnmovableError as error:
                self._reason = str(error)
            else:
                self._reason = kept_from_moving(values, chat=self._chat)
        return not self._reason

    def release(self) -> None:
        """The request has ended, or will not move."""
        self.buffer.drop()
