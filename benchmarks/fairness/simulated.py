"""What fair shares do for a quiet tenant beside a flood, in OServe's simulator.

    .venv/bin/python benchmarks/fairness/simulated.py [--seconds 120] [--reserve PART] [--json FILE]

Two replicas of one H100 each serve an 8B model, on the roofline. Requests arrive as a Poisson
process with fixed lengths, which the gateway knows. The first 10 s do not count, and neither does
what happens after the last arrival. Work is in device-seconds, as fair shares charge it.
"""

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from oserve.config import load_cluster
from oserve.control.dispatch.fair_policy import FairPolicy
from oserve.control.dispatch.order import OrderPolicy
from oserve.core import DeploymentPlan, LengthClass, ReplicaShape, ReplicaSpec
from oserve.evaluate.simulator import Levers, SimulatedServing, SimulatedTraffic, Simulator
from oserve.perf.selection import SourceChoice, find_source
from oserve.sim.results import FleetResults
from oserve.sim.types import FairShares

WARM_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Tenant:
    """Requests a second, prompt and output tokens; ``on_s``: bursts of that length, and pauses.

    ``turns``: requests of one session, each of which begins with all tokens of the one before.
    """

    name: str
    rps: float
    prompt: int = 512
    output: int = 128
    on_s: float = 0.0
    turns: int = 1
    weight: float = 1.0


QUIET = Tenant(name="quiet", rps=12.0)
FLOOD = Tenant(name="flood", rps=120.0)
SCENARIOS: dict[str, list[Tenant]] = {
    "a flood of ten times as much": [QUIET, FLOOD],
    "the flood goes on and off, 10 s each": [QUIET, replace(FLOOD, rps=240.0, on_s=10.0)],
    "long requests beside short ones": [
        Tenant(name="quiet", rps=4.0, prompt=2000, output=256),
        Tenant(name="flood", rps=450.0, prompt=100, output=32),
    ],
    "short requests beside long ones": [
        Tenant(name="quiet", rps=30.0, prompt=100, output=32),
        Tenant(name="flood", rps=60.0, prompt=2000, output=256),
    ],
    "private prompts beside a flood of sessions": [QUIET, replace(FLOOD, turns=8)],
    "seven floods on two replicas": [
        replace(QUIET, rps=4.0),
        *(replace(FLOOD, name=f"flood {number}", rps=20.0) for number in range(7)),
    ],
    "two floods, one of longer answers": [
        Tenant(name="a", rps=100.0),
        Tenant(name="b", rps=100.0, output=256),
    ],
    "three floods, weights 1, 2 and 3": [
        Tenant(name=f"w{weight}", rps=90.0, weight=weight) for weight in (1.0, 2.0, 3.0)
    ],
    "eight floods on two replicas": [
        Tenant(name=f"t{number}", rps=14.0 + 2 * number) for number in range(8)
    ],
    "a lone tenant": [FLOOD],
}


def plan_of(shape: ReplicaShape, replicas: int = 2) -> DeploymentPlan:
    return DeploymentPlan(
        id="fairness",
        replicas=tuple(
            ReplicaSpec(id=f"r{number}", shape=shape, devices=(f"d{number}",))
            for number in range(replicas)
        ),
        length_classes=(LengthClass(name="all"),),
        routing_shares={"all": {f"r{number}": 1 / replicas for number in range(replicas)}},
    )


