"""Engines are measured in a place of their own, of which nothing is left, however it ends."""

import asyncio
import os
import signal
import tempfile
from pathlib import Path

import pytest

from oserve.config import load_settings
from oserve.core import Device
from oserve.profiler.profile import temporary_cluster

SLOTS = (Device(id="cpu:0", kind="cpu"),)


def folders() -> set[str]:
    return {path.name for path in Path(tempfile.gettempdir()).glob("oserve-*")}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
async def test_who_is_told_to_end_clears_up_first(number: signal.Signals) -> None:
    before = folders()
    # Whoever runs the tests may have had it ignored, as nohup does.
    signal.signal(number, signal.SIG_DFL)

    async def measure() -> None:
        async with temporary_cluster(load_settings(None, {"model": "some/model"}, {}), SLOTS):
            assert folders() > before
            os.kill(os.getpid(), number)
            await asyncio.Event().wait()

    with pytest.raises(SystemExit) as stopped:
        await measure()
    assert stopped.value.code == 128 + number
    assert folders() == before
    # What came before counts again.
    assert signal.getsignal(number) == signal.SIG_DFL


async def test_whoever_cancels_it_hears_of_it() -> None:
    before = folders()

    async def measure() -> None:
        async with temporary_cluster(load_settings(None, {"model": "some/model"}, {}), SLOTS):
            await asyncio.Event().wait()

    task = asyncio.create_task(measure())
    while folders() == before:  # noqa: ASYNC110 - it looks at a folder
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert folders() == before
