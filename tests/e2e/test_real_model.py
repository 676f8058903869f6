"""`oserve serve` with a model that knows something: what `make serve` gives a person."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

MODEL = Path(__file__).parents[2] / ".oserve" / "models" / "smollm2-135m"
_START_LIMIT_S = 300.0


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """Of a server with two shapes, as ``make serve`` starts it but without measuring anything."""
    copy = MODEL.with_name(MODEL.name + "-int8")
    if not (copy / "config.json").exists():
        pytest.skip("SmolLM2 is not there: `make test` makes it where its package can be had")
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "workload_types: [{name: short, max_prompt_tokens: 400}, {name: long}]\n"
        "routing_shares: {short: {wide: 1}, long: {light: 1}}\n"
        "replicas:\n"
        "  - {id: wide, devices: ['cpu:0'], shape: {precision: fp32, max_num_seqs: 16}}\n"
        "  - {id: light, devices: ['cpu:1'], shape: {precision: int8, max_num_seqs: 16}}\n"
    )
    command = [sys.executable, "-m", "oserve.cli", "serve", str(MODEL), "--plan", str(plan)]
    command += ["--cpu-slots", "2", "--port", "0", "--state-dir", str(tmp_path / "state")]
    command += ["--set", f"engines.variants={{int8: {copy}}}"]
    log = tmp_path / "serve.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, cwd=tmp_path)
    try:
        deadline_s = time.monotonic() + _START_LIMIT_S
        while "Ready on" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline_s, log.read_text()
            time.sleep(0.1)
        line = next(line for line in log.read_text().splitlines() if line.startswith("Ready on"))
        yield line.split()[2]
    finally:
        process.terminate()
        process.wait(timeout=60)


async def test_every_replica_knows_the_capital_of_france(url: str) -> None:
    """With default settings: it starts the first time, though its context is 8,192 tokens."""
    import openai  # noqa: PLC0415 - slow to import

    said: dict[str, str] = {}
    question = "What is the capital of France?"
    async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", timeout=120) as client:
        models = [model.id async for model in client.models.list()]
        for before in ("", "The letters of the alphabet: " + "a b c d e f g h i j k. " * 80):
            answer = await client.chat.completions.with_raw_response.create(
                model=models[0],
                temperature=0,
                max_tokens=24,
                messages=[{"role": "user", "content": before + question}],
            )
            text = answer.parse().choices[0].message.content
            said[answer.headers["x-oserve-replica"]] = text or ""
    assert models == ["smollm2-135m"]
    assert said.keys() == {"wide", "light"}
    assert all("Paris" in text for text in said.values()), said
