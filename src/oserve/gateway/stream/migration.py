"""Stream migration: the replay buffer of a stream, and its continuation on another replica.

The gateway passes the first replica's events through and stores them in a replay buffer. When the
stream must leave, ``prepare`` parses the buffer into a continuation, which follows the stream from
then on.
"""

from dataclasses import dataclass

from oserve.control.dispatch.table import TableReplica
from oserve.gateway.http.body import Fields
from oserve.gateway.stream.continuation import BrokenError, Continuation
from oserve.gateway.stream.continuation_fields import (
    UnmovableError,
    migration_obstacle,
    values_of,
)
from oserve.gateway.stream.replay_buffer import ReplayBudget, ReplayBuffer
from oserve.wire.caches import CacheFolder, giving, new_name, taking


@dataclass(frozen=True, slots=True, kw_only=True)
class Unmovable:
    """The reason why a stream cannot migrate."""

    reason: str


class StreamMigration:
    """The migration state of one stream. ``shows_ids``: the client requested token ids itself.

    ``continuation`` is ``None`` while the first replica serves the stream.
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
        # The KV cache at the present replica, and the one that the continuation loads.
        self._cache_folder = ""
        self._cache = ""
        self._requested = ""

    def use_replica(self, replica: TableReplica) -> None:
        """Use a replica; its engine gets a key under which this request's cache can be fetched."""
        self._cache_folder = replica.endpoint.caches
        self._cache = new_name() if self._cache_folder else ""

    @property
    def cache_fields(self) -> dict[str, str]:
        """The parameters of the KV cache transfer for the engine."""
        own = giving(self._cache) if self._cache else {}
        return own | (taking(self._requested) if self._requested else {})

    def prepare(self) -> Continuation | Unmovable:
        """Parse the replay buffer into the continuation; the stream runs on until it leaves."""
        try:
            self._prepared = self.continuation or self._read()
        except (UnmovableError, BrokenError) as error:
            return Unmovable(reason=str(error))
        if not self._prepared.prompt:
            return Unmovable(reason="its prompt is unknown")
        return self._prepared

    def _read(self) -> Continuation:
        continuation = Continuation(self._fields, chat=self._chat)
        self.buffer.read_into(continuation)
        return continuation

    def leave(self, *, with_cache: bool) -> bool:
        """Detach from the replica; returns whether its engine was asked to keep the KV cache."""
        self.buffer.drop()
        self.continuation = self._prepared
        if self.continuation is not None:
            self.continuation.rewind()
        self._requested = self._request_cache() if with_cache else ""
        return bool(self._requested)

    def _request_cache(self) -> str:
        if not self._cache:
            return ""
        try:
            CacheFolder(self._cache_folder).ask(self._cache)
        except OSError:
            return ""
        return self._cache

    @property
    def movable(self) -> bool:
        """Whether the stream can migrate, as far as is known without parsing the answer."""
        if self.buffer.full:
            return False
        if self._reason is None:
            try:
                values = values_of(self._fields, chat=self._chat)
            except UnmovableError as error:
                self._reason = str(error)
            else:
                self._reason = migration_obstacle(values, chat=self._chat)
        return not self._reason

    def release(self) -> None:
        """Free the replay buffer: the request has ended, or will not migrate."""
        self.buffer.drop()
