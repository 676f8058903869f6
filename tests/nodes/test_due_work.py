"""Work in the background: once for a burst, again after a fault, by itself after a while."""

import asyncio
import logging

import pytest

from oserve.core import VirtualClock
from oserve.nodes.due_work import DueWork


async def test_a_burst_is_followed_once_and_a_fault_is_no_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock, faults, done = VirtualClock(), [RuntimeError("unforeseen")], list[float]()

    async def work() -> None:
        done.append(clock.now())
        if faults:
            raise faults.pop()

    due = DueWork(work, clock, fault="it does not work", again_s=10.0, settle_s=2.0)
    due.refresh()
    await clock.advance(5.0)
    assert done == []
    due.begin()
    with caplog.at_level(logging.ERROR):
        await clock.advance(1.0)
        due.refresh()
        await clock.advance(1.5)
        assert len(done) == 1
        assert not due.idle
        await clock.advance(30.0)
    assert "it does not work; tried again in 10 s" in caplog.text
    assert len(done) == 2
    assert due.idle
    for _ in range(3):
        due.refresh()
    await clock.advance(30.0)
    assert len(done) == 3
    await due.close()
    due.refresh()
    await clock.advance(30.0)
    assert len(done) == 3


async def test_it_is_due_by_itself_after_a_while() -> None:
    clock, done = VirtualClock(), list[float]()

    async def work() -> None:
        done.append(clock.now())

    due = DueWork(work, clock, fault="", every_s=100.0)
    due.begin()
    await clock.advance(1.0)
    assert len(done) == 1
    for _ in range(25):
        await clock.advance(10.0)
    assert len(done) == 3
    await due.close()
    await due.close()


async def test_closing_cancels_what_is_under_way() -> None:
    clock, ended = VirtualClock(), list[bool]()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    due = DueWork(work, clock, fault="")
    due.begin()
    await clock.advance(1.0)
    assert not due.idle
    await due.close()
    assert ended == [True]
