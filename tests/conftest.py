"""What every test shares: the event loop that serves users, and that nothing is left behind."""

import asyncio
import importlib.util
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import pytest_asyncio
import uvloop
from hypothesis import HealthCheck, settings

from oserve.engines.holding import private_name
from oserve.engines.spawner import EngineProcess, ZygoteLauncher
from oserve.engines.tiny import make_tiny_model

# How long an example takes says how busy the machine is, not whether the code is right. The same
# examples every time: who looks for more runs with --hypothesis-profile=search.
settings.register_profile(
    "oserve", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("search", settings.get_profile("oserve"), derandomize=False)
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
    # The longest first: then what is short fills the processes evenly.
    items.sort(key=lambda item: item.get_closest_marker("engine") is None)


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
    # PyTorch keeps what it compiles there for whoever comes next, and makes the folder in any case.
    made = (path for path in own.iterdir() if not path.name.startswith("torchinductor_"))
    return [str(path) for path in (*made, *private) if path.exists()]


class SharedLauncher:
    """A zygote that several clusters start their engines from: each ends its own engines."""

    def __init__(self, zygote: ZygoteLauncher) -> None:
        self._zygote = zygote

    async def prepare(self) -> None:
        """The fixture has done it."""

    async def start(
        self, argv: Sequence[str], env: Mapping[str, str], cores: Sequence[int], log_path: Path
    ) -> EngineProcess:
        return await self._zygote.start(argv, env, cores, log_path)

    async def close(self) -> None:
        """The fixture closes it."""


@pytest.fixture(scope="session")
def zygote_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the shared zygote writes."""
    return tmp_path_factory.mktemp("zygote") / "zygote.log"


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def zygote(zygote_log: Path) -> AsyncIterator[SharedLauncher]:
    """Engines in seconds for every test that asks: vLLM is imported once for all of them."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    zygote = ZygoteLauncher(log_path=zygote_log)
    await zygote.prepare()
    yield SharedLauncher(zygote)
    await zygote.close()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tokenizers")
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
