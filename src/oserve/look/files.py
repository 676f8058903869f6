"""The files of the page: one HTML file, and the chart library of an installed package.

The Content-Security-Policy allows scripts from this port alone, and of the page itself only the one
script whose hash it names. Styles may be set in elements: the chart library does so.
"""

import asyncio
import base64
import gzip
import hashlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Final

from oserve.wire import Exchange

PAGE: Final = b"/oserve/"
CHARTS: Final = b"/oserve/charts.js"
NEEDS: Final = "pip install 'oserve[page]'"
"""What to install where the chart library is missing."""

FileAnswer = Callable[[Exchange], None]

_SENDING: set[asyncio.Task[None]] = set()


def page_files() -> dict[bytes, FileAnswer]:
    """What answers a request for a file of the page, by path."""
    return {PAGE: _page, PAGE[:-1]: _redirect, CHARTS: _charts}


@cache
def page_html() -> tuple[bytes, bytes]:
    """The page and its Content-Security-Policy."""
    text = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    text = text.replace("{{charts}}", charts_version()).replace("{{needs}}", NEEDS)
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)
    if script is None:
        raise RuntimeError("the page has no script")
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    policy = (
        "default-src 'none'; connect-src 'self'; img-src 'self' data:; "
        f"script-src 'self' 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text.encode(), policy.encode()


@cache
def charts_version() -> str:
    """The version of the chart library; empty if it is not installed."""
    try:
        return importlib.metadata.version("plotly") if _charts_file() is not None else ""
    except importlib.metadata.PackageNotFoundError:
        return ""


def _charts_file() -> Path | None:
    """The library's file; the package itself, which is large, is not imported."""
    found = importlib.util.find_spec("plotly")
    if found is None or not found.submodule_search_locations:
        return None
    file = Path(found.submodule_search_locations[0]) / "package_data" / "plotly.min.js"
    return file if file.is_file() else None


@cache
def _charts_packed() -> bytes:
    file = _charts_file()
    return b"" if file is None else gzip.compress(file.read_bytes(), compresslevel=4, mtime=0)


def _page(exchange: Exchange) -> None:
    body, policy = page_html()
    headers = (
        (b"content-security-policy", policy),
        (b"cache-control", b"no-cache"),
        (b"referrer-policy", b"no-referrer"),
        (b"x-content-type-options", b"nosniff"),
    )
    exchange.respond(200, body, content_type=b"text/html; charset=utf-8", headers=headers)


def _redirect(exchange: Exchange) -> None:
    exchange.respond(308, b"", content_type=b"text/plain", headers=((b"location", PAGE),))


def _charts(exchange: Exchange) -> None:
    """The library, packed once, in a thread: streams of answers must not wait for it."""
    if _charts_file() is None:
        text = f"// The charts need Plotly: {NEEDS}\n".encode()
        exchange.respond(404, text, content_type=b"text/javascript")
        return
    task = asyncio.ensure_future(_send_charts(exchange))
    _SENDING.add(task)
    task.add_done_callback(_SENDING.discard)


async def _send_charts(exchange: Exchange) -> None:
    # The address has the version of the library, so the answer may be kept for long.
    headers = (
        (b"content-encoding", b"gzip"),
        (b"cache-control", b"public, max-age=31536000, immutable"),
        (b"x-content-type-options", b"nosniff"),
    )
    try:
        body = await asyncio.to_thread(_charts_packed)
    except OSError:
        exchange.respond(500, b"", content_type=b"text/plain")
    else:
        exchange.respond(200, body, content_type=b"text/javascript; charset=utf-8", headers=headers)
