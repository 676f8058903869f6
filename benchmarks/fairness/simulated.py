"""What fair shares do for a quiet tenant beside a flood: the request machine on a virtual clock.

    .venv/bin/python benchmarks/fairness/simulated.py [--seconds 120] [--reserve PART] [--json FILE]

The machine is that of the gateway. Replicas are modelled as batches of sequences: a step takes a
constant, a part for each decoding sequence and a part for each prompt token, at most a chunk of
those; waiting sequences are admitted by the rank that the machine gives them. The first 10 s
do not count.
"""

import argparse
import heapq
import json
import random
import statistics
from dataclasses import dataclass
from pathlib import Path

from oserve.control.dispatch import commands as do
from oserve.control.dispatch import events as on
from oserve.control.dispatch.fair_policy import FairPolicy
from oserve.control.dispatch.machine import RequestMachine
from oserve.control.dispatch.policy import DispatchPolicy
from oserve.control.dispatch.table import RoutingTable, TableReplica
from oserve.core import Endpoint, LengthClass, ReplicaPhase, Request

STEP_S, DECODE_S, PROMPT_S = 0.015, 0.00015, 0.00005
SEQS, CHUNK = 64, 2048
WARM_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Tenant:
    """Requests a second, prompt and output tokens; ``on_s``: bursts of that length, and pauses."""

    name: str
    rps: float
    prompt: int = 512
    output: int = 128
    on_s: float = 0.0
    prefixes: int = 0


class Sequence:
    def __init__(self, number: int, prompt: int, output: int) -> None:
        self.number, self.prompt, self.output = number, prompt, output
        self.made = 0


class Replica:
    """One engine: a batch, and a queue by rank."""

    def __init__(self) -> None:
        self.queue: list[tuple[float, int, Sequence]] = []
        self.batch: list[Sequence] = []
        self.busy = False

    def plan(self) -> tuple[float, list[Sequence]]:
        """The seconds of the next step, and who gets a token in it."""
        while self.queue and len(self.batch) < SEQS:
            self.batch.append(heapq.heappop(self.queue)[2])
        left, prompts, tokens = CHUNK, 0, []
        for item in self.batch:
            if item.prompt == 0:
                tokens.append(item)
        decodes = len(tokens)
        for item in self.batch:
            if item.prompt > 0 and left > 0:
                part = min(left, item.prompt)
                item.prompt -= part
                left -= part
                prompts += part
                if item.prompt == 0:
                    tokens.append(item)
        return STEP_S + DECODE_S * decodes + PROMPT_S * prompts, tokens


