"""The energy of a simulated fleet: devices that replicas hold, and idle ones."""

import pytest

from oserve.core import Device, ReplicaShape
from oserve.evaluate.energy import HeldDevices, fleet_energy, work_of
from oserve.perf.known_models import find_model
from oserve.perf.power import ReplicaWork
from oserve.perf.source import RooflineSource
from oserve.sim.results import ReplicaTotals

SOURCE = RooflineSource(find_model("llama-2-70b"))
SHAPE = ReplicaShape(tensor_parallel_size=4, device_kind="H100")
DEVICES = [Device(id=f"n0/{k}", kind="H100", node="n0") for k in range(8)]


def test_a_replica_that_only_loads_holds_its_devices_and_the_rest_is_idle() -> None:
    held = [HeldDevices(shape=SHAPE, seconds=60.0, work=ReplicaWork())]
    energy = fleet_energy(SOURCE, held, DEVICES, 100.0)
    assert energy.serving_j == 4 * 60 * 122
    assert energy.idle_j == (8 * 100 - 4 * 60) * 72
    assert energy.total_j == energy.serving_j + energy.idle_j


def test_an_empty_fleet_is_idle() -> None:
    energy = fleet_energy(SOURCE, [], DEVICES, 10.0)
    assert (energy.serving_j, energy.idle_j) == (0.0, 8 * 10 * 72)


def test_hours_add_up_to_no_more_than_the_day() -> None:
    """The mean batch of a day overrates the power, that of shorter intervals does less so."""
    night = ReplicaTotals(
        busy_s=50.0, prompt_tokens=0, generated_tokens=4000, preemptions=0, steps=1000
    )
    day = ReplicaTotals(
        busy_s=100.0, prompt_tokens=0, generated_tokens=260_000, preemptions=0, steps=2000
    )
    parts = [
        HeldDevices(shape=SHAPE, seconds=50.0, work=work_of(night)),
        HeldDevices(shape=SHAPE, seconds=50.0, work=work_of(day, night)),
    ]
    whole = [HeldDevices(shape=SHAPE, seconds=100.0, work=work_of(day))]
    by_part = fleet_energy(SOURCE, parts, DEVICES[:4], 100.0).serving_j
    assert by_part == pytest.approx(4 * 50 * (300 + 300 + 300 * 6 / 7))
    assert by_part < fleet_energy(SOURCE, whole, DEVICES[:4], 100.0).serving_j
