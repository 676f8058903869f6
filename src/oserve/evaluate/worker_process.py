"""An object in a process of its own: what computes for seconds there disturbs nobody.

In a thread it would hold the interpreter that the gateway runs in, and take the cores of engines
that run on CPUs. The process has the lowest claim to processors, and ends with the one that it was
made by, however that ends.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from oserve.core import OServeError

_NICE = 15
_END_S = 5.0


class Aside:
    """``make`` makes the object there; it must be such as can be sent to a process.

    So must arguments and results of its methods. The process starts with the first call.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._one = threading.Lock()
        self._process: SpawnProcess | None = None
        self._pipe: Connection | None = None
        self._closed = False

    def call(self, method: str, *arguments: Any) -> Any:
        """Wait for what a method of it returns; raises what that raises.

        Raises OServeError if the process ended meanwhile; the next call starts another.
        """
        with self._one:
            try:
                pipe = self._pipe or self._start()
                pipe.send((method, arguments))
                found, error = pipe.recv()
            except (EOFError, OSError) as ended:
                self._end()
                raise OServeError(
                    place=f"the process that was asked for {method}",
                    message="it has ended",
                    remedy="nothing: the next question starts another",
                ) from ended
        if error is not None:
            raise error
        return found

    def close(self) -> None:
        """End the process, whatever it does; a call that waits for it fails."""
        self._closed = True
        if self._process is not None:
            self._process.terminate()
        with self._one:
            self._end()

    def _start(self) -> Connection:
        if self._closed:
            raise EOFError
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_work, args=(self._make, there), daemon=True)
        self._process.start()
        there.close()
        return self._pipe

    def _end(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
        if self._process is not None:
            self._process.terminate()
            self._process.join(_END_S)
            self._process = None


def _work(make: Callable[[], Any], pipe: Connection) -> None:
    """All that the new process does."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_after, args=(parent.sentinel,), daemon=True).start()
    # A key pressed in the terminal is not for this process.
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(_NICE)
    held = make()
    with contextlib.suppress(EOFError, OSError):
        while True:
            method, arguments = pipe.recv()
            try:
                found, error = getattr(held, method)(*arguments), None
            except Exception as raised:
                found, error = None, raised
            pipe.send((found, error))


def _end_after(sentinel: int) -> None:
    wait([sentinel])
    os._exit(0)
