"""``oserve look``: the page of a past hour, from what a server saved."""

import asyncio
import time
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from oserve.core import OServeError
from oserve.look.points import MOST_POINTS, POINT_S
from oserve.look.replay import ReplaySource, SavedMoment, serve_replay
from oserve.startup.store import StateStore

_HOUR_S = POINT_S * MOST_POINTS


def look(
    file: Annotated[Path, typer.Argument(help="state.sqlite of a server's state directory.")],
    begin: Annotated[
        str | None,
        typer.Option("--from", help="Local time, 2026-03-01T14:30. Default: the last hour."),
    ] = None,
    speed: Annotated[float, typer.Option(min=0.1, max=3600.0, help="Seconds a second.")] = 10.0,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 0,
) -> None:
    """Show the page of a past hour on this machine, in a browser."""
    moments, start_s = saved_moments(file, begin)
    source = ReplaySource(moments, start_s=start_s, speed=speed, now=time.monotonic)
    try:
        asyncio.run(_serve(source, port))
    except KeyboardInterrupt:
        pass
    except OSError as error:
        raise OServeError(
            f"cannot listen there: {error.strerror or error}",
            place="--port",
            remedy="choose another one, or 0 for a free one",
        ) from None


def saved_moments(file: Path, begin: str | None) -> tuple[list[SavedMoment], float]:
    """What the page showed from then on, and the hour before; and the Unix time of the start.

    Raises OServeError if there is nothing.
    """
    store = StateStore(file) if file.is_file() else None
    span = None if store is None else store.page_span()
    if store is None or span is None:
        raise OServeError(
            "it contains nothing of a page",
            place=str(file),
            remedy="give the state.sqlite in a server's state directory",
        )
    start_s = max(span[0], span[1] - _HOUR_S) if begin is None else _unix_s(begin)
    if not span[0] - POINT_S <= start_s <= span[1]:
        first, last = (time.strftime("%Y-%m-%dT%H:%M", time.localtime(at_s)) for at_s in span)
        raise OServeError(
            "nothing was saved at that time",
            place="--from",
            remedy=f"choose a time from {first} to {last}",
        )
    rows = store.page_states(start_s=start_s - _HOUR_S, end_s=span[1])
    return [SavedMoment(*row) for row in rows], start_s


def _unix_s(text: str) -> float:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise OServeError(
            f"{text!r} is not a time", place="--from", remedy="write it as 2026-03-01T14:30"
        ) from None


async def _serve(source: ReplaySource, port: int) -> None:
    server = await serve_replay(source, port=port)
    print(f"http://127.0.0.1:{server.port}/oserve/ (Ctrl-C ends)", flush=True)
    try:
        await asyncio.Event().wait()
    finally:
        await server.close()
