"""An engine without a model: OpenAI's API, deterministic tokens, a speed of your choice.

For tests of whatever stands in front of an engine, and for measuring that alone.
"""

import asyncio
from dataclasses import dataclass
from typing import Any

import msgspec

from oserve.wire import Exchange, ServerLimits, chunk, serve
from oserve.wire.framing import LAST_CHUNK
from oserve.wire.server import Server


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpeed:
    """Seconds to the first token, and between tokens; with both 0 an answer leaves at once."""

    ttft_s: float = 0.0
    tpot_s: float = 0.0


class EmulatedEngine:
    """Serves one model name. ``seen`` keeps the bodies received, ``aborted`` counts clients gone.

    ``max_model_len`` is in tokens; a prompt counts one token a word.
    """

    def __init__(
        self,
        *,
        model: str = "emulated",
        speed: EngineSpeed | None = None,
        max_model_len: int = 8192,
        keep_bodies: bool = True,
    ) -> None:
        self._model = model
        self._speed = speed or EngineSpeed()
        self._max_model_len = max_model_len
        self._keep_bodies = keep_bodies
        self._server: Server | None = None
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
            words = str(msgspec.json.decode(exchange.body).get("prompt", "")).split()
            body = {"count": len(words), "max_model_len": self._max_model_len}
            exchange.respond(200, msgspec.json.encode({**body, "tokens": list(range(len(words)))}))
        elif path == b"/metrics":
            text = b"vllm:num_requests_running %d\nvllm:num_requests_waiting 0\n" % self.running
            exchange.respond(200, text, content_type=b"text/plain")
        else:
            exchange.respond(404, _error("no such route"))

    def _generate(self, exchange: Exchange, *, chat: bool) -> None:
        body = msgspec.json.decode(exchange.body)
        if self._keep_bodies:
            self.seen.append(body)
        prompt_tokens = _count_prompt(body)
        limit = body.get("max_completion_tokens") or body.get("max_tokens") or 16
        if limit < 1 or prompt_tokens + 1 > self._max_model_len:
            exchange.respond(400, _error("bad max_tokens, or too long a prompt"))
            return
        answer = _Answer(self, exchange, body, chat=chat, prompt_tokens=prompt_tokens, limit=limit)
        exchange.on_disconnect = answer.cancel
        self.running += 1
        answer.begin(self._speed)


class _Answer:
    """One answer on its way out."""

    def __init__(
        self,
        engine: EmulatedEngine,
        exchange: Exchange,
        body: dict[str, Any],
        *,
        chat: bool,
        prompt_tokens: int,
        limit: int,
    ) -> None:
        self._engine = engine
        self._exchange = exchange
        self._stream = bool(body.get("stream"))
        self._usage_wanted = bool((body.get("stream_options") or {}).get("include_usage"))
        self._chat = chat
        self._limit = limit
        self._made = 0
        self._timer: asyncio.TimerHandle | None = None
        self._id = exchange.headers.get(b"x-request-id", b"0").decode("latin-1")
        self._model = str(body.get("model") or "emulated")
        self._usage = {
            "prompt_tokens": prompt_tokens,
            "total_tokens": prompt_tokens + limit,
            "completion_tokens": limit,
        }

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
        if not self._stream:
            self._made = self._limit
        elif self._speed.tpot_s <= 0.0:
            while self._made < self._limit:
                self._emit()
        else:
            self._emit()
        if self._made < self._limit:
            self._later(self._speed.tpot_s)
        else:
            self._finish()

    def _emit(self) -> None:
        self._made += 1
        reason = "length" if self._made == self._limit else None
        self._event([self._choice(f" t{self._made}", reason)])

    def _choice(self, text: str, reason: str | None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason}
        if not self._chat:
            choice["text"] = text
        else:
            choice["delta" if self._stream else "message"] = {"role": "assistant", "content": text}
        return choice

    def _document(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        kind = "chat.completion" if self._chat else "text_completion"
        if self._chat and self._stream:
            kind += ".chunk"
        head = {"id": self._id, "object": kind, "created": 0, "model": self._model}
        return msgspec.json.encode({**head, "choices": choices, **more})

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> None:
        document = self._document(choices, **more)
        self._exchange.write(chunk(b"data: " + document + b"\n\n"))

    def _finish(self) -> None:
        self._engine.running -= 1
        if self._stream:
            if self._usage_wanted:
                self._event([], usage=self._usage)
            self._exchange.write(chunk(b"data: [DONE]\n\n") + LAST_CHUNK)
            self._exchange.finish()
        else:
            text = "".join(f" t{index + 1}" for index in range(self._limit))
            choices = [self._choice(text, "length")]
            self._exchange.respond(200, self._document(choices, usage=self._usage))


def _count_prompt(body: dict[str, Any]) -> int:
    prompt = body.get("prompt", body.get("messages", ""))
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
        return len(prompt)
    return len(str(prompt).split())


def _error(message: str) -> bytes:
    return msgspec.json.encode(
        {"error": {"message": message, "type": "BadRequestError", "param": None, "code": 400}}
    )
