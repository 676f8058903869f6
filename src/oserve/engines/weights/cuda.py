"""Weights on GPUs: handles inside a device, NCCL between two; sockets only introduce the ranks.

Between two nodes values go through main memory and the sockets themselves, as those of CPUs do.

Two processes on one GPU cannot be ranks of one NCCL group, so each pair of ranks chooses: if both
are on one device, the receiver opens the sender's memory by its handle and copies in place; if not,
the pair is an NCCL group of two. Written from the interfaces' documentation; it has not run on a
GPU.
"""

# Only an engine's worker loads it.
# ruff: noqa: PLC0415

import datetime
import pickle
import time
from collections.abc import Sequence
from typing import Protocol

import torch

from oserve.engines.weights.parts import bytes_of, part_of
from oserve.engines.weights.sockets import ShardStream, Throttle
from oserve.engines.weights.transfer import Transfer
from oserve.switch.rank_order import ShardPart


class _Work(Protocol):
    def wait(self) -> bool: ...


class ProcessGroup(Protocol):
    """A ``torch.distributed`` group of two; ranks and tags as there."""

    def send(self, tensors: list[torch.Tensor], rank: int, tag: int) -> _Work: ...

    def recv(self, tensors: list[torch.Tensor], rank: int, tag: int) -> _Work: ...


class CudaTransfer(Transfer):
    """Sockets carry device ids and, within a device, handles; values stay on GPUs."""

    def _send(self, stream: ShardStream, parts: Sequence[ShardPart], throttle: Throttle) -> None:
        from torch.multiprocessing.reductions import reduce_tensor

        own = _device_name()
        if stream.far:
            stream.send(0, memoryview(bytes(len(own))), throttle)
            for number, part in enumerate(parts):
                values = part_of(self._tensors, part).contiguous().cpu()
                stream.send(number, bytes_of(values), throttle)
            return
        stream.send(0, memoryview(own), throttle)
        if stream.take(1) == b"\1":
            handles = {
                part.parameter: reduce_tensor(self._tensors[part.parameter]) for part in parts
            }
            # torch rebuilds tensors from handles with functions that only pickle carries.
            stream.give_message(pickle.dumps((handles, list(parts))))
            stream.take(1)  # the other side has copied
            return
        group = self._pair(stream.take(int.from_bytes(stream.take(2), "big")).decode(), 0)
        for part in parts:
            values = part_of(self._tensors, part).contiguous()
            group.send([values.reshape(-1).view(torch.uint8)], 1, 0).wait()
        torch.cuda.current_stream().synchronize()

    def _receive(self, stream: ShardStream, parts: Sequence[ShardPart], throttle: Throttle) -> None:
        del throttle
        own = _device_name()
        other = bytearray(len(own))
        stream.receive(0, memoryview(other))
        if not any(other):  # of another node, which has no name here
            for number, part in enumerate(parts):
                place = part_of(self._tensors, part)
                came = torch.empty(place.shape, dtype=place.dtype)
                stream.receive(number, bytes_of(came))
                place.copy_(came)
            return
        stream.give(memoryview(b"\1" if bytes(other) == own else b"\0"))
        group: ProcessGroup | None = None
        shown: list[torch.Tensor] = []
        if bytes(other) == own:
            handles, given = pickle.loads(stream.take_message())
            tensors = {name: rebuild(*made_of) for name, (rebuild, made_of) in handles.items()}
            shown = [part_of(tensors, part) for part in given]
        else:
            path = f"{self._listener.path}.{time.monotonic_ns()}"
            stream.give(memoryview(len(path).to_bytes(2, "big") + path.encode()))
            group = self._pair(path, 1)
        for number, part in enumerate(parts):
            place = part_of(self._tensors, part)
            if group is None:
                place.copy_(shown[number])
                continue
            whole = torch.empty_like(place, memory_format=torch.contiguous_format)
            group.recv([whole.reshape(-1).view(torch.uint8)], 0, 0).wait()
            place.copy_(whole)
        torch.cuda.current_stream().synchronize()
        if group is None:
            stream.give(memoryview(b"\1"))

    def _pair(self, path: str, rank: int) -> ProcessGroup:
        from torch.distributed import FileStore, ProcessGroupNCCL

        options = ProcessGroupNCCL.Options()
        # The binding has no public name for it.
        options._timeout = datetime.timedelta(seconds=self._command.limit_s)  # noqa: SLF001
        group: ProcessGroup = ProcessGroupNCCL(FileStore(path, 2), rank, 2, options)
        return group


def _device_name() -> bytes:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return str(properties.uuid).encode()
