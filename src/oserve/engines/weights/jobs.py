"""Work of one rank in background threads, so that serving goes on."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Literal

from oserve.engines.rank_commands import JobReport
from oserve.engines.weights.sockets import TransferError

_NICE = 5


class ByteCounter:
    """Bytes that several threads have moved."""

    def __init__(self) -> None:
        self.total = 0
        self.lock = threading.Lock()


class Job:
    """Work in a background thread; ``report`` tells its state. Subclasses do the work."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.state: Literal["running", "done", "failed"] = "running"
        self.reason = ""
        self.stopped = threading.Event()
        self.sent = ByteCounter()
        self.received = ByteCounter()
        self.sums: list[int] = []
        self._began_s = time.monotonic()
        self._took_s = 0.0

    def start(self) -> None:
        """Start the thread, at a lower priority than serving."""
        threading.Thread(target=self._run, name=f"oserve-{self.name}", daemon=True).start()

    def report(self) -> JobReport:
        """The state now; checksums once the job is done."""
        state = self.state
        return JobReport(
            name=self.name,
            state=state,
            reason=self.reason,
            seconds=self._took_s or time.monotonic() - self._began_s,
            sent_bytes=self.sent.total,
            received_bytes=self.received.total,
            sums=self.sums if state == "done" else [],
        )

    def abort(self) -> None:
        """End it as soon as possible."""
        self.stopped.set()
        self._release()

    def _run(self) -> None:
        _yield_to_serving()
        state: Literal["done", "failed"] = "done"
        try:
            self._work()
        except TransferError as error:
            state, self.reason = "failed", str(error)
        except Exception as error:  # no caller is above this thread: the report names the error
            state, self.reason = "failed", f"{type(error).__name__}: {error}"
        if self.stopped.is_set() and state == "failed":
            self.reason = "aborted"
        self._took_s = time.monotonic() - self._began_s
        self.state = state

    def _side_by_side(self, work: Sequence[Callable[[], None]]) -> None:
        """Do all of it at once, each in a thread; the first error ends the others."""
        failed: list[Exception] = []

        def guarded(one: Callable[[], None]) -> None:
            _yield_to_serving()
            try:
                one()
            except Exception as error:  # raised again below, in the thread that waits for all
                failed.append(error)
                self._release()

        threads = [threading.Thread(target=guarded, args=(one,), daemon=True) for one in work]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]

    def _work(self) -> None:
        raise NotImplementedError

    def _release(self) -> None:
        """Wake the threads of this job that wait for other ranks."""


def _yield_to_serving() -> None:
    """Lower this thread's priority below that of the engine's own threads."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
