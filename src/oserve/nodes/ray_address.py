"""Which Ray cluster is meant: ``ray``, or ``ray:HOST:PORT``."""

import re
from collections.abc import Mapping

from oserve.core import OServeError

_WORD = "ray"
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9][A-Za-z0-9._-]*):(\d{1,5})")
_SHAPE = "use ray (RAY_ADDRESS, else the Ray of this machine) or ray:HOST:6379"


def is_ray(text: str) -> bool:
    """Whether ``--cluster`` names a Ray cluster, well formed or not."""
    return text == _WORD or text.startswith(f"{_WORD}:")


def ray_address(text: str) -> str:
    """``HOST:PORT`` from ``ray:HOST:PORT``; empty from ``ray``. Raises OServeError."""
    if text == _WORD:
        return ""
    if not is_ray(text):
        raise OServeError(f"{text!r} names no Ray cluster", place="--cluster", remedy=_SHAPE)
    if text.startswith(f"{_WORD}://"):
        check_ray_address(text)
    address = text.removeprefix(f"{_WORD}:")
    check_ray_address(address)
    return address


def own_ray_address(environment: Mapping[str, str]) -> str:
    """What RAY_ADDRESS names; empty for the Ray of this machine."""
    address = environment.get("RAY_ADDRESS", "").strip()
    return "" if address in {"auto", "local"} else address


def check_ray_address(address: str) -> tuple[str, int]:
    """Host and port of a Ray head. Raises OServeError."""
    if address.startswith("ray://"):
        raise OServeError(
            "ray:// is Ray Client: its server on the head would run OServe's helper there, and end "
            "it with each broken connection",
            place="--cluster",
            remedy=f"{_SHAPE}; start Ray on this machine, without resources, if it runs elsewhere",
        )
    matched = _ADDRESS.fullmatch(address)
    if matched is None or not 0 < int(matched[2]) < 65536:
        raise OServeError(f"{address!r} is no address", place="--cluster", remedy=_SHAPE)
    return matched[1].strip("[]"), int(matched[2])
