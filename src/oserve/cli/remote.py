"""Calls to a running server."""

import asyncio
import os
from typing import Any

import aiohttp
import msgspec

from oserve.cli.answers import error_message
from oserve.config import API_KEYS, environment_value
from oserve.core import OServeError

_DOCUMENT_DECODER = msgspec.json.Decoder(dict[str, Any])

_TIMEOUT_S = 10.0


def call(
    url: str,
    path: str,
    *,
    api_key: str | None = None,
    body: bytes | None = None,
    timeout_s: float = _TIMEOUT_S,
) -> bytes:
    """The body of a GET, or of a POST if there is a body. ``url`` is a base URL.

    Raises OServeError with the server's message.
    """
    key = api_key or environment_value(API_KEYS).partition(",")[0]
    return asyncio.run(_call(url + path, key, body, timeout_s))


async def _call(url: str, key: str, body: bytes | None, timeout_s: float) -> bytes:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    method = "GET" if body is None else "POST"
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.request(method, url, headers=headers, data=body) as answer,
        ):
            answered = await answer.read()
            if answer.status == 401:
                raise OServeError(
                    "it requires an API key", place=url, remedy=f"set {API_KEYS} or --api-key"
                )
            if answer.status == 403:
                raise OServeError(
                    error_message(answered),
                    place=url,
                    remedy="give a key of that role; oserve keys add --role admin makes one",
                )
            if answer.status in {400, 409}:
                raise OServeError(error_message(answered), place=url, remedy="see docs/control.md")
            if answer.status == 503:
                raise OServeError(
                    error_message(answered), place=url, remedy="try again in a moment"
                )
            if answer.status != 200:
                raise OServeError(
                    f"it answered with status {answer.status}: {error_message(answered)[:100]}",
                    place=url,
                    remedy="is this an OServe server?",
                )
            return answered
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
        raise unreachable(error, url) from None


def unreachable(error: Exception, url: str) -> OServeError:
    """The error for a server without a complete answer."""
    remedy = "is the server running? Start it with oserve serve, or give another --url"
    if isinstance(error, aiohttp.ClientSSLError):
        remedy = "is it http rather than https, or has it a certificate of its own?"
    return OServeError(f"no answer: {reason_of(error)}", place=url, remedy=remedy)


def reason_of(error: Exception) -> str:
    """Why a connection failed, without redundant details."""
    if isinstance(error, aiohttp.ClientConnectorError):
        cause = error.os_error
        # asyncio replaces the meaning of errno by the address.
        number = cause.errno or 0
        return (os.strerror(number) if number > 0 else cause.strerror or str(cause)).lower()
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "it closed the connection"
    if isinstance(error, aiohttp.ClientPayloadError):
        return "the connection broke in the middle of an answer"
    return f"{type(error).__name__}: {error}"


def decode(raw: bytes, url: str, *, needed: str) -> dict[str, Any]:
    """A JSON object with that key; raises OServeError for anything else."""
    try:
        document = _DOCUMENT_DECODER.decode(raw)
    except msgspec.DecodeError:
        document = {}
    if needed not in document:
        raise OServeError(
            "the answer is not from OServe", place=url, remedy="is this an OServe server?"
        )
    return document
