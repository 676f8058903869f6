"""What the engine tests share."""

import asyncio
import time
from pathlib import Path

import pytest

from oserve.engines.tiny import make_tiny_model


class LiveClock:
    """The machine's own clock."""

    def now(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


@pytest.fixture
def live_clock() -> LiveClock:
    return LiveClock()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tokenizers")
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
