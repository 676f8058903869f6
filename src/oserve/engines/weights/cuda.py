"""Weights on GPUs: handles inside a device, NCCL between two. The sockets only introduce.

Two processes on one GPU cannot be ranks of one NCCL group, so each pair has its own way: where old
and new engine share the device, memory is opened by its handle and copied in place; otherwise the
pair is an NCCL group of two. Written from the interfaces' documentation; it has not run on a GPU.
"""

# Loaded by an engine's worker alone.
# ruff: noqa: PLC0415

import datetime
import pickle
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from oserve.engines.weights.memory import Memory
from oserve.engines.weights.sockets import Listener, Stream, Throttle, TransferError
from oserve.engines.weights.transfer import Order, Part, Transfer, part_of


def transfer_for(
    order: Order,
    tensors: Mapping[str, Any],
    listener: Listener | None,
    memory: Memory | None = None,
) -> Transfer:
    """The transfer for where these tensors are. Raises TransferError if nobody was told to call."""
    if listener is None:
        raise TransferError("the transfer was not opened")
    on_gpu = any(tensor.is_cuda for tensor in tensors.values())
    if on_gpu:
        return CudaTransfer(order, tensors, listener)
    return Transfer(order, tensors, listener, memory)


class CudaTransfer(Transfer):
    """Sockets carry device ids and, inside a device, handles; values stay on GPUs."""

    def _send(self, stream: Stream, parts: Sequence[Part], throttle: Throttle) -> None:
        from torch.multiprocessing.reductions import reduce_tensor

        stream.send(0, memoryview(_device_name()), throttle)
        if stream.take(1) == b"\1":
            handles = {name: reduce_tensor(self._tensors[name]) for name, _ in parts}
            words = pickle.dumps((handles, [(name, list(box)) for name, box in parts]))
            stream.give(memoryview(len(words).to_bytes(8, "big") + words))
            stream.take(1)  # the other side has copied
            return
        group = self._pair(stream.take(int.from_bytes(stream.take(2), "big")).decode(), 0)
        for name, box in parts:
            part = part_of(self._tensors[name], box).contiguous()
            group.send([part.reshape(-1).view(torch.uint8)], 1, 0).wait()
        torch.cuda.current_stream().synchronize()

    def _receive(self, stream: Stream, parts: Sequence[Part], throttle: Throttle) -> None:
        del throttle
        own = _device_name()
        other = bytearray(len(own))
        stream.receive(0, memoryview(other))
        stream.give(memoryview(b"\1" if bytes(other) == own else b"\0"))
        group, seen = None, []
        if bytes(other) == own:
            handles, boxes = pickle.loads(stream.take(int.from_bytes(stream.take(8), "big")))
            tensors = {name: rebuild(*words) for name, (rebuild, words) in handles.items()}
            seen = [part_of(tensors[name], box) for name, box in boxes]
        else:
            path = f"{self._listener.path}.{time.monotonic_ns()}"
            stream.give(memoryview(len(path).to_bytes(2, "big") + path.encode()))
            group = self._pair(path, 1)
        for number, (name, box) in enumerate(parts):
            place = part_of(self._tensors[name], box)
            if group is None:
                place.copy_(seen[number])
                continue
            whole = torch.empty_like(place, memory_format=torch.contiguous_format)
            group.recv([whole.reshape(-1).view(torch.uint8)], 0, 0).wait()
            place.copy_(whole)
        torch.cuda.current_stream().synchronize()
        if group is None:
            stream.give(memoryview(b"\1"))

    def _pair(self, path: str, rank: int) -> Any:
        from torch.distributed import FileStore, ProcessGroupNCCL

        options = ProcessGroupNCCL.Options()
        # The binding has no public name for it.
        options._timeout = datetime.timedelta(seconds=self._order.limit_s)  # noqa: SLF001
        return ProcessGroupNCCL(FileStore(path, 2), rank, 2, options)


def _device_name() -> bytes:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return str(properties.uuid).encode()
