"""What computes in a process of its own: it answers, tells what went wrong, and ends."""

import os
import signal
import threading
from functools import partial

import pytest

from oserve.core import OServeError
from oserve.evaluate.worker_process import WorkerProcess


class Held:
    """Lives in the other process."""

    def __init__(self, start: int) -> None:
        self._sum = start

    def add(self, more: int) -> int:
        self._sum += more
        return self._sum

    def pid(self) -> int:
        return os.getpid()

    def fail(self) -> None:
        raise OServeError("no", place="here", remedy="another way")

    def wait(self) -> None:
        signal.pause()


def test_it_answers_fails_and_begins_again_when_it_was_killed() -> None:
    worker = WorkerProcess(partial(Held, 5))
    assert worker.call(Held.add, 2) == 7
    assert worker.call(Held.add, 2) == 9
    with pytest.raises(OServeError) as error:
        worker.call(Held.fail)
    assert (error.value.place, error.value.remedy) == ("here", "another way")
    pid = worker.call(Held.pid)
    assert pid != os.getpid()
    assert os.getpgid(pid) == pid
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(OServeError, match="ended"):
        worker.call(Held.add, 1)
    assert worker.call(Held.add, 1) == 6
    worker.close()
    with pytest.raises(OServeError, match="ended"):
        worker.call(Held.add, 1)


def test_its_end_does_not_wait_for_what_it_computes() -> None:
    worker = WorkerProcess(partial(Held, 0))
    pid = worker.call(Held.pid)
    failed = threading.Event()

    def ask() -> None:
        with pytest.raises(OServeError):
            worker.call(Held.wait)
        failed.set()

    asking = threading.Thread(target=ask)
    asking.start()
    worker.close()
    asking.join(30.0)
    assert failed.is_set()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
