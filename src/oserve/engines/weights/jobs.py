"""Work of one rank in background threads, so that serving goes on: the base, and checksums."""

import contextlib
import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from oserve.engines.rank_commands import JobReport
from oserve.engines.weights.sockets import TransferError
from oserve.engines.weights.sums import checksum
from oserve.switch.rank_order import ShardPart

_NICE = 5


class Job:
    """Work in a background thread; ``report`` tells its state."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.state: Literal["running", "done", "failed"] = "running"
        self.reason = ""
        self.stopped = threading.Event()
        self._began_s = time.monotonic()
        self._took_s = 0.0

    def start(self) -> None:
        """Start the thread, at a lower priority than serving."""
        threading.Thread(target=self._run, name=f"oserve-{self.name}", daemon=True).start()

    def report(self) -> JobReport:
        """The state now."""
        return JobReport(
            name=self.name,
            state=self.state,
            reason=self.reason,
            seconds=self._took_s or time.monotonic() - self._began_s,
        )

    def abort(self) -> None:
        """End it as soon as possible."""
        self.stopped.set()

    def _run(self) -> None:
        yield_to_serving()
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

    def _work(self) -> None:
        raise NotImplementedError


class Checksums(Job):
    """Checksums of ``parts`` of ``tensors``.

    ``staged``: those of parts that were converted on arrival, by ``part_key``.
    """

    def __init__(
        self,
        name: str,
        tensors: Mapping[str, torch.Tensor],
        parts: Sequence[ShardPart],
        staged: Mapping[str, int],
    ) -> None:
        super().__init__(name)
        self._tensors = tensors
        self._parts = parts
        self._staged = staged
        self._sums: list[int] = []

    def report(self) -> JobReport:
        """The state now, and once done the sums in the order of the parts."""
        before = super().report()
        return JobReport(
            name=before.name,
            state=before.state,
            reason=before.reason,
            seconds=before.seconds,
            sums=self._sums if before.state == "done" else [],
        )

    def _work(self) -> None:
        # A part that went to several ranks is summed once.
        known = dict(self._staged)
        for part in self._parts:
            if self.stopped.is_set():
                raise TransferError("aborted")
            key = part_key(part)
            if key not in known:
                known[key] = checksum(part_of(self._tensors, part))
            self._sums.append(known[key])


def part_key(part: ShardPart) -> str:
    """A key for a part."""
    return f"{part.parameter}{[list(edge) for edge in part.box]}"


def part_of(tensors: Mapping[str, torch.Tensor], part: ShardPart) -> torch.Tensor:
    """A view of the part's box. Raises TransferError for a parameter that is not in ``tensors``."""
    tensor = tensors.get(part.parameter)
    if tensor is None:
        raise TransferError(f"this rank has no parameter {part.parameter}")
    return tensor[tuple(slice(start, stop) for start, stop in part.box)]


def yield_to_serving() -> None:
    """Lower this thread's priority below that of the engine's own threads."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
