"""A quiet tenant beside one that floods, on real engines; with fair shares and without.

    python benchmarks/fairness/live.py [--seconds 60] [--reserve PART] [--json FILE]

It makes a Llama of noise (4 layers, hidden size 1024, fp32), and runs ``oserve serve`` on it with
two replicas of one core each and a key for every tenant: once with ``gateway.tenancy.fair``, once
without. On each the same seeded requests of the quiet tenant arrive alone, then while another one
keeps ten times as many requests in flight as the replicas have sequences. At last two tenants flood
together. Printed: P50 and P99 of the quiet tenant's TTFT, output tokens a second in all, and Jain's
index of the two floods' device-seconds, as ``oserve_tenant_device_seconds_total`` counts them.

The first tenth of each phase does not count. Bounded; on the loopback interface only.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "switch"))
from mid_model import make_mid_model  # type: ignore[import-not-found]

SEQS, REPLICAS, TIMES = 8, 2, 10
PROMPT, OUTPUT = 32, 48
QUIET_RPS = 0.5
TENANTS = ("quiet", "flood", "other")
PLAN = """
id: two
workload_types: [{name: all}]
replicas:
  - id: a
    shape: {precision: fp32, max_num_batched_tokens: 256, max_num_seqs: 8}
    devices: [cpu:0]
  - id: b
    shape: {precision: fp32, max_num_batched_tokens: 256, max_num_seqs: 8}
    devices: [cpu:1]
