"""vLLM's own tests of its API, against bare vLLM and against OServe; which of them differ.

    .venv/bin/python benchmarks/clients/vllm_tests.py .oserve/models/smollm2-135m --folder judge

Takes the source distribution of the installed vLLM from the package index (`PIP_INDEX_URL`), once,
into the folder. Every server of the tests is the one that runs (`given_server.py`), every model the
given one: tests that need another model or other flags fail everywhere. Four servers, one after the
other: bare vLLM; OServe with one shape; with two; with two while it switches without end. Ends with
1 if a test fails at OServe that passes on bare vLLM and is not in `EXPECTED`.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import tarfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from xml.etree import ElementTree

from vllm.version import __version__

HERE = Path(__file__).resolve().parent
INDEX = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple")
FILES = (
    "openai/completion/test_completion.py",
    "openai/chat_completion/test_chat.py",
    "openai/chat_completion/test_chat_completion.py",
    "openai/chat_completion/test_batched_chat_completions.py",
    "openai/chat_completion/test_chat_logit_bias_validation.py",
    "openai/chat_completion/test_chat_echo.py",
    "openai/test_return_token_ids.py",
    "openai/test_chunked_prompt.py",
    "openai/models/test_models.py",
    "openai/responses/test_simple.py",
    "openai/responses/test_basic.py",
    "openai/responses/test_function_call.py",
    "openai/responses/test_sampling_params.py",
    "openai/responses/test_structured_output.py",
    "openai/responses/test_errors.py",
    "anthropic/test_messages.py",
    "serve/instrumentator/test_basic.py",
    "serve/tokenize/test_tokenization.py",
    "generate/generative_scoring/test_generative_scoring_e2e.py",
)
_CHAT = "openai.chat_completion.test_chat_completion::test_kv_transfer_prompt_token_ids"
_TRANSFERS = "clients may not ask for cache transfers: another's prompt could be read so"
EXPECTED = {f"{_CHAT}_round_trip": _TRANSFERS, f"{_CHAT}_streaming": _TRANSFERS}
"""Tests that may fail at OServe though they pass on bare vLLM, and why."""

SHAPE = "max_num_batched_tokens: 2048, max_num_seqs: 32"
FLAGS = ["--enable-prompt-tokens-details", "--enable-auto-tool-choice"]
FLAGS += ["--tool-call-parser", "hermes", "--max-logprobs", "50"]
# Many tests set no limit to the answer, and a small model hardly ever ends one.
CONTEXT = 1024
# The heads of small models are often odd in number, so stages it is.
ONE = {"a": (1, ["cpu:0"])}
TWO = {"a": (1, ["cpu:0"]), "w": (2, ["cpu:1", "cpu:2"])}
OTHER = {"b": (1, ["cpu:1"]), "v": (2, ["cpu:0", "cpu:2"])}
_START_S = 300.0


def fetched(folder: Path) -> Path:
    """The unpacked tests of the installed vLLM."""
    number = __version__.partition("+")[0]
    archive, target = folder / f"vllm-{number}.tar.gz", folder / f"vllm-{number}"
    if not archive.exists():
        accept = {"accept": "application/vnd.pypi.simple.v1+json"}
        request = urllib.request.Request(f"{INDEX.rstrip('/')}/vllm/", headers=accept)
        with urllib.request.urlopen(request, timeout=60.0) as answer:
            files = {item["filename"]: item for item in json.load(answer)["files"]}
        found = files[archive.name]
        print(f"fetching {archive.name}, {found['size'] / 1e6:.0f} MB", file=sys.stderr)
        with urllib.request.urlopen(found["url"], timeout=600.0) as answer:
            data = answer.read()
        if hashlib.sha256(data).hexdigest() != found["hashes"]["sha256"]:
            raise SystemExit(f"{archive.name} arrived damaged: try again")
        archive.write_bytes(data)
    with tarfile.open(archive) as packed:
        wanted = (item for item in packed if item.name.startswith(f"{target.name}/tests/"))
        packed.extractall(folder, members=wanted, filter="data")
    # It loads every optional package of theirs, and the tests here use nothing of it.
    (target / "tests" / "conftest.py").unlink()
    return target / "tests"


def prepare(tests: Path, model: Path) -> None:
    """Let each module name the model that is served: they use it as a tokenizer's, too."""
    for name in FILES:
        path = tests / "entrypoints" / name
        text = path.read_text(encoding="utf-8")
        changed = re.sub(r'^MODEL_NAME = ".*"$', f'MODEL_NAME = "{model}"', text, flags=re.M)
        path.write_text(changed, encoding="utf-8")
    shared = tests / "entrypoints" / "openai" / "responses" / "conftest.py"
    text = shared.read_text(encoding="utf-8")
    shared.write_text(re.sub(r'"Qwen/[^"]+"', f'"{model}"', text), encoding="utf-8")


