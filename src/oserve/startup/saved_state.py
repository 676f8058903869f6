"""The values that a server saves by name in its ``StateStore``."""

from typing import Any

import msgspec

from oserve.core import Device, ReplicaShape
from oserve.perf.device import Link
from oserve.perf.source import DEFAULT_NETWORK
from oserve.plan.demand import Demand


class SavedPlan(msgspec.Struct, frozen=True, kw_only=True):
    """``plan``: the text of the plan file in force. The fingerprints tell whether it still fits.

    ``given``: of the plan file that the server was started with; empty without one.
    """

    fingerprint: str
    given: str
    plan: str


class SavedSpeeds(msgspec.Struct, frozen=True, kw_only=True):
    """The state of a ``SpeedEstimator``, and the source of step times that speeds refer to."""

    source: str
    seen: list[dict[str, Any]]


class ReplayContext(msgspec.Struct, frozen=True, kw_only=True):
    """The facts of the observed server that a replay needs; ``settings`` as read from YAML."""

    settings: dict[str, Any]
    devices: tuple[Device, ...]
    demand: Demand
    shapes: tuple[ReplicaShape, ...]
    network: str | Link = DEFAULT_NETWORK
