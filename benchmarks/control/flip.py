"""Traffic flips on a live server, from short chats to long documents and back: what OServe does.

    python benchmarks/control/flip.py [--phase-s 100] [--chats-rps 1.8] [--documents-rps 0.6]
        [--slo-ttft-ms MS] [--slo-tpot-ms 60] [--mode auto] [--profile FILE] [--json FILE]

It makes the tiny model, runs ``oserve serve`` on it as ``make serve`` does (two slots of one core
each, so two small replicas or a wide one), drives it with ``oserve bench`` and a seeded trace, and
prints what was forecast, each decision with its numbers, when replicas changed, and what each phase
of the traffic met. It ends with 1 if any request failed. ``--mode off`` serves the
same with the replicas of the beginning. Bounded: three phases, a start and an end;
under ten minutes with the defaults. Everything stays on the loopback interface.

Two settings differ from ``make serve``. Decisions are made each 10 s, not each minute, to keep it
short. And the limit of the first token lies between what one core takes to read a document and what
two take, as ``oserve profile`` measures it on this machine before anything else (three minutes,
unless it is given a profile): where it lies above both, the same replicas are the best for either
traffic, and there is rightly no switch. Chats have long answers: two cores apart decode more of
them than two together. Where they are many and short there is rightly no switch either, since the
chats that are missed when they come back are more than the documents that are won
(--chats-rps 10 --chat-tokens 120 --documents-rps 0.5).
"""

import argparse
import json
import math
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from oserve.core import Precision, ReplicaShape, RequestRecord
from oserve.engines.checkpoints.int8 import make_int8_variant
from oserve.engines.tiny import make_tiny_model
from oserve.gateway.records import read_records
from oserve.perf.profile import ProfileSource, read_profile
from oserve.traces.metrics import percentile

_START_LIMIT_S = 180.0
_END_LIMIT_S = 90.0
_SAMPLE_S = 5.0
_SETTLE_S = 3.0
_PROFILE_LIMIT_S = 600.0
# Gateway and engine take this much of what reading a prompt takes, beside it.
_BESIDE = 1.2
# What may be waiting when the trace is over.
_BACKLOG_S = 60.0


@dataclass(frozen=True)
class Kind:
    """Prompt and output tokens of one kind of request: their means; ``spread``: how far off."""

    name: str
    prompt_tokens: int
    output_tokens: int
    spread: float

    def row(self, at_s: float, draw: random.Random) -> str:
        low, high = 1 - self.spread, 1 + self.spread
        prompt = round(self.prompt_tokens * draw.uniform(low, high))
        output = max(1, round(self.output_tokens * draw.uniform(low, high)))
        return f"{at_s:.3f},{prompt},{output}\n"


CHATS = Kind("chats", 60, 700, 0.2)
DOCUMENTS = Kind("documents", 2500, 10, 0.1)


@dataclass(frozen=True)
class Phase:
    kind: Kind
    rate_rps: float


def write_trace(path: Path, phases: list[Phase], phase_s: float, seed: int) -> None:
    """Poisson arrivals, one phase after the other."""
    draw = random.Random(seed)
    rows = ["arrival_s,input_tokens,output_tokens\n"]
    for number, phase in enumerate(phases):
        at_s = draw.expovariate(phase.rate_rps)
        while at_s < phase_s:
            rows.append(phase.kind.row(number * phase_s + at_s, draw))
            at_s += draw.expovariate(phase.rate_rps)
    path.write_text("".join(rows))


def profiled(folder: Path) -> Path:
    """This machine's own step times: of a replica of one core, and of one of two."""
    model, variant = models(folder)
    path = folder / "profile.json"
    command = [sys.executable, "-m", "oserve.cli", "profile", str(model), "--output", str(path)]
    command += ["--shape", "tp1-int8", "--shape", "tp2-int8"]
    command += ["--set", f"engines.variants={{int8: {variant}}}"]
    subprocess.run(command, check=True, timeout=_PROFILE_LIMIT_S)
    return path


def ttft_limit_ms(profile: Path) -> float:
    """Between what a document takes on one core and on two."""
    source = ProfileSource(read_profile(profile), name=str(profile))
    prompt = DOCUMENTS.prompt_tokens
    took_s = [
        float(
            source.step_model(
                ReplicaShape(tensor_parallel_size=size, precision=Precision.INT8, device_kind="cpu")
            ).step_s(prompt, prompt * prompt / 2, 0, 0)
        )
        for size in (1, 2)
    ]
    print(f"a document takes {1e3 * took_s[0]:.0f} ms on one core, {1e3 * took_s[1]:.0f} on two")
    return 1e3 * _BESIDE * math.sqrt(took_s[0] * took_s[1])


