"""Errors in OpenAI's form, with their HTTP status."""

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from oserve.control.dispatch.commands import Refusal, Refuse
from oserve.gateway.http.api_form import ANTHROPIC
from oserve.wire import Exchange
from oserve.wire.events import data_event


# Neither frozen nor slotted: Python sets the traceback of an exception that propagates.
@dataclass(kw_only=True, eq=False)
class ApiError(Exception):
    """An error of the OpenAI API: message, type, code and parameter.

    ``reason``: what metrics call it, where its code does not tell enough.
    """

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    retry_after_s: int | None = None
    headers: tuple[tuple[bytes, bytes], ...] = ()
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.status} {self.code or self.type}: {self.message}"

    def body(self) -> bytes:
        """The error as JSON."""
        return msgspec.json.encode(
            {
                "error": {
                    "message": self.message,
                    "type": self.type,
                    "param": self.param,
                    "code": self.code,
                }
            }
        )

    def anthropic_body(self) -> bytes:
        """The same in Anthropic's form."""
        kind = _ANTHROPIC.get(self.status, "api_error" if self.status >= 500 else self.type)
        error = {"type": kind, "message": self.message}
        return msgspec.json.encode({"type": "error", "error": error})

    def body_for(self, path: bytes) -> bytes:
        """The form that clients of this path understand."""
        return self.anthropic_body() if path.startswith(ANTHROPIC) else self.body()

    def event_for(self, path: bytes) -> bytes:
        """The event that ends a stream of this path with the error."""
        if path.startswith(ANTHROPIC):
            return b"event: error\n" + data_event(self.anthropic_body())
        if path.startswith(b"/v1/responses"):
            fields = {"code": self.code or self.type, "message": self.message, "param": self.param}
            body = msgspec.json.encode({"type": "error", **fields, "sequence_number": 0})
            return b"event: error\n" + data_event(body)
        return data_event(self.body())


# Other client errors are ``invalid_request_error`` there, too.
_ANTHROPIC = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request is invalid."""
    return ApiError(status=400, message=message, param=param, code=code)


def unavailable(message: str, *, retry_after_s: int = 5) -> ApiError:
    """503: no replica can serve now."""
    return ApiError(
        status=503,
        message=message,
        type="server_error",
        code="no_capacity",
        retry_after_s=retry_after_s,
    )


def overloaded(message: str, *, retry_after_s: int, code: str = "queue_full") -> ApiError:
    """429: too many requests wait. As at OpenAI, the type of a 429 names what is short."""
    return ApiError(
        status=429,
        message=message,
        type="requests",
        code=code,
        retry_after_s=retry_after_s,
    )


def upstream_failed(message: str) -> ApiError:
    """502: a replica failed and the request could not be retried."""
    return ApiError(status=502, message=message, type="server_error", code="replica_failed")


def internal() -> ApiError:
    """500: a fault of the gateway, with details in its log."""
    return ApiError(
        status=500,
        message="The gateway failed to handle this request; see its log",
        type="server_error",
        code="internal_error",
    )


def shown(request_id: bytes) -> str:
    """A request id made safe for the log, since a client may choose it."""
    return ascii(request_id.decode("latin-1"))


def timed_out(message: str) -> ApiError:
    """504: the request exceeded its time limit."""
    return ApiError(status=504, message=message, type="server_error", code="deadline_exceeded")


_BY_STATUS = {401: "authentication_error", 404: "not_found_error", 413: "invalid_request_error"}


def with_status(status: int, message: str, *, code: str | None = None) -> ApiError:
    """An error with any other status."""
    return ApiError(
        status=status,
        message=message,
        type=_BY_STATUS.get(status, "invalid_request_error"),
        code=code,
    )


def send_error(
    exchange: Exchange,
    error: ApiError,
    headers: tuple[tuple[bytes, bytes], ...] = (),
    *,
    close: bool = False,
) -> None:
    """Answer an exchange with an error."""
    if error.retry_after_s is not None:
        headers = (*headers, (b"retry-after", b"%d" % error.retry_after_s))
    body = error.body_for(exchange.path)
    exchange.respond(error.status, body, headers=headers, close=close)


def refusal_error(command: Refuse) -> ApiError:
    """The error for a request that the request machine refused."""
    return _REFUSALS[command.refusal](command)


_REFUSALS: dict[Refusal, Callable[[Refuse], ApiError]] = {
    Refusal.NO_REPLICA: lambda told: unavailable(
        told.reason or "No replica can serve now, and none is starting"
    ),
    Refusal.NONE_READY_IN_TIME: lambda _: unavailable("No replica became ready in time"),
    Refusal.QUEUE_FULL: lambda refusal: overloaded(
        "Too many requests are waiting", retry_after_s=refusal.retry_after_s
    ),
    Refusal.SHED: lambda refusal: overloaded(
        "The request waited too long and was shed", retry_after_s=refusal.retry_after_s, code="shed"
    ),
    Refusal.PROMISE: lambda refusal: overloaded(
        f"Its first token is expected in {refusal.reason}",
        retry_after_s=refusal.retry_after_s,
        code="tier_limit",
    ),
    Refusal.REPLICA_FAILED: lambda refusal: upstream_failed(
        f"Replica {refusal.replica} failed: {refusal.reason}"
    ),
    Refusal.REFUSED_WITHOUT_BODY: lambda refusal: with_status(
        refusal.status, "The replica refused the request; its error message was lost"
    ),
    Refusal.DEADLINE: lambda _: timed_out("The request exceeded the server's time limit"),
    Refusal.SHUTTING_DOWN: lambda _: unavailable("The server is shutting down"),
    Refusal.INTERNAL: lambda _: internal(),
}
