"""A process that has imported vLLM once and forks engines: seconds instead of most of a minute.

Runs as ``python -m oserve.engines.zygote --fd N``, where N is one end of a socket pair that carries
``process_messages``. It ends with its client: when the other end closes, on SIGTERM, or when its
parent dies, it first ends every engine. It stays single-threaded, since only then is forking safe.
"""

# vLLM takes long to import, and must not be before the process is set up for it.
# ruff: noqa: PLC0415

import argparse
import contextlib
import gc
import importlib
import os
import random
import selectors
import signal
import socket
import sys
import tempfile
import traceback
from typing import NoReturn

from oserve.engines.group import (
    adopt_orphans,
    die_with_parent,
    end_group,
    fork_group,
    release_leftovers,
    remove_if_unused,
    signal_group,
)
from oserve.engines.patches import PatchError, apply
from oserve.engines.process_messages import (
    EngineExited,
    EngineFork,
    EngineForked,
    ForkRefused,
    ZygoteEvent,
    ZygoteReady,
    encoded,
    fork_of,
)
from oserve.engines.vllm_process import main as run_vllm

_MODULES = (
    "torch",
    "transformers",
    "xgrammar",
    "vllm.entrypoints.launchers.api_server.entry",
    "vllm.entrypoints.launchers.cli_args",
    "vllm.v1.engine.core",
    "vllm.v1.engine.async_llm",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.executor.multiproc_executor",
    "vllm.model_executor.models.llama",
    # Without these each engine imports them itself: a second of computing.
    "compressed_tensors",
    "model_hosting_container_standards.sagemaker",
    "oserve.engines.caches",
    "oserve.engines.weights.cuda",
    "uvicorn.protocols.http.auto",
    "uvicorn.protocols.websockets.auto",
    "vllm.entrypoints.anthropic.api_router",
    "vllm.entrypoints.generate.generative_scoring.api_router",
    "vllm.entrypoints.generate.structured_decisions.api_router",
    "vllm.entrypoints.openai.chat_completion.api_router",
    "vllm.entrypoints.openai.completion.api_router",
    "vllm.entrypoints.openai.responses.api_router",
    "vllm.entrypoints.rl.online.api_router",
    "vllm.entrypoints.scale_out.derender.api_router",
    "vllm.entrypoints.scale_out.render.api_router",
    "vllm.entrypoints.scale_out.token_in_token_out.api_router",
    "vllm.entrypoints.serve.tokenize.api_router",
    "vllm.v1.attention.backends.cpu_attn",
)
_GRACE_S = 2.0
# Engines share cores with the gateway and the controller and must not starve them: tokens would
# wait in the gateway, and the controller would observe and decide late.
_NICE = 5


class Zygote:
    """The loop: one control socket, many engines."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._buffer = b""
        self._engines: dict[int, EngineFork] = {}
        self._folders: set[str] = set()
        self._over = False
        self._wakeup, self._waker = os.pipe()
        for descriptor in (self._wakeup, self._waker):
            os.set_blocking(descriptor, False)

    def run(self) -> None:
        """Serve until the client disconnects or on SIGTERM; leaves nothing behind."""
        signal.set_wakeup_fd(self._waker)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: self._stop())
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
        selector = selectors.DefaultSelector()
        selector.register(self._control, selectors.EVENT_READ)
        selector.register(self._wakeup, selectors.EVENT_READ)
        self._send(ZygoteReady())
        while not self._over:
            for key, _ in selector.select():
                if key.fileobj is self._control:
                    self._receive(selector)
                else:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._wakeup, 4096)
            self._reap()
        for pid in self._engines:
            signal_group(pid, signal.SIGTERM)
        for pid in list(self._engines):
            self._clear(pid, grace_s=_GRACE_S)
        for folder in self._folders:
            # A client that was killed does not remove the folder that held the engines' folders.
            remove_if_unused(folder)

    def _stop(self) -> None:
        self._over = True

    def _send(self, event: ZygoteEvent) -> None:
        try:
            self._control.sendall(encoded(event))
        except OSError:
            self._stop()

    def _receive(self, selector: selectors.BaseSelector) -> None:
        try:
            data = self._control.recv(65536)
        except OSError:
            data = b""
        if not data:
            return self._stop()
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            request = fork_of(line)
            if isinstance(request, ForkRefused):
                self._send(request)
            else:
                self._start(request, selector)
        return None

    def _start(self, request: EngineFork, selector: selectors.BaseSelector) -> None:
        parent = os.getpid()
        pid = fork_group()
        if pid:
            self._engines[pid] = request
            self._send(EngineForked(name=request.name, pid=pid))
            return
        try:
            signal.set_wakeup_fd(-1)
            selector.close()
            self._control.close()
            os.close(self._wakeup)
            os.close(self._waker)
            os.nice(_NICE)
            _become_engine(request, parent)
        finally:
            os._exit(1)  # whatever happens, a child never returns into the zygote's loop

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid in self._engines:
                name = self._engines[pid].name
                self._clear(pid, grace_s=0)
                self._send(EngineExited(name=name, status=os.waitstatus_to_exitcode(status)))

    def _clear(self, pid: int, *, grace_s: float) -> None:
        request = self._engines.pop(pid)
        end_group(pid, grace_s=grace_s)
        folder = request.env.get("TMPDIR", "")
        release_leftovers(pid, folder)
        self._folders.add(os.path.dirname(folder))


def _become_engine(request: EngineFork, parent: int) -> NoReturn:
    """In the child: leave the zygote's set-up and run vLLM's API server to its end."""
    die_with_parent(parent=parent)
    # The engine core and the workers are forked too: each ends with the one above it.
    os.register_at_fork(after_in_child=die_with_parent)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log = os.open(request.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.environ.update(request.env)
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
    if request.cores:
        os.sched_setaffinity(0, request.cores)
    random.seed()
    tempfile.tempdir = None
    apply("engine")
    status = 1
    try:
        import torch

        # OpenMP and torch.compile read their variables when loaded: too late for those here.
        torch.set_num_threads(request.threads)
        if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
            torch.compiler.set_stance("force_eager")
        sys.argv = ["vllm", *request.argv]
        run_vllm()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except KeyboardInterrupt:
        status = 130  # vLLM raises it for a TERM that comes before it serves
    except BaseException:  # whatever vLLM raises ends up in the engine's log
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Interpreter teardown of forked native libraries can hang, and has nothing left to do.
        os._exit(status)


def _preload() -> None:
    """Import what an engine needs, and patch it."""
    for name in _MODULES:
        try:
            importlib.import_module(name)
        except ImportError:
            if name in {"torch", "vllm.entrypoints.launchers.api_server.entry"}:
                raise
            print(f"zygote: cannot import {name}, which costs time later", file=sys.stderr)
    apply("zygote")
    # Objects alive now are shared by all engines: the collector must not touch their pages.
    gc.collect()
    gc.freeze()


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="control socket, inherited")
    parser.add_argument("--parent", type=int, required=True, help="process to end with")
    arguments = parser.parse_args()
    # Ctrl-C in the terminal is for the process that started this one.
    os.setpgid(0, 0)
    die_with_parent(signal.SIGTERM, parent=arguments.parent)
    adopt_orphans()
    control = socket.socket(fileno=arguments.fd)
    os.set_inheritable(arguments.fd, False)
    try:
        _preload()
    except PatchError as error:
        sys.exit(f"zygote: {error}")
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        print(f"zygote: {threads} threads after importing vLLM; forking may hang", file=sys.stderr)
    Zygote(control).run()


if __name__ == "__main__":
    main()
