"""An engine without a model: OpenAI's API, deterministic tokens, a speed of your choice.

For tests of whatever stands in front of an engine, and for measuring that alone.
"""

import asyncio
import json
from collections import deque
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from oserve.sim.speech import Speech
from oserve.sim.tongue import Counting, Tongue
from oserve.wire import Exchange, ServerLimits, chunk, serve
from oserve.wire.framing import LAST_CHUNK
from oserve.wire.server import Server


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpeed:
    """Seconds to the first token, and between tokens; with both 0 an answer leaves at once."""

    ttft_s: float = 0.0
    tpot_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Mishap:
    """What befalls an answer after so many tokens.

    ``how``: ``break`` (the connection ends), ``torn`` (it ends within an event), ``abort`` (the
    engine gives the request up), ``error`` (it says that it died).
    """

    after: int
    how: str = "break"


class EmulatedEngine:
    """Serves one model name. ``seen`` keeps the bodies received, ``aborted`` counts clients gone.

    ``max_model_len`` is in tokens; a prompt counts one token a word. No answer has more than
    ``most_tokens``. Each answer takes the next of ``mishaps``, as long as there are any.
    """

    def __init__(
        self,
        *,
        model: str = "emulated",
        speed: EngineSpeed | None = None,
        max_model_len: int = 8192,
        most_tokens: int = 1 << 20,
        keep_bodies: bool = True,
        tongue: Tongue | None = None,
    ) -> None:
        self._model = model
        self._speed = speed or EngineSpeed()
        self._max_model_len = max_model_len
        self._most_tokens = most_tokens
        self._keep_bodies = keep_bodies
        self._server: Server | None = None
        self.tongue = tongue or Counting()
        self.mishaps: deque[Mishap | None] = deque()
        self.seen: list[dict[str, Any]] = []
        self.aborted = 0
        self.running = 0

    async def start(self, *, host: str = "127.0.0.1", port: int = 0, unix_socket: str = "") -> int:
        """Listen; returns the port."""
        self._server = await serve(
            self._handle,
            refuse=lambda exchange, status, _: exchange.respond(status, b"{}", close=True),
            limits=ServerLimits(),
            host=host,
            port=port,
            unix_socket=unix_socket,
        )
        return self._server.port

    async def stop(self) -> None:
        """End at once: every connection breaks, as when a process is killed."""
        if self._server is not None:
            await self._server.close()

    def _handle(self, exchange: Exchange) -> None:
        path = exchange.path.partition(b"?")[0]
        if path in {b"/v1/completions", b"/v1/chat/completions"}:
            self._generate(exchange, chat=path.startswith(b"/v1/chat"))
        elif path == b"/health":
            exchange.respond(200, b"")
        elif path == b"/v1/models":
            entry = {"id": self._model, "object": "model", "max_model_len": self._max_model_len}
            exchange.respond(200, msgspec.json.encode({"object": "list", "data": [entry]}))
        elif path == b"/tokenize":
            try:
                words = str(json.loads(exchange.body).get("prompt", "")).split()
            except (ValueError, AttributeError, RecursionError) as error:
                exchange.respond(400, _error(str(error)))
                return
            body = {"count": len(words), "max_model_len": self._max_model_len}
            exchange.respond(200, msgspec.json.encode({**body, "tokens": list(range(len(words)))}))
        elif path == b"/metrics":
            text = b"vllm:num_requests_running %d\nvllm:num_requests_waiting 0\n" % self.running
            exchange.respond(200, text, content_type=b"text/plain")
        else:
            exchange.respond(404, _error("no such route"))

    def _generate(self, exchange: Exchange, *, chat: bool) -> None:
        try:
            # As vLLM reads it, which takes more than JSON: numbers out of range, for one.
            body = json.loads(exchange.body)
            checked = msgspec.convert(body, _Checked, strict=False)
        except (ValueError, RecursionError) as error:
            exchange.respond(400, _error(str(error)))
            return
        if self._keep_bodies:
            self.seen.append(dict(body))
        body |= {name: getattr(checked, name) for name in body.keys() & _CHECKED}
        prompt = body.get("prompt")
        if not (isinstance(prompt, list) and prompt and isinstance(prompt[0], int)):
            prompt = self.tongue.encode(_prompt_text(body))
        elif not all(isinstance(token, int) and 0 <= token < 1 << 31 for token in prompt):
            exchange.respond(400, _error("no token ids"))
            return
        limit = checked.max_completion_tokens or checked.max_tokens or 16
        if limit < 1 or len(prompt) + 1 > self._max_model_len:
            exchange.respond(400, _error("bad max_tokens, or too long a prompt"))
            return
        limit = min(limit, self._most_tokens)
        mishap = self.mishaps.popleft() if self.mishaps else None
        answer = _Answer(self, exchange, body, chat=chat, prompt=prompt, limit=limit, mishap=mishap)
        exchange.on_disconnect = answer.cancel
        self.running += 1
        answer.begin(self._speed)


