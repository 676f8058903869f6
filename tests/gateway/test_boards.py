"""The board and the alert rules of deploy/: only metrics that exist, understood by Prometheus."""

import asyncio
import json
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from gateway.conftest import Make
from oserve.gateway.metrics import COUNTERS, GAUGES, HISTOGRAMS
from oserve.sim import EmulatedEngine

ROOT = Path(__file__).parent.parent.parent
BOARD = ROOT / "deploy/grafana/oserve.json"
RULES = ROOT / "deploy/prometheus/alerts.yaml"
NAMES = {f"{name}_total": labels for name, (_, labels) in COUNTERS.items()}
NAMES |= {f"{name}_bucket": (*labels, "le") for name, (_, labels) in HISTOGRAMS.items()}
NAMES |= {name: labels for name, (_, labels) in GAUGES.items()}
_PROMTOOL, _PROMETHEUS = shutil.which("promtool"), shutil.which("prometheus")
LIMIT_S = 60.0


def panels() -> list[dict[str, Any]]:
    return list(json.loads(BOARD.read_text())["panels"])


def expressions() -> list[str]:
    found = [line["expr"] for panel in panels() for line in panel.get("targets", ())]
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        found += [rule["expr"] for rule in group["rules"]]
    return [expression.replace("$__rate_interval", "1m") for expression in found]


@pytest.mark.parametrize("expression", expressions())
def test_an_expression_has_metrics_and_labels_that_there_are(expression: str) -> None:
    metrics = re.findall(r"\boserve_[a-z_]+", expression)
    assert metrics
    known: set[str] = {"instance"}
    for name in metrics:
        assert name in NAMES
        known |= set(NAMES[name])
    given = re.findall(r"(\w+)(?:=~|!=|=)\"", expression)
    for names in re.findall(r"by \(([^)]*)\)", expression):
        given += [name.strip() for name in names.split(",")]
    assert set(given) <= known


def test_every_row_is_a_question_and_every_line_has_a_legend_of_its_labels() -> None:
    rows = [panel["title"] for panel in panels() if panel["type"] == "row"]
    assert len(rows) == 7
    assert all(title.endswith("?") for title in rows)
    for panel in panels():
        for line in panel.get("targets", ()):
            names = set(re.findall(r"{{(\w+)}}", line["legendFormat"]))
            own = {
                label
                for name in re.findall(r"oserve_[a-z_]+", line["expr"])
                for label in NAMES[name]
            }
            assert names <= own, panel["title"]


def test_the_board_is_what_its_tool_writes() -> None:
    done = subprocess.run([sys.executable, ROOT / "tools/board.py", "--check"], check=False)
    assert done.returncode == 0, "run python tools/board.py"


@pytest.mark.skipif(_PROMTOOL is None, reason="promtool is not installed (Debian: prometheus)")
@pytest.mark.parametrize("words", [("check", RULES), ("test", RULES.with_name("alerts_test.yaml"))])
def test_promtool_accepts_the_rules(words: tuple[str, Path]) -> None:
    command = [str(_PROMTOOL), words[0], "rules", str(words[1])]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(_PROMETHEUS is None, reason="prometheus is not installed (Debian: prometheus)")
async def test_prometheus_scrapes_a_gateway_and_answers_the_board(
    make_front: Make, tmp_path: Path
) -> None:
    front = await make_front(EmulatedEngine())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    targets = [{"targets": [front.url.removeprefix("http://")]}]
    job = {"job_name": "oserve", "static_configs": targets, "scrape_interval": "1s"}
    config = tmp_path / "prometheus.yml"
    config.write_text(yaml.safe_dump({"scrape_configs": [job], "rule_files": [str(RULES)]}))
    words = [f"--config.file={config}", f"--storage.tsdb.path={tmp_path}/data"]
    words.append(f"--web.listen-address={place}")
    log = tmp_path / "prometheus.log"
    with log.open("wb") as out:
        process = subprocess.Popen(  # noqa: ASYNC220 - returns at once
            [str(_PROMETHEUS), *words], stdout=out, stderr=out
        )

    async def ask(expression: str) -> list[dict[str, Any]]:
        asked = {"query": expression}
        async with front.session.get(f"http://{place}/api/v1/query", params=asked) as answer:
            document = await answer.json()
            assert document["status"] == "success", (expression, document)
            return list(document["data"]["result"])

    try:
        deadline_s = time.monotonic() + LIMIT_S
        while True:
            body = {"prompt": "hello", "max_tokens": 3, "stream": True}
            await front.lines("/v1/completions", body)
            try:
                if await ask('rate(oserve_requests_total{status="completed"}[1m]) > 0'):
                    break
            except aiohttp.ClientError:
                pass
            assert time.monotonic() < deadline_s, log.read_text()
            await asyncio.sleep(0.1)
        for expression in expressions():
            await ask(expression)
        assert await ask("oserve_time_to_first_token_seconds_bucket")
        assert not await ask('ALERTS{alertname="OServeRequestsFail"}')
    finally:
        process.terminate()
        process.wait()
