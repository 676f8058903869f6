"""Engines that hang, under load: how soon each is found, and what becomes of its streams.

    .venv/bin/python benchmarks/faults/hangs.py [--only core-decode ...] [--json FILE]

For each case the tiny model is served by ``oserve serve`` as two replicas; one of them is stopped
(SIGSTOP) in one of its processes while streams run whose text is known. Cases are the process - the
API process, the engine core, a worker of a tensor-parallel or of a pipeline-parallel engine - and
the moment: decoding, prefill of long prompts, idle until a request comes, loading, beside a
transfer of weights. Told are seconds from the signal until

- the replica has left routing (``left``), its processes are gone (``ended``), it serves again
  (``back``), as ``/oserve/v1/status`` says, asked every 50 ms;
- the last stream that it had goes on elsewhere (``resumed``: its next event);

and how many streams it had, failed, or differ from what an undisturbed run said. With ``cont`` in
place of a process it is let go on (SIGCONT) after half of the limit: nothing may happen.

Ends with 1 if a stream failed or differed, or a hang was not found. Bounded: at most four minutes a
case; about eight minutes in all.
"""

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from serving import served

from oserve.engines.group import group_members
from oserve.engines.tiny import make_tiny_model

_CASE_LIMIT_S = 150.0
_POLL_S = 0.05
_STREAMS = 6
_TOKENS = 400
_LONG = 1800

_PLAN = """
id: hangs
workload_types: [{{name: all}}]
replicas:
  - id: victim
    shape: {{precision: fp32, max_num_batched_tokens: 64, max_num_seqs: 8, {shape}}}
    devices: [{devices}]
  - id: other
    shape: {{precision: fp32, max_num_batched_tokens: 256, max_num_seqs: 16}}
    devices: [cpu:2]
routing_shares: {{all: {{victim: 1}}}}
"""
_WIDE = """
id: wide
workload_types: [{name: all}]
replicas:
  - id: wide
    shape: {precision: fp32, max_num_batched_tokens: 256, max_num_seqs: 8, tensor_parallel_size: 2}
    devices: [cpu:0, cpu:2]
routing_shares: {all: {wide: 1}}
"""
_SHAPES = {
    "tp1": ("tensor_parallel_size: 1", "cpu:0"),
    "tp2": ("tensor_parallel_size: 2", "cpu:0, cpu:1"),
    "pp2": ("pipeline_parallel_size: 2", "cpu:0, cpu:1"),
}


_WORDS = (
    *("--cpu-slots", "3", "--set", "control.max_failures=1000"),
    *("--set", "control.max_backoff_s=1", "--set", "engines.max_model_len=4096"),
)


def plan_of(shape: str) -> str:
    """The victim of this shape, and another replica."""
    words, devices = _SHAPES[shape]
    return _PLAN.format(shape=words, devices=devices)


@dataclass(frozen=True)
class Case:
    """``process``: api, core, worker, all or cont. ``moment``: when it is stopped."""

    name: str
    shape: str
    process: str
    moment: str


CASES = (
    Case("PP worker, decode", "pp2", "worker", "decode"),
    Case("PP worker, prefill", "pp2", "worker", "prefill"),
    Case("core of the target, transfer", "tp1", "core", "transfer"),
    Case("core, decode", "tp1", "core", "decode"),
    Case("api, decode", "tp1", "api", "decode"),
    Case("all processes, decode", "tp1", "all", "decode"),
    Case("core, prefill", "tp1", "core", "prefill"),
    Case("core, idle", "tp1", "core", "idle"),
    Case("core, goes on", "tp1", "cont", "decode"),
    Case("core, loading", "tp1", "core", "loading"),
    Case("TP worker, decode", "tp2", "worker", "decode"),
    Case("TP worker, idle", "tp2", "worker", "idle"),
)


@dataclass
class Found:
    """What a case showed; seconds since the signal, ``None`` where it did not happen."""

    case: str
    left: float | None = None
    resumed: float | None = None
    ended: float | None = None
    back: float | None = None
    streams: int = 0
    failed: int = 0
    differ: int = 0
    reason: str = ""
    phases: list[str] = field(default_factory=list)


