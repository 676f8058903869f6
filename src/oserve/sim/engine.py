"""An engine without a model for tests and benchmarks of gateways.

It serves OpenAI's API with deterministic tokens at a chosen speed.
"""

import json
from collections import deque
from typing import Annotated, Any

import msgspec

from oserve.sim.dialects import VLLM, Dialect
from oserve.sim.documents import GenerationRequest
from oserve.sim.further_forms import (
    LIMITS,
    TypedStream,
    batch_answer,
    messages_answer,
    messages_events,
    responses_answer,
    responses_events,
    scoring_answer,
)
from oserve.sim.responses import EmulatedResponse, EngineSpeed, Mishap, send_whole
from oserve.sim.tokenizer_stub import CountingTokenizer, TokenizerStub
from oserve.wire import Exchange, ServerLimits, serve
from oserve.wire.server import HttpServer

_FURTHER = {
    *LIMITS,
    b"/v1/messages/count_tokens",
    b"/v1/chat/completions/batch",
    b"/generative_scoring",
}


class EmulatedEngine:
    """Serves one model. ``seen`` holds request bodies, ``aborted`` counts clients that left.

    ``max_model_len`` is in tokens; a word of a prompt counts as one. No answer has more than
    ``most_tokens``. Each answer takes the next of ``mishaps``, if any. ``dialect``: the server that
    it imitates. ``heads`` holds paths and headers of the last requests. ``hosts``: accepted host
    names, all others get 403; empty: all are accepted. ``api_key``, if set, is required.
    ``status``, if set, answers every generation, with ``extra`` headers.
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
        self._server: HttpServer | None = None
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
        """Abort all connections, as when a process is killed."""
        if self._server is not None:
            await self._server.close()

    @property
    def path(self) -> str:
        """The path of its URL."""
        return self.dialect.prefix

    def _handle(self, exchange: Exchange) -> None:
        path = exchange.path.partition(b"?")[0]
        dialect = self.dialect
        self.heads.append((path, exchange.headers))
        if self.hosts and exchange.headers.get(b"host", b"").decode("latin-1") not in self.hosts:
            self._refuse(exchange, 403, "no such host")
            return
        if path.decode("latin-1") in dialect.health:
            send_whole(exchange, dialect, 200, b"")
            return
        key = exchange.headers.get(b"authorization", b"")
        if self._api_key and key != b"Bearer " + self._api_key.encode():
            self._refuse(exchange, 401, "missing or wrong key")
            return
        prefix = dialect.prefix.encode()
        self._route(exchange, path.removeprefix(prefix) if path.startswith(prefix) else b"")

    def _route(self, exchange: Exchange, route: bytes) -> None:
        dialect = self.dialect
        if route in {b"/v1/completions", b"/v1/chat/completions"}:
            self._generate(exchange, chat=route.startswith(b"/v1/chat"))
        elif route in _FURTHER and dialect is VLLM:
            self._answer_further(exchange, route)
        elif route == b"/v1/models" and dialect.lists_models:
            entry = {"id": self._model, "object": "model", "max_model_len": self._max_model_len}
            send_whole(exchange, dialect, 200, dialect.text({"object": "list", "data": [entry]}))
        elif route == b"/tokenize" and dialect.tokenizes:
            self._tokenize(exchange)
        elif route == b"/metrics" and dialect is VLLM:
            text = b"vllm:num_requests_running %d\nvllm:num_requests_waiting 0\n" % self.running
            exchange.respond(200, text, content_type=b"text/plain")
        else:
            self._refuse(exchange, 404, "no such route")

    def _tokenize(self, exchange: Exchange) -> None:
        try:
            asked = json.loads(exchange.body)
            model, words = asked.get("model"), str(asked.get("prompt", "")).split()
        except (ValueError, AttributeError, RecursionError) as error:
            self._refuse(exchange, 400, str(error))
            return
        if model not in {None, self._model}:
            self._refuse(exchange, 404, "no such model")
            return
        body = {"count": len(words), "max_model_len": self._max_model_len}
        text = self.dialect.text({**body, "tokens": list(range(len(words)))})
        send_whole(exchange, self.dialect, 200, text)

    def _answer_further(self, exchange: Exchange, route: bytes) -> None:
        """Answer in a form other than OpenAI's completions."""
        body = json.loads(exchange.body)
        self.seen.append(body)
        if self.status:
            error = self.dialect.error("not now", self.status)
            send_whole(exchange, self.dialect, self.status, error, self.extra)
            return
        limit = body.get(LIMITS.get(route, "max_tokens")) or 16
        words = [f" t{number + 1}" for number in range(min(limit, self._most_tokens))]
        prompt_tokens = len(exchange.body.split())
        if body.get("stream") and route in LIMITS:
            make = messages_events if route == b"/v1/messages" else responses_events
            stream = TypedStream(exchange, make(words, prompt_tokens), self._speed, self._ended)
            exchange.on_disconnect = stream.cancel
            self.running += 1
            stream.begin()
            return
        if route == b"/v1/messages":
            answer = messages_answer(words, prompt_tokens)
        elif route == b"/v1/responses":
            answer = responses_answer(words, prompt_tokens)
        elif route == b"/v1/chat/completions/batch":
            answer = batch_answer(words, prompt_tokens, len(body["messages"]))
        elif route == b"/generative_scoring":
            answer = scoring_answer(prompt_tokens, len(body["items"]))
        else:
            answer = {"input_tokens": prompt_tokens}
        send_whole(exchange, self.dialect, 200, self.dialect.text(answer))

    def _generate(self, exchange: Exchange, *, chat: bool) -> None:
        dialect = self.dialect
        try:
            # vLLM accepts more than strict JSON, such as numbers out of range.
            body = json.loads(exchange.body)
            checked = msgspec.convert(body, _Checked, strict=False)
        except (ValueError, RecursionError) as error:
            self._refuse(exchange, 400, str(error))
            return
        if self._keep_bodies:
            self.seen.append(dict(body))
        body |= {name: getattr(checked, name) for name in body.keys() & _CHECKED}
        if self.status:
            error_body = dialect.error("not now", self.status)
            send_whole(exchange, dialect, self.status, error_body, self.extra)
            return
        wrong = _wrong(body, dialect)
        if wrong:
            self._refuse(exchange, 400, wrong)
            return
        if not dialect.token_ids:
            body.pop("return_token_ids", None)
        prompt = self._prompt_tokens(body)
        limit = checked.max_completion_tokens or checked.max_tokens or 16
        if limit < 1 or len(prompt) + 1 > self._max_model_len:
            self._refuse(exchange, dialect.error_status, "bad max_tokens, or too long a prompt")
            return
        request = GenerationRequest(
            body=body,
            id=exchange.headers.get(b"x-request-id", b"0").decode("latin-1"),
            chat=chat,
            prompt=prompt,
            limit=min(limit, self._most_tokens),
        )
        self._respond(exchange, request)

    def _respond(self, exchange: Exchange, request: GenerationRequest) -> None:
        response = EmulatedResponse(
            exchange,
            request,
            dialect=self.dialect,
            tokenizer=self.tokenizer,
            speed=self._speed,
            mishap=self.mishaps.popleft() if self.mishaps else None,
            on_end=self._ended,
        )
        exchange.on_disconnect = response.cancel
        self.running += 1
        response.begin()

    def _ended(self, aborted: bool) -> None:
        self.running -= 1
        self.aborted += aborted

    def _prompt_tokens(self, body: dict[str, Any]) -> list[int]:
        """The prompt's token ids, which a body may hold itself."""
        prompt = body.get("prompt")
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
            return prompt
        return self.tokenizer.encode(str(body.get("prompt", body.get("messages", ""))))

    def _refuse(self, exchange: Exchange, status: int, message: str) -> None:
        send_whole(exchange, self.dialect, status, self.dialect.error(message, status))


class _Checked(msgspec.Struct):
    """Fields whose types an engine checks."""

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
    """The reason why the engine refuses the body; empty if it accepts it."""
    unknown = dialect.refused & body.keys()
    if unknown:
        return f"Extra inputs are not permitted: {', '.join(sorted(unknown))}"
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
        valid = (isinstance(token, int) and 0 <= token < 1 << 31 for token in prompt)
        return "" if all(valid) else "no token ids"
    return ""
