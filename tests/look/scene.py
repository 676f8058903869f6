"""A made-up fleet for tests of the page: status documents, switches, an hour of points."""

import math
import random
from dataclasses import dataclass, field
from typing import Any

import msgspec

from oserve.core import FinishStatus, RequestRecord
from oserve.look.points import (
    POINT_S,
    PageLimits,
    PagePoint,
    PageRecent,
    PointHistory,
    RecordWindow,
)
from oserve.look.sections import page_state
from oserve.look.switches import SwitchLog, SwitchOutcomeSeen

START_S = 1_790_000_000.0
TIERS = ("tight", "normal", "bulk")
LENGTHS = ("short prompt, short answer", "short prompt, long answer", "long prompt, short answer")
PHASES = ("prepare", "start", "copy", "verify", "commit", "drain")


def type_names(tiers: int, lengths: int) -> list[str]:
    words = [LENGTHS[i] if i < len(LENGTHS) else f"length cluster {i}" for i in range(lengths)]
    return [f"{tier}: {word}" for tier in TIERS[:tiers] for word in words]


def decision(number: int, at_s: float, names: list[str], **fields: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "number": number,
        "at_s": at_s,
        "trigger": "interval",
        "verdict": "keep",
        "reason": "gain_too_small",
        "current_plan": "p1",
        "candidate_plan": "p2",
        "forecast": [],
        "lasts_s": 900.0,
        "current_rps": 11.25,
        "candidate_rps": 11.5,
        "gain_requests": 22.0,
        "cost_requests": 31.0,
        "switch_s": 14.0,
    }
    rates = ", ".join(f"{name} 1.25 (0.90-1.60)" for name in names)
    line = f"decision {number} (interval): keep; forecast requests/s: {rates}"
    return {**defaults, "line": line, **fields}


