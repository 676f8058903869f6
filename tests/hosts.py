"""Several hosts on this machine, made of Linux namespaces; for tests of what happens between hosts.

Each host has its own network, host name, process ids, shared memory, ``/tmp`` and loopback, so that
nothing but the network is shared. A bridge joins them. A power cut kills every process of a host at
once, a pulled cable leaves them running without a network. Everything ends with this process.

Needs root and ``unshare``, ``nsenter``, ``setpriv`` and ``ip``; see ``unavailable``.
"""

import contextlib
import ctypes
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

_TOOLS = ("unshare", "nsenter", "setpriv", "ip", "mount")
_NAMESPACES = ("--net", "--uts", "--ipc", "--mount", "--pid")
_SUBNET = "10.231.0"
_LIMIT_S = 300.0


@functools.cache
def unavailable() -> str:
    """Why no hosts can be made here; empty if they can."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    try:
        with contextlib.ExitStack() as stack:
            switch = stack.enter_context(_Namespace("probe", None))
            switch.inside(["ip", "link", "add", "br0", "type", "bridge"])
    except (OSError, subprocess.SubprocessError) as error:
        return f"namespaces are refused here: {error}"
    return ""


def kept_folders() -> list[str]:
    """Folders under ``/tmp`` that Python needs: the hosts have another ``/tmp``."""
    wanted = {
        str(Path(path).resolve()) for path in (*sys.path, sys.prefix, sys.base_prefix) if path
    }
    return sorted(path for path in wanted if path.startswith("/tmp/"))


class _Namespace:
    """Namespaces that live as long as their first process."""

    def __init__(self, name: str, tmp: Path | None, kept: Sequence[str] = ()) -> None:
        self.name = name
        steps = ["set -e", f"hostname {name}", "ip link set lo up", "mount -t tmpfs none /dev/shm"]
        if tmp is not None:
            for folder in kept:
                inner = f"{tmp}/{folder.removeprefix('/tmp/')}"
                steps += [f"mkdir -p '{inner}'", f"mount --rbind '{folder}' '{inner}'"]
            steps.append(f"mount --rbind '{tmp}' /tmp")
        # The first process adopts orphans and reaps them, as an init does.
        steps += ["echo up", "while :; do sleep 3600 & wait; done"]
        command = ["unshare", *_NAMESPACES, "--fork", "--kill-child", "--mount-proc"]
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command, "bash", "-c", "\n".join(steps)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"up\n":
            _, errors = self._process.communicate()
            lines = errors.decode(errors="replace").strip().splitlines() or ["no reason given"]
            raise OSError(lines[-1])
        task = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        self.pid = int(task.read_text().split()[0])

    def words(self, command: Sequence[str], *, pids: bool = True) -> list[str]:
        """The command line that runs ``command`` there; without ``pids`` it sees our processes."""
        flags = ["-n", "-u", "-i", "-m"] + (["-p"] if pids else [])
        return ["nsenter", "-t", str(self.pid), *flags, "--wd=/", "--", *command]

    def inside(self, command: Sequence[str], *, pids: bool = True) -> str:
        """Run a command there and return its output. Raises ``subprocess.SubprocessError``."""
        words = self.words(command, pids=pids)
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        if done.returncode:
            raise subprocess.SubprocessError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def end(self) -> None:
        """Kill every process there."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self._process.wait(_LIMIT_S)
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> "_Namespace":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


