"""The folders of a server."""

from dataclasses import dataclass
from pathlib import Path

from oserve.config import Settings
from oserve.engines.holding import private_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFolders:
    """``state`` outlives the server, ``run`` holds its sockets, ``log`` one file per process."""

    state: Path
    run: Path
    log: Path


def state_file(settings: Settings) -> Path:
    """The file of the controller's state, in the state folder."""
    return Path(settings.state_dir) / "state.sqlite"


def server_folders(settings: Settings) -> ServerFolders:
    """The folders of a server, created if missing."""
    state = Path(settings.state_dir)
    return ServerFolders(
        state=state, run=private_folder(state), log=Path(settings.engines.log_dir).resolve()
    )