def models(folder: Path) -> tuple[Path, Path]:
    """The tiny model, and its int8 variant."""
    model = make_tiny_model(folder / "tiny-llama")
    return model, make_int8_variant(model, folder / "tiny-llama-int8")


def serve(folder: Path, wanted: argparse.Namespace) -> tuple["subprocess.Popen[bytes]", str]:
    """`oserve serve` as a process, and its URL once it is ready."""
    model, variant = models(folder)
    rates = f"chats:{CHATS.prompt_tokens}x{wanted.chat_tokens}={wanted.chats_rps}"
    rates += f",documents:{DOCUMENTS.prompt_tokens}x{DOCUMENTS.output_tokens}=0"
    command = [sys.executable, "-m", "oserve.cli", "serve", str(model), "--port", "0"]
    command += ["--state-dir", str(folder / "state"), "--cpu-slots", "2"]
    for setting in (
        f"engines.variants={{int8: {variant}}}",
        "cluster.devices=cpu",
        f"planning.profile={wanted.profile}",
        f"planning.slo_ttft_ms={wanted.slo_ttft_ms}",
        f"planning.slo_tpot_ms={wanted.slo_tpot_ms}",
        f"planning.rates={rates}",
        f'control.mode="{wanted.mode}"',
        "control.decision_interval_s=10",
        "control.min_dwell_s=20",
        "control.start_s=8",
    ):
        command += ["--set", setting]
    log = folder / "serve.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    deadline_s = time.monotonic() + _START_LIMIT_S
    while "Ready on" not in log.read_text():
        if process.poll() is not None or time.monotonic() > deadline_s:
            end(process)
            sys.exit(f"it did not come up:\n{log.read_text()[-3000:]}")
        time.sleep(0.1)
    line = next(line for line in log.read_text().splitlines() if line.startswith("Ready on"))
    return process, line.split()[2]


def end(process: "subprocess.Popen[bytes]") -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=_END_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def status(url: str) -> dict[str, Any]:
    """As ``oserve status --json`` prints it."""
    command = [sys.executable, "-m", "oserve.cli", "status", "--json", "--url", url]
    return dict(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))


def peek(url: str) -> dict[str, Any]:
    """The same document without a process for it, while load is on."""
    with urllib.request.urlopen(url + "/oserve/v1/status", timeout=30) as answer:
        return dict(json.loads(answer.read()))


def drive(url: str, trace: Path, limit_s: float) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """`oserve bench` to its end; its report, and what the status said meanwhile."""
    command = [sys.executable, "-m", "oserve.cli", "bench", str(trace), "--url", url, "--json"]
    command += ["--prompt-scale", "1", "--output-scale", "1"]
    seen = []
    deadline_s = time.monotonic() + limit_s
    with tempfile.TemporaryFile() as out:
        bench = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL)
        while bench.poll() is None:
            document = peek(url)
            seen.append({"at_s": time.time(), **document})
            if time.monotonic() > deadline_s:
                bench.kill()
                bench.wait()
                sys.exit("the requests did not end in time: this machine is too slow or too busy")
            time.sleep(_SAMPLE_S)
        out.seek(0)
        return json.loads(out.read()), seen


def phase_row(records: list[RequestRecord], wanted: argparse.Namespace) -> dict[str, Any]:
    ttft_s = [r.ttft_s for r in records if r.ttft_s is not None]
    tpot_s = [r.tpot_s for r in records if r.tpot_s is not None]
    good = sum(
        r.ttft_s is not None
        and 1e3 * r.ttft_s <= wanted.slo_ttft_ms
        and 1e3 * (r.tpot_s or 0.0) <= wanted.slo_tpot_ms
        for r in records
    )
    return {
        "requests": len(records),
        "not_completed": sum(r.status != "completed" for r in records),
        "ttft_p50_ms": 1e3 * percentile(ttft_s, 0.5) if ttft_s else None,
        "ttft_p95_ms": 1e3 * percentile(ttft_s, 0.95) if ttft_s else None,
        "tpot_p50_ms": 1e3 * percentile(tpot_s, 0.5) if tpot_s else None,
        "within_limits": good / len(records) if records else None,
    }


