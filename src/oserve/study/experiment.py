"""What the scripts under ``experiments/`` share: arguments, traffic, scenes, tables."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from oserve.config import load_cluster, load_switch_costs
from oserve.study.compare import CompareOptions, Row, compare, usable_cores
from oserve.study.report import row_document
from oserve.study.scene import Scene, SceneChoice, make_scene
from oserve.switch.costs import SwitchCosts
from oserve.traces import Slo, TraceRequest, read_trace, synthesise

SLO = Slo(ttft_s=2.0, tpot_s=0.1)
"""The limits of every experiment: 95 % of all requests within 2 s TTFT and 100 ms TPOT."""

KNEE = 1.1
"""P99 is compared at this multiple of the capacity of static-best, a little past its knee."""

_SYNTHETIC_RPS = 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """The arguments of the command line."""

    trace: str | None
    duration_s: float
    seed: int
    jobs: int
    models: tuple[str, ...]
    out: Path | None
    tensor_parallel_only: bool = False
    switch_costs: SwitchCosts = field(default_factory=SwitchCosts)
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def words(self) -> str:
        """A description of the traffic; for a trace the name of its file."""
        if self.trace is None:
            return f"a synthetic mix (seed {self.seed}), {self.duration_s:g} s"
        return f"{Path(self.trace).name}, its first {self.duration_s:g} s"

    def requests(self) -> list[TraceRequest]:
        """The trace's first part, or the synthetic mix."""
        if self.trace is not None:
            return list(read_trace(self.trace, until_s=self.duration_s))
        made = synthesise(rate_rps=_SYNTHETIC_RPS, duration_s=self.duration_s, seed=self.seed)
        return list(made)


def setup(
    description: str,
    *,
    duration_s: float,
    models: Sequence[str],
    more: Callable[[argparse.ArgumentParser], None] = lambda _: None,
) -> Setup:
    """Read the command line; ``more`` adds arguments of one experiment, found in ``Setup.more``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--trace", help="request trace; a seeded synthetic mix without one")
    parser.add_argument("--duration", type=float, default=duration_s, help="first seconds of it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=usable_cores())
    parser.add_argument("--models", default=",".join(models))
    parser.add_argument("--out", type=Path, help="also write all figures as JSON")
    parser.add_argument(
        "--tensor-parallel-only",
        action="store_true",
        help="no pipeline parallel, whose step times were never measured",
    )
    parser.add_argument("--switch-costs", help="file that benchmarks/switch/fit.py wrote")
    more(parser)
    given = parser.parse_args()
    return Setup(
        trace=given.trace,
        duration_s=given.duration,
        seed=given.seed,
        jobs=given.jobs,
        models=tuple(given.models.split(",")),
        out=given.out,
        tensor_parallel_only=given.tensor_parallel_only,
        more=vars(given),
        switch_costs=load_switch_costs(given.switch_costs) if given.switch_costs else SwitchCosts(),
    )


def scene(
    asked: Setup,
    model: str,
    cluster: str,
    requests: Sequence[TraceRequest],
    *,
    name: str = "",
    **choice: Any,
) -> Scene:
    """A scene with the experiments' limits; ``choice`` are further fields of ``SceneChoice``."""
    spec = load_cluster(cluster)
    wanted = SceneChoice(
        model=model, devices=spec.devices, network=spec.network, slo=SLO, seed=asked.seed
    )
    wanted = replace(wanted, switch_costs=asked.switch_costs)
    if asked.tensor_parallel_only:
        wanted = replace(wanted, pipeline_parallel_sizes=(1,))
    return make_scene(
        replace(wanted, **choice),
        requests,
        source_name=asked.words,
        name=name or f"{model} on {cluster}",
    )


LOADS = (0.25, 0.5, 0.75, 1.0)
"""Fixed loads, as fractions of the capacity of static-best."""


def measured(
    asked: Setup,
    scenes: Sequence[Scene],
    names: Sequence[str],
    *,
    loads: Sequence[float] = (),
) -> list[dict[str, Row]]:
    """Rows by policy for each scene, at the knee, with capacities; progress goes to stderr.

    ``loads``: also points at these fractions of the capacity of static-best, below the knee.
    """

    def told(at: int, name: str) -> None:
        print(f"{scenes[at].name}: {name}", file=sys.stderr, flush=True)

    wish = CompareOptions(knee=KNEE, sweep=tuple(load / KNEE for load in loads))
    found = compare(scenes, names, wish, jobs=asked.jobs, progress=told)
    rows = [{row.policy: row for row in part} for part in found]
    if asked.out is not None:
        document = [
            {"scene": item.name, "policies": [row_document(row) for row in part.values()]}
            for item, part in zip(scenes, rows, strict=True)
        ]
        asked.out.write_text(json.dumps(document, indent=2), encoding="utf-8")
    return rows


def capacity(row: Row) -> float:
    """The largest rate scale; 0 where none was found."""
    return row.max_rate_scale or 0.0


def ratio(row: Row, base: Row) -> str:
    """Capacity over that of another policy, and its P99 E2E over this one's."""
    most = capacity(row) / capacity(base) if capacity(base) else float("inf")
    latency = base.p99_e2e_s / row.p99_e2e_s if row.p99_e2e_s else float("inf")
    return f"{most:.2f}x / {latency:.2f}x"


def words(row: Row) -> str:
    """A deployment in words."""
    return " + ".join(f"{count} x {name}" for name, count in row.deployment)


def tell(title: str, heads: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table."""
    print(f"\n{title}\n")
    print("| " + " | ".join(heads) + " |")
    print("|" + "---|" * len(heads))
    for line in lines:
        print("| " + " | ".join(line) + " |")
    sys.stdout.flush()
