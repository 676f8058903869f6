"""The pass-through of an event stream to the client.

It parses events by the standard and forwards them in one form: lines end in LF, JSON is unchanged.
It removes what only OServe requested: usage reports and token ids. vLLM's own form, one chunk with
one event on one line, is forwarded as the bytes received, which is cheaper and equivalent.

Pure: bytes in, bytes out; no session, no clock.
"""

from collections import deque

import msgspec

from oserve.gateway.stream.answer import (
    AnswerChoice,
    ReplicaAnswer,
    Trouble,
    read_answer,
    shown,
    trouble_of,
    usage_within,
    with_service_tier,
)
from oserve.gateway.stream.replay_buffer import ReplayBuffer
from oserve.wire import Dechunker, chunk
from oserve.wire.events import EventReader, ServerSentEvent, data_event

DONE = b"[DONE]"
_FIELD = b"data: "
_NULL = b"null"
_IDS = b'"token_ids":'
_IDS_BYTES = len(_IDS)
# ``null`` padded to the length of the list it replaces, so that the chunk's size stays valid. A
# list of one single-digit id is too short for it.
_BLANKS = {size: b"null" + b" " * (size - 4) for size in range(4, 256)}
_decode = msgspec.json.Decoder(ReplicaAnswer).decode


class PassThrough:
    """One stream from one server.

    ``replay``: its replay buffer, if it may migrate. ``shows_ids``: the client gets token ids.
    ``plain``: the client speaks HTTP/1.0, which has no chunked encoding. ``service_tier``: OpenAI's
    word for the request's tier, which every event then has; "": as the server sent them.

    ``begun``: an event that is no comment came. ``events``: the number of events with choices,
    about one token each. ``finished`` and ``done``: the last token and ``[DONE]`` came.
    ``trouble``: an error in the stream; only ``forward_error`` forwards it and what follows.
    """

    __slots__ = (
        "_clean",
        "_dechunker",
        "_hide_ids",
        "_hide_usage",
        "_plain",
        "_reader",
        "_replay",
        "_service_tier",
        "_trouble_sent",
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
        replay: ReplayBuffer | None = None,
        shows_ids: bool = True,
        plain: bool = False,
        service_tier: str = "",
    ) -> None:
        self._hide_usage = hide_usage
        self._hide_ids = not shows_ids
        self._replay = replay
        self._plain = plain
        self._service_tier = service_tier
        self._reader = EventReader()
        self._dechunker = Dechunker()
        # Whether the next byte starts both a chunk and an event.
        self._clean = False
        self._waiting: deque[ServerSentEvent] = deque()
        self._trouble_sent = False
        self.begun = False
        self.done = False
        self.finished = False
        self.events = 0
        self.trouble: Trouble | None = None
        self.usage = b""

    def take(self, data: bytes, *, chunked: bool) -> bytes:
        """Add bytes of the answer's body, ``chunked`` or not; returns the client's bytes."""
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
        """Forward the leading chunks of ``data`` that are in vLLM's form.

        Returns the offset of the first chunk that is in another form or incomplete.
        """
        position, size = 0, len(data)
        replay = self._replay
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
            if replay is not None:
                replay.keep(text)
            parts.append(passed[start - position : -2] if self._plain else passed)
            position = after
        return position

    def _read(self, payload: bytes) -> bytes:
        self._waiting += self._reader.feed(payload)
        output = self._pass_waiting()
        idle = self._reader.idle and self._dechunker.idle and not self._waiting
        self._clean = idle and not self._service_tier
        return output

    def end(self) -> bytes:
        """End the body; returns the client's last bytes."""
        last = self._reader.end()
        if last is not None:
            self._waiting.append(last)
        return self._pass_waiting()

    def forward_error(self) -> bytes:
        """Forward the error after all, and what follows it."""
        self.trouble = None
        self._trouble_sent = True
        return self._pass_waiting()

    def _pass_waiting(self) -> bytes:
        parts = []
        while self._waiting and self.trouble is None:
            part = self._pass(self._waiting[0])
            if self.trouble is None:
                self._waiting.popleft()
                parts.append(part)
        output = b"".join(parts)
        return output if self._plain or not output else chunk(output)

    def _pass(self, event: ServerSentEvent) -> bytes:
        """One event for the client; sets ``trouble`` if the event is an error."""
        data = event.data
        if data is None:
            return event.text
        self.begun = True
        if data.strip() == DONE:
            self.done = True
            if self._replay is not None:
                self._replay.done = True
            return data_event(DONE)
        answer = read_answer(data)
        if answer is None:
            return event.text
        if not self._trouble_sent:
            self.trouble = trouble_of(answer)
            if self.trouble is not None:
                return b""
        self.usage = usage_within(answer) or self.usage
        if answer.has_token:
            self.events += 1
        self.finished = self.finished or answer.is_last
        if answer.choices:
            self.events += 1
            self.finished = self.finished or any(
                choice.finish_reason is not None for choice in answer.choices
            )
        if self._replay is not None:
            self._replay.keep(data)
        for_client = shown(data, answer, hide_usage=self._hide_usage, hide_ids=self._hide_ids)
        if for_client is None:
            return b""
        if self._service_tier and answer.choices is not None:
            for_client = with_service_tier(for_client, self._service_tier)
        return event.text if for_client is data else data_event(for_client)


def _is_size(line: bytes, size: int) -> bool:
    """Whether a chunk's size line equals ``size``; one with extensions takes the slow path."""
    try:
        return int(line, 16) == size
    except ValueError:
        return False


def _without_ids(data: bytes, choice: AnswerChoice) -> bytes:
    """The chunk with null for its token ids, at the same length; empty: use the slow path."""
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
