"""Errors in OpenAI's form, and the HTTP status each kind travels with."""

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from oserve.control.dispatch.commands import Refusal, Refuse
from oserve.wire import Exchange


# Neither frozen nor slotted: whoever passes an exception on sets its traceback.
@dataclass(kw_only=True, eq=False)
class ApiError(Exception):
    """What went wrong, as clients of OpenAI's API expect to read it."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    retry_after_s: int | None = None

    def body(self) -> bytes:
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


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """The request is at fault."""
    return ApiError(status=400, message=message, param=param, code=code)


def unavailable(message: str, *, retry_after_s: int = 5) -> ApiError:
    """No replica can take it now."""
    return ApiError(
        status=503,
        message=message,
        type="server_error",
        code="no_capacity",
        retry_after_s=retry_after_s,
    )


def overloaded(message: str, *, retry_after_s: int, code: str = "queue_full") -> ApiError:
    """Too much is waiting already."""
    return ApiError(
        status=429,
        message=message,
        type="rate_limit_error",
        code=code,
        retry_after_s=retry_after_s,
    )


def upstream_failed(message: str) -> ApiError:
    """A replica failed and the request could not be saved."""
    return ApiError(status=502, message=message, type="server_error", code="replica_failed")


def internal() -> ApiError:
    """Our own fault; the log says more."""
    return ApiError(
        status=500,
        message="The gateway could not handle this request; its log says where",
        type="server_error",
        code="internal_error",
    )


def shown(request_id: bytes) -> str:
    """A request's id as a log may have it: a client chose it."""
    return ascii(request_id.decode("latin-1"))


def timed_out(message: str) -> ApiError:
    """It took longer than allowed."""
    return ApiError(status=504, message=message, type="server_error", code="deadline_exceeded")


_BY_STATUS = {401: "authentication_error", 404: "not_found_error", 413: "invalid_request_error"}


def with_status(status: int, message: str, *, code: str | None = None) -> ApiError:
    """Any other refusal."""
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
    exchange.respond(error.status, error.body(), headers=headers, close=close)


def refusal_error(command: Refuse) -> ApiError:
    """What a client is told when the request machine refuses its request."""
    return _REFUSALS[command.refusal](command)


_REFUSALS: dict[Refusal, Callable[[Refuse], ApiError]] = {
    Refusal.NO_REPLICA: lambda told: unavailable(
        told.reason or "No replica can serve now, and none is starting"
    ),
    Refusal.NONE_READY_IN_TIME: lambda _: unavailable("No replica became ready in time"),
    Refusal.QUEUE_FULL: lambda told: overloaded(
        "Too many requests are waiting", retry_after_s=told.retry_after_s
    ),
    Refusal.SHED: lambda told: overloaded(
        "It waited too long", retry_after_s=told.retry_after_s, code="shed"
    ),
    Refusal.REPLICA_FAILED: lambda told: upstream_failed(
        f"Replica {told.replica} failed: {told.reason}"
    ),
    Refusal.REFUSED_UNHEARD: lambda told: with_status(
        told.status, "The replica refused the request, and its reasons were lost"
    ),
    Refusal.DEADLINE: lambda _: timed_out("The request exceeded the server's time limit"),
    Refusal.SHUTTING_DOWN: lambda _: unavailable("The server is shutting down"),
    Refusal.INTERNAL: lambda _: internal(),
}