def run_tests(tests: Path, url: str, report: Path) -> dict[str, str]:
    """What became of each test: passed, failed or skipped."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "given_server", "-p", "no:cacheprovider"]
    command += ["-p", "no:randomly", "-c", os.devnull, "--rootdir", str(tests.parent)]
    command += ["--timeout", "120", f"--junitxml={report}", "--tb=short"]
    paths = os.pathsep.join((str(HERE), str(tests.parent)))
    env = {**os.environ, "GIVEN_SERVER": url, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    with report.with_suffix(".log").open("wb") as out:
        files = [str(tests / "entrypoints" / name) for name in FILES]
        subprocess.run(
            [*command, *files], check=False, env=env, cwd=tests.parent, stdout=out, stderr=out
        )
    found: dict[str, str] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        words = {child.tag for child in case}
        state = "failed" if words & {"failure", "error"} else "passed"
        name = f"{case.get('classname', '').removeprefix('tests.entrypoints.')}::{case.get('name')}"
        found[name] = "skipped" if "skipped" in words else state
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def served(
    command: list[str],
    url: str,
    log: Path,
    ready: str,
    env: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[str]:
    """A server, once its log has ``ready``; it is ended after the block."""
    with log.open("wb") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, **env})
    try:
        end_s = time.monotonic() + _START_S
        while ready not in log.read_text(errors="replace"):
            if server.poll() is not None or time.monotonic() > end_s:
                raise SystemExit(f"no server came up: see {log}")
            time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        server.wait(timeout=120.0)


def bare(model: Path, folder: Path) -> contextlib.AbstractContextManager[str]:
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += [*FLAGS, "--port", str(port), "--host", "127.0.0.1"]
    command += ["--max-num-batched-tokens", "2048", "--max-num-seqs", "32"]
    # As OServe starts engines on CPUs.
    command += [
        "--max-model-len",
        str(CONTEXT),
        "--enforce-eager",
        "--kv-cache-memory-bytes",
        str(2**30),
    ]
    env = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1"}
    return served(
        command, f"http://127.0.0.1:{port}", folder / "bare.server.log", "startup complete", env
    )


def plan_file(folder: Path, name: str, replicas: dict[str, tuple[int, list[str]]]) -> Path:
    """A plan; its id is the name."""
    lines = [f"id: {name}", "replicas:"]
    for replica, (size, devices) in replicas.items():
        shape = f"pipeline_parallel_size: {size}, {SHAPE}"
        flags = json.dumps(FLAGS)
        lines.append(
            f"  - {{id: {replica}, shape: {{{shape}}}, devices: [{', '.join(devices)}], "
            f"engine_args: {flags}}}"
        )
    path = folder / f"{name}.yaml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def oserve(
    model: Path, folder: Path, name: str, plan: Path
) -> contextlib.AbstractContextManager[str]:
    port = free_port()
    command = [sys.executable, "-m", "oserve.cli", "serve", str(model), "--plan", str(plan)]
    command += ["--served-model-name", str(model), "--cpu-slots", "3", "--port", str(port)]
    command += ["--state-dir", str(folder / name), "--set", f"engines.max_model_len={CONTEXT}"]
    return served(command, f"http://127.0.0.1:{port}", folder / f"{name}.server.log", "Ready on")


def switch_until(ended: threading.Event, url: str, plans: list[Path], states: list[str]) -> None:
    """Switch between plans without a pause; ``states`` collects how each switch ended."""
    while not ended.is_set():
        plan = plans[len(states) % len(plans)]
        command = [sys.executable, "-m", "oserve.cli", "switch", "--to", str(plan), "--url", url]
        if subprocess.run(command, check=False, capture_output=True).returncode:
            states.append("refused")
            continue
        report: dict[str, str] = {}
        while not report.get("ended_s"):
            time.sleep(0.5)
            with urllib.request.urlopen(url + "/oserve/v1/status", timeout=60.0) as answer:
                report = json.load(answer)["switch"] or {}
        states.append(report["state"])


def compare(results: dict[str, dict[str, str]]) -> int:
    """Print the table, and what differs; the exit code."""
    reference, *others = results
    files = sorted({name.partition("::")[0] for name in results[reference]})
    print("| tests passed | " + " | ".join(results) + " |")
    print("|---|" + "---|" * len(results))
    for file in [*files, ""]:
        counts = [
            sum(
                s == "passed" and name.startswith(f"{file}::" if file else "")
                for name, s in r.items()
            )
            for r in results.values()
        ]
        total = sum(name.startswith(f"{file}::" if file else "") for name in results[reference])
        print(f"| {file or 'all'} ({total}) | " + " | ".join(map(str, counts)) + " |")
    code = 0
    for other in others:
        for name, state in results[reference].items():
            if state == "passed" and results[other].get(name) != "passed":
                reason = EXPECTED.get(name, "")
                code = code if reason else 1
                print(f"{other}: {name} {results[other].get(name, 'absent')} {reason}")
    return code


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="folder of a small model with a chat template")
    parser.add_argument("--folder", type=Path, required=True, help="for archive, logs and reports")
    parser.add_argument("--only", nargs="*", default=[], help="of: one two switching; default: all")
    options = parser.parse_args()
    model, folder = options.model.resolve(), options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    tests = fetched(folder)
    prepare(tests, model)
    plans = {
        name: plan_file(folder, name, replicas)
        for name, replicas in (("one", ONE), ("two", TWO), ("other", OTHER))
    }
    servers: dict[str, Callable[[], contextlib.AbstractContextManager[str]]] = {
        "bare": lambda: bare(model, folder),
        "one": lambda: oserve(model, folder, "one", plans["one"]),
        "two": lambda: oserve(model, folder, "two", plans["two"]),
        "switching": lambda: oserve(model, folder, "switching", plans["two"]),
    }
    results: dict[str, dict[str, str]] = {}
    for name, start in servers.items():
        if name != "bare" and options.only and name not in options.only:
            continue
        ended, done = threading.Event(), list[str]()
        with start() as url:
            arguments = (ended, url, [plans["other"], plans["two"]], done)
            switching = threading.Thread(target=switch_until, args=arguments)
            if name == "switching":
                switching.start()
            began_s = time.monotonic()
            results[name] = run_tests(tests, url, folder / f"{name}.xml")
            took_s = time.monotonic() - began_s
            ended.set()
            if name == "switching":
                switching.join()
        counted = sum(state == "passed" for state in results[name].values())
        switches = f", switches: {dict(Counter(done))}" if done else ""
        print(f"{name}: {counted} of {len(results[name])}, {took_s:.0f} s{switches}", flush=True)
    return compare(results)


if __name__ == "__main__":
    sys.exit(main())