class Host(_Namespace):
    """One host; its files under ``/tmp`` are in ``tmp``."""

    def __init__(self, number: int, tmp: Path, kept: Sequence[str] = ()) -> None:
        super().__init__(f"host{number}", tmp, (*kept_folders(), *kept))
        self.number = number
        self.tmp = tmp
        self.address = f"{_SUBNET}.{number + 1}"

    def popen(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        log: "IO[bytes] | int",
        **named: Any,
    ) -> "subprocess.Popen[bytes]":
        """Start a process there in a session of its own, with its output in ``log``."""
        return subprocess.Popen(
            self.words(command),
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            **named,
        )

    def processes(self, *words: str) -> list[int]:
        """Ids, as seen from here, of its processes whose command line has all these words."""
        place = os.readlink(f"/proc/{self.pid}/ns/pid")
        found = []
        for entry in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{entry}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                same = os.readlink(f"/proc/{entry}/ns/pid") == place
                if same and all(word in command for word in words):
                    found.append(int(entry))
        return found

    def kill(self, *words: str) -> int:
        """``kill -9`` of those processes; returns how many."""
        pids = self.processes(*words)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(pids)

    def cut_power(self) -> None:
        """Every process of it ends at once, and its network is gone."""
        self.end()


class Hosts:
    """Hosts that are joined by a switch; ``hosts[0].address`` is reachable from all of them.

    ``folder`` holds their files; all of them see it.
    """

    def __init__(self, count: int, folder: Path) -> None:
        self._shared = [str(folder)] if str(folder).startswith("/tmp/") else []
        self._switch = _Namespace("switch", None)
        self._hosts: list[Host] = []
        try:
            self._switch.inside(["ip", "link", "add", "br0", "type", "bridge"])
            self._switch.inside(["ip", "link", "set", "br0", "up"])
            for number in range(count):
                self._add(number, folder / f"host{number}")
        except BaseException:
            self.end()
            raise

    def _add(self, number: int, tmp: Path) -> None:
        tmp.mkdir(mode=0o1777, parents=True, exist_ok=True)
        host = Host(number, tmp, self._shared)
        self._hosts[number:] = [host, *self._hosts[number + 1 :]]
        port = f"v{number}"
        # ``netns`` takes a process id of ours.
        for line in (
            f"ip link add {port} type veth peer name eth0 netns {host.pid}",
            f"ip link set {port} master br0 up",
        ):
            outside = ["nsenter", "-t", str(self._switch.pid), "-n", "--", *line.split()]
            subprocess.run(outside, check=True, timeout=_LIMIT_S)
        host.inside(["ip", "address", "add", f"{host.address}/24", "dev", "eth0"])
        host.inside(["ip", "link", "set", "eth0", "up"])

    def __len__(self) -> int:
        return len(self._hosts)

    def __getitem__(self, number: int) -> Host:
        return self._hosts[number]

    def __iter__(self) -> Iterator[Host]:
        return iter(self._hosts)

    def pull_cable(self, number: int) -> None:
        """Take a host off the network; its processes run on."""
        self._switch.inside(["ip", "link", "set", f"v{number}", "down"])

    def plug_cable(self, number: int) -> None:
        """Put it back."""
        self._switch.inside(["ip", "link", "set", f"v{number}", "up"])

    def power_on(self, number: int) -> None:
        """Start a host after a power cut: with its files, without any process."""
        # The other end of its cable went with its network, which may take a moment.
        with contextlib.suppress(subprocess.SubprocessError):
            self._switch.inside(["ip", "link", "delete", f"v{number}"])
        self._add(number, self._hosts[number].tmp)

    def end(self) -> None:
        """Kill every process of every host."""
        for space in (*self._hosts, self._switch):
            space.end()

    def __enter__(self) -> "Hosts":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


_NEW_NETWORK = 0x40000000


def socket_on(host: Host, family: int = socket.AF_INET) -> socket.socket:
    """A socket of this process in the network of a host."""
    library = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as own, open(f"/proc/{host.pid}/ns/net") as theirs:
        _enter(library, theirs.fileno())
        try:
            return socket.socket(family, socket.SOCK_STREAM)
        finally:
            _enter(library, own.fileno())


def _enter(library: ctypes.CDLL, network: int) -> None:
    if library.setns(network, _NEW_NETWORK):
        raise OSError(ctypes.get_errno(), "cannot enter the network of a host")
