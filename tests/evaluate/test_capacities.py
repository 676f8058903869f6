"""Capacities by simulation: in place of the linear model's, where they are worth a look."""

from dataclasses import replace

import numpy as np

from oserve.config import load_cluster
from oserve.core import LengthClass, ReplicaShape, WorkloadType
from oserve.evaluate.capacities import LengthSamples, simulated_table
from oserve.evaluate.simulator import Levers, Simulator
from oserve.perf.capacity import LatencyLimits
from oserve.perf.known_models import find_model
from oserve.perf.source import RooflineSource
from oserve.perf.table import performance_table
from oserve.traces import Slo

SLO = Slo(ttft_s=1.0, tpot_s=0.05)
TYPES = tuple(
    WorkloadType(name=name, prompt_tokens=prompt, output_tokens=10, arrival_rate_rps=1.0)
    for name, prompt in (("short", 200), ("long", 3000))
)


def test_a_table_is_simulated_again() -> None:
    source = RooflineSource(find_model("qwen3-32b"))
    shapes = [
        ReplicaShape(
            tensor_parallel_size=tp,
            max_num_batched_tokens=512,
            max_num_seqs=64,
            device_kind="H100",
        )
        for tp in (1, 4)
    ]
    limits = LatencyLimits(ttft_s=SLO.ttft_s, tpot_s=SLO.tpot_s)
    table = performance_table(source, shapes, TYPES, limits={kind.name: limits for kind in TYPES})
    hopeless = replace(table[0], capacity_rps=(0.01, 0.01))
    lengths = [
        LengthSamples(
            prompt_tokens=np.array([int(kind.prompt_tokens)]), output_tokens=np.array([10])
        )
        for kind in TYPES
    ]

    def simulated() -> list[tuple[float, ...]]:
        found = simulated_table(
            Simulator(source),
            [hopeless, table[-1]],
            lengths,
            devices=load_cluster("4xH100").devices,
            classes=(LengthClass(name="all", output_tokens=10),),
            levers=Levers(),
            slo=SLO,
        )
        # What the model gives a small part of the best is left out.
        assert [row.shape for row in found] == [table[-1].shape]
        return [row.capacity_rps for row in found]

    found = simulated()
    assert found == simulated()
    for modelled, measured in zip(table[-1].capacity_rps, found[0], strict=True):
        assert 0.3 * modelled < measured < 3 * modelled
