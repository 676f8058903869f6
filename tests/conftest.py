"""What every test shares: the event loop that serves users."""

import asyncio
from collections.abc import Callable, Mapping

import pytest
import uvloop
from hypothesis import HealthCheck, settings

# How long an example takes says how busy the machine is, not whether the code is right.
settings.register_profile("oserve", deadline=None, suppress_health_check=[HealthCheck.too_slow])
# `make check` looks at fewer examples than `make test`.
settings.register_profile("quick", settings.get_profile("oserve"), max_examples=20)
settings.load_profile("oserve")


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    del config, item
    return {"uvloop": uvloop.new_event_loop}