def run(
    tenants: list[Tenant],
    *,
    fair: bool,
    seconds: float,
    reserve: float,
    replicas: int = 2,
    seed: int = 1,
) -> dict[str, dict[str, float]]:
    """By tenant: P50 and P99 of TTFT, tokens served and device-seconds within the time."""
    draw = random.Random(seed)
    machine = RequestMachine(
        DispatchPolicy(max_queued=1 << 20, fair=FairPolicy(reserve=reserve), request_timeout_s=1e9)
    )
    engines = {f"r{index}": Replica() for index in range(replicas)}
    decode_s = (STEP_S + SEQS * DECODE_S) / SEQS
    table = RoutingTable(
        plan_id="p",
        length_classes=(LengthClass(name="t", max_prompt_tokens=1 << 30, output_tokens=128),),
        routing_shares={"t": dict.fromkeys(engines, 1.0)},
        replicas=tuple(
            TableReplica(
                id=name,
                shape="s",
                phase=ReplicaPhase.READY,
                endpoint=Endpoint(url="x"),
                max_inflight=2 * SEQS,
                max_model_len=0,
                accepts_priority=True,
                returns_token_ids=True,
                prefill_s_per_token=PROMPT_S,
                decode_s_per_token=decode_s,
            )
            for name in engines
        ),
    )
    machine.handle(on.TableChanged(table), 0.0)
    arrivals: list[tuple[float, Tenant]] = []
    for tenant in tenants:
        at_s = 0.0
        while True:
            at_s += draw.expovariate(tenant.rps)
            if at_s >= seconds:
                break
            if tenant.on_s and int(at_s / tenant.on_s) % 2:
                continue
            arrivals.append((at_s, tenant))
    arrivals.sort(key=lambda item: item[0])
    who: dict[int, tuple[Tenant, float, Sequence]] = {}
    ttft: dict[str, list[float]] = {tenant.name: [] for tenant in tenants}
    served = dict.fromkeys(ttft, 0.0)
    steps: list[tuple[float, int, str, list[Sequence]]] = []
    count = 0

    def execute(commands: list[do.Command], now_s: float) -> None:
        nonlocal count
        for command in commands:
            if isinstance(command, do.Send):
                sequence = who[command.number][2]
                engine = engines[command.replica.id]
                heapq.heappush(engine.queue, (command.rank_s, command.number, sequence))
                begin(command.replica.id, now_s)
            elif isinstance(command, do.Record) and command.charge is not None:
                made = who[command.number][2].made
                machine.settle_charge(command.charge, made)

    def begin(name: str, now_s: float) -> None:
        nonlocal count
        engine = engines[name]
        if engine.busy:
            return
        took_s, tokens = engine.plan()
        if engine.batch:
            engine.busy = True
            count += 1
            heapq.heappush(steps, (now_s + took_s, count, name, tokens))

    number, at = 0, 0
    while at < len(arrivals) or steps:
        if at < len(arrivals) and (not steps or arrivals[at][0] <= steps[0][0]):
            now_s, tenant = arrivals[at]
            at, number = at + 1, number + 1
            who[number] = tenant, now_s, Sequence(number, tenant.prompt, tenant.output)
            request = Request(
                id=str(number),
                arrival_s=now_s,
                workload_type="t",
                prompt_tokens=tenant.prompt,
                output_tokens=tenant.output,
            )
            event = on.Arrived(
                number=number,
                request=request,
                rank_s=now_s,
                streams=True,
                tenant=tenant.name if fair else "",
            )
            execute(machine.handle(event, now_s), now_s)
            continue
        now_s, _, name, tokens = heapq.heappop(steps)
        if now_s > seconds:
            break
        engine = engines[name]
        engine.busy = False
        for item in tokens:
            tenant, arrived_s, _ = who[item.number]
            item.made += 1
            counts = now_s >= WARM_S
            served[tenant.name] += counts * decode_s
            if item.made == 1:
                served[tenant.name] += counts * PROMPT_S * tenant.prompt
                if arrived_s >= WARM_S:
                    ttft[tenant.name].append(now_s - arrived_s)
                execute(machine.handle(on.Streams(item.number), now_s), now_s)
            if item.made == item.output:
                engine.batch.remove(item)
                execute(machine.handle(on.Finished(item.number), now_s), now_s)
        begin(name, now_s)
    # A request that never began has waited until the end at least.
    for tenant, arrived_s, sequence in who.values():
        if not sequence.made and arrived_s >= WARM_S:
            ttft[tenant.name].append(seconds - arrived_s)
    return {
        name: {
            "p50_s": statistics.median(values),
            "p99_s": sorted(values)[int(0.99 * (len(values) - 1))],
            "device_s": served[name],
        }
        for name, values in ttft.items()
    }


def jain(values: list[float]) -> float:
    return sum(values) ** 2 / (len(values) * sum(value * value for value in values))


SCENARIOS: dict[str, list[Tenant]] = {
    "flood tenfold": [Tenant(name="quiet", rps=4.0), Tenant(name="flood", rps=40.0)],
    "on and off": [Tenant(name="quiet", rps=4.0), Tenant(name="flood", rps=80.0, on_s=10.0)],
    "quiet long, flood short": [
        Tenant(name="quiet", rps=1.0, prompt=2000, output=256),
        Tenant(name="flood", rps=150.0, prompt=100, output=32),
    ],
    "quiet short, flood long": [
        Tenant(name="quiet", rps=8.0, prompt=100, output=32),
        Tenant(name="flood", rps=20.0, prompt=2000, output=256),
    ],
    "two floods": [Tenant(name="a", rps=40.0), Tenant(name="b", rps=60.0, output=256)],
    "many floods": [Tenant(name=f"t{index}", rps=6.0 + index) for index in range(8)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--reserve", type=float, default=FairPolicy().reserve)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = {}
    for name, tenants in SCENARIOS.items():
        with_, without = (
            run(tenants, fair=fair, seconds=options.seconds, reserve=options.reserve)
            for fair in (True, False)
        )
        total = [sum(item["device_s"] for item in each.values()) for each in (with_, without)]
        line = f"{name}: throughput {total[0] / total[1] - 1:+.1%}"
        floods = [item["device_s"] for each, item in with_.items() if each != "quiet"]
        plain = [item["device_s"] for each, item in without.items() if each != "quiet"]
        if "quiet" in with_:
            alone = run(tenants[:1], fair=True, seconds=options.seconds, reserve=options.reserve)[
                "quiet"
            ]
            line += "; quiet P99 TTFT" + "".join(
                f", {what} {each['p99_s'] * 1e3:.0f} ms ({each['p99_s'] / alone['p99_s']:.2f}x)"
                for what, each in (
                    ("alone", alone),
                    ("fair", with_["quiet"]),
                    ("unfair", without["quiet"]),
                )
            )
        else:
            line += f"; Jain fair {jain(floods):.3f}, unfair {jain(plain):.3f}"
        print(line, flush=True)
        found[name] = {"fair": with_, "unfair": without}
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
