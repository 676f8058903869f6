"""The response formats of different servers, for an emulated engine that imitates them.

Each is what the real server was observed to send, or what its documentation says
(docs/backends.md). A dialect covers form only: bytes of events, health and errors, and the fields
that the server accepts.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import msgspec


class UsageForm(StrEnum):
    """Where a stream reports its token counts, if asked."""

    LAST_EVENT = "last event, its choices empty"
    WITHOUT_CHOICES = "last event, which has no choices"
    WITH_LAST_TOKEN = "the event that ends the answer"
    NEVER = "nowhere"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """One server's format. Paths start at its root; ``prefix`` comes before ``/v1``.

    ``begins``: start of a data line; ``before_end``: bytes between JSON and line end; ``ends``: the
    line end. ``spaced`` and ``ascii``: its JSON style. ``usage_null``: each event has a usage
    field. ``always_usage``: it reports usage unasked. ``pings``: comments between events.
    ``chunked``: streams are chunked, else they end with the connection; ``chunk_bytes``: size of a
    chunk, regardless of events; 0: one chunk per event. ``reason``: status lines have reason
    phrases. ``refused``: fields that it refuses with 400. ``token_ids``: it supports vLLM's
    ``return_token_ids``. ``error_status``: status for an invalid request. ``bare_errors``: errors
    are a text and a type.
    """

    name: str
    prefix: str = ""
    health: tuple[str, ...] = ("/health",)
    lists_models: bool = True
    begins: bytes = b"data: "
    before_end: bytes = b""
    ends: bytes = b"\n"
    spaced: bool = False
    ascii: bool = False
    usage: UsageForm = UsageForm.LAST_EVENT
    usage_null: bool = False
    always_usage: bool = False
    pings: bool = False
    chunked: bool = True
    chunk_bytes: int = 0
    reason: bool = True
    content_type: str = "text/event-stream; charset=utf-8"
    refused: frozenset[str] = frozenset()
    token_ids: bool = False
    error_status: int = 400
    bare_errors: bool = False
    tokenizes: bool = False
    stream_headers: tuple[tuple[str, str], ...] = ()

    def text(self, document: Mapping[str, Any]) -> bytes:
        """A document in its JSON style."""
        if not self.spaced and not self.ascii:
            return msgspec.json.encode(document)
        separators = (", ", ": ") if self.spaced else (",", ":")
        return json.dumps(document, ensure_ascii=self.ascii, separators=separators).encode()

    def event(self, data: bytes) -> bytes:
        """An event with this data, after a comment if the server sends those."""
        ping = b": ping - 2026-01-01" + 2 * self.ends if self.pings else b""
        return ping + self.begins + data + self.before_end + 2 * self.ends

    def error(self, message: str, status: int) -> bytes:
        """The body of an error."""
        if self.bare_errors:
            kind = "validation" if status < 500 else "generation"
            return self.text({"error": message, "error_type": kind})
        kind = "BadRequestError" if status < 500 else "InternalServerError"
        error = {"message": message, "type": kind, "param": None, "code": status}
        return self.text({"error": error})


VLLM = Dialect(name="vllm", token_ids=True, tokenizes=True)

DIALECTS: tuple[Dialect, ...] = (
    VLLM,
    Dialect(
        name="llama-cpp-python",
        health=(),
        spaced=True,
        ascii=True,
        usage=UsageForm.NEVER,
        error_status=500,
    ),
    Dialect(
        name="sse-starlette",
        ends=b"\r\n",
        spaced=True,
        pings=True,
        usage=UsageForm.WITHOUT_CHOICES,
        refused=frozenset({"stream_options"}),
    ),
    Dialect(
        name="torchserve",
        prefix="/predictions/emulated/1.0",
        health=("/ping",),
        lists_models=False,
        spaced=True,
        ascii=True,
        reason=False,
        always_usage=True,
        content_type="",
        error_status=503,
        stream_headers=(("ts_stream_next", "true"),),
    ),
    Dialect(
        name="tgi",
        begins=b"data:",
        usage=UsageForm.WITH_LAST_TOKEN,
        pings=True,
        error_status=422,
        bare_errors=True,
    ),
    Dialect(name="tensorrt-llm", before_end=b" "),
    Dialect(name="sglang", usage_null=True, token_ids=True, tokenizes=True),
    Dialect(name="ollama", health=("/",), always_usage=True),
    # No server in particular: what HTTP and the standard allow.
    Dialect(name="carriage returns", ends=b"\r", chunk_bytes=7),
    Dialect(name="odd chunks", chunk_bytes=41, spaced=True, token_ids=True),
    Dialect(name="no chunks", chunked=False, usage_null=True),
)
