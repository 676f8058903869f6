"""Asking a running server, for the commands that do."""

import asyncio
from typing import Any

import aiohttp
import msgspec

from oserve.config import API_KEYS, environment_value
from oserve.core import OServeError

_TIMEOUT_S = 10.0


def call(
    url: str,
    path: str,
    *,
    api_key: str | None = None,
    body: bytes | None = None,
    timeout_s: float = _TIMEOUT_S,
) -> bytes:
    """The answer's body; with a body it is a POST. Raises OServeError with what the server said."""
    key = api_key or environment_value(API_KEYS).partition(",")[0]
    return asyncio.run(_call(url.rstrip("/") + path, key, body, timeout_s))


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
                    "it wants an API key", place=url, remedy=f"set {API_KEYS} or --api-key"
                )
            if answer.status in {400, 409}:
                raise OServeError(_said(answered), place=url, remedy="see docs/control.md")
            if answer.status == 503:
                raise OServeError(_said(answered), place=url, remedy="try again in a moment")
            if answer.status != 200:
                raise OServeError(
                    f"it answered with status {answer.status}",
                    place=url,
                    remedy="is this an OServe server?",
                )
            return answered
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        raise OServeError(
            f"no answer: {error or 'timed out'}",
            place=url,
            remedy="start it with oserve serve, or give --url",
        ) from None


def _said(answered: bytes) -> str:
    try:
        return str(msgspec.json.decode(answered)["error"]["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return answered[:200].decode(errors="replace")


def decode(raw: bytes, url: str) -> dict[str, Any]:
    """A JSON object; raises OServeError for anything else."""
    try:
        return msgspec.json.decode(raw, type=dict[str, Any])
    except msgspec.DecodeError:
        raise OServeError(
            "its status is not JSON", place=url, remedy="is this an OServe server?"
        ) from None
