"""A load that rises and falls on a live server: it follows on a ladder, beside one that stays.

    python benchmarks/control/follow.py [--profile FILE] [--low 0.15] [--high 0.75] [--layers 4]
        [--settle-s 60 --low-s 90 --rise-s 30 --high-s 120 --fall-s 150] [--json FILE]

It makes a Llama of noise (4 layers, hidden size 1024: 64 million parameters, fp32), runs
``oserve serve`` on it on two slots of one core each, and drives it with seeded Poisson arrivals of
short prompts with answers of about 96 tokens. A replica of two cores answers one request sooner
than a replica of one core does; two replicas of one core decode twice as many sequences at once
(``max_num_seqs`` is at most 32 a replica on CPUs) and so carry more. The server's own ladder says
how much: ``--low`` and ``--high`` are parts of the capacity that it reports.

Two servers, one after the other, meet the same requests: one follows the load (objective latency,
mode auto), the other one stays with the plan of most capacity (objective capacity, mode off). For
each it prints P50 and P99 of E2E and TTFT by phase, requests within the SLO, failed ones, streams
whose text is not the one that the engine gave before the load; for the former also the decisions
and switches with their reasons, and what ``oserve status`` says in each phase.

The SLO follows from the profile: ``--tpot`` times the decode step of a full replica of one core,
and ``--ttft`` times that for the first token. Without --profile it measures one first (two
minutes). Settings differ from the defaults so that the whole takes minutes, not hours: decisions
every 10 s, a fall after 30 s. Bounded; everything stays on the loopback interface. It ends with 1 if
a request failed or a text differed.
"""

import argparse
import asyncio
import contextlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from oserve.core import Precision, ReplicaShape
from oserve.perf.profile import ProfileSource, read_profile

sys.path.append(str(Path(__file__).parents[1] / "switch"))
# It lies beside the benchmarks of switches, where mypy knows it by a longer name.
from mid_model import make_mid_model  # type: ignore[import-not-found] # noqa: E402

PROMPT_TOKENS, OUTPUT_TOKENS, SPREAD = 32, 96, 0.25
LONGEST = round(OUTPUT_TOKENS * (1 + SPREAD))
SEQS = 32
TEXTS = 24
CONTEXT = 1024
_FIRST_TOKENS, _VOCABULARY = 8, 250
_START_LIMIT_S = 240.0
_LADDER_LIMIT_S = 300.0
_END_LIMIT_S = 90.0
_PROFILE_LIMIT_S = 900.0
# What may be waiting when the last request was sent.
_BACKLOG_S = 60.0
_SAMPLE_S = 5.0
# `oserve status` is asked so long before the end of each phase.
_ASK_BEFORE_S = 10.0


@dataclass(frozen=True)
class Phase:
    """``rates`` at its begin and its end, requests/s."""

    name: str
    seconds: float
    rates: tuple[float, float]


@dataclass(frozen=True)
class Request:
    at_s: float
    phase: int
    text: int
    tokens: int


@dataclass
class Answer:
    """``sent_s`` and the other times are seconds since the begin of the load."""

    request: Request
    ttft_s: float = 0.0
    e2e_s: float = 0.0
    text: str = ""
    error: str = ""

    @property
    def tpot_s(self) -> float:
        return (self.e2e_s - self.ttft_s) / max(1, self.request.tokens - 1)


