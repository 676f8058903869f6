"""What every test shares: the event loop that serves users, and that nothing is left behind."""

import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import uvloop
from hypothesis import HealthCheck, settings

from oserve.engines.holding import private_name

# How long an example takes says how busy the machine is, not whether the code is right.
settings.register_profile("oserve", deadline=None, suppress_health_check=[HealthCheck.too_slow])
# `make check` looks at fewer examples than `make test`.
settings.register_profile("quick", settings.get_profile("oserve"), max_examples=20)
settings.load_profile("oserve")

# Real engines start in seconds, and tests of them wait for several.
_ENGINE_TIMEOUT_S = 900
# Processes that were told to end may still be clearing up.
_CLEARING_S = 30.0


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    del config, item
    return {"uvloop": uvloop.new_event_loop}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("engine") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(_ENGINE_TIMEOUT_S))


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A temporary directory of the session's own, with a short name; it must be empty at the end.

    So must be what servers have in ``/tmp`` whatever the temporary directory, by the names of their
    state folders. Folders of tests themselves are pytest's, elsewhere.
    """
    base = tmp_path_factory.getbasetemp()
    own = Path(tempfile.mkdtemp(prefix="o", dir="/tmp"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(own))
        patch.setattr(tempfile, "tempdir", None)
        yield own
        deadline_s = time.monotonic() + _CLEARING_S
        while (left := _left(own, base)) and time.monotonic() < deadline_s:
            time.sleep(0.2)
    shutil.rmtree(own, ignore_errors=True)
    assert not left, f"left behind in the temporary directory: {left}"


def _left(own: Path, base: Path) -> list[str]:
    states = (Path(folder) for folder, _, _ in os.walk(base))
    private = (Path("/tmp") / private_name(folder) for folder in states)
    return [*map(str, own.iterdir()), *(str(folder) for folder in private if folder.exists())]
