"""What the engine tests share."""

from pathlib import Path

import pytest

from oserve.app.clock import LiveClock
from oserve.engines.tiny import make_tiny_model


@pytest.fixture
def live_clock() -> LiveClock:
    return LiveClock()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tokenizers")
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
