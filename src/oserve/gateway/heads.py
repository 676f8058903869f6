"""The headers of an answer: the replica's, as far as they are for the client, and our own."""

from typing import TYPE_CHECKING

from oserve.wire import ResponseHead

if TYPE_CHECKING:
    from oserve.gateway.relay import Relay

_DROPPED = {
    b"connection",
    b"content-length",
    b"date",
    b"keep-alive",
    b"server",
    b"transfer-encoding",
    b"x-request-id",
}

Headers = tuple[tuple[bytes, bytes], ...]


def told_headers(head: ResponseHead, *, plain: bool) -> tuple[Headers, bool]:
    """Those of the replica, and whether the connection must close at the end of the answer.

    ``plain``: the client speaks HTTP/1.0, which has no chunks.
    """
    fields = [field for field in head.headers if field[0] not in _DROPPED]
    close = False
    if head.length is not None:
        fields.append((b"content-length", b"%d" % head.length))
    elif head.chunked and not plain:
        fields.append((b"transfer-encoding", b"chunked"))
    else:
        close = True
    return tuple(fields), close


def own_headers(relay: "Relay") -> Headers:
    """Which request it is, and where it went first."""
    fields = [(b"x-request-id", relay.request_id)]
    if relay.replica is not None:
        fields.append((b"x-oserve-replica", relay.replica.id.encode()))
    if relay.request is not None:
        fields.append((b"x-oserve-workload-type", relay.request.workload_type.encode()))
    fields.append((b"x-oserve-plan-id", relay.dispatcher.table.plan_id.encode()))
    return tuple(fields)
