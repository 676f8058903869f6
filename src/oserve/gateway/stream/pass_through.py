"""Events of an answer on their way to the client.

They are read as the standard says and passed on in one form, whichever server wrote them: lines end
in LF, JSON stays as it is written. What only we asked for is taken out: the usage report, token
ids. vLLM's own form, one chunk that holds one event on one line, is passed on as the bytes it came
in; that is the same for the client, only cheaper.

Pure: bytes in, bytes out; no relay, no clock.
"""

from collections import deque

import msgspec

from oserve.gateway.stream.answer import (
    AnswerChoice,
    ReplicaAnswer,
    Trouble,
    has_usage,
    read_answer,
    shown,
    trouble_of,
)
from oserve.gateway.stream.replay_buffer import ReplayBuffer
from oserve.wire import Dechunker, chunk
from oserve.wire.events import EventReader, ServerSentEvent, data_event

DONE = b"[DONE]"
_FIELD = b"data: "
_NULL = b"null"
_IDS = b'"token_ids":'
_IDS_BYTES = len(_IDS)
# As long as the list that they stand for, so that the chunk's size still holds; a shorter one, of a
# single digit, leaves no room.
_BLANKS = {size: b"null" + b" " * (size - 4) for size in range(4, 256)}
_decode = msgspec.json.Decoder(ReplicaAnswer).decode


class PassThrough:
    """Of one stream from one server.

    ``kept``: what is kept of it, so that it can move; its token ids are shown to ``shows_ids``
    only. ``plain``: the client speaks HTTP/1.0, which has no chunks.

    ``begun`` once an event came that is more than a comment; ``events`` counts those with choices,
    about a token each. ``finished`` and ``done``: so are the last token and ``[DONE]``. ``trouble``
    is an error that the stream tells: nothing from there on is passed on before ``give_in``.
    """

    __slots__ = (
        "_clean",
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
        kept: ReplayBuffer | None = None,
        shows_ids: bool = True,
        plain: bool = False,
    ) -> None:
        self._hide_usage = hide_usage
        self._hide_ids = not shows_ids
        self._kept = kept
        self._plain = plain
        self._reader = EventReader()
        self._dechunker = Dechunker()
        # Whether the next byte begins a chunk and an event.
        self._clean = False
        self._waiting: deque[ServerSentEvent] = deque()
        self._told_trouble = False
        self.begun = False
        self.done = False
        self.finished = False
        self.events = 0
        self.trouble: Trouble | None = None
        self.usage = b""

    def take(self, data: bytes, *, chunked: bool) -> bytes:
        """Bytes of the answer's body, ``chunked`` or not; returns the client's."""
        if not chunked:
            return self._read(data)
        if not self._clean:
            return self._read(self._dechunker.feed(data))
        parts: list[bytes] = []
        position = self._pass_chunks(data, parts)
        if position < len(data):
            parts.append(self._read(self._dechunker.feed(data[position:])))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _pass_chunks(self, data: bytes, parts: list[bytes]) -> int:
        """Pass on the chunks that ``data`` begins with and that are in vLLM's form.

        Returns where the first one begins that is something else, or is not whole.
        """
        position, size = 0, len(data)
        kept = self._kept
        while position < size:
            start = data.find(b"\n", position) + 1
            end = data.find(b"\n", start)
            if (
                data[end : end + 4] != b"\n\n\r\n"
                or not data.startswith(_FIELD, start)
                or data.find(b"\r", start, end) >= 0
                or not _is_size(data[position : start - 2], end + 2 - start)
            ):
                break
            text = data[start + 6 : end]
            try:
                answer = _decode(text)
            except (msgspec.DecodeError, RecursionError):
                break
            choices = answer.choices
            if not choices or len(choices) > 1 or answer.error or answer.prompt_token_ids:
                break
            choice = choices[0]
            if answer.usage and bytes(answer.usage) != _NULL:
                break
            if choice.finish_reason is not None:
                if choice.finish_reason == "abort":
                    break
                self.finished = True
            elif answer.object == "error":
                break
            after = end + 4
            passed = data[position:after] if position or after < size else data
            if self._hide_ids and (choice.token_ids or choice.prompt_token_ids):
                passed = _without_ids(passed, choice)
                if not passed:
                    break
            self.events += 1
            if kept is not None:
                kept.keep(text)
            parts.append(passed[start - position : -2] if self._plain else passed)
            position = after
        return position

    def _read(self, payload: bytes) -> bytes:
        self._waiting += self._reader.feed(payload)
        told = self._pass_waiting()
        self._clean = self._reader.idle and self._dechunker.idle and not self._waiting
        return told

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

    def _pass(self, event: ServerSentEvent) -> bytes:
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


def _is_size(line: bytes, size: int) -> bool:
    """Whether a chunk's size line says so; one with extensions is left to the slower way."""
    try:
        return int(line, 16) == size
    except ValueError:
        return False


def _without_ids(data: bytes, choice: AnswerChoice) -> bytes:
    """The chunk with null for its token ids, as long as it was; empty: it is not that simple."""
    if choice.prompt_token_ids and bytes(choice.prompt_token_ids) != _NULL:
        return b""
    ids = bytes(choice.token_ids)
    if not ids or ids == _NULL:
        return data
    start = data.rfind(b"[")
    after = start + len(ids)
    if data[start - _IDS_BYTES : start] != _IDS or data[start:after] != ids:
        return b""
    blank = _BLANKS.get(len(ids))
    return b"" if blank is None else data[:start] + blank + data[after:]
