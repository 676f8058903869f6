"""One answer of an emulated engine, in the form of the server that it speaks like."""

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from oserve.sim.dialects import UsageForm
from oserve.sim.generated_text import GeneratedText
from oserve.wire import Exchange, chunk
from oserve.wire.framing import LAST_CHUNK

if TYPE_CHECKING:
    from oserve.sim.engine import EmulatedEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpeed:
    """Seconds to the first token, and between tokens; with both 0 an answer leaves at once."""

    ttft_s: float = 0.0
    tpot_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Mishap:
    """What befalls an answer after so many tokens.

    ``how``: ``break`` (the connection ends), ``torn`` (it ends within an event), ``abort`` (the
    engine gives the request up), ``error`` (it says that it died), ``refuse`` (it tells in an
    event that the request is at fault).
    """

    after: int
    how: str = "break"


class EmulatedResponse:
    """One answer on its way out. ``engine`` begins and counts it."""

    def __init__(
        self,
        engine: "EmulatedEngine",
        exchange: Exchange,
        body: dict[str, Any],
        *,
        chat: bool,
        prompt: list[int],
        limit: int,
        mishap: Mishap | None,
    ) -> None:
        self._engine = engine
        self._dialect = engine.dialect
        self._exchange = exchange
        self._body = body
        self._stream = bool(body.get("stream"))
        options = body.get("stream_options") or {}
        dialect = engine.dialect
        asked = bool(options.get("include_usage")) or dialect.always_usage
        self._usage_wanted = asked and dialect.usage is not UsageForm.NEVER
        self._usage_always = bool(options.get("continuous_usage_stats"))
        self._chat = chat
        self._limit = limit
        self._mishap = mishap
        self._timer: asyncio.TimerHandle | None = None
        self._id = exchange.headers.get(b"x-request-id", b"0").decode("latin-1")
        self._model = str(body.get("model") or "emulated")
        self._text = GeneratedText(engine.tokenizer, body, prompt)
        self._prompt = prompt
        self._offset = 0

    def begin(self, speed: EngineSpeed) -> None:
        if self._stream:
            dialect = self._dialect
            fields = [(name.encode(), text.encode()) for name, text in dialect.stream_headers]
            if dialect.content_type:
                fields.append((b"content-type", dialect.content_type.encode()))
            if dialect.chunked:
                fields.append((b"transfer-encoding", b"chunked"))
            self._engine.begin(self._exchange, 200, tuple(fields))
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
        if self._stream and self._chat and not self._text.tokens:
            self._event([self._choice({"role": "assistant", "content": ""}, None)], first=True)
        paced = self._stream and self._speed.tpot_s > 0.0
        while True:
            if self._mishap is not None and len(self._text.tokens) >= self._mishap.after:
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
        before = len(self._text.tokens)
        first = before == 0
        text, reason = self._text.say(self._limit)
        # The first token is told at once, as by vLLM.
        left = 0 if first else (self._body.get("stream_interval") or 1) - 1
        while left > 0 and reason is None:
            more, reason = self._text.say(self._limit)
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
                choice["token_ids"] = self._text.tokens[before:]
            choice["logprobs"] = self._logprobs(self._text.tokens[before:])
            last = reason is not None and self._dialect.usage is UsageForm.WITH_LAST_TOKEN
            self._event([choice], usage=last and self._usage_wanted)
        return reason

    def _fail(self, how: str) -> None:
        """Go wrong as engines do: see ``Mishap``."""
        self._engine.running -= 1
        exchange = self._exchange
        if how == "abort":
            held = self._text.flushed()
            choice = self._choice({"content": held} if self._chat else held, "abort")
            if self._body.get("return_token_ids"):
                choice["token_ids"] = []
            if self._stream:
                self._event([choice])
                self._done()
            else:
                document = self._document([choice], usage=self._usage())
                self._engine.answer(exchange, 200, document)
            return
        if how in {"error", "refuse"}:
            status = 400 if how == "refuse" else 500
            said = "logprobs is too large" if how == "refuse" else "engine died"
            self._send(self._dialect.event(self._dialect.error(said, status)))
            self._done()
            return
        if how == "torn":
            exchange.write(b'40\r\ndata: {"id":"torn in the mid')
        exchange.finish(close=True)

    def _choice(self, said: Any, reason: str | None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": None}
        if reason is not None or not self._chat:
            choice["stop_reason"] = self._text.stop_reason
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
        texts = [self._engine.tokenizer.piece(token).decode(errors="replace") for token in tokens]
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
        made = len(self._text.tokens)
        return {
            "prompt_tokens": len(self._prompt),
            "total_tokens": len(self._prompt) + made,
            "completion_tokens": made,
        }

    def _document(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        kind = "chat.completion" if self._chat else "text_completion"
        if self._chat and self._stream:
            kind += ".chunk"
        head: dict[str, Any] = {"id": self._id, "object": kind, "created": 0, "model": self._model}
        if choices or self._dialect.usage is not UsageForm.WITHOUT_CHOICES:
            head["choices"] = choices
        return self._dialect.text({**head, **more})

    def _send(self, payload: bytes) -> None:
        """Events, in chunks as its kind of server makes them."""
        dialect = self._dialect
        if not dialect.chunked:
            self._exchange.write(payload)
            return
        size = dialect.chunk_bytes or len(payload)
        for start in range(0, len(payload), size):
            self._exchange.write(chunk(payload[start : start + size]))

    def _done(self) -> None:
        self._send(self._dialect.event(b"[DONE]"))
        if self._dialect.chunked:
            self._exchange.write(LAST_CHUNK)
        self._exchange.finish(close=not self._dialect.chunked)

    def _event(
        self, choices: list[dict[str, Any]], *, first: bool = False, usage: bool = False
    ) -> None:
        more: dict[str, Any] = {}
        if first and self._body.get("return_token_ids"):
            more["prompt_token_ids"] = self._prompt
        if self._usage_always or not choices or usage:
            more["usage"] = self._usage()
        elif self._dialect.usage_null:
            more["usage"] = None
        self._send(self._dialect.event(self._document(choices, **more)))

    def _finish(self, reason: str) -> None:
        self._engine.running -= 1
        if self._stream:
            if self._usage_wanted and self._dialect.usage is not UsageForm.WITH_LAST_TOKEN:
                self._event([])
            self._done()
        else:
            text = self._text.text
            said: Any = {"role": "assistant", "content": text} if self._chat else text
            choice = self._choice(said, reason)
            choice["logprobs"] = self._logprobs(self._text.tokens)
            document = self._document([choice], usage=self._usage())
            self._engine.answer(self._exchange, 200, document)


def _chat_logprob(text: str, value: float, top: list[tuple[str, float]]) -> dict[str, Any]:
    entry = {"token": text, "logprob": value, "bytes": list(text.encode())}
    entry["top_logprobs"] = [
        {"token": other, "logprob": its, "bytes": list(other.encode())} for other, its in top
    ]
    return entry
