"""What the engine tests share."""

import pytest

from oserve.engines.clock import LiveClock


@pytest.fixture
def live_clock() -> LiveClock:
    return LiveClock()