@dataclass
class Stream:
    """One stream: its text, where it began, when events came."""

    text: str = ""
    replica: str = ""
    times: list[float] = field(default_factory=list)
    error: str = ""


class Server:
    """``oserve serve`` as a process."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self.url = url
        self.session = session

    async def replicas(self) -> dict[str, dict[str, Any]]:
        async with self.session.get(self.url + "/oserve/v1/status") as answer:
            document = await answer.json()
        return {entry["id"]: entry for entry in document["replicas"]}

    async def until(self, true: Callable[[dict[str, dict[str, Any]]], bool]) -> dict[str, Any]:
        async with asyncio.timeout(_CASE_LIMIT_S):
            while not true(found := await self.replicas()):  # noqa: ASYNC110
                await asyncio.sleep(_POLL_S)
        return found

    async def ready(self) -> dict[str, Any]:
        return await self.until(
            lambda all_: all(
                all_.get(name, {}).get("phase") == "ready" for name in ("victim", "other")
            )
        )

    async def stream(self, prompt: list[int], into: Stream) -> None:
        body = {
            **{"model": "tiny", "prompt": prompt, "max_tokens": _TOKENS, "temperature": 0},
            **{"ignore_eos": True, "stream": True},
        }
        try:
            async with self.session.post(self.url + "/v1/completions", json=body) as answer:
                into.replica = answer.headers.get("x-oserve-replica", "")
                done = False
                async for line in answer.content:
                    if not line.startswith(b"data: "):
                        continue
                    into.times.append(time.monotonic())
                    done = line.strip() == b"data: [DONE]"
                    if not done:
                        event = json.loads(line[6:])
                        into.error = into.error or str(event.get("error", ""))
                        into.text += "".join(c["text"] for c in event.get("choices", ()))
                if not done:
                    into.error = into.error or f"it broke off ({answer.status})"
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            into.error = repr(error)


def targets(pid: int, process: str) -> list[int]:
    """Process ids of an engine: its API process leads the group."""
    if process == "api":
        return [pid]
    members = group_members(pid)
    if process == "all":
        return members
    wanted = "VLLM::Worker" if process == "worker" else "VLLM::EngineCor"
    named = [p for p in members if Path(f"/proc/{p}/comm").read_text().startswith(wanted)]
    return named[-1:]


def prompts(case: Case) -> list[list[int]]:
    length = _LONG if case.moment == "prefill" else 12
    return [[5 + number] * (length + number) for number in range(_STREAMS)]


async def run(case: Case, server: Server) -> Found:
    found = Found(case=case.name)
    await server.ready()
    calm = [Stream() for _ in range(_STREAMS)]
    await _streams(server, case, calm)
    streams = [Stream() for _ in range(_STREAMS)]
    began = await server.ready()
    before = began["victim"]
    tasks: list[asyncio.Future[None]] = []
    if case.moment == "loading":
        os.kill(before["pid"], signal.SIGKILL)
        victim = await _loading(server, before["pid"])
    elif case.moment == "transfer":
        victim = await _standby(server)
    else:
        victim = before
    name = "wide" if case.moment == "transfer" else "victim"
    if case.moment != "idle":
        tasks = _start(server, case, streams)
    if case.moment == "decode":
        while any(len(stream.times) < 5 for stream in streams):  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    elif case.moment == "prefill":
        await asyncio.sleep(0.5)
    stopped = targets(victim["pid"], "core" if case.process == "cont" else case.process)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    at_s = time.monotonic()
    if case.moment == "idle":
        tasks = _start(server, case, streams)
    if case.process == "cont":
        await asyncio.sleep(5.0)
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
        await asyncio.gather(*tasks)
        after = (await server.replicas())["victim"]
        found.reason = "nothing" if after["pid"] == before["pid"] else "it was ended"
    else:
        await _watch(server, found, name, victim["pid"], at_s, back=case.moment != "transfer")
        await asyncio.gather(*tasks)
    _judge(found, calm, streams, at_s, name)
    return found


def _start(server: Server, case: Case, streams: list[Stream]) -> list[asyncio.Future[None]]:
    return [
        asyncio.ensure_future(server.stream(prompt, stream))
        for prompt, stream in zip(prompts(case), streams, strict=True)
    ]


async def _streams(server: Server, case: Case, streams: list[Stream]) -> None:
    await asyncio.gather(*_start(server, case, streams))


async def _loading(server: Server, pid: int) -> dict[str, Any]:
    """The victim once it has a core and loads."""
    deadline_s = time.monotonic() + _CASE_LIMIT_S
    while time.monotonic() < deadline_s:
        entry = (await server.replicas())["victim"]
        if entry["pid"] not in {0, pid} and targets(entry["pid"], "core"):
            return entry
        await asyncio.sleep(_POLL_S)
    raise SystemExit("the victim did not start again")


async def _standby(server: Server) -> dict[str, Any]:
    """The target of a switch, as soon as it stands by for its weights."""
    async with server.session.post(server.url + "/oserve/v1/switch", data=_WIDE) as answer:
        if answer.status != 200:
            raise SystemExit(await answer.text())
    found = await server.until(
        lambda all_: all_.get("wide", {}).get("phase") in {"standby", "ready"}
    )
    return dict(found["wide"])


async def _watch(
    server: Server, found: Found, name: str, pid: int, at_s: float, *, back: bool
) -> None:
    """Note when the replica leaves, is ended and comes back."""
    routed = {"loading", "standby", "ready"}
    while time.monotonic() - at_s < _CASE_LIMIT_S:
        entry = (await server.replicas()).get(name)
        since_s = time.monotonic() - at_s
        phase = entry["phase"] if entry is not None and entry["pid"] in {pid, 0} else "new"
        if entry is not None and phase == "hung":
            found.reason = entry["detail"]
        if found.phases[-1:] != [phase]:
            found.phases.append(phase)
        if found.left is None and phase not in routed:
            found.left = since_s
        if found.ended is None and not group_members(pid):
            found.ended = since_s
        if found.ended is not None and entry is not None:
            again = phase == "new" and entry["phase"] == "ready"
            if again or not back:
                found.back = since_s if again else None
                return
        await asyncio.sleep(_POLL_S)


def _judge(found: Found, calm: list[Stream], streams: list[Stream], at_s: float, name: str) -> None:
    for before, stream in zip(calm, streams, strict=True):
        if stream.replica == name or stream.times[:1] > [at_s]:
            found.streams += 1
            after = [at for at in stream.times if at > at_s + 0.5]
            if after:
                found.resumed = max(found.resumed or 0.0, after[0] - at_s)
        found.failed += bool(stream.error)
        found.differ += stream.text != before.text
        if stream.error:
            print(f"  {stream.replica}: {stream.error}", file=sys.stderr)


async def run_all(url: str, cases: list[Case]) -> list[Found]:
    """Cases of one server, one after the other."""
    rows = []
    limit = aiohttp.ClientTimeout(total=_CASE_LIMIT_S)
    async with aiohttp.ClientSession(timeout=limit) as session:
        for case in cases:
            try:
                rows.append(await run(case, Server(url, session)))
            except TimeoutError:
                rows.append(Found(case=case.name, reason="the replicas were not ready before it"))
            print(line(rows[-1]), flush=True)
    return rows


def line(found: Found) -> str:
    """One row of the table."""

    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    times = " | ".join(map(shown, (found.left, found.resumed, found.ended, found.back)))
    ends = f"{found.streams} | {found.failed} | {found.differ}"
    return f"| {found.case} | {times} | {ends} | {found.reason} |"


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="cases with one of these words")
    parser.add_argument("--json", type=Path, help="write all there")
    arguments = parser.parse_args()
    print("| case | left | resumed | ended | back | streams | failed | differ | seen |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    wanted = [
        case
        for case in CASES
        if not arguments.only or any(word in case.name for word in arguments.only)
    ]
    rows: list[Found] = []
    with tempfile.TemporaryDirectory(prefix="oserve-hangs-") as name:
        make_tiny_model(Path(name) / "tiny")
        for shape in dict.fromkeys(case.shape for case in wanted):
            with served(Path(name), shape, plan_of(shape), *_WORDS) as url:
                of_shape = [case for case in wanted if case.shape == shape]
                rows += asyncio.run(run_all(url, of_shape))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    missed = [row for row in rows if row.left is None and row.reason != "nothing"]
    return 1 if missed or any(row.failed or row.differ for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
