"""The request as sent to a replica: path, host, headers, and the fields that it supports."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import urlsplit

import msgspec

from oserve.control.dispatch.order import engine_priority
from oserve.control.dispatch.table import TableReplica
from oserve.core import Endpoint
from oserve.gateway.http.body import Fields, GenerateBody, with_fields
from oserve.wire import UpstreamPool
from oserve.wire.upstream import client_context

# Further headers that clients may send to engines. Not the data-parallel rank, since OServe routes,
# nor the priority, which is part of the rank in the body.
_FORWARDED_NAMES = {
    b"traceparent",
    b"tracestate",
    b"x-correlation-id",
    b"x-session-id",
    b"user-agent",
    b"endpoint-load-metrics-format",
}
_TLS_PORT, _PORT = 443, 80
_fields = msgspec.json.Decoder(Fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """The address of an endpoint. ``authority``: the value of the Host header."""

    host: str = ""
    port: int = 0
    tls: bool = False
    authority: bytes = b"replica"
    prefix: bytes = b""


@lru_cache(maxsize=4096)
def address_of(endpoint: Endpoint) -> Address:
    """Parse ``http[s]://host[:port][/path]``; the path may end in ``/v1``."""
    if endpoint.unix_socket:
        return Address()
    parts = urlsplit(endpoint.url)
    tls = parts.scheme == "https"
    return Address(
        host=parts.hostname or "",
        port=parts.port or (_TLS_PORT if tls else _PORT),
        tls=tls,
        authority=parts.netloc.rpartition("@")[2].encode(),
        prefix=parts.path.rstrip("/").removesuffix("/v1").rstrip("/").encode(),
    )


def pool_of(endpoint: Endpoint) -> UpstreamPool:
    """A connection pool for an endpoint."""
    if endpoint.unix_socket:
        return UpstreamPool(unix_socket=endpoint.unix_socket, hatch=endpoint.hatch)
    address = address_of(endpoint)
    tls = client_context(endpoint.ca_file) if address.tls else None
    return UpstreamPool(host=address.host, port=address.port, tls=tls)


class Outgoing(msgspec.Struct, frozen=True, kw_only=True):
    """A request for a replica. ``parsed`` describes ``body``; ``None``: the body is opaque.

    ``token_ids``: request token ids. ``cache_salt``: of its tenant's prefixes, "" for none.
    ``cache``: the parameters of a KV cache transfer.
    """

    method: bytes
    path: bytes
    headers: Mapping[bytes, bytes]
    request_id: bytes
    body: bytes
    parsed: GenerateBody | None
    token_ids: bool = False
    cache_salt: str = ""
    cache: Mapping[str, str] | None = None


def request_bytes(
    outgoing: Outgoing, replica: TableReplica, *, rank_s: float, stream_options: bool
) -> bytes:
    """The HTTP request for this replica.

    ``stream_options``: whether the replica supports that option.
    """
    body, parsed, priority = outgoing.body, outgoing.parsed, None
    if parsed is not None:
        priority = engine_priority(rank_s) if replica.accepts_priority else None
        body = with_fields(
            parsed,
            priority=priority,
            model=replica.model,
            token_ids=outgoing.token_ids,
            cache=outgoing.cache if replica.endpoint.caches else None,
            # vLLM knows the field; others might refuse it.
            cache_salt=outgoing.cache_salt
            if not replica.attached or replica.returns_token_ids
            else "",
        )
        if parsed.stream and not stream_options:
            body = _changed(body, without="stream_options")
    elif replica.model:
        body = _changed(body, model=replica.model)
    endpoint = replica.endpoint
    address = address_of(endpoint)
    lines = [
        b"%b %b%b HTTP/1.1\r\nhost: %b\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\nx-request-id: %b\r\n"
        % (
            outgoing.method,
            address.prefix,
            outgoing.path,
            address.authority,
            len(body),
            outgoing.request_id,
        )
    ]
    headers = outgoing.headers
    forwarded = _FORWARDED_NAMES & headers.keys()
    if forwarded:
        own = {name.lower().encode() for name, _ in endpoint.headers}
        lines += [b"%b: %b\r\n" % (name, headers[name]) for name in forwarded - own]
    if priority is not None and parsed is not None and parsed.form.priority_header:
        lines.append(b"x-vllm-priority: %d\r\n" % priority)
    if endpoint.headers:
        lines += [
            b"%b: %b\r\n" % (name.encode(), value.encode()) for name, value in endpoint.headers
        ]
    if endpoint.api_key:
        lines.append(b"authorization: Bearer %b\r\n" % endpoint.api_key.encode())
    return b"".join((*lines, b"\r\n", body))


def requests_only_usage(parsed: GenerateBody) -> bool:
    """Whether the stream options hold nothing but ``include_usage``, which OServe would add."""
    return all(name == "include_usage" for name in parsed.options)


def _changed(body: bytes, *, model: str = "", without: str = "") -> bytes:
    """The body with another model, or without a field; unchanged if it is no JSON object."""
    try:
        fields = _fields.decode(body)
    except (ValueError, RecursionError):
        return body
    if model:
        fields["model"] = msgspec.Raw(msgspec.json.encode(model))
    fields.pop(without, None)
    return msgspec.json.encode(fields)
