"""A stream that can go on at another replica: what is kept of it, and the sink of what goes on.

The first replica's events pass through (``passing``) and are ``kept``. When it breaks off, or is to
give its requests up, ``resume`` reads what was kept and sends a continuation; its events are turned
into the client's one by one, and kept as they are understood, so that a stream can move again.
"""

from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING

from oserve.control.dispatch.table import TableReplica
from oserve.gateway.http.body import Fields
from oserve.gateway.http.errors import upstream_failed
from oserve.gateway.standing import remaining_tokens
from oserve.gateway.stream.answer import Usage
from oserve.gateway.stream.continuation import BrokenError, Carried, DivergedError
from oserve.gateway.stream.continuation_fields import UnmovableError, kept_from_moving, values_of
from oserve.gateway.stream.pass_through import DONE
from oserve.gateway.stream.replay_buffer import Budget, Kept, read_event
from oserve.switch.kv import Way
from oserve.wire import Dechunker, ResponseHead, chunk
from oserve.wire.caches import CacheFolder, giving, new_name, taking
from oserve.wire.events import EventReader, EventsError
from oserve.wire.framing import LAST_CHUNK, FramingError
from oserve.wire.upstream import UpstreamConnection

if TYPE_CHECKING:
    from oserve.gateway.relay import Relay


