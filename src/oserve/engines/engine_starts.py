"""What an engine is started with: its names, folders, command line and environment."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from oserve.core import Device, Endpoint, ReplicaSpec
from oserve.engines.adoption import stamp_of
from oserve.engines.arguments import (
    NodeInterface,
    Platform,
    engine_arguments,
    engine_environment,
    runs_eagerly,
)
from oserve.engines.group import CACHES_FOLDER
from oserve.engines.memory_check import cache_sized, unsized
from oserve.engines.settings import EngineSettings

# Socket paths must stay under 108 bytes, and vLLM's own are 37 longer than their folder.
_MAX_FOLDER_BYTES = 68
_MAX_NAME_BYTES = 24
_LONGEST_NAME = "x" * _MAX_NAME_BYTES + "-999999"


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchFacts:
    """What all engines of a cluster have in common.

    ``model`` is a folder or a hub name; ``served_model_name`` the name in requests. ``sized``: the
    KV cache size in ``settings`` was computed, so that engines of another size may be taken over.
    """

    model: str
    served_model_name: str
    settings: EngineSettings
    platform: Platform
    sized: bool

    def stamp(self, devices: Sequence[Device]) -> str:
        """See ``adoption.stamp_of``."""
        settings = unsized(self.settings) if self.sized else self.settings
        return stamp_of(self.model, self.served_model_name, settings, devices)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFiles:
    """The folder and the log of one engine, on its node, and its endpoint."""

    folder: Path
    log_path: Path
    endpoint: Endpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCommand:
    """See ``spawner.Launcher.start``."""

    argv: list[str]
    env: dict[str, str]


def engine_command(
    facts: LaunchFacts,
    spec: ReplicaSpec,
    devices: Sequence[Device],
    folder: Path,
    *,
    standby: bool,
    moves_caches: bool,
    free_bytes: float | None = None,
    interface: NodeInterface | None = None,
) -> EngineCommand:
    """The command of an engine whose sockets lie in ``folder``; ``free_bytes``: ``cache_sized``.

    ``interface``: of a part of a replica over several nodes; ``part_arguments`` adds its arguments.

    Raises ``OServeError`` if the settings name no checkpoint of the replica's precision.
    """
    arguments = engine_arguments(
        spec,
        model=facts.model,
        served_model_name=facts.served_model_name,
        unix_socket=str(folder / "api.sock"),
        platform=facts.platform,
        settings=cache_sized(facts.settings, facts.model, devices, spec.shape, free_bytes),
        standby=standby,
        moves_caches=moves_caches,
    )
    environment = engine_environment(
        devices,
        platform=facts.platform,
        local_model=Path(facts.model).is_dir(),
        eager=runs_eagerly(arguments),
        folder=str(folder),
        keep_weights=facts.settings.keep_weights,
        caches=str(folder.parent / CACHES_FOLDER) if moves_caches else "",
        interface=interface,
    )
    return EngineCommand(argv=arguments, env=environment)


def platform_of(devices: Sequence[Device]) -> Platform:
    """How engines on these devices run."""
    return "cpu" if all(device.kind == "cpu" for device in devices) else "cuda"


def engine_name(replica: str, number: int) -> str:
    """The name of a new engine, and of its folder; ``number`` tells it from earlier ones."""
    return f"{log_name(replica)}-{number}"


def log_name(replica: str) -> str:
    """The name of a replica's log, without its ending: letters and digits first."""
    name = re.sub(r"[^A-Za-z0-9_-]", "_", replica)
    return (name if name[:1].isalnum() else f"r{name}")[:_MAX_NAME_BYTES]


def is_short(folder: Path) -> bool:
    """Whether folders of engines can lie in it."""
    return len(str(folder / _LONGEST_NAME).encode()) <= _MAX_FOLDER_BYTES
