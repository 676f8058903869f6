"""A fast stand-in for an engine: every running stream gets one chunk a step. Run: backend.py PORT.

The body's ``step_us`` says how long a step takes (0: as fast as it can). Each chunk carries the
moment it was written (CLOCK_MONOTONIC, ns), so that the client can tell how long it travelled.
"""

import asyncio
import sys
import time

import msgspec
import uvloop

from oserve.wire import Exchange, ServerLimits, serve
from oserve.wire.framing import LAST_CHUNK

MODEL = "bench"
# As long as vLLM's chunks are: id, object, model, one token of text, nulls.
_FILL = (
    b'"object":"text_completion","created":1700000000,"model":"bench","choices":[{"index":0,'
    b'"text":" token","logprobs":null,"finish_reason":null,"stop_reason":null,'
    b'"prompt_token_ids":%b,"token_ids":%b}]'
)
_ANSWER = (
    b'{"id":"cmpl-0","object":"text_completion","created":1700000000,"model":"bench","choices":'
    b'[{"index":0,"text":" token","finish_reason":"length"}],"usage":{"prompt_tokens":8,'
    b'"total_tokens":9,"completion_tokens":1}}'
)
_STREAM = ((b"content-type", b"text/event-stream"), (b"transfer-encoding", b"chunked"))


class Body(msgspec.Struct):
    max_tokens: int = 1
    stream: bool = False
    step_us: int = 0
    return_token_ids: bool = False


class Backend:
    def __init__(self) -> None:
        self._streams: dict[Exchange, int] = {}
        self._told: dict[Exchange, bytes] = {}
        self._paused: set[Exchange] = set()
        self._step_s = 0.0
        self._running = False

    def handle(self, exchange: Exchange) -> None:
        path = exchange.path
        if path in {b"/v1/completions", b"/v1/chat/completions"}:
            body = msgspec.json.decode(exchange.body, type=Body)
            if not body.stream:
                exchange.respond(200, _ANSWER)
                return
            self._step_s = body.step_us / 1e6
            exchange.start(200, _STREAM)
            exchange.on_disconnect = lambda: self._forget(exchange)
            exchange.on_pause = lambda paused: self._pause(exchange, paused)
            self._streams[exchange] = body.max_tokens
            if body.return_token_ids:
                self._told[exchange] = b"[1,2,3,4,5,6,7,8]"
            if not self._running:
                self._running = True
                asyncio.get_running_loop().call_soon(self._step)
        elif path == b"/v1/models":
            entry = {"id": MODEL, "object": "model", "max_model_len": 100_000}
            exchange.respond(200, msgspec.json.encode({"object": "list", "data": [entry]}))
        else:
            exchange.respond(200, b"{}")

    def _forget(self, exchange: Exchange) -> None:
        self._streams.pop(exchange, None)
        self._told.pop(exchange, None)
        self._paused.discard(exchange)

    def _pause(self, exchange: Exchange, paused: bool) -> None:
        (self._paused.add if paused else self._paused.discard)(exchange)

    def _step(self) -> None:
        for exchange, left in list(self._streams.items()):
            if exchange in self._paused:
                continue
            prompt = self._told.get(exchange, b"")
            if prompt:
                self._told[exchange] = b"null"
            fill = _FILL % (prompt or b"null", b"[%d]" % (30_000 + left) if prompt else b"null")
            event = b'data: {"t":%d,%b}\n\n' % (time.monotonic_ns(), fill)
            exchange.write(b"%x\r\n%b\r\n" % (len(event), event))
            if left == 1:
                self._forget(exchange)
                exchange.write(b"e\r\ndata: [DONE]\n\n\r\n" + LAST_CHUNK)
                exchange.finish()
            else:
                self._streams[exchange] = left - 1
        loop = asyncio.get_running_loop()
        if not self._streams:
            self._running = False
        elif self._step_s:
            loop.call_later(self._step_s, self._step)
        else:
            loop.call_soon(self._step)


async def main(port: int) -> None:
    limits = ServerLimits()
    await serve(
        Backend().handle, refuse=lambda e, s, _: e.respond(s, b""), limits=limits, port=port
    )
    print("listening", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
