"""What a plan is chosen for, among the deployments that hold the SLO."""

from enum import StrEnum


class Objective(StrEnum):
    """The objective, once the SLO of every type holds.

    ``LATENCY``: the least mean E2E, relative to the best of each type, with P99 E2E as a guard.
    ``ENERGY``: the fewest joules per request. ``CAPACITY``: the largest load that still holds.
    """

    LATENCY = "latency"
    ENERGY = "energy"
    CAPACITY = "capacity"
