"""An engine without a model: OpenAI's API, deterministic tokens, a speed of your choice.

For tests of whatever stands in front of an engine, and for measuring that alone.
"""

import json
from collections import deque
from typing import Annotated, Any

import msgspec

from oserve.sim.dialects import VLLM, Dialect
from oserve.sim.responses import EmulatedResponse, EngineSpeed, Mishap
from oserve.sim.tokenizer_stub import CountingTokenizer, TokenizerStub
from oserve.wire import Exchange, ServerLimits, serve
from oserve.wire.server import Server


class EmulatedEngine:
    """Serves one model name. ``seen`` keeps the bodies received, ``aborted`` counts clients gone.

    ``max_model_len`` is in tokens; a prompt counts one token a word. No answer has more than
    ``most_tokens``. Each takes the next of ``mishaps``, as long as there are any. ``dialect``: the
    server that it speaks like. ``heads`` keeps the last requests' headers, ``hosts`` its own names:
    others get 403; none: all are. Where it has an ``api_key``, requests must. ``status``, if set,
    answers every generation, and ``extra`` are headers of that answer.
    """

    def __init__(
        self,
        *,
        model: str = "emulated",
        speed: EngineSpeed | None = None,
        max_model_len: int = 8192,
        most_tokens: int = 1 << 20,
        keep_bodies: bool = True,
        tokenizer: TokenizerStub | None = None,
        dialect: Dialect = VLLM,
        api_key: str = "",
    ) -> None:
        self.dialect = dialect
        self.hosts: frozenset[str] = frozenset()
        self.status = 0
        self.extra: tuple[tuple[bytes, bytes], ...] = ()
        self.heads: deque[tuple[bytes, dict[bytes, bytes]]] = deque(maxlen=256)
        self._api_key = api_key
        self._model = model
        self._speed = speed or EngineSpeed()
        self._max_model_len = max_model_len
        self._most_tokens = most_tokens
        self._keep_bodies = keep_bodies
        self._server: Server | None = None
        self.tokenizer = tokenizer or CountingTokenizer()
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

    @property
    def path(self) -> str:
        """What its URL has after the port."""
        return self.dialect.prefix

    def answer(
        self,
        exchange: Exchange,
        status: int,
        body: bytes,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        """A whole answer as its kind of server gives it."""
        kind = b"application/json" if self.dialect.content_type else b""
        fields = ((b"content-type", kind),) if kind else ()
        length = ((b"content-length", b"%d" % len(body)),)
        self.begin(exchange, status, (*fields, *length, *headers))
        exchange.write(body)
        exchange.finish()

    def begin(
        self, exchange: Exchange, status: int, headers: tuple[tuple[bytes, bytes], ...]
    ) -> None:
        """The head of an answer; of some servers it says no reason."""
        if self.dialect.reason:
            exchange.start(status, headers)
            return
        lines = [b"HTTP/1.1 %d \r\n" % status, *(b"%b: %b\r\n" % field for field in headers)]
        exchange.write(b"".join((*lines, b"\r\n")))

    def _handle(self, exchange: Exchange) -> None:
        path = exchange.path.partition(b"?")[0]
        dialect = self.dialect
        self.heads.append((path, exchange.headers))
        if self.hosts and exchange.headers.get(b"host", b"").decode("latin-1") not in self.hosts:
            self.answer(exchange, 403, dialect.error("no such host", 403))
            return
        if path.decode("latin-1") in dialect.health:
            self.answer(exchange, 200, b"")
            return
        key = exchange.headers.get(b"authorization", b"")
        if self._api_key and key != b"Bearer " + self._api_key.encode():
            self.answer(exchange, 401, dialect.error("missing or wrong key", 401))
            return
        prefix = dialect.prefix.encode()
        route = path.removeprefix(prefix) if path.startswith(prefix) else b""
        if route in {b"/v1/completions", b"/v1/chat/completions"}:
            self._generate(exchange, chat=route.startswith(b"/v1/chat"))
        elif route == b"/v1/models" and dialect.lists_models:
            entry = {"id": self._model, "object": "model", "max_model_len": self._max_model_len}
            self.answer(exchange, 200, dialect.text({"object": "list", "data": [entry]}))
        elif route == b"/tokenize" and dialect.tokenizes:
            try:
                asked = json.loads(exchange.body)
                model, words = asked.get("model"), str(asked.get("prompt", "")).split()
            except (ValueError, AttributeError, RecursionError) as error:
                self.answer(exchange, 400, dialect.error(str(error), 400))
                return
            if model not in {None, self._model}:
                self.answer(exchange, 404, dialect.error("no such model", 404))
                return
            body = {"count": len(words), "max_model_len": self._max_model_len}
            self.answer(exchange, 200, dialect.text({**body, "tokens": list(range(len(words)))}))
        elif route == b"/metrics" and dialect is VLLM:
            text = b"vllm:num_requests_running %d\nvllm:num_requests_waiting 0\n" % self.running
            exchange.respond(200, text, content_type=b"text/plain")
        else:
            self.answer(exchange, 404, dialect.error("no such route", 404))

    def _generate(self, exchange: Exchange, *, chat: bool) -> None:
        dialect = self.dialect
        try:
            # As vLLM reads it, which takes more than JSON: numbers out of range, for one.
            body = json.loads(exchange.body)
            checked = msgspec.convert(body, _Checked, strict=False)
        except (ValueError, RecursionError) as error:
            self.answer(exchange, 400, dialect.error(str(error), 400))
            return
        if self._keep_bodies:
            self.seen.append(dict(body))
        body |= {name: getattr(checked, name) for name in body.keys() & _CHECKED}
        if self.status:
            error_body = dialect.error("not now", self.status)
            self.answer(exchange, self.status, error_body, self.extra)
            return
        wrong = _wrong(body, dialect)
        if wrong:
            self.answer(exchange, 400, dialect.error(wrong, 400))
            return
        if not dialect.token_ids:
            body.pop("return_token_ids", None)
        prompt = body.get("prompt")
        if not (isinstance(prompt, list) and prompt and isinstance(prompt[0], int)):
            prompt = self.tokenizer.encode(_prompt_text(body))
        limit = checked.max_completion_tokens or checked.max_tokens or 16
        if limit < 1 or len(prompt) + 1 > self._max_model_len:
            status = dialect.error_status
            message = "bad max_tokens, or too long a prompt"
            self.answer(exchange, status, dialect.error(message, status))
            return
        limit = min(limit, self._most_tokens)
        mishap = self.mishaps.popleft() if self.mishaps else None
        answer = EmulatedResponse(
            self, exchange, body, chat=chat, prompt=prompt, limit=limit, mishap=mishap
        )
        exchange.on_disconnect = answer.cancel
        self.running += 1
        answer.begin(self._speed)


def _prompt_text(body: dict[str, Any]) -> str:
    return str(body.get("prompt", body.get("messages", "")))


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


def _wrong(body: dict[str, Any], dialect: Dialect) -> str:
    """What keeps it from answering, or nothing."""
    unknown = dialect.refused & body.keys()
    if unknown:
        return f"Extra inputs are not permitted: {', '.join(sorted(unknown))}"
    prompt: Any = body.get("prompt")
    by_ids = isinstance(prompt, list) and prompt and isinstance(prompt[0], int)
    if by_ids and not all(isinstance(token, int) and 0 <= token < 1 << 31 for token in prompt):
        return "no token ids"
    return ""
