"""Answers of an emulated engine to Anthropic's Messages, OpenAI's Responses, batches and scoring.

Their bodies and events have the fields that vLLM 0.32 sends; the text is that of completions.
"""

import asyncio
from collections.abc import Callable, Iterable

import msgspec

from oserve.sim.documents import Json
from oserve.sim.responses import EngineSpeed
from oserve.wire import Exchange, chunk
from oserve.wire.framing import LAST_CHUNK

LIMITS = {b"/v1/messages": "max_tokens", b"/v1/responses": "max_output_tokens"}
"""The paths whose answers may stream, with the field that limits them."""


def messages_answer(words: list[str], prompt_tokens: int) -> Json:
    """A whole message."""
    return {
        **_MESSAGE,
        "content": [{"type": "text", "text": "".join(words)}],
        "stop_reason": "max_tokens",
        "usage": _usage(prompt_tokens, len(words)),
    }


def responses_answer(words: list[str], prompt_tokens: int) -> Json:
    """A whole response."""
    part = {"type": "output_text", "text": "".join(words), "annotations": []}
    item = {"type": "message", "id": "msg", "role": "assistant", "content": [part]}
    usage = _usage(prompt_tokens, len(words))
    usage["total_tokens"] = prompt_tokens + len(words)
    return {**_RESPONSE, "status": "completed", "output": [item], "usage": usage}


def messages_events(words: list[str], prompt_tokens: int) -> list[Json]:
    """The events of a message."""
    text = {"type": "text", "text": ""}
    return [
        {"type": "message_start", "message": {**_MESSAGE, "usage": _usage(prompt_tokens, 0)}},
        {"type": "content_block_start", "index": 0, "content_block": text},
        *(
            {
                "type": "content_block_delta",
                "index": 0,
                "delta": {"type": "text_delta", "text": word},
            }
            for word in words
        ),
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "max_tokens"},
            "usage": _usage(prompt_tokens, len(words)),
        },
        {"type": "message_stop"},
    ]


def responses_events(words: list[str], prompt_tokens: int) -> list[Json]:
    """The events of a response."""
    began = {**_RESPONSE, "status": "in_progress", "output": [], "usage": None}
    events: list[Json] = [{"type": "response.created", "response": began}]
    for word in words:
        delta = {"item_id": "msg", "output_index": 0, "content_index": 0, "delta": word}
        events.append({"type": "response.output_text.delta", **delta})
    whole = responses_answer(words, prompt_tokens)
    events.append({"type": "response.completed", "response": whole})
    return [{**event, "sequence_number": number} for number, event in enumerate(events)]


def batch_answer(words: list[str], prompt_tokens: int, conversations: int) -> Json:
    """The answers to a batch of chats, with one choice each."""
    message = {"role": "assistant", "content": "".join(words)}
    made = conversations * len(words)
    return {
        "id": "batch",
        "object": "chat.completion",
        "choices": [
            {"index": index, "message": message, "finish_reason": "length"}
            for index in range(conversations)
        ],
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": made},
    }


def scoring_answer(prompt_tokens: int, items: int) -> Json:
    """One probability for each item."""
    scores = [{"index": index, "object": "score", "score": 0.5} for index in range(items)]
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": items}
    return {"id": "scores", "object": "list", "data": scores, "usage": usage}


class TypedStream:
    """Sends typed events, one after ``ttft_s`` and the others ``tpot_s`` apart.

    ``on_end`` is called once, with whether the client left.
    """

    def __init__(
        self,
        exchange: Exchange,
        events: Iterable[Json],
        speed: EngineSpeed,
        on_end: Callable[[bool], None],
    ) -> None:
        self._exchange = exchange
        self._events = iter(events)
        self._speed = speed
        self._on_end = on_end
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Send the head; the first event comes later."""
        headers = ((b"content-type", b"text/event-stream"), (b"transfer-encoding", b"chunked"))
        self._exchange.start(200, headers, b"")
        self._later(self._speed.ttft_s)

    def cancel(self) -> None:
        """Stop, since the client left."""
        self._on_end(True)
        if self._timer is not None:
            self._timer.cancel()

    def _later(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self._send)

    def _send(self) -> None:
        event = next(self._events, None)
        if event is None:
            self._on_end(False)
            self._exchange.write(LAST_CHUNK)
            self._exchange.finish()
            return
        name = str(event["type"]).encode()
        text = b"event: %b\ndata: %b\n\n" % (name, msgspec.json.encode(event))
        self._exchange.write(chunk(text))
        self._later(self._speed.tpot_s)


def _usage(prompt_tokens: int, output_tokens: int) -> dict[str, object]:
    return {"input_tokens": prompt_tokens, "output_tokens": output_tokens}


_MESSAGE: Json = {
    "id": "msg",
    "type": "message",
    "role": "assistant",
    "model": "emulated",
    "content": [],
    "stop_reason": None,
}
_RESPONSE: Json = {"id": "resp", "object": "response", "model": "emulated", "error": None}