@dataclass
class Run:
    """What one server did."""

    answers: list[Answer] = field(default_factory=list)
    inexact: int = 0
    seen: list[dict[str, Any]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    ladder_s: float = 0.0


def phases_of(wanted: argparse.Namespace, capacity_rps: float) -> list[Phase]:
    low, high = wanted.low * capacity_rps, wanted.high * capacity_rps
    return [
        Phase("settling", wanted.settle_s, (low, low)),
        Phase("low", wanted.low_s, (low, low)),
        Phase("rising", wanted.rise_s, (low, high)),
        Phase("high", wanted.high_s, (high, high)),
        Phase("falling", wanted.fall_s / 2, (low, low)),
        Phase("low again", wanted.fall_s / 2, (low, low)),
    ]


def requests_of(phases: Sequence[Phase], seed: int) -> list[Request]:
    """Poisson arrivals by thinning, with varied lengths; whole milliseconds."""
    draw = random.Random(seed)
    found, begin_s = [], 0.0
    for number, phase in enumerate(phases):
        first, last = phase.rates
        most = max(phase.rates)
        at_s = draw.expovariate(most)
        while at_s < phase.seconds:
            rate = first + (last - first) * at_s / phase.seconds
            if draw.random() < rate / most:
                tokens = round(OUTPUT_TOKENS * draw.uniform(1 - SPREAD, 1 + SPREAD))
                found.append(Request(begin_s + at_s, number, draw.randrange(TEXTS), tokens))
            at_s += draw.expovariate(most)
        begin_s += phase.seconds
    return found


def prompts() -> list[list[int]]:
    draw = random.Random(1)
    return [[draw.randrange(_VOCABULARY) for _ in range(PROMPT_TOKENS)] for _ in range(TEXTS)]


# -- one request ------------------------------------------------------------------------------------
async def ask(
    session: aiohttp.ClientSession, url: str, model: str, prompt: list[int], answer: Answer
) -> Answer:
    """Stream an answer; ``answer`` gets its times and text, or the error."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": answer.request.tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    begin_s, pieces, done = time.perf_counter(), [], False
    try:
        async with session.post(url + "/v1/completions", json=body) as given:
            if given.status != 200:
                answer.error = f"HTTP {given.status}: {(await given.text())[:200]}"
                return answer
            async for line in given.content:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        answer.error = str(event["error"])[:200]
                        return answer
                    pieces += [choice["text"] for choice in event["choices"]]
                    answer.ttft_s = answer.ttft_s or time.perf_counter() - begin_s
                done = done or line.startswith(b"data: [DONE]")
    except (aiohttp.ClientError, TimeoutError) as error:
        answer.error = f"{type(error).__name__}: {error}"
        return answer
    answer.e2e_s = time.perf_counter() - begin_s
    answer.text = "".join(pieces)
    answer.error = "" if done else "it broke off"
    return answer


async def known_texts(session: aiohttp.ClientSession, url: str, model: str) -> list[str]:
    """What the engine says to each prompt, a few at a time, before there is load."""
    places = asyncio.Semaphore(4)

    async def one(number: int, prompt: list[int]) -> str:
        async with places:
            request = Request(0.0, 0, number, LONGEST)
            answer = await ask(session, url, model, prompt, Answer(request))
        if answer.error:
            sys.exit(f"a request before the load failed: {answer.error}")
        return answer.text

    return list(await asyncio.gather(*(one(i, prompt) for i, prompt in enumerate(prompts()))))


# -- one server -------------------------------------------------------------------------------------
def profiled(folder: Path, model: Path) -> Path:
    """This machine's own step times: of a replica of one core, and of one of two."""
    path = folder / "profile.json"
    command = [sys.executable, "-m", "oserve.cli", "profile", str(model), "--output", str(path)]
    command += ["--shape", f"tp1-fp32-512-{SEQS}", "--shape", f"tp2-fp32-512-{SEQS}"]
    command += ["--cpu-slots", "2", "--set", f"engines.max_model_len={CONTEXT}"]
    subprocess.run(command, check=True, timeout=_PROFILE_LIMIT_S)
    return path


def step_s(profile: Path, tensor_parallel_size: int, seqs: int) -> float:
    """A decode step of so many sequences."""
    shape = ReplicaShape(
        tensor_parallel_size=tensor_parallel_size, precision=Precision.FP32, device_kind="cpu"
    )
    model = ProfileSource(read_profile(profile), name=str(profile)).step_model(shape)
    return float(model.step_s(0, 0, seqs, seqs * (PROMPT_TOKENS + OUTPUT_TOKENS / 2)))


@contextlib.contextmanager
def served(folder: Path, model: Path, wanted: argparse.Namespace, follows: bool) -> Iterator[str]:
    """`oserve serve` as a process, and its URL once it is ready."""
    rate = wanted.high_rps or wanted.rate_guess
    command = [sys.executable, "-m", "oserve.cli", "serve", str(model), "--port", "0"]
    command += ["--state-dir", str(folder), "--cpu-slots", "2"]
    for setting in (
        "cluster.devices=cpu",
        f"engines.max_model_len={CONTEXT}",
        f"planning.profile={wanted.profile}",
        f"planning.slo_ttft_ms={wanted.slo_ttft_ms:.1f}",
        f"planning.slo_tpot_ms={wanted.slo_tpot_ms:.1f}",
        f"planning.rates=all:{PROMPT_TOKENS}x{OUTPUT_TOKENS}={rate:.3f}",
        f"planning.objective={'latency' if follows else 'capacity'}",
        f"control.mode={'auto' if follows else chr(34) + 'off' + chr(34)}",
        "control.decision_interval_s=10",
        "control.fall_after_s=30",
        "control.min_dwell_s=10",
        "control.max_switches_per_hour=30",
        "control.start_s=10",
    ):
        command += ["--set", setting]
    folder.mkdir(parents=True)
    log = folder / "serve.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        deadline_s = time.monotonic() + _START_LIMIT_S
        while "Ready on" not in log.read_text():
            if process.poll() is not None or time.monotonic() > deadline_s:
                sys.exit(f"it did not come up:\n{log.read_text()[-3000:]}")
            time.sleep(0.1)
        line = next(line for line in log.read_text().splitlines() if line.startswith("Ready on"))
        yield line.split()[2]
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=_END_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def status_of(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    async with session.get(url + "/oserve/v1/status") as answer:
        return dict(await answer.json())


async def ladder_of(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    """The ladder, once the server has prepared it."""
    deadline_s = time.monotonic() + _LADDER_LIMIT_S
    while True:
        found = (await status_of(session, url))["control"].get("ladder")
        if found is not None:
            return dict(found)
        if time.monotonic() > deadline_s:
            sys.exit("no ladder was prepared in time")
        await asyncio.sleep(0.5)


async def watch(
    session: aiohttp.ClientSession, url: str, phases: Sequence[Phase], run: Run, began_s: float
) -> None:
    """The status every few seconds, and `oserve status` towards the end of each phase."""
    ends, at_s = [], 0.0
    for phase in phases:
        at_s += phase.seconds
        ends.append(at_s - min(_ASK_BEFORE_S, phase.seconds / 3))
    while True:
        now_s = time.perf_counter() - began_s
        document = await status_of(session, url)
        run.seen.append({"at_s": now_s, **document})
        if len(run.said) < len(ends) and now_s >= ends[len(run.said)]:
            command = [sys.executable, "-m", "oserve.cli", "status", "--url", url]
            process = await asyncio.create_subprocess_exec(
                *command, stdout=asyncio.subprocess.PIPE, env=_wide()
            )
            out, _ = await process.communicate()
            name = phases[len(run.said)].name
            run.said.append(f"[{name}, {now_s:.0f} s]\n{out.decode()}")
        await asyncio.sleep(_SAMPLE_S)


def _wide() -> dict[str, str]:
    return {"COLUMNS": "150", "PYTHONPATH": ":".join(filter(None, sys.path))}


async def drive(
    url: str,
    model: str,
    phases: Sequence[Phase],
    requests: Sequence[Request],
    run: Run,
    known: list[str],
) -> None:
    """All requests at their times; what became of them."""
    bodies = prompts()
    timeout = aiohttp.ClientTimeout(total=None)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        began_s = time.perf_counter()
        watching = asyncio.ensure_future(watch(session, url, phases, run, began_s))
        calls = []
        for request in requests:
            await asyncio.sleep(max(0.0, began_s + request.at_s - time.perf_counter()))
            answer = Answer(request)
            run.answers.append(answer)
            calls.append(
                asyncio.ensure_future(ask(session, url, model, bodies[request.text], answer))
            )
        _, left = await asyncio.wait(calls, timeout=_BACKLOG_S)
        for call in left:
            call.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        left_s = sum(phase.seconds for phase in phases) - (time.perf_counter() - began_s)
        await asyncio.sleep(max(0.0, left_s))
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        for answer in run.answers:
            if not answer.error and not answer.e2e_s:
                answer.error = "it did not end in time"
            # A byte is a character of the text, and greedy answers of fewer tokens begin alike.
            if not answer.error and not known[answer.request.text].startswith(answer.text):
                run.inexact += 1
        async with session.get(url + "/metrics") as given:
            metrics = await given.text()
        run.moved = [
            line
            for line in metrics.splitlines()
            if line.startswith("oserve_requests_moved_total{") and not line.endswith(" 0.0")
        ]


async def prepared(url: str, model: str, follows: bool, run: Run) -> tuple[list[str], float]:
    """Texts before the load, and the capacity that the ladder reports."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:
        began_s = time.perf_counter()
        capacity_rps = 0.0
        if follows:
            ladder = await ladder_of(session, url)
            run.ladder_s = time.perf_counter() - began_s
            capacity_rps = ladder["capacity_rps"]
            show_ladder(ladder)
        return await known_texts(session, url, model), capacity_rps


# -- what is printed --------------------------------------------------------------------------------
def show_ladder(ladder: dict[str, Any]) -> None:
    print(f"the ladder, {ladder['deployments']} deployments (simulated)")
    for row in ladder["rungs"]:
        print(
            f"  {row['load']:5.0%} {row['rate_rps']:6.2f}/s  {row['deployment']:32} "
            f"{'holds' if row['holds'] else 'does not hold':14} "
            f"E2E P50 {row['p50_e2e_s']:.2f} s, P99 {row['p99_e2e_s']:.2f} s"
        )


def row_of(answers: Sequence[Answer], wanted: argparse.Namespace) -> dict[str, Any]:
    done = [item for item in answers if not item.error]
    e2e_s = [item.e2e_s for item in done] or [float("nan")]
    ttft_s = [item.ttft_s for item in done] or [float("nan")]
    good = sum(
        1e3 * item.ttft_s <= wanted.slo_ttft_ms and 1e3 * item.tpot_s <= wanted.slo_tpot_ms
        for item in done
    )
    return {
        "requests": len(answers),
        "failed": len(answers) - len(done),
        "e2e_p50_s": float(np.quantile(e2e_s, 0.5)),
        "e2e_p99_s": float(np.quantile(e2e_s, 0.99)),
        "ttft_p50_ms": 1e3 * float(np.quantile(ttft_s, 0.5)),
        "ttft_p99_ms": 1e3 * float(np.quantile(ttft_s, 0.99)),
        "within_slo": good / max(1, len(answers)),
    }


def rows_of(run: Run, phases: Sequence[Phase], wanted: argparse.Namespace) -> list[dict[str, Any]]:
    return [
        {"phase": phase.name, **row_of([a for a in run.answers if a.request.phase == i], wanted)}
        for i, phase in enumerate(phases)
    ]


def show_rows(name: str, rows: Sequence[dict[str, Any]]) -> None:
    print(f"\n{name}")
    keys = [key for key in rows[0] if key != "phase"]
    print(f"  {'':12}" + "".join(f"{key:>13}" for key in keys))
    for row in rows:
        values = "".join(
            f"{row[key]:>13}" if isinstance(row[key], int) else f"{row[key]:>13.2f}" for key in keys
        )
        print(f"  {row['phase']:12}{values}")


def show_course(run: Run) -> None:
    print("\nreplicas and the place on the ladder, where they changed")
    last = ""
    for document in run.seen:
        alive = [item for item in document["replicas"] if item["phase"] != "gone"]
        replicas = ", ".join(
            f"{item['id']} TP{item['shape']['tensor_parallel_size']} {item['phase']}"
            for item in alive
        )
        decisions = document["control"].get("decisions") or [{}]
        place = decisions[-1].get("place") or {}
        loads = "".join(
            f"  {name} {place[key]:.0%}"
            for name, key in (
                ("load", "load"),
                ("expected", "expected_load"),
                ("to hold", "required_load"),
            )
            if key in place
        )
        if replicas != last:
            print(f"  {document['at_s']:6.0f} s {loads}  {place.get('rung', '')}: {replicas}")
            last = replicas
    words = ("a ladder", "decision", "switching", "switch ", "given up", "ERROR", "WARNING")
    print("\nwhat the server logged of it; decisions to keep the plan once for each reason in a row")
    before = ""
    for line in run.log:
        if any(word in line for word in words):
            kept = line.split("; ")[0].partition("): ")[2] if ": keep, " in line else line
            if kept != before:
                print("  " + line)
            before = kept


def ratio_lines(mine: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> list[str]:
    return [
        f"  {one['phase']:12} E2E P50 {two['e2e_p50_s'] / one['e2e_p50_s']:.2f}x, "
        f"P99 {two['e2e_p99_s'] / one['e2e_p99_s']:.2f}x lower than the static capacity plan"
        for one, two in zip(mine, other, strict=True)
    ]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--low", type=float, default=0.15, help="part of the ladder's capacity")
    parser.add_argument("--high", type=float, default=0.75, help="part of the ladder's capacity")
    parser.add_argument("--settle-s", type=float, default=60.0)
    parser.add_argument("--low-s", type=float, default=90.0)
    parser.add_argument("--rise-s", type=float, default=30.0)
    parser.add_argument("--high-s", type=float, default=120.0)
    parser.add_argument("--fall-s", type=float, default=150.0)
    parser.add_argument("--tpot", type=float, default=1.5, help="times a full step of one core")
    parser.add_argument("--ttft", type=float, default=20.0, help="times a full step of one core")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["follow", "static"])
    parser.add_argument("--high-rps", type=float, default=0.0, help="instead of --high")
    parser.add_argument("--low-rps", type=float, default=0.0, help="instead of --low")
    parser.add_argument("--json", type=Path)
    wanted = parser.parse_args()
    spans = (wanted.settle_s, wanted.low_s, wanted.rise_s, wanted.high_s, wanted.fall_s)
    if min(spans) < 5 or sum(spans) > 900:
        parser.error("phases: at least 5 s each, at most 900 s together")
    if wanted.only == "static" and not (wanted.low_rps and wanted.high_rps):
        parser.error("--only static: also --low-rps and --high-rps")
    return wanted


def main() -> int:
    wanted = options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    runs: dict[str, Run] = {}
    known: list[str] = []
    phases: list[Phase] = []
    with tempfile.TemporaryDirectory(prefix="follow-") as place:
        folder = Path(place)
        model = make_mid_model(folder / "mid", layers=wanted.layers)
        wanted.profile = wanted.profile or profiled(folder, model)
        full_s = step_s(wanted.profile, 1, SEQS)
        wanted.slo_tpot_ms = 1e3 * wanted.tpot * full_s
        wanted.slo_ttft_ms = 1e3 * wanted.ttft * full_s
        wanted.rate_guess = 0.5 * 2 * SEQS / (full_s * OUTPUT_TOKENS)
        for seqs in (1, SEQS):
            took = [1e3 * step_s(wanted.profile, size, seqs) for size in (1, 2)]
            print(f"a step of {seqs}: {took[0]:.0f} ms on one core, {took[1]:.0f} on two")
        print(f"SLO: {wanted.slo_ttft_ms:.0f} ms TTFT, {wanted.slo_tpot_ms:.0f} ms TPOT")
        for name in ("follow", "static") if wanted.only is None else (wanted.only,):
            run = runs[name] = Run()
            with served(folder / name, model, wanted, name == "follow") as url:
                own, capacity_rps = asyncio.run(prepared(url, model.name, name == "follow", run))
                if known and own != known:
                    print("the engines of the two servers differ before the load")
                known = known or own
                wanted.low_rps = wanted.low_rps or wanted.low * capacity_rps
                wanted.high_rps = wanted.high_rps or wanted.high * capacity_rps
                wanted.low, wanted.high = wanted.low_rps, wanted.high_rps
                phases = phases_of(wanted, 1.0)
                print(f"{name}: {wanted.low_rps:.2f}, then {wanted.high_rps:.2f} requests/s")
                requests = requests_of(phases, wanted.seed)
                asyncio.run(drive(url, model.name, phases, requests, run, known))
            run.log = (folder / name / "serve.log").read_text().splitlines()
            if name == "follow":
                show_course(run)
                for text in run.said:
                    print("\n" + text)
            show_rows(name, rows_of(run, phases, wanted))
    return finish(runs, phases, wanted)


def finish(runs: dict[str, Run], phases: Sequence[Phase], wanted: argparse.Namespace) -> int:
    tables = {name: rows_of(run, phases, wanted) for name, run in runs.items()}
    if len(tables) == 2:
        print("\n" + "\n".join(ratio_lines(tables["follow"], tables["static"])))
    bad = 0
    for name, run in runs.items():
        errors = [item.error for item in run.answers if item.error]
        bad += len(errors) + run.inexact
        print(
            f"{name}: {len(run.answers)} requests, {len(errors)} failed, {run.inexact} inexact; "
            f"went on elsewhere: {', '.join(run.moved) or 'none'}"
        )
        for error in dict.fromkeys(errors[:5]):
            print(f"  {error}")
    if wanted.json:
        document = {
            name: {
                "phases": tables[name],
                "inexact": run.inexact,
                "ladder_s": run.ladder_s,
                "moved": run.moved,
                "log": run.log,
                "status": run.said,
            }
            for name, run in runs.items()
        }
        wanted.json.write_text(json.dumps(document, indent=1))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
