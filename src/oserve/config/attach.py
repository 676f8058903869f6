"""Attached servers in plan files: the ``attach`` section of a replica."""

import re
from typing import Annotated, Any
from urllib.parse import urlsplit

import msgspec

from oserve.core import AttachedBackend, OServeError

_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(r"[\t\x20-\x7e]*")
# The gateway sets these itself; a duplicate would enable request smuggling.
_OURS = {"connection", "content-length", "content-type", "host", "te", "transfer-encoding"}
_OURS |= {"upgrade", "x-request-id", "expect", "keep-alive", "trailer"}


class AttachFile(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The keys under ``attach``; see ``core.AttachedBackend``."""

    url: Annotated[str, msgspec.Meta(pattern="^https?://[^/]+")]
    model: str = ""
    api_key_env: str | None = None
    priority: bool = False
    token_ids: bool = False
    stream_options: bool = True
    health: Annotated[str, msgspec.Meta(pattern="^(/[\x21-\x7e]*)?$")] = ""
    headers: dict[str, str] = {}
    ca_file: str = ""


def attached_backend(attach: AttachFile, *, place: str) -> AttachedBackend:
    """The backend of an ``attach`` section; raises OServeError if a value is invalid."""
    _check_url(attach.url, place=f"{place}.url")
    for name, value in attach.headers.items():
        where = f"{place}.headers.{name}"
        if not _NAME.fullmatch(name) or name.lower() in _OURS:
            raise OServeError(
                "this header cannot be set", place=where, remedy="leave it out, or correct its name"
            )
        if name.lower() == "authorization" and attach.api_key_env:
            raise OServeError(
                "authorization is set by api_key_env already", place=where, remedy="choose one"
            )
        if not _VALUE.fullmatch(value):
            raise OServeError(
                "the value has characters that a header cannot carry",
                place=where,
                remedy="use printable ASCII",
            )
    return AttachedBackend(
        url=attach.url.rstrip("/"),
        model=attach.model,
        api_key_env=attach.api_key_env,
        priority=attach.priority,
        token_ids=attach.token_ids,
        stream_options=attach.stream_options,
        health=attach.health,
        headers=tuple(attach.headers.items()),
        ca_file=attach.ca_file,
    )


def _check_url(url: str, *, place: str) -> None:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise OServeError(str(error), place=place, remedy="http://host:port/path") from None
    if parts.username is not None or parts.password is not None:
        raise OServeError(
            "a URL with a user name would show it in status and logs",
            place=place,
            remedy="use api_key_env, or headers: {Authorization: $VARIABLE}",
        )
    if parts.query or parts.fragment:
        raise OServeError(
            "requests add their own path, so the URL can have no ? or #",
            place=place,
            remedy="leave them out",
        )
    if not parts.hostname or port == 0 or not re.fullmatch(r"[\x21-\x7e]+", url):
        raise OServeError("it names no host", place=place, remedy="http://host:port/path")


def attach_row(backend: AttachedBackend) -> dict[str, Any]:
    """The ``attach`` section of a backend, without defaults."""
    row: dict[str, Any] = {
        "url": backend.url,
        "model": backend.model,
        "api_key_env": backend.api_key_env,
        "priority": backend.priority,
        "token_ids": backend.token_ids,
        "health": backend.health,
        "headers": dict(backend.headers),
        "ca_file": backend.ca_file,
    }
    given = {key: value for key, value in row.items() if value}
    return given if backend.stream_options else {**given, "stream_options": False}