@dataclass
class Fleet:
    """A fleet of nodes of eight GPUs; ``advance`` moves its time, by which everything follows."""

    nodes: int = 2
    tiers: int = 2
    lengths: int = 2
    at_s: float = START_S
    switch: dict[str, Any] | None = None
    decisions: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(7)
        self.names = type_names(self.tiers, self.lengths)
        self.window = RecordWindow(PageLimits(ttft_s=1.0))
        self.history = PointHistory()
        self.log = SwitchLog()
        self.decided = 0
        self.after = False
        self.recent: PageRecent | None = None
        self.decide()

    # -- what happens ---------------------------------------------------------------------------
    def decide(self, **fields: Any) -> None:
        self.decided += 1
        self.decisions.append(decision(self.decided, self.at_s, self.names, **fields))
        del self.decisions[:-10]

    def begin_switch(self) -> None:
        self.decide(
            verdict="switch",
            reason="gain_exceeds_cost",
            gain_requests=412.0,
            cost_requests=18.0,
            candidate_rps=14.5,
        )
        self.switch = {
            "id": f"switch-{self.decided}",
            "plan_id": "p2",
            "by": "interval",
            "method": "transfer",
            "state": "running",
            "reason": "",
            "phase": "prepare",
            "wave": 0,
            "waves": 1,
            "moved_bytes": 0,
            "total_bytes": 2_700_000_000,
            "began_s": self.at_s + 0.5,
            "ended_s": None,
            "phases": [{"wave": 0, "phase": "prepare", "at_s": self.at_s + 0.5}],
        }

    def next_phase(self) -> str:
        assert self.switch is not None
        place = PHASES.index(self.switch["phase"]) + 1
        if place == len(PHASES):
            self.switch.update(state="done", ended_s=self.at_s)
            self.after = True
            return "done"
        name = PHASES[place]
        self.switch["phase"] = name
        self.switch["phases"].append({"wave": 0, "phase": name, "at_s": self.at_s})
        self.switch["moved_bytes"] = 2_700_000_000 if place > 2 else 900_000_000 * place
        return name

    def rate(self, index: int) -> float:
        wave = math.sin((self.at_s - START_S) / 600.0 + index)
        return 2.0 + 1.2 * wave + 0.4 * index

    def records(self, seconds: float) -> list[RequestRecord]:
        made = []
        replicas = self.replica_ids()
        for index, name in enumerate(self.names):
            for _ in range(max(0, round(self.rate(index) * seconds))):
                draw = self.random
                ttft_s = draw.lognormvariate(-1.4 - 0.4 * self.after, 0.7)
                tpot_s = draw.lognormvariate(-3.6, 0.3)
                e2e_s = ttft_s + tpot_s * draw.randint(20, 200)
                end_s = self.at_s - draw.random() * seconds
                made.append(
                    RequestRecord(
                        arrival_s=end_s - e2e_s,
                        prompt_tokens=draw.randint(50, 2000),
                        output_tokens=draw.randint(20, 200),
                        workload_type=name,
                        replica=draw.choice(replicas),
                        ttft_s=ttft_s,
                        tpot_s=tpot_s,
                        e2e_s=e2e_s,
                        status=FinishStatus.COMPLETED,
                        tier=name.partition(":")[0],
                        tenant=draw.choice(["acme", "acme", "globex", "initech"]),
                        kept=ttft_s < 0.9,
                    )
                )
        return sorted(made, key=lambda item: item.arrival_s + item.e2e_s)

    def replica_ids(self) -> list[str]:
        return [item["id"] for item in self.replicas() if item["phase"] in {"ready", "draining"}]

    def advance(self, seconds: float) -> None:
        """Move on, with a point every ten seconds."""
        end_s = self.at_s + seconds
        while self.at_s + POINT_S <= end_s:
            self.at_s += POINT_S
            self.window.add(self.records(POINT_S))
            self.history.add(self.point())
            self.recent = self.window.recent(self.at_s)
        self.at_s = end_s

    # -- documents ------------------------------------------------------------------------------
    def point(self) -> PagePoint:
        forecast = {
            name: (r, r * 1.05, r * 0.7, r * 1.4)
            for name, r in ((name, self.rate(i)) for i, name in enumerate(self.names))
        }
        return PagePoint(
            at_s=round(self.at_s, 1),
            types=self.window.types(self.at_s, forecast),
            queued=max(0, round(4 * math.sin(self.at_s / 200.0))),
            power_w=round(2400 + 600 * math.sin(self.at_s / 500.0), 1),
            load=0.61,
        )

    def replicas(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for node in range(self.nodes):
            for pair in range(4):
                two = pair < 2
                for half in range(1 if two else 2):
                    first = node * 8 + 2 * pair + half
                    found.append(self._replica(f"r{len(found)}", first, 2 if two else 1))
        if self.switch is not None and self.switch["ended_s"] is None:
            found[1]["phase"] = "draining" if self.switch["phase"] == "drain" else "ready"
            if self.switch["phase"] != "prepare":
                phase = "ready" if self.switch["phase"] in {"commit", "drain"} else "standby"
                for half in range(2):
                    found.append(self._replica(f"n{half}", 2 + half, 1, phase))
        elif self.after:
            found[1:2] = [self._replica(f"n{half}", 2 + half, 1) for half in range(2)]
        return found

    def _replica(self, name: str, first: int, width: int, phase: str = "ready") -> dict[str, Any]:
        draw = random.Random(f"{name} {int(self.at_s)}")
        return {
            "id": name,
            "shape": {
                "tensor_parallel_size": width,
                "pipeline_parallel_size": 1,
                "precision": "bf16" if width == 2 else "fp8",
            },
            "devices": [f"gpu:{first + i}" for i in range(width)],
            "phase": phase,
            "phase_s": 4.0 if phase == "standby" else 100.0 + self.at_s - START_S,
            "running": draw.randint(0, 24),
            "waiting": draw.randint(0, 2),
            "kv_cache_usage": draw.random() * 0.8,
            "detail": "",
            "url": "",
            "note": "receives its weights from other replicas" if phase == "standby" else "",
        }

    def status(self) -> dict[str, Any]:
        replicas = self.replicas()
        serving = [item for item in replicas if item["phase"] == "ready"]
        shares = {item["id"]: 1.0 / len(serving) for item in serving}
        return {
            "version": "0.0",
            "model": "example-70b",
            "plan_id": "p2" if self.after else "p1",
            "serving": bool(serving),
            "replicas": replicas,
            "given_up": {},
            "workload_types": [{"name": name} for name in self.names],
            "routing_shares": dict.fromkeys(self.names, shares),
            "devices": [
                {"id": f"gpu:{place}", "kind": "h100", "node": f"node{place // 8}", "cores": 0}
                for place in range(8 * self.nodes)
            ],
            "nodes": [{"name": f"node{place}", "state": "up"} for place in range(self.nodes)],
            "gateways": [{"queued": 3, "inflight": 61}],
            "energy": {
                "power_w": 2410.5,
                "idle_power_w": 75.0,
                "joules_per_output_token": 1.25,
                "sources": ["nvml"],
            },
            "tiers": [
                {
                    "tier": tier,
                    "ttft_ms": 800.0 * (place + 1),
                    "tpot_ms": 50.0,
                    "e2e_ms": None,
                    "requests": {"kept": 950, "missed": 50},
                }
                for place, tier in enumerate(TIERS[: self.tiers])
            ],
            "control": {
                "mode": "auto",
                "forecast": [
                    {
                        "name": name,
                        "now_rps": self.rate(i) + self.random.random(),
                        "expected_rps": self.rate(i) * 1.05,
                        "low_rps": self.rate(i) * 0.7,
                        "high_rps": self.rate(i) * 1.4,
                    }
                    for i, name in enumerate(self.names)
                ],
                "decisions": self.decisions,
                "ladder": {
                    "load": 0.61,
                    "deployment": "6 x TP2 bf16",
                    "objectives": dict.fromkeys(self.names, "latency"),
                    "rungs": [
                        {
                            "load": 0.2 * step,
                            "deployment": f"{2 * step} x TP2 bf16",
                            "devices": 4 * step,
                            "holds": step < 5,
                            "power_w": 700.0 * step,
                        }
                        for step in range(1, 6)
                    ],
                },
            },
        }

    def document(self) -> bytes:
        """The page's sections, as a server publishes them."""
        totals = {
            "completed": 4000.0,
            "failed": 0.0,
            "rejected": 3.0,
            "moved": 12.0,
            "retried": 1.0,
            "demoted": 5.0,
            "shed": 0.0,
        }
        switches = [self.switch] if self.switch is not None else []
        state = page_state(self.status(), switches, totals, now_s=self.at_s)
        fields: dict[str, Any] = {name: getattr(state, name) for name in state.__struct_fields__}
        seen = self.log.observe(state.switches)
        if self.after and seen[-1].outcome is None:
            outcome = SwitchOutcomeSeen(
                requests=88, moves=12, lost=0, kept=1490, without=1103, with_it=1502, judged_s=300.0
            )
            self.log.learn({seen[-1].switch.id: outcome})
            seen = self.log.observe(())
        fields["switches"] = [item.document() for item in seen]
        fields["recent"] = self.recent
        fields["point"] = self.history.points[-1] if self.history.points else None
        return msgspec.json.encode(fields)


class FleetSource:
    """A fleet as the source of a feed; ``away`` is how long its controller is away."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.away = 0.0

    async def refresh(self) -> None:
        if self.away:
            raise ConnectionError("away")

    def state(self) -> bytes:
        return self.fleet.document()

    async def history(self) -> bytes:
        return msgspec.json.encode(list(self.fleet.history.points))

    def away_s(self) -> float:
        return self.away
