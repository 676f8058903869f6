"""A small Ray cluster on the hosts of ``hosts``: lean, quick to notice a death, with a token.

The head is host 0 and keeps its state in RocksDB, so that it can be started again.
"""

import contextlib
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hosts import Host, Hosts

GCS_PORT = 6379
_MOST_KNOCKS = 20

# As the program ``ray``, without what its other commands import.
_RAY = """
import sys
sys.modules["ray.serve"] = sys.modules["pandas"] = None
from ray.scripts.scripts import main
main()
"""
_START = (sys.executable, "-c", _RAY, "start", "--block")
_LEAN = (
    *("--num-cpus", "0", "--object-store-memory", str(80 << 20)),
    *("--disable-usage-stats", "--include-log-monitor", "false"),
)
# A start hook alone can leave out the autoscaler and the server of Ray Client.
_HOOK = """
def start(params, head):
    params.no_monitor, params.ray_client_server_port = True, None
"""
# A raylet that comes before its GCS tries again late: wait for the port.
_KNOCK = """
import socket, sys, time
for _ in range(100):
    try:
        socket.create_connection((sys.argv[1], int(sys.argv[2])), 1.0).close()
        break
    except OSError:
        time.sleep(0.05)
else:
    raise SystemExit("no GCS")
"""
_HEALTH_CHECK = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}


class Raylets:
    """The processes of Ray on each host. ``env``: what a driver needs in its environment."""

    def __init__(
        self, hosts: Hosts, folder: Path, resources: Mapping[int, Mapping[str, int]]
    ) -> None:
        self._hosts = hosts
        self._folder = folder
        self._resources = resources
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._spare_starts = 12
        # Of each host: what it was last started with, and the size of its log then.
        self._last: dict[int, dict[str, Any]] = {}
        self._begun: dict[int, int] = {}
        token = folder / "ray-token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(24))
        (folder / "lean_ray.py").write_text(_HOOK)
        kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        path = os.pathsep.join([str(folder), *(item for item in sys.path if item)])
        self.env = (
            kept
            | _HEALTH_CHECK
            | {
                "PYTHONPATH": path,
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN_PATH": str(token),
                "RAY_START_HOOK": "lean_ray.start",
                "RAY_enable_worker_prestart": "0",
                "RAY_gcs_storage": "rocksdb",
                "RAY_gcs_storage_path": str(folder / "gcs"),
                "TMPDIR": "/tmp",
            }
        )

    @property
    def folder(self) -> Path:
        """A folder that all hosts see."""
        return self._folder

    @property
    def address(self) -> str:
        """``HOST:PORT`` of the head."""
        return f"{self._hosts[0].address}:{GCS_PORT}"

    def start(self, number: int, *, gpus: int = 0, **env: str) -> None:
        """Start Ray on a host; returns before it is up.

        With ``gpus`` it offers as many instead of the resources. ``env``: for Ray there.
        """
        host = self._hosts[number]
        where = ["--head", "--port", str(GCS_PORT), "--include-dashboard", "false"]
        if number:
            self._knock(host)
            where = ["--address", self.address]
        resources = {} if gpus else dict(self._resources.get(number, {}))
        words = [*_START, *where, "--node-ip-address", host.address, *_LEAN]
        words += ["--resources", json.dumps(resources), "--num-gpus", str(gpus)]
        self.stop(number)
        self._last[number] = {"gpus": gpus, **env}
        with (self._folder / f"ray-{number}.log").open("ab") as log:
            self._begun[number] = log.tell()
            self._running[number] = host.popen(words, env=self.env | env, log=log)

    def _knock(self, host: Host) -> None:
        """Wait for the head, whose start may have to be tried again."""
        words = [sys.executable, "-c", _KNOCK, self._hosts[0].address, str(GCS_PORT)]
        for _ in range(_MOST_KNOCKS - 1):
            with contextlib.suppress(subprocess.SubprocessError):
                host.inside(words)
                return
            self._tend(0)
        host.inside(words)

    def joined(self, number: int) -> bool:
        """Whether Ray has been started on a host, so that a driver can run there."""
        self.tend()
        return self._has_started(number)

    def tend(self) -> None:
        """Start Ray once more where its start took longer than it likes, as on a busy machine."""
        for number in list(self._running):
            self._tend(number)

    def _tend(self, number: int) -> None:
        process = self._running.get(number)
        if process is None or process.poll() is None or self._has_started(number):
            return
        if self._spare_starts:
            self._spare_starts -= 1
            self.start(number, **self._last[number])

    def _has_started(self, number: int) -> bool:
        """Whether the last start on a host has come to its end."""
        if number not in self._running:
            return False
        log = (self._folder / f"ray-{number}.log").read_bytes()
        return b"Ray runtime started" in log[self._begun[number] :]

    def stop(self, number: int) -> None:
        """Wait until what was started there before has ended, or end it."""
        process = self._running.pop(number, None)
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5.0)
            process.kill()
            process.wait()

    def end(self) -> None:
        """End Ray; the hosts end what is left."""
        for process in self._running.values():
            process.kill()
            process.wait()
        self._running.clear()


@contextlib.contextmanager
def running(
    hosts: Hosts, folder: Path, resources: Mapping[int, Mapping[str, int]]
) -> Iterator[Raylets]:
    """Ray on all hosts; ``resources`` by host."""
    raylets = Raylets(hosts, folder, resources)
    try:
        for host in hosts:
            raylets.start(host.number)
        yield raylets
    finally:
        raylets.end()
