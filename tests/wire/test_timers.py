"""Deadlines on a loop whose clock the test moves."""

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest

from oserve.wire.timers import Timers


class Loop:
    """As much of an event loop as timers need."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.calls: list[tuple[float, Callable[..., None], tuple[Any, ...]]] = []

    def time(self) -> float:
        return self.now_s

    def call_at(self, when_s: float, call: Callable[..., None], *arguments: Any) -> Any:
        item = when_s, call, arguments
        self.calls.append(item)

        class Handle:
            def cancel(handle) -> None:  # noqa: N805
                if item in self.calls:
                    self.calls.remove(item)

        return Handle()

    def run_until(self, until_s: float) -> None:
        while self.calls and min(self.calls, key=lambda it: it[0])[0] <= until_s:
            item = min(self.calls, key=lambda it: it[0])
            self.calls.remove(item)
            self.now_s = max(self.now_s, item[0])
            item[1](*item[2])
        self.now_s = until_s


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Loop:
    made = Loop()
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: cast(Any, made))
    return made


def test_one_timer_of_the_loop_serves_many_deadlines(loop: Loop) -> None:
    told: list[tuple[str, float]] = []
    timers: Timers[str] = Timers(lambda key: told.append((key, loop.now_s)), tick_s=0.5)
    for name, seconds in (("a", 60.0), ("b", 5.0), ("c", 5.2), ("d", 7.0)):
        timers.set(name, seconds)
        assert len(loop.calls) == 1
    timers.cancel("d")
    timers.set("b", 30.0)
    loop.run_until(200.0)
    assert [name for name, _ in told] == ["c", "b", "a"]
    for name, at_s in told:
        assert 0.0 <= at_s - 100.0 - {"a": 60.0, "b": 30.0, "c": 5.2}[name] <= 0.5
    assert not loop.calls


def test_what_is_done_at_a_deadline_may_set_another(loop: Loop) -> None:
    told: list[float] = []

    def act(key: str) -> None:
        told.append(loop.now_s)
        if len(told) < 3:
            timers.set(key, 1.0)

    timers: Timers[str] = Timers(act, tick_s=0.25)
    timers.set("a", 1.0)
    loop.run_until(200.0)
    assert told == [101.0, 102.0, 103.0]
