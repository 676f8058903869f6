"""One response of an emulated engine, in the form of the server that it imitates."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from oserve.sim.dialects import Dialect, UsageForm
from oserve.sim.documents import Documents, GenerationRequest, Json
from oserve.sim.generated_text import GeneratedText
from oserve.sim.tokenizer_stub import TokenizerStub
from oserve.wire import Exchange, chunk
from oserve.wire.framing import LAST_CHUNK

Headers = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpeed:
    """Seconds to the first token, and between tokens; with both 0 an answer leaves at once."""

    ttft_s: float = 0.0
    tpot_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Mishap:
    """A fault injected into an answer after so many tokens.

    ``how``: ``break`` (the connection ends), ``torn`` (it ends within an event), ``abort`` (the
    engine aborts the request), ``error`` (an event says that the engine died), ``refuse`` (an event
    says that the request is at fault).
    """

    after: int
    how: str = "break"


def send_head(exchange: Exchange, dialect: Dialect, status: int, headers: Headers) -> None:
    """Send the head of a response; some servers send no reason phrase."""
    if dialect.reason:
        exchange.start(status, headers)
        return
    lines = [b"HTTP/1.1 %d \r\n" % status, *(b"%b: %b\r\n" % field for field in headers)]
    exchange.write(b"".join((*lines, b"\r\n")))


def send_whole(
    exchange: Exchange, dialect: Dialect, status: int, body: bytes, headers: Headers = ()
) -> None:
    """Send a response whose body is complete."""
    kind = b"application/json" if dialect.content_type else b""
    fields = ((b"content-type", kind),) if kind else ()
    length = ((b"content-length", b"%d" % len(body)),)
    send_head(exchange, dialect, status, (*fields, *length, *headers))
    exchange.write(body)
    exchange.finish()


class EmulatedResponse:
    """Generates and sends one response; calls ``on_end`` once, with whether the client left."""

    def __init__(
        self,
        exchange: Exchange,
        request: GenerationRequest,
        *,
        dialect: Dialect,
        tokenizer: TokenizerStub,
        speed: EngineSpeed,
        mishap: Mishap | None,
        on_end: Callable[[bool], None],
    ) -> None:
        self._exchange = exchange
        self._request = request
        self._dialect = dialect
        self._documents = Documents(request, dialect, tokenizer)
        self._text = GeneratedText(tokenizer, request.body, request.prompt)
        self._speed = speed
        self._mishap = mishap
        self._on_end = on_end
        self._timer: asyncio.TimerHandle | None = None
        options = request.stream_options
        asked = bool(options.get("include_usage")) or dialect.always_usage
        self._usage_wanted = asked and dialect.usage is not UsageForm.NEVER
        self._usage_always = bool(options.get("continuous_usage_stats"))

    def begin(self) -> None:
        """Send the head of a stream, and generate at the engine's speed."""
        if self._request.streams:
            dialect = self._dialect
            fields = [(name.encode(), text.encode()) for name, text in dialect.stream_headers]
            if dialect.content_type:
                fields.append((b"content-type", dialect.content_type.encode()))
            if dialect.chunked:
                fields.append((b"transfer-encoding", b"chunked"))
            send_head(self._exchange, dialect, 200, tuple(fields))
        self._later(self._speed.ttft_s)

    def cancel(self) -> None:
        """Stop, since the client left."""
        self._on_end(True)
        if self._timer is not None:
            self._timer.cancel()

    # -- generation -----------------------------------------------------------------------------
    def _later(self, seconds: float) -> None:
        if seconds <= 0.0:
            self._generate()
        else:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._generate)

    def _generate(self) -> None:
        """Generate tokens until the answer ends, or must wait for its pace."""
        streams = self._request.streams
        if streams and self._request.chat and not self._text.tokens:
            self._event([self._choice({"role": "assistant", "content": ""}, None)], first=True)
        paced = streams and self._speed.tpot_s > 0.0
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
        """Generate one event's tokens; returns the finish reason if they are the last."""
        before = len(self._text.tokens)
        interval = self._request.body.get("stream_interval")
        # vLLM sends the first token at once.
        more = interval - 1 if isinstance(interval, int) and before > 0 else 0
        text, reason = self._text.generate(self._request.limit)
        while more > 0 and reason is None:
            added, reason = self._text.generate(self._request.limit)
            text += added
            more -= 1
        if self._request.streams:
            self._event_of(text, reason, before)
        return reason

    def _event_of(self, text: str, reason: str | None, before: int) -> None:
        """Send the tokens from ``before`` on."""
        tokens = self._text.tokens[before:]
        if self._request.chat:
            choice = self._choice({"content": text}, reason, tokens)
        else:
            choice = self._choice(text, reason, tokens)
            if before == 0 and self._request.wants_token_ids:
                choice["prompt_token_ids"] = self._request.prompt
        choice["logprobs"] = self._documents.logprobs(tokens)
        last = reason is not None and self._dialect.usage is UsageForm.WITH_LAST_TOKEN
        self._event([choice], usage=last and self._usage_wanted)

    # -- the end --------------------------------------------------------------------------------
    def _finish(self, reason: str) -> None:
        self._on_end(False)
        if self._request.streams:
            if self._usage_wanted and self._dialect.usage is not UsageForm.WITH_LAST_TOKEN:
                self._event([])
            self._end_stream()
            return
        text = self._text.text
        content = {"role": "assistant", "content": text} if self._request.chat else text
        choice = self._choice(content, reason)
        choice["logprobs"] = self._documents.logprobs(self._text.tokens)
        self._send_whole([choice])

    def _fail(self, how: str) -> None:
        """Fail as engines do: see ``Mishap``."""
        self._on_end(False)
        if how == "abort":
            held = self._text.flush()
            choice = self._choice({"content": held} if self._request.chat else held, "abort", ())
            if self._request.streams:
                self._event([choice])
                self._end_stream()
            else:
                self._send_whole([choice])
            return
        if how in {"error", "refuse"}:
            status = 400 if how == "refuse" else 500
            message = "logprobs is too large" if how == "refuse" else "engine died"
            self._send(self._dialect.event(self._dialect.error(message, status)))
            self._end_stream()
            return
        if how == "torn":
            self._exchange.write(b'40\r\ndata: {"id":"torn in the mid')
        self._exchange.finish(close=True)

    # -- bytes ----------------------------------------------------------------------------------
    def _choice(
        self, content: object, reason: str | None, tokens: list[int] | tuple[int, ...] | None = None
    ) -> dict[str, object]:
        return self._documents.choice(
            content, reason, stop_reason=self._text.stop_reason, tokens=tokens
        )

    def _usage(self) -> Json:
        return self._documents.usage(len(self._text.tokens))

    def _send_whole(self, choices: list[dict[str, object]]) -> None:
        document = self._documents.document(choices, usage=self._usage())
        send_whole(self._exchange, self._dialect, 200, document)

    def _event(
        self, choices: list[dict[str, object]], *, first: bool = False, usage: bool = False
    ) -> None:
        more: dict[str, object] = {}
        if first and self._request.wants_token_ids:
            more["prompt_token_ids"] = self._request.prompt
        if self._usage_always or not choices or usage:
            more["usage"] = self._usage()
        elif self._dialect.usage_null:
            more["usage"] = None
        self._send(self._dialect.event(self._documents.document(choices, **more)))

    def _send(self, payload: bytes) -> None:
        """Encode events in chunks as this kind of server does."""
        dialect = self._dialect
        if not dialect.chunked:
            self._exchange.write(payload)
            return
        size = dialect.chunk_bytes or len(payload)
        for start in range(0, len(payload), size):
            self._exchange.write(chunk(payload[start : start + size]))

    def _end_stream(self) -> None:
        self._send(self._dialect.event(b"[DONE]"))
        if self._dialect.chunked:
            self._exchange.write(LAST_CHUNK)
        self._exchange.finish(close=not self._dialect.chunked)
