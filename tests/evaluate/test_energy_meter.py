"""The server's modelled energy equals the simulator's for the same work."""

import asyncio
from itertools import pairwise

import numpy as np
import pytest

from oserve.control.energy import ModelledEnergy
from oserve.core import (
    Device,
    DrainReplica,
    Observation,
    ReplicaShape,
    ReplicaSpec,
    StartReplica,
    StopReplica,
    VirtualClock,
)
from oserve.evaluate.energy import HeldDevices, fleet_energy, work_of
from oserve.perf import TokenCosts
from oserve.perf.costs import measured_costs
from oserve.perf.known_models import find_model
from oserve.perf.source import RooflineSource
from oserve.sim import Phases
from oserve.sim.fleet import SimulatedFleet
from oserve.sim.fleet_cluster import FleetCluster
from oserve.sim.results import FleetResults
from oserve.sim.steps import step_tables
from oserve.sim.types import RequestTable

SOURCE = RooflineSource(find_model("llama-2-70b"))
DEVICES = tuple(Device(id=f"gpu:{n}", kind="H100") for n in range(8))
SHAPE = ReplicaShape(
    tensor_parallel_size=2,
    pipeline_parallel_size=2,
    max_num_batched_tokens=512,
    max_num_seqs=64,
    device_kind="H100",
)
SPEC = ReplicaSpec(id="a", shape=SHAPE, devices=("gpu:0", "gpu:1", "gpu:2", "gpu:3"))


async def observed(
    seconds: int, stop_s: int | None = None
) -> tuple[list[Observation], list[FleetResults]]:
    """What a cluster with one replica shows each second, and its counters."""
    times = np.arange(0.0, 20.0, 0.25)
    fleet = SimulatedFleet(RequestTable.of(times, [600] * len(times), [150] * len(times)))
    clock = VirtualClock()

    def add(spec: ReplicaSpec, ready_at_s: float) -> None:
        costs = TokenCosts(prefill_s_per_token=1e-4, decode_s_per_token=1e-4)
        tables = step_tables(SOURCE.step_model(SHAPE), SHAPE)
        fleet.add_replica(
            spec.id, SHAPE, tables, kv_tokens=100_000, costs=costs, ready_at_s=ready_at_s
        )

    cluster = FleetCluster(fleet, add, DEVICES, clock, phases=Phases(start_s=3.0))
    await cluster.apply(StartReplica(spec=SPEC))
    shown, counted = [], []
    for second in range(seconds + 1):
        if second == stop_s:
            await cluster.apply(DrainReplica(replica="a"))
            await cluster.apply(StopReplica(replica="a"))
        shown.append(await cluster.observe())
        counted.append(fleet.results())
        await clock.advance(1.0)
    return shown, counted


def metered(observations: list[Observation]) -> float:
    model = ModelledEnergy(lambda shape, _kind: measured_costs(SOURCE.step_model(shape), shape))
    return sum(sum(model.observe(item).values()) for item in observations)


@pytest.mark.parametrize("every", [1, 5, 30])
def test_the_meter_and_the_simulator_agree(every: int) -> None:
    """Over any intervals, with loading and idle devices."""
    shown, counted = asyncio.run(observed(30))
    shown, counted = shown[::every], counted[::every]
    simulated = 0.0
    for before, after in pairwise(counted):
        work = work_of(after.totals[0], before.totals[0])
        held = [HeldDevices(shape=SHAPE, seconds=float(every), work=work)]
        simulated += fleet_energy(SOURCE, held, DEVICES, float(every)).total_j
    # A step counts when it begins, so one may reach into the next interval.
    assert metered(shown) == pytest.approx(simulated, rel=2e-3)
    assert simulated > 30 * 8 * 72


def test_a_process_that_has_ended_draws_nothing_more() -> None:
    shown, _ = asyncio.run(observed(60, stop_s=0))
    model = ModelledEnergy(
        lambda shape, _kind: TokenCosts(prefill_s_per_token=1e-4, decode_s_per_token=1e-4)
    )
    last = [model.observe(item) for item in shown][-1]
    assert set(last.values()) == {72.0}
