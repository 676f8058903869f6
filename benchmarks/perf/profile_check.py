"""Predicted against measured on shapes and request types that no profile was fitted to.

    .venv/bin/python -m oserve.engines.tiny .oserve/models/tiny-llama
    .venv/bin/python benchmarks/perf/profile_check.py .oserve/models/tiny-llama \\
        --set 'engines.variants={int8: .oserve/models/tiny-llama-int8}'

Starts engines with other chunk budgets and sequence limits than the profile's, keeps a fixed number
of requests in flight, and compares requests/s, output tokens/s and TPOT with what the profile lets
expect (capacity.closed_loop). Exits with 1 when the mean error of requests/s exceeds --limit.
"""

import argparse
import asyncio
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import uvloop

from oserve.cli.serve import settings_from
from oserve.core import Precision, ReplicaShape
from oserve.perf.capacity import ClosedLoop, closed_loop
from oserve.perf.known_models import find_model
from oserve.perf.profile import ProfileSource, read_profile, shipped_profile
from oserve.profiler.client import EngineClient, MeasuredStream
from oserve.profiler.contention import foreign_cpu_s
from oserve.profiler.profile import profile_devices, started_engine, temporary_cluster

LIMITS = ((256, 8), (1024, 32))
# Prompt tokens, output tokens, requests in flight.
TYPES = ((64, 100, 4), (64, 100, 16), (300, 40, 8), (1000, 60, 2), (1000, 60, 16), (3000, 30, 4))
WARM = 1.5
RUN = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """Measured in the middle of a run: requests/s, mean seconds per output token, others' cores."""

    rate_rps: float
    tpot_s: float
    foreign: float


async def measure(
    client: EngineClient, prompt: int, output: int, inflight: int, expected: ClosedLoop
) -> Seen:
    """A closed loop, long enough for each place to see a few requests."""
    cycle_s = inflight / expected.rate_rps
    warm_s, run_s = max(2.0, WARM * cycle_s), max(8.0, RUN * cycle_s)
    ended: list[tuple[float, MeasuredStream]] = []
    stop_s = time.perf_counter() + warm_s + run_s

    async def place() -> None:
        while time.perf_counter() < stop_s:
            seen = await client.stream(client.prompt(prompt), output)
            ended.append((seen.times[-1], seen))

    tasks = [asyncio.create_task(place()) for _ in range(inflight)]
    await asyncio.sleep(warm_s)
    begin_s, before = time.perf_counter(), foreign_cpu_s()
    await asyncio.sleep(run_s)
    end_s, after = time.perf_counter(), foreign_cpu_s()
    await asyncio.gather(*tasks)
    # Tokens, not requests, since few long requests end within the run.
    tokens = sum(begin_s <= t < end_s for _, seen in ended for t in seen.times)
    kept = [seen for last_s, seen in ended if begin_s <= last_s]
    foreign = 0.0 if before is None or after is None else (after - before) / (end_s - begin_s)
    return Seen(
        rate_rps=tokens / output / (end_s - begin_s),
        tpot_s=statistics.fmean((s.times[-1] - s.times[0]) / (output - 1) for s in kept),
        foreign=foreign,
    )


async def check(wanted: argparse.Namespace) -> float:
    settings = settings_from(None, {"model": wanted.model}, wanted.override)
    devices = profile_devices(settings)
    model = find_model(wanted.model)
    if wanted.profile:
        source = ProfileSource(read_profile(wanted.profile), name=str(wanted.profile))
    else:
        found = shipped_profile(model, devices[0].kind)
        assert found is not None, "no profile is shipped for this model: give --profile"
        source = ProfileSource(found[1], name=found[0])
    print(source.origin, flush=True)
    print(
        f"{'shape':>18} {'seqs':>4} {'in':>5} {'out':>4} {'flight':>6} | {'req/s':>7} {'told':>7} "
        f"{'error':>6} | {'tok/s':>7} {'told':>7} | "
        f"{'TPOT ms':>7} {'told':>7} {'error':>6} | others' cores"
    )
    rates, tpots = [], []
    async with temporary_cluster(settings, devices) as cluster:
        for tp, pp, precision in [entry.key for entry in source.profile.entries]:
            if wanted.only and f"tp{tp}pp{pp}-{precision}" not in wanted.only:
                continue
            for chunk, seqs in LIMITS:
                shape = ReplicaShape(
                    tensor_parallel_size=tp,
                    pipeline_parallel_size=pp,
                    precision=Precision(precision),
                    max_num_batched_tokens=chunk,
                    max_num_seqs=seqs,
                )
                async with (
                    started_engine(cluster, devices, shape) as state,
                    EngineClient(state.endpoint, vocab=model.vocab) as client,
                ):
                    await client.facts()
                    for kind in TYPES:
                        rate, tpot = await one(source, client, shape, *kind)
                        rates.append(rate)
                        tpots.append(tpot)
    for name, errors in (("requests/s, output tokens/s", rates), ("TPOT", tpots)):
        sizes = [abs(error) for error in errors]
        print(
            f"{name}: mean error {100 * statistics.fmean(sizes):.1f} %, median "
            f"{100 * statistics.median(sizes):.1f} %, worst {100 * max(sizes):.1f} %, bias "
            f"{100 * statistics.fmean(errors):+.1f} % over {len(sizes)} runs"
        )
    return statistics.fmean(abs(error) for error in rates)


async def one(
    source: ProfileSource,
    client: EngineClient,
    shape: ReplicaShape,
    prompt: int,
    output: int,
    inflight: int,
) -> tuple[float, float]:
    kind = replace(shape, device_kind=source.profile.device_kind)
    told = closed_loop(
        source.step_model(kind),
        kind,
        source.kv_tokens(kind),
        inflight=inflight,
        prompt_tokens=prompt,
        output_tokens=output,
    )
    seen = await measure(client, prompt, output, inflight, told)
    rate = told.rate_rps / seen.rate_rps - 1.0
    tpot = told.tpot_s / seen.tpot_s - 1.0
    print(
        f"{shape.name:>18} {shape.max_num_seqs:4} {prompt:5} {output:4} {inflight:6} | "
        f"{seen.rate_rps:7.2f} {told.rate_rps:7.2f} {100 * rate:+5.0f}% | "
        f"{seen.rate_rps * output:7.0f} {told.rate_rps * output:7.0f} | "
        f"{1e3 * seen.tpot_s:7.1f} {1e3 * told.tpot_s:7.1f} {100 * tpot:+5.0f}% | "
        f"{seen.foreign:.2f}",
        flush=True,
    )
    return rate, tpot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--profile", type=Path, help="instead of the shipped one")
    parser.add_argument("--only", action="append", help="a shape such as tp1pp1-fp32; repeatable")
    parser.add_argument("--set", dest="override", action="append", help="a setting, path=value")
    parser.add_argument("--limit", type=float, default=0.15, help="mean error that is acceptable")
    wanted = parser.parse_args()
    raise SystemExit(uvloop.run(check(wanted)) > wanted.limit)


if __name__ == "__main__":
    main()
