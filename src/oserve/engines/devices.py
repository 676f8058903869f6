"""The devices of this machine: NVIDIA GPUs, or slots of CPU cores."""

import os
import re
import subprocess
from collections.abc import Sequence

from oserve.core import Device, OServeError
from oserve.engines.main_memory import total_memory_bytes

_FORMAT = "--format=csv,noheader,nounits"
_QUERY = ("nvidia-smi", "--query-gpu=index,name,memory.total,uuid", _FORMAT)
_USERS = ("nvidia-smi", "--query-compute-apps=gpu_uuid,pid,process_name", _FORMAT)
_MIB = 1024 * 1024
_QUERY_TIMEOUT_S = 30.0
# Words of product names that do not tell one GPU from another.
_NOISE = {"nvidia", "geforce", "tesla", "quadro", "graphics", "device"}


def find_devices(kind: str = "auto", cpu_slots: int | None = None) -> tuple[Device, ...]:
    """Devices of this machine; ``kind`` is ``auto`` (GPUs if there are any), ``gpu`` or ``cpu``.

    ``cpu_slots``: the number of slots that share the usable cores; by default one per core, at
    least two and at most eight. Raises ``OServeError`` if ``gpu`` is asked for and there is none.
    """
    if kind not in {"auto", "gpu", "cpu"}:
        raise OServeError(
            f"unknown device kind {kind!r}", place="devices", remedy="use auto, gpu or cpu"
        )
    if kind != "cpu":
        gpus = parse_gpus(_ask_nvidia_smi(_QUERY))
        if gpus or kind == "gpu":
            if not gpus:
                raise OServeError(
                    "no NVIDIA GPU found",
                    place="devices",
                    remedy="check that nvidia-smi lists one, or use cpu",
                )
            return gpus
    return split_cores(sorted(os.sched_getaffinity(0)), cpu_slots, total_memory_bytes())


def parse_gpus(listing: str) -> tuple[Device, ...]:
    """Devices from lines of ``index, name, MiB, UUID``; other lines are skipped."""
    devices = []
    for line in listing.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) != 4 or not fields[0].isdigit():
            continue
        mib = int(fields[2]) if fields[2].isdigit() else 0
        uuid = fields[3] if fields[3].startswith("GPU-") else ""
        devices.append(
            Device(
                id=f"gpu:{fields[0]}",
                kind=_gpu_kind(fields[1]),
                memory_bytes=mib * _MIB,
                uuid=uuid,
            )
        )
    return tuple(devices)


def find_gpu_users() -> dict[str, str]:
    """Programs that compute on GPUs of this machine now, by the GPU's UUID."""
    return parse_gpu_users(_ask_nvidia_smi(_USERS))


def parse_gpu_users(listing: str) -> dict[str, str]:
    """Programs by the GPU's UUID, from lines of ``UUID, PID, name``; other lines are skipped."""
    users: dict[str, str] = {}
    for line in listing.splitlines():
        fields = [field.strip() for field in line.split(",", 2)]
        if len(fields) == 3 and fields[0].startswith("GPU-"):
            users.setdefault(fields[0], f"{fields[2]} (process {fields[1]})")
    return users


def split_cores(
    cores: Sequence[int], slots: int | None = None, memory_bytes: int = 0
) -> tuple[Device, ...]:
    """Divide cores among slots as evenly as possible; more slots than cores share them.

    Raises ``OServeError`` unless there is at least one slot.
    """
    count = slots if slots is not None else max(2, min(8, len(cores)))
    if count < 1:
        raise OServeError(f"{count} CPU slots", place="devices", remedy="ask for at least one slot")
    share, rest = divmod(len(cores), count)
    devices = []
    first = 0
    for slot in range(count):
        size = share + (slot < rest)
        own = tuple(cores[first : first + size]) if share else (cores[slot % len(cores)],)
        first += size
        devices.append(
            Device(id=f"cpu:{slot}", kind="cpu", memory_bytes=memory_bytes // count, cores=own)
        )
    return tuple(devices)


def _gpu_kind(name: str) -> str:
    """``NVIDIA H100 80GB HBM3`` is an ``H100``; ``GeForce RTX 4090`` an ``RTX4090``."""
    words = [word for word in re.split(r"[\s\-_]+", name) if word.lower() not in _NOISE]
    if not words:
        return "GPU"
    if words[0].upper() in {"RTX", "GTX"} and len(words) > 1:
        return words[0].upper() + words[1]
    return words[0]


def _ask_nvidia_smi(query: Sequence[str]) -> str:
    try:
        answer = subprocess.run(
            query, capture_output=True, text=True, timeout=_QUERY_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout if answer.returncode == 0 else ""
