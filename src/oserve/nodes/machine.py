"""The facts of this machine that an examination needs. It holds no addresses and no user names."""

import os
import platform
import resource
import subprocess
from collections.abc import Sequence
from pathlib import Path

from oserve import __version__
from oserve.engines.devices import parse_gpus
from oserve.engines.main_memory import available_memory_bytes, total_memory_bytes
from oserve.engines.patches import engine_package
from oserve.nodes.examination import GpuFacts, InterfaceFacts, MachineFacts
from oserve.nodes.model_files import examine_model

_FORMAT = "--format=csv,noheader,nounits"
_GPUS = ("nvidia-smi", "--query-gpu=index,name,memory.total,uuid", _FORMAT)
_STATE = ("nvidia-smi", "--query-gpu=uuid,driver_version,mig.mode.current,memory.used", _FORMAT)
_USERS = ("nvidia-smi", "--query-compute-apps=gpu_uuid,pid,process_name", _FORMAT)
_QUERY_LIMIT_S = 30.0
_MIB = 1 << 20
_KEEPER = b"oserve.engines.keeper"
_MAX_DEPTH = 64
_MAX_INTERFACES = 64


def examine_machine(model: str = "") -> MachineFacts:
    """This machine, with the files of ``model`` unless it is empty. Blocks for seconds."""
    gpus, driver = examine_gpus(_answer(_GPUS), _answer(_STATE), _answer(_USERS))
    engine = engine_package()
    return MachineFacts(
        oserve=__version__,
        python=platform.python_version(),
        engine=engine[1] if engine is not None else "",
        driver=driver,
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=total_memory_bytes(),
        free_bytes=available_memory_bytes(),
        shared_memory_bytes=_size_of(Path("/dev/shm")),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        gpus=gpus,
        interfaces=examine_interfaces(Path("/sys/class/net")),
        model=examine_model(model) if model else None,
    )


def examine_gpus(listing: str, state: str, users: str) -> tuple[tuple[GpuFacts, ...], str]:
    """GPUs and the driver's version, from the three answers of ``nvidia-smi``."""
    states = {}
    driver = ""
    for line in state.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 4 and fields[0].startswith("GPU-"):
            states[fields[0]] = fields
            driver = fields[1]
    strangers: dict[str, list[str]] = {}
    for line in users.splitlines():
        fields = [field.strip() for field in line.split(",", 2)]
        known = len(fields) == 3 and fields[0].startswith("GPU-") and fields[1].isdigit()
        if known and not of_keeper(int(fields[1])):
            # The folders of a program can name a user.
            words = f"{fields[2].rpartition('/')[2] or 'a program'} (process {fields[1]})"
            strangers.setdefault(fields[0], []).append(words)
    gpus = []
    for device in parse_gpus(listing):
        _, _, mig, used = states.get(device.uuid, ["", "", "", ""])
        gpus.append(
            GpuFacts(
                name=device.id,
                kind=device.kind,
                memory_bytes=device.memory_bytes,
                used_bytes=int(used) * _MIB if used.isdigit() else 0,
                mig=mig == "Enabled",
                strangers=tuple(strangers.get(device.uuid, ())),
            )
        )
    return tuple(gpus), driver


def of_keeper(pid: int, proc: Path = Path("/proc")) -> bool:
    """Whether a process is a keeper's: it or a process above it is one."""
    for _ in range(_MAX_DEPTH):
        try:
            if _KEEPER in (proc / str(pid) / "cmdline").read_bytes():
                return True
            stat = (proc / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
            pid = int(stat.rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            return False
        if pid <= 1:
            return False
    return False


def examine_interfaces(folder: Path) -> tuple[InterfaceFacts, ...]:
    """Interfaces that are up, but for the loopback; ``folder`` is that of the kernel."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return ()
    found = [
        InterfaceFacts(
            name=name,
            mtu=_number(folder / name / "mtu"),
            speed_mbps=max(0, _number(folder / name / "speed")),
        )
        for name in names
        if name != "lo" and _text(folder / name / "operstate") == "up"
    ]
    return tuple(found[:_MAX_INTERFACES])


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _number(file: Path) -> int:
    try:
        return int(_text(file))
    except ValueError:
        return 0


def _size_of(folder: Path) -> int:
    try:
        found = os.statvfs(folder)
    except OSError:
        return 0
    return found.f_blocks * found.f_frsize


def _answer(query: Sequence[str]) -> str:
    try:
        found = subprocess.run(
            query, capture_output=True, text=True, timeout=_QUERY_LIMIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout if found.returncode == 0 else ""
