"""Faults of the request machine itself: they end the request that they are about, and no other."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gateway.conftest import Make, until
from oserve.core import FinishStatus, KeyRole
from oserve.gateway.access.key_file import KeyStore
from oserve.gateway.stream.session import Session
from oserve.sim import EmulatedEngine, EngineSpeed

TEXT = {"model": "emulated", "prompt": "hello there", "max_tokens": 3}
STREAM = {**TEXT, "stream": True, "max_tokens": 2000}


def failing(step: Callable[..., Any], times: int) -> Callable[..., Any]:
    """A step that raises so many times."""
    left = times

    def attempt(*arguments: Any, **options: Any) -> Any:
        nonlocal left
        if left > 0:
            left -= 1
            raise KeyError("a user's text")
        return step(*arguments, **options)

    return attempt


async def test_what_was_asked_for_before_a_fault_is_done(
    make_front: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    front = await make_front(EmulatedEngine(speed=EngineSpeed(ttft_s=0.02)), max_inflight=1)
    runner = front.gateway.runner
    first = asyncio.ensure_future(front.post("/v1/completions", TEXT))
    await until(lambda: runner.active)
    second = asyncio.ensure_future(front.post("/v1/completions", TEXT))
    await until(lambda: runner.queued)
    # The end of the first has the second sent, and then a step raises.
    life = runner.machine._life
    monkeypatch.setattr(life, "_wake", failing(life._wake, 1))
    assert (await first)[0] == 200
    assert (await second)[0] == 200
    await until(lambda: not runner.active)
    assert runner.metrics.snapshot()["oserve_requests"] == {FinishStatus.COMPLETED.value: [2.0]}
    assert runner.outstanding() == {"r0": (0.0, 0)}


async def test_a_request_that_cannot_be_ended_is_answered_and_forgotten(
    make_front: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = EmulatedEngine(speed=EngineSpeed(tpot_s=0.001))
    front = await make_front(engine)
    runner = front.gateway.runner
    life = runner.machine._life
    monkeypatch.setattr(life, "release", failing(life.release, 2))
    status, _, body = await front.post("/v1/completions", TEXT)
    # The client had its answer when the step failed.
    assert (status, body["choices"][0]["text"]) == (200, " t1 t2 t3")
    assert not runner.active
    assert not runner.machine.requests
    assert "KeyError" in caplog.text
    assert "a user's text" not in caplog.text
    assert (await front.post("/v1/completions", TEXT))[0] == 200


async def test_what_a_tenant_is_charged_for_a_request_that_cannot_be_ended_is_settled(
    make_front: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, key = KeyStore(tmp_path / "keys.json").add("acme", KeyRole.USE)
    front = await make_front(EmulatedEngine(), keys_file=tmp_path / "keys.json")
    runner = front.gateway.runner
    life = runner.machine._life
    monkeypatch.setattr(life, "release", failing(life.release, 2))
    headers = {"authorization": f"Bearer {key}"}
    assert (await front.post("/v1/completions", TEXT, headers=headers))[0] == 200
    await until(lambda: not runner.active)
    fair = runner.machine.waiting.fair
    assert fair._flow("", "acme").open == 0
    assert not fair._open
    assert runner.outstanding() == {"r0": (0.0, 0)}


async def test_a_stream_whose_progress_cannot_be_told_keeps_no_other_from_leaving(
    make_front: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = EmulatedEngine(speed=EngineSpeed(ttft_s=0.001, tpot_s=0.005))
    front = await make_front(slow, EmulatedEngine())
    runner = front.gateway.runner
    both = runner.table
    runner.update(replace(both, replicas=both.replicas[:1]))
    calls = [asyncio.ensure_future(front.lines("/v1/completions", STREAM)) for _ in range(3)]
    await until(lambda: len(runner.active) == 3)
    await until(lambda: all(session.committed for session in runner.active.values()))
    runner.update(both)
    monkeypatch.setattr(Session, "progress", failing(Session.progress, 1))
    runner.hand_over("r0", 0.0)
    ended = [lines[-1] for lines in await asyncio.gather(*calls)]
    assert sum(b"internal_error" in line for line in ended) == 1
    assert ended.count(b"data: [DONE]") == 2
    assert not runner.active
