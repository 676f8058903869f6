"""Events of an answer on their way to the client.

They are read as the standard says and passed on in one form, whichever server wrote them: lines end
in LF, JSON stays as it is written. What only we asked for is taken out: the usage report, token
ids. vLLM's own form, one chunk that holds one event on one line, is passed on as the bytes it came
in; that is the same for the client, only cheaper.

Pure: bytes in, bytes out; no relay, no clock.
"""

from collections import deque

from oserve.gateway.kept import Kept
from oserve.gateway.meaning import (
    Choice,
    Trouble,
    has_usage,
    read_answer,
    shown,
    trouble_of,
)
from oserve.wire import Dechunker, Framing, chunk
from oserve.wire.events import Event, EventReader, data_event

DONE = b"[DONE]"
_FIELD = b"data: "
_ABSENT = {b"", b"null"}
_IDS = b'"token_ids":'
# Shorter lists leave no room for null and the spaces that keep a chunk as long as it was.
_LEAST_LIST_BYTES = 4


class Passing:
    """Of one stream from one server.

    ``kept``: what is kept of it, so that it can move; its token ids are shown to ``shows_ids``
    only. ``plain``: the client speaks HTTP/1.0, which has no chunks.

    ``begun`` once an event came that is more than a comment; ``events`` counts those with choices,
    about a token each. ``finished`` and ``done``: so are the last token and ``[DONE]``. ``trouble``
    is an error that the stream tells: nothing from there on is passed on before ``give_in``.
    """

    __slots__ = (
        "_chunks",
        "_dechunker",
        "_hide_ids",
        "_hide_usage",
        "_kept",
        "_plain",
        "_reader",
        "_told_trouble",
        "_waiting",
        "begun",
        "done",
        "events",
        "finished",
        "trouble",
        "usage",
    )

    def __init__(
        self,
        *,
        hide_usage: bool,
        kept: Kept | None = None,
        shows_ids: bool = True,
        plain: bool = False,
    ) -> None:
        self._hide_usage = hide_usage
        self._hide_ids = not shows_ids
        self._kept = kept
        self._plain = plain
        self._reader = EventReader()
        self._dechunker = Dechunker()
        self._chunks = 0
        self._waiting: deque[Event] = deque()
        self._told_trouble = False
        self.begun = False
        self.done = False
        self.finished = False
        self.events = 0
        self.trouble: Trouble | None = None
        self.usage = b""

    def take(self, data: bytes, framing: Framing | None) -> bytes:
        """Bytes of the answer's body, which ``framing`` has taken in; returns the client's."""
        if framing is None or not framing.chunked:
            return self._read(data)
        one = framing.chunks == self._chunks + 1 and framing.boundary == len(data)
        self._chunks = framing.chunks
        if one and self._reader.idle and self._dechunker.idle and not self._waiting:
            passed = self._pass_chunk(data)
            if passed:
                return passed
        return self._read(self._dechunker.feed(data))

    def _pass_chunk(self, data: bytes) -> bytes:
        """A whole chunk in vLLM's form, as the client gets it; empty: it is something else."""
        start = data.find(b"\n") + 1
        end = len(data) - 4
        if data.find(b"\n", start) != end or data.find(b"\r", start) != end + 2:
            return b""
        if not data.startswith(_FIELD, start) or not data.endswith(b"\n\n\r\n"):
            return b""
        text = data[start + 6 : end]
        answer = read_answer(text)
        if answer is None or not answer.choices or len(answer.choices) > 1:
            return b""
        choice = answer.choices[0]
        if (
            choice.finish_reason == "abort"
            or answer.object == "error"
            or answer.error
            or answer.prompt_token_ids
            or (answer.usage and bytes(answer.usage) != b"null")
        ):
            return b""
        passed = data
        if self._hide_ids and (choice.token_ids or choice.prompt_token_ids):
            passed = _without_ids(data, choice)
            if not passed:
                return b""
        if choice.finish_reason is not None:
            self.finished = True
        self.events += 1
        if self._kept is not None:
            self._kept.keep(text)
        return passed if not self._plain else passed[start:-2]

    def _read(self, payload: bytes) -> bytes:
        self._waiting += self._reader.feed(payload)
        return self._pass_waiting()

    def end(self) -> bytes:
        """The body has ended."""
        last = self._reader.end()
        if last is not None:
            self._waiting.append(last)
        return self._pass_waiting()

    def give_in(self) -> bytes:
        """Pass on the trouble after all, and what comes after it."""
        self.trouble = None
        self._told_trouble = True
        return self._pass_waiting()

    def _pass_waiting(self) -> bytes:
        parts = []
        while self._waiting and self.trouble is None:
            part = self._pass(self._waiting[0])
            if self.trouble is None:
                self._waiting.popleft()
                parts.append(part)
        told = b"".join(parts)
        return told if self._plain or not told else chunk(told)

    def _pass(self, event: Event) -> bytes:
        """One event as the client gets it; sets ``trouble`` if it tells any."""
        data = event.data
        if data is None:
            return event.text
        self.begun = True
        if data.strip() == DONE:
            self.done = True
            if self._kept is not None:
                self._kept.done = True
            return data_event(DONE)
        answer = read_answer(data)
        if answer is None:
            return event.text
        if not self._told_trouble:
            self.trouble = trouble_of(answer)
            if self.trouble is not None:
                return b""
        if has_usage(answer):
            self.usage = bytes(answer.usage)
        if answer.choices:
            self.events += 1
            self.finished = self.finished or any(
                choice.finish_reason is not None for choice in answer.choices
            )
        if self._kept is not None:
            self._kept.keep(data)
        for_client = shown(data, answer, hide_usage=self._hide_usage, hide_ids=self._hide_ids)
        if for_client is None:
            return b""
        return event.text if for_client is data else data_event(for_client)


def _without_ids(data: bytes, choice: Choice) -> bytes:
    """The chunk with null for its token ids, as long as it was; empty: it is not that simple."""
    ids = bytes(choice.token_ids)
    length = len(ids)
    if bytes(choice.prompt_token_ids) not in _ABSENT:
        return b""
    if ids in _ABSENT:
        return data
    start = data.rfind(b"[")
    simple = data.endswith(_IDS, 0, start) and data.startswith(ids, start)
    if length < _LEAST_LIST_BYTES or not simple:
        return b""
    return b"%bnull%b%b" % (data[:start], b" " * (length - 4), data[start + length :])