routing_shares: {all: {a: 0.5, b: 0.5}}
"""
_START_LIMIT_S, _END_LIMIT_S = 300.0, 90.0
_DEVICE_S = re.compile(r'oserve_tenant_device_seconds_total\{tenant="(\w+)"\} (\S+)')


@dataclass
class Phase:
    """What a phase gave: TTFT of the quiet tenant (s), output tokens, device-seconds by tenant."""

    name: str
    ttft_s: list[float] = field(default_factory=list)
    tokens: int = 0
    failed: int = 0
    counted_s: float = 0.0
    device_s: dict[str, float] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """Figures of the phase."""
        quantiles = np.quantile(self.ttft_s, (0.5, 0.99)) if self.ttft_s else (None, None)
        shares = [self.device_s.get(name, 0.0) for name in ("flood", "other")]
        index = sum(shares) ** 2 / (2 * sum(s * s for s in shares)) if min(shares) > 0 else None
        return {
            "phase": self.name,
            "requests": len(self.ttft_s),
            "failed": self.failed,
            "ttft_p50_s": quantiles[0],
            "ttft_p99_s": quantiles[1],
            "tokens_per_s": self.tokens / self.counted_s,
            "jain": index,
        }


@contextlib.contextmanager
def served(
    folder: Path, model: Path, fair: bool, reserve: float | None
) -> Iterator[tuple[str, dict[str, str]]]:
    """A server; its URL, and a key for each tenant."""
    folder.mkdir()
    (folder / "plan.yaml").write_text(PLAN)
    state = folder / "state"
    base = [sys.executable, "-m", "oserve.cli"]
    keys = {}
    for tenant in TENANTS:
        words = [*base, "keys", "add", tenant, "--state-dir", str(state)]
        if tenant == "other":
            words += ["--role", "admin"]
        keys[tenant] = subprocess.run(
            words, check=True, capture_output=True, text=True
        ).stdout.strip()
    words = [*base, "serve", str(model), "--port", "0", "--state-dir", str(state)]
    words += ["--plan", str(folder / "plan.yaml"), "--cpu-slots", "2"]
    settings = ["engines.max_model_len=1024", f"gateway.tenancy.fair={str(fair).lower()}"]
    settings += [] if reserve is None else [f"gateway.tenancy.reserve={reserve}"]
    for setting in (*settings, "cluster.devices=cpu", "gateway.max_queued=4096"):
        words += ["--set", setting]
    log = folder / "serve.log"
    with log.open("wb") as out:
        process = subprocess.Popen(words, stdout=out, stderr=out)
    try:
        deadline_s = time.monotonic() + _START_LIMIT_S
        while "Ready on" not in log.read_text():
            if process.poll() is not None or time.monotonic() > deadline_s:
                sys.exit(f"it did not come up:\n{log.read_text()[-3000:]}")
            time.sleep(0.1)
        line = next(line for line in log.read_text().splitlines() if line.startswith("Ready on"))
        yield line.split()[2], keys
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=_END_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Clients:
    """The clients of one server, which count for one phase at a time."""

    def __init__(self, session: aiohttp.ClientSession, url: str, keys: dict[str, str]) -> None:
        self._session = session
        self._url = url
        self._keys = keys
        self._phase = Phase("")
        self._counts = False
        self._draw = random.Random(7)

    async def _ask(self, tenant: str) -> None:
        prompt = [self._draw.randrange(250) for _ in range(PROMPT)]
        body = {"prompt": prompt, "max_tokens": OUTPUT, "ignore_eos": True, "stream": True}
        key = {"authorization": f"Bearer {self._keys[tenant]}"}
        phase, counts, first_s = self._phase, self._counts, 0.0
        began_s = time.perf_counter()
        url = self._url + "/v1/completions"
        async with self._session.post(url, json=body, headers=key) as answer:
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    if not first_s:
                        first_s = time.perf_counter() - began_s
                        if tenant == "quiet" and counts:
                            phase.ttft_s.append(first_s)
                    if self._phase is phase and self._counts:
                        phase.tokens += 1
        if not first_s:
            phase.failed += 1

    async def _flood(self, tenant: str) -> None:
        while True:
            await self._ask(tenant)

    async def _quiet(self, seed: int) -> None:
        draw = random.Random(seed)
        async with asyncio.TaskGroup() as group:
            while True:
                await asyncio.sleep(draw.expovariate(QUIET_RPS))
                group.create_task(self._ask("quiet"))

    async def _device_s(self) -> dict[str, float]:
        key = {"authorization": f"Bearer {self._keys['other']}"}
        async with self._session.get(self._url + "/metrics", headers=key) as answer:
            return {name: float(value) for name, value in _DEVICE_S.findall(await answer.text())}

    async def phase(self, name: str, seconds: float, *floods: str) -> Phase:
        """Play one phase."""
        self._phase = phase = Phase(name)
        self._counts = False
        tasks = [asyncio.create_task(self._quiet(3))]
        for tenant in floods:
            width = TIMES * SEQS * REPLICAS // len(floods)
            tasks += [asyncio.create_task(self._flood(tenant)) for _ in range(width)]
        await asyncio.sleep(seconds / 10)
        before, began_s = await self._device_s(), time.perf_counter()
        self._counts = True
        await asyncio.sleep(seconds)
        self._counts = False
        phase.counted_s = time.perf_counter() - began_s
        after = await self._device_s()
        phase.device_s = {name: spent - before.get(name, 0.0) for name, spent in after.items()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(2.0)
        return phase


async def played(folder: Path, model: Path, wanted: argparse.Namespace, fair: bool) -> list[Any]:
    """All phases on one server."""
    with served(folder, model, fair, wanted.reserve) as (url, keys):
        limits = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=limits) as session:
            clients = Clients(session, url, keys)
            await clients.phase("warm", 5.0)
            return [
                (await clients.phase("alone", wanted.seconds)).row(),
                (await clients.phase("beside a flood", wanted.seconds, "flood")).row(),
                (await clients.phase("two floods", wanted.seconds, "flood", "other")).row(),
            ]


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--reserve", type=float, help="gateway.tenancy.reserve")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--json", type=Path)
    wanted = parser.parse_args()
    for name in [name for name in os.environ if name.startswith("OSERVE_")]:
        del os.environ[name]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="oserve-fair-") as name:
        folder = Path(name)
        model = make_mid_model(folder / "mid", layers=wanted.layers)
        for fair in (True, False):
            words = "fair shares" if fair else "no fair shares"
            found[words] = asyncio.run(
                played(folder / words.replace(" ", "-"), model, wanted, fair)
            )
            for row in found[words]:
                told = {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
                print(words, told, flush=True)
    if wanted.json:
        wanted.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