def told(seen: list[dict[str, Any]], start_s: float) -> list[str]:
    """What was expected, and which replicas there were, where either changed."""
    lines: list[str] = []
    last = ""
    for document in seen:
        forecast = ", ".join(
            f"{item['name']} {item['now_rps']:.2f} now, {item['expected_rps']:.2f} expected"
            for item in document["control"].get("forecast", [])
        )
        alive = [r for r in document["replicas"] if r["phase"] != "gone"]
        now = ", ".join(
            f"{r['id']} TP{r['shape']['tensor_parallel_size']} {r['shape']['precision']} "
            f"chunk {r['shape']['max_num_batched_tokens']} {r['phase']}"
            for r in alive
        )
        lines.append(f"{document['at_s'] - start_s:6.0f} s  requests/s: {forecast}")
        if now != last:
            lines.append(f"{'':9}replicas: {now}")
            last = now
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--phase-s", type=float, default=100.0)
    parser.add_argument("--chats-rps", type=float, default=1.8)
    parser.add_argument("--chat-tokens", type=int, default=CHATS.output_tokens)
    parser.add_argument("--documents-rps", type=float, default=0.6)
    parser.add_argument("--slo-ttft-ms", type=float)
    parser.add_argument("--slo-tpot-ms", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mode", choices=["auto", "advise", "off"], default="auto")
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--json", type=Path)
    wanted = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if not 5 <= wanted.phase_s <= 120:
        parser.error("--phase-s: from 5 to 120")
    chats = replace(CHATS, output_tokens=wanted.chat_tokens)
    phases = [
        Phase(chats, wanted.chats_rps),
        Phase(DOCUMENTS, wanted.documents_rps),
        Phase(chats, wanted.chats_rps),
    ]
    with tempfile.TemporaryDirectory(prefix="flip-") as place:
        folder = Path(place)
        trace = folder / "trace.csv"
        wanted.profile = wanted.profile or profiled(folder)
        wanted.slo_ttft_ms = wanted.slo_ttft_ms or ttft_limit_ms(wanted.profile)
        print(f"limits: {wanted.slo_ttft_ms:.0f} ms TTFT, {wanted.slo_tpot_ms:.0f} ms TPOT")
        write_trace(trace, phases, wanted.phase_s, wanted.seed)
        process, url = serve(folder, wanted)
        try:
            report, seen = drive(url, trace, len(phases) * wanted.phase_s + _BACKLOG_S)
            time.sleep(_SETTLE_S)
            final = status(url)
        finally:
            end(process)
        records = sorted(read_records(folder / "state" / "records.sqlite"), key=_arrival)
        log = (folder / "serve.log").read_text().splitlines()
    # The bench asks a little first, to learn how words become tokens.
    records = records[max(0, len(records) - report["sent"]) :]
    start_s = records[0].arrival_s
    rows = []
    for number in range(len(phases)):
        first_s = start_s + number * wanted.phase_s
        own = [r for r in records if first_s <= r.arrival_s < first_s + wanted.phase_s]
        rows.append(phase_row(own, wanted))
    show(phases, rows, told(seen, start_s), log, report)
    if wanted.json:
        document = {"phases": rows, "report": report, "control": final["control"], "log": log}
        wanted.json.write_text(json.dumps(document, indent=1))
    failed = report["failed"] + report["truncated"]
    print(f"\nfailed requests: {failed} of {report['sent']}")
    return 1 if failed else 0


def _arrival(record: RequestRecord) -> float:
    return record.arrival_s


def show(
    phases: list[Phase],
    rows: list[dict[str, Any]],
    seen: list[str],
    log: list[str],
    report: dict[str, Any],
) -> None:
    print("what was seen and expected")
    print("\n".join("  " + line for line in seen))
    print("\ndecisions, switches, starts and ends (the server's log)")
    words = ("decision", "takes the place", "start replica", "drain replica", "given up")
    for line in log:
        if any(word in line for word in words):
            print("  " + line.replace("INFO oserve.control: ", ""))
    print("\nwhat each phase met")
    keys = list(rows[0])
    print(f"  {'':22}" + "".join(f"{key:>15}" for key in keys))
    for phase, row in zip(phases, rows, strict=True):
        values = "".join(
            f"{row[key]:>15}" if isinstance(row[key], int) else f"{row[key] or 0.0:>15.2f}"
            for key in keys
        )
        print(f"  {phase.kind.name + f' at {phase.rate_rps:g}/s':22}{values}")
    print(f"  errors: {report['errors'] or 'none'}")


if __name__ == "__main__":
    sys.exit(main())