class _Checked(msgspec.Struct):
    """What an engine reads must be of the type it expects."""

    model: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    min_tokens: Annotated[int, msgspec.Meta(ge=0)] | None = None
    seed: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    stream_interval: Annotated[int, msgspec.Meta(ge=1)] | None = None
    temperature: float | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    logprobs: int | bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    return_token_ids: bool | None = None
    priority: int | None = None


_CHECKED = frozenset(_Checked.__struct_fields__)


class _Answer:
    """One answer on its way out."""

    def __init__(
        self,
        engine: EmulatedEngine,
        exchange: Exchange,
        body: dict[str, Any],
        *,
        chat: bool,
        prompt: list[int],
        limit: int,
        mishap: Mishap | None,
    ) -> None:
        self._engine = engine
        self._exchange = exchange
        self._body = body
        self._stream = bool(body.get("stream"))
        options = body.get("stream_options") or {}
        self._usage_wanted = bool(options.get("include_usage"))
        self._usage_always = bool(options.get("continuous_usage_stats"))
        self._chat = chat
        self._limit = limit
        self._mishap = mishap
        self._timer: asyncio.TimerHandle | None = None
        self._id = exchange.headers.get(b"x-request-id", b"0").decode("latin-1")
        self._model = str(body.get("model") or "emulated")
        self._speech = Speech(engine.tongue, body, prompt)
        self._prompt = prompt
        self._offset = 0

    def begin(self, speed: EngineSpeed) -> None:
        if self._stream:
            fields = (
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"transfer-encoding", b"chunked"),
            )
            self._exchange.start(200, fields)
        self._speed = speed
        self._later(speed.ttft_s)

    def cancel(self) -> None:
        self._engine.aborted += 1
        self._engine.running -= 1
        if self._timer is not None:
            self._timer.cancel()

    def _later(self, seconds: float) -> None:
        if seconds <= 0.0:
            self._step()
        else:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._step)

    def _step(self) -> None:
        if self._stream and self._chat and not self._speech.tokens:
            self._event([self._choice({"role": "assistant", "content": ""}, None)], first=True)
        paced = self._stream and self._speed.tpot_s > 0.0
        while True:
            if self._mishap is not None and len(self._speech.tokens) >= self._mishap.after:
                self._fail(self._mishap.how)
                return
            reason = self._emit()
            if reason is not None:
                self._finish(reason)
                return
            if paced:
                self._later(self._speed.tpot_s)
                return

    def _emit(self) -> str | None:
        """One event's tokens; returns why they were the last, if they were."""
        before = len(self._speech.tokens)
        first = before == 0
        text, reason = self._speech.say(self._limit)
        # The first token is told at once, as by vLLM.
        left = 0 if first else (self._body.get("stream_interval") or 1) - 1
        while left > 0 and reason is None:
            more, reason = self._speech.say(self._limit)
            text += more
            left -= 1
        if self._stream:
            if self._chat:
                choice = self._choice({"content": text}, reason)
            else:
                choice = self._choice(text, reason)
                if first and self._body.get("return_token_ids"):
                    choice["prompt_token_ids"] = self._prompt
            if self._body.get("return_token_ids"):
                choice["token_ids"] = self._speech.tokens[before:]
            choice["logprobs"] = self._logprobs(self._speech.tokens[before:])
            self._event([choice])
        return reason

    def _fail(self, how: str) -> None:
        """Go wrong as engines do: see ``Mishap``."""
        self._engine.running -= 1
        exchange = self._exchange
        if how == "abort":
            held = self._speech.flushed()
            choice = self._choice({"content": held} if self._chat else held, "abort")
            if self._body.get("return_token_ids"):
                choice["token_ids"] = []
            if self._stream:
                self._event([choice])
                exchange.write(chunk(b"data: [DONE]\n\n") + LAST_CHUNK)
                exchange.finish()
            else:
                exchange.respond(200, self._document([choice], usage=self._usage()))
            return
        if how == "error":
            exchange.write(chunk(b'data: {"error":{"message":"engine died","code":500}}\n\n'))
            exchange.write(chunk(b"data: [DONE]\n\n") + LAST_CHUNK)
            exchange.finish()
            return
        if how == "torn":
            exchange.write(b'40\r\ndata: {"id":"torn in the mid')
        exchange.finish(close=True)

    def _choice(self, said: Any, reason: str | None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": None}
        if reason is not None or not self._chat:
            choice["stop_reason"] = self._speech.stop_reason
        if self._chat:
            choice["delta" if self._stream else "message"] = said
        else:
            choice["text"] = said
            choice["prompt_token_ids"] = None
        choice["token_ids"] = None
        return choice

    def _logprobs(self, tokens: list[int]) -> dict[str, Any] | None:
        wanted = self._body.get("logprobs")
        if wanted is None or wanted is False:
            return None
        texts = [self._engine.tongue.piece(token).decode(errors="replace") for token in tokens]
        if self._chat:
            most = self._body.get("top_logprobs") or 0
            content = []
            for text in texts:
                top = [(text, -0.5), (text + "?", -1.5), (text + "!", -2.5)][:most]
                content.append(_chat_logprob(text, -0.5, top))
            return {"content": content}
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "text_offset": offsets,
            "token_logprobs": [-0.5] * len(texts),
            "tokens": texts,
            "top_logprobs": [
                dict([(text, -0.5), (text + "?", -1.5), (text + "!", -2.5)][: wanted + 1])
                for text in texts
            ],
        }

    def _usage(self) -> dict[str, int]:
        made = len(self._speech.tokens)
        return {
            "prompt_tokens": len(self._prompt),
            "total_tokens": len(self._prompt) + made,
            "completion_tokens": made,
        }

    def _document(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        kind = "chat.completion" if self._chat else "text_completion"
        if self._chat and self._stream:
            kind += ".chunk"
        head = {"id": self._id, "object": kind, "created": 0, "model": self._model}
        return msgspec.json.encode({**head, "choices": choices, **more})

    def _event(self, choices: list[dict[str, Any]], *, first: bool = False) -> None:
        more: dict[str, Any] = {}
        if first and self._body.get("return_token_ids"):
            more["prompt_token_ids"] = self._prompt
        if self._usage_always or not choices:
            more["usage"] = self._usage()
        document = self._document(choices, **more)
        self._exchange.write(chunk(b"data: " + document + b"\n\n"))

    def _finish(self, reason: str) -> None:
        self._engine.running -= 1
        if self._stream:
            if self._usage_wanted:
                self._event([])
            self._exchange.write(chunk(b"data: [DONE]\n\n") + LAST_CHUNK)
            self._exchange.finish()
        else:
            text = self._speech.text
            said: Any = {"role": "assistant", "content": text} if self._chat else text
            choice = self._choice(said, reason)
            choice["logprobs"] = self._logprobs(self._speech.tokens)
            self._exchange.respond(200, self._document([choice], usage=self._usage()))


def _chat_logprob(text: str, value: float, top: list[tuple[str, float]]) -> dict[str, Any]:
    entry = {"token": text, "logprob": value, "bytes": list(text.encode())}
    entry["top_logprobs"] = [
        {"token": other, "logprob": its, "bytes": list(other.encode())} for other, its in top
    ]
    return entry


def _prompt_text(body: dict[str, Any]) -> str:
    return str(body.get("prompt", body.get("messages", "")))


def _error(message: str) -> bytes:
    return msgspec.json.encode(
        {"error": {"message": message, "type": "BadRequestError", "param": None, "code": 400}}
    )