class Moving:
    """What lets one relay's stream move; the sink of its continuations."""

    def __init__(self, relay: "Relay", budget: Budget, *, shows_ids: bool, max_moves: int) -> None:
        self._relay = relay
        self.kept = Kept(budget)
        self.shows_ids = shows_ids
        self._max_moves = max_moves
        self._plain = relay.exchange.http_1_0
        self._carried: Carried | None = None
        # The KV cache at the replica that serves it, and the one that it goes on with.
        self._cache_folder = ""
        self._cache = ""
        self._taken = ""
        self._head: ResponseHead | None = None
        self._dechunker: Dechunker | None = None
        self._reader = EventReader()
        self._reason: str | None = None
        self.moves = 0

    def write(self, payload: bytes) -> None:
        """Send events to the client."""
        if payload:
            self._relay.exchange.write(payload if self._plain else chunk(payload))

    # -- going on -------------------------------------------------------------------------------
    def sent_to(self, replica: TableReplica) -> None:
        """A replica was chosen; its engine is told how this request's cache may be asked for."""
        self._cache_folder = replica.endpoint.caches
        self._cache = new_name() if self._cache_folder else ""

    @property
    def cache_fields(self) -> dict[str, str]:
        """What the engine is told of the request's KV cache."""
        own = giving(self._cache) if self._cache else {}
        return own | (taking(self._taken) if self._taken else {})

    def _ask_for_cache(self) -> str:
        """Have the engine keep the cache when the request is taken away; its name, if it will."""
        if not self._cache:
            return ""
        try:
            CacheFolder(self._cache_folder).ask(self._cache)
        except OSError:
            return ""
        return self._cache

    def resume(self, reason: str, *, cache: bool = False) -> bool:
        """Have another replica go on; tells whether that, or the end of the answer, was arranged.

        ``reason`` is one of lost, failed, aborted, diverged, handed_over. ``cache``: its KV cache
        goes with it, if it can.
        """
        relay = self._relay
        if relay.ended or self.moves >= self._max_moves:
            return False
        try:
            carried = self._carried or self._read()
            if not carried.prompt:
                raise UnmovableError("nothing is known of its prompt")
        except (UnmovableError, BrokenError) as error:
            relay.dispatcher.log_stays(relay, str(error))
            return False
        again = reason == "diverged"
        if not carried.finished and not relay.dispatcher.may_move(
            relay, carried.context_tokens, again=again
        ):
            return False
        self._carried = carried
        self.kept.drop()
        if carried.finished:
            relay.release(tried=False)
            self._finish(carried)
            return True
        carried.rewind()
        self._taken = self._ask_for_cache() if cache else ""
        relay.release(tried=not again)
        self.moves += 1
        way = Way.MOVE if self._taken else Way.REPLAY
        relay.dispatcher.metrics.count("oserve_requests_moved", reason, way.value)
        self._head, self._dechunker, self._reader = None, None, EventReader()
        if relay.first_request is not None:
            relay.request = replace(
                relay.first_request,
                prompt_tokens=carried.context_tokens,
                output_tokens=round(remaining_tokens(relay)),
            )
        relay.dispatcher.send_on(relay, reason)
        return True

    def _read(self) -> Carried:
        """The stream so far, from what was kept of it."""
        carried = Carried(self._fields, chat=self._chat)
        self.kept.read_into(carried)
        return carried

    @property
    def _fields(self) -> Fields:
        parsed = self._relay.parsed
        return parsed.fields if parsed is not None else {}

    @property
    def _chat(self) -> bool:
        return self._relay.exchange.path.startswith(b"/v1/chat/")

    @property
    def movable(self) -> bool:
        """Whether nothing that is known without reading the answer keeps it from moving."""
        if self.moves >= self._max_moves or self.kept.full:
            return False
        if self._reason is None:
            try:
                values = values_of(self._fields, chat=self._chat)
            except UnmovableError as error:
                self._reason = str(error)
            else:
                self._reason = kept_from_moving(values, chat=self._chat)
        return not self._reason

    def body(self) -> bytes:
        """The body of the continuation."""
        assert self._carried is not None
        return self._carried.continuation()

    @property
    def made_tokens(self) -> int:
        """Output tokens so far; about so many while the first replica serves it."""
        return len(self._carried.tokens) if self._carried is not None else self._relay.events

    def release(self) -> None:
        """The request has ended."""
        self.kept.drop()

    # -- the replica that goes on (Sink) --------------------------------------------------------
    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for this any more."""
        return self._relay.cancelled

    def attached(self, connection: UpstreamConnection) -> None:
        self._relay.attached(connection)

    def crashed(self, error: Exception) -> None:
        """Taking the answer in raised."""
        self._relay.crashed(error)

    def on_head(self, head: ResponseHead) -> None:
        self._head = head
        self._dechunker = Dechunker() if head.chunked else None

    def on_data(self, data: bytes) -> None:
        head = self._head
        assert head is not None
        if head.status != 200:
            return
        self._relay.progressed(monotonic())
        try:
            payload = data if self._dechunker is None else self._dechunker.feed(data)
            events = self._reader.feed(payload)
        except (EventsError, FramingError) as error:
            self._relay.release(tried=False)
            self.on_error(str(error))
            return
        found = [event.data for event in events if event.data is not None]
        if found:
            self._translate(found)

    def _translate(self, found: list[bytes]) -> None:
        carried = self._carried
        assert carried is not None
        told = []
        reason = ""
        try:
            for data in found:
                if data.strip() != DONE:
                    told.append(carried.go_on(read_event(data)))
        except BrokenError:
            reason = "aborted"
        except DivergedError:
            reason = "diverged"
        except UnmovableError:
            reason = "failed"
        self.write(b"".join(told))
        if carried.finished:
            self._relay.release(tried=False, done=True)
            self._finish(carried)
        elif reason and not self.resume(reason):
            self._relay.fail(upstream_failed(f"The answer could not go on elsewhere: {reason}"))

    def _finish(self, carried: Carried) -> None:
        relay = self._relay
        relay.usage = Usage(prompt_tokens=len(carried.prompt), output_tokens=len(carried.tokens))
        self.write(carried.ending())
        if not self._plain:
            relay.exchange.write(LAST_CHUNK)
        relay.exchange.finish()
        relay.completed()

    def on_end(self) -> None:
        head = self._head
        status = head.status if head is not None else 0
        self.on_error(f"it answered with status {status}" if status != 200 else "it stopped short")

    def on_error(self, reason: str) -> None:
        relay = self._relay
        if relay.ended or self.resume("lost"):
            return
        name = relay.replica.id if relay.replica is not None else "?"
        relay.fail(upstream_failed(f"Replica {name} failed: {reason}"))
