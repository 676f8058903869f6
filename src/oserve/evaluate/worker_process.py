"""An object in a worker process, so that long computations do not disturb serving.

In a thread they would hold the interpreter lock, and take cores from engines that run on CPUs. The
worker process has the lowest priority. It ends with its parent, even after a kill.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Concatenate, Generic, ParamSpec, TypeVar

from oserve.core import OServeError

_NICE = 15
_END_S = 5.0

Resource = TypeVar("Resource")
Given = ParamSpec("Given")
Returned = TypeVar("Returned")


class WorkerProcess(Generic[Resource]):
    """The first call starts the process, in which ``make`` makes the object.

    ``make``, the called functions, their arguments and results must be picklable.
    """

    def __init__(self, make: Callable[[], Resource]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._process: SpawnProcess | None = None
        self._pipe: Connection | None = None
        self._closed = False

    def call(
        self,
        function: Callable[Concatenate[Resource, Given], Returned],
        *arguments: Given.args,
        **named: Given.kwargs,
    ) -> Returned:
        """Call a function of the object in the process, and wait for what it returns.

        Raises what the function raises, and OServeError if the process ended meanwhile; the next
        call starts another process.
        """
        with self._lock:
            try:
                pipe = self._pipe or self._start()
                pipe.send((function, arguments, named))
                returned, error = pipe.recv()
            except (EOFError, OSError) as ended:
                self._end()
                raise OServeError(
                    place=f"the worker process that ran {function.__qualname__}",
                    message="it has ended",
                    remedy="nothing: the next call starts another",
                ) from ended
        if error is not None:
            raise error
        result: Returned = returned
        return result

    def renew(self, make: Callable[[], Resource]) -> None:
        """Make another object with the next call; waits for a call under way."""
        with self._lock:
            self._end()
            self._make = make

    def close(self) -> None:
        """End the process at once; a waiting call fails."""
        self._closed = True
        if self._process is not None:
            self._process.terminate()
        with self._lock:
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


def _work(make: Callable[[], object], pipe: Connection) -> None:
    """Run in the worker process: answer calls until the parent closes the pipe."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent.sentinel,), daemon=True).start()
    # Ctrl-C in the terminal is for the parent only.
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(_NICE)
    held = make()
    with contextlib.suppress(EOFError, OSError):
        while True:
            function, arguments, named = pipe.recv()
            try:
                result, error = function(held, *arguments, **named), None
            except Exception as raised:  # the caller in the parent gets whatever was raised
                result, error = None, raised
            pipe.send((result, error))


def _end_after(sentinel: int) -> None:
    wait([sentinel])
    os._exit(0)