def traffic_of(tenants: list[Tenant], seconds: float) -> tuple[SimulatedTraffic, "np.ndarray"]:
    """The requests, and the session of each. A tenant's own do not depend on the others."""
    rows = []
    sessions = 0
    for number, tenant in enumerate(tenants):
        draw = np.random.default_rng(number)
        at_s = np.sort(draw.uniform(0.0, seconds, draw.poisson(tenant.rps * seconds)))
        if tenant.on_s:
            at_s = at_s[(at_s // tenant.on_s).astype(int) % 2 == 0]
        for place, arrival_s in enumerate(at_s):
            # A turn comes 100 requests after the last one of its session.
            group = place // (100 * tenant.turns) * 100 + place % 100
            session = sessions + group if tenant.turns > 1 else -1
            rows.append((arrival_s, tenant.prompt, tenant.output, number, session))
        sessions += len(at_s)
    columns = [np.array(column) for column in zip(*sorted(rows), strict=True)]
    traffic = SimulatedTraffic(
        arrival_s=columns[0],
        prompt_tokens=columns[1],
        output_tokens=columns[2],
        tenant=columns[3],
    )
    return traffic, columns[4]


@dataclass(frozen=True, kw_only=True)
class Bench:
    simulator: Simulator
    shape: ReplicaShape
    seconds: float

    def run(self, tenants: list[Tenant], fair: FairPolicy | None) -> FleetResults:
        shares = None
        if fair is not None:
            weights = tuple(tenant.weight for tenant in tenants)
            shares = FairShares(weights=weights, reserve=fair.reserve)
        serving = SimulatedServing(
            plan=plan_of(self.shape), levers=Levers(order=OrderPolicy(), fair=shares)
        )
        traffic, session = traffic_of(tenants, self.seconds)
        known = self.simulator.requests(serving, traffic, expected=traffic.output_tokens)
        fleet = self.simulator.fleet(serving, replace(known, session=session))
        for spec in serving.plan.replicas:
            self.simulator.add(fleet, spec, serving.levers, ready_at_s=0.0)
        self.simulator.route(fleet, serving.plan, serving.levers)
        fleet.run(limit_s=self.seconds)
        return fleet.results()

    def first_token_s(self, found: FleetResults, tenant: int = 0) -> list[float]:
        """P50 and P99; a request without a first token has waited until the end."""
        own = (found.tenant == tenant) & (found.arrival_s >= WARM_S)
        at_s = np.where(np.isnan(found.first_token_s), self.seconds, found.first_token_s)
        return [float(value) for value in np.quantile((at_s - found.arrival_s)[own], [0.5, 0.99])]

    def work_s(self, found: FleetResults) -> float:
        costs = self.simulator.costs(self.shape)
        return sum(
            own.prompt_tokens * costs.prefill_s_per_token
            + own.generated_tokens * costs.decode_s_per_token
            for own in found.totals
        )

    def served_s(self, found: FleetResults, tenants: list[Tenant]) -> list[float]:
        """By tenant, the work of answers begun or made, by weight."""
        costs = self.simulator.costs(self.shape)
        begun = np.isfinite(found.first_token_s)
        work = begun * found.prompt_tokens * costs.prefill_s_per_token
        work = work + found.made_tokens * costs.decode_s_per_token
        return [
            float(work[found.tenant == number].sum()) / tenant.weight
            for number, tenant in enumerate(tenants)
        ]


def jain(values: list[float]) -> float:
    return sum(values) ** 2 / (len(values) * sum(value * value for value in values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--reserve", type=float, default=FairPolicy().reserve)
    parser.add_argument("--seqs", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    spec = load_cluster("1x2xH100")
    source, _ = find_source(
        SourceChoice(model="llama-3.1-8b", devices=spec.devices, network=spec.network)
    )
    shape = ReplicaShape(
        device_kind="H100",
        max_num_seqs=options.seqs,
        max_num_batched_tokens=options.chunk,
    )
    bench = Bench(simulator=Simulator(source), shape=shape, seconds=options.seconds)
    policy = FairPolicy(reserve=options.reserve)
    rows = []
    for name, tenants in SCENARIOS.items():
        fair, unfair = (bench.run(tenants, own) for own in (policy, None))
        row: dict[str, object] = {
            "scenario": name,
            "throughput": bench.work_s(fair) / bench.work_s(unfair) - 1,
        }
        line = f"{name}: work {row['throughput']:+.1%}"
        floods = [at for at, tenant in enumerate(tenants) if tenant.name != "quiet"]
        if len(floods) > 1:
            served = [bench.served_s(found, tenants) for found in (fair, unfair)]
            index = [jain([own[at] for at in floods]) for own in served]
            row["jain"] = index
            line += f"; Jain of the floods, fair and unfair: {index[0]:.4f}, {index[1]:.4f}"
        if tenants[0].name == "quiet":
            alone = bench.run(tenants[:1], policy)
            ttft = [bench.first_token_s(found) for found in (alone, fair, unfair)]
            row["ttft_s"] = dict(zip(("alone", "fair", "unfair"), ttft, strict=True))
            line += "; quiet TTFT P50 / P99, ms: " + ", ".join(
                f"{what} {own[0] * 1e3:.0f} / {own[1] * 1e3:.0f} ({own[1] / ttft[0][1]:.2f}x)"
                for what, own in row["ttft_s"].items()  # type: ignore[attr-defined]
            )
        print(line, flush=True)
        rows.append(row)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
