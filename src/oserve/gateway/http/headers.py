"""Response headers: the replica's end-to-end headers, and those that the gateway adds."""

from functools import lru_cache

from oserve.wire import Dechunker, ResponseHead

_DROPPED = {
    b"connection",
    b"content-length",
    b"date",
    b"keep-alive",
    b"proxy-authenticate",
    b"server",
    b"te",
    b"trailer",
    b"transfer-encoding",
    b"upgrade",
    b"x-request-id",
}
# Limits of OServe's own account at an attached server are none of the client's, and the gateway
# alone says which origins may read an answer.
_OWN = (b"x-ratelimit-", b"access-control-")
_EVENTS = b"text/event-stream"

Headers = tuple[tuple[bytes, bytes], ...]


def is_event_stream(head: ResponseHead, begin: bytes) -> bool | None:
    """Whether the answer to a streaming request is an event stream; ``None``: not known yet.

    ``begin``: the bytes of its body so far. With a missing or wrong content type the first
    character decides: no line of an event stream begins like JSON or HTML.
    """
    fields = dict(head.headers)
    if fields.get(b"content-encoding", b"identity").lower() != b"identity":
        return False
    if fields.get(b"content-type", b"").partition(b";")[0].strip().lower() == _EVENTS:
        return True
    payload = Dechunker().feed(begin) if head.chunked else begin
    text = payload.removeprefix(b"\xef\xbb\xbf").lstrip()
    return text[:1] not in {b"{", b"[", b"<", b'"'} if text else None


# Heads that are equal byte by byte are one object (see ``wire.response``).
@lru_cache(maxsize=256)
def client_headers(head: ResponseHead, *, plain: bool, events: bool) -> tuple[Headers, bool]:
    """The replica's headers for the client, and whether to close the connection after the answer.

    ``plain``: the client speaks HTTP/1.0, which has no chunked encoding. ``events``: an event
    stream follows, which the gateway chunks itself.
    """
    dropped = _DROPPED | _named(head)
    fields = [
        field for field in head.headers if field[0] not in dropped and not field[0].startswith(_OWN)
    ]
    if events:
        if not any(
            name == b"content-type" and value.lower().startswith(_EVENTS) for name, value in fields
        ):
            fields = [field for field in fields if field[0] != b"content-type"]
            fields.append((b"content-type", _EVENTS + b"; charset=utf-8"))
        if not plain:
            fields.append((b"transfer-encoding", b"chunked"))
        return tuple(fields), plain
    close = False
    if head.length is not None:
        fields.append((b"content-length", b"%d" % head.length))
    elif head.chunked and not plain:
        fields.append((b"transfer-encoding", b"chunked"))
    else:
        close = True
    return tuple(fields), close


def _named(head: ResponseHead) -> set[bytes]:
    """Headers that concern one connection only (RFC 9110, 7.6.1)."""
    return {
        name.strip().lower()
        for field, value in head.headers
        if field == b"connection"
        for name in value.split(b",")
    }


def own_headers(
    request_id: bytes, *, replica: str, workload_type: str, plan_id: str, limits: Headers = ()
) -> Headers:
    """Headers with the request id, its first replica, type and plan; empty names are left out.

    ``limits``: those about the limits of its tenant.
    """
    fields = [(b"x-request-id", request_id)]
    if replica:
        fields.append((b"x-oserve-replica", replica.encode()))
    if workload_type:
        fields.append((b"x-oserve-workload-type", workload_type.encode()))
    fields.append((b"x-oserve-plan-id", plan_id.encode()))
    return (*fields, *limits)
