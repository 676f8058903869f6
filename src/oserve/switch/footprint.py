"""Memory that replicas take of their devices, as the order of waves needs it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf

from oserve.core import Device, ReplicaSpec, VllmBackend
from oserve.perf.device import find_device
from oserve.perf.memory import CPU_ENGINE_BYTES, GPU_ENGINE_BYTES, MEMORY_SHARE
from oserve.switch.layout import ShardPlacement, shard_map
from oserve.switch.model import MovableModel
from oserve.switch.tensor import volume
from oserve.switch.waves import WaveReplica

# Share of the free main memory that new engines may fill.
_FREE_SHARE = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprints:
    """Measures replicas on ``devices``.

    ``kv_cache_memory_bytes``: per device, where a shape names none; 0 leaves the size to engines.
    """

    model: MovableModel
    devices: tuple[Device, ...]
    kv_cache_memory_bytes: int

    @property
    def on_cpu(self) -> bool:
        """Whether all devices are slots of CPU cores, which share main memory."""
        return all(device.kind == "cpu" for device in self.devices)

    def measure(self, spec: ReplicaSpec, placed: ShardPlacement) -> WaveReplica:
        """Return bytes per device of a replica, and its capacity in devices."""
        weights = self._weights_bytes(placed)
        kv = spec.shape.kv_cache_memory_bytes
        if kv is None:
            kv = self.kv_cache_memory_bytes
        engine = CPU_ENGINE_BYTES if self.on_cpu else GPU_ENGINE_BYTES
        if not self.on_cpu and not kv:
            # An engine without a given cache size fills its device.
            own = self.memory_bytes()[spec.devices[0]]
            kv = int(max(0.0, own * MEMORY_SHARE - weights - engine))
        return WaveReplica(
            placed=placed,
            # On CPU an engine keeps weights that can be moved beside the packed ones.
            weights_bytes=2 * weights if self.on_cpu else weights,
            kv_bytes=kv,
            engine_bytes=engine,
            capacity_rps=capacity_of([spec]),
            settings=repr((replace(spec.shape, device_kind=""), _arguments(spec))),
        )

    def memory_bytes(self) -> dict[str, float]:
        """Return the memory of each device; where the device does not say, that of its kind."""
        return {
            device.id: float(device.memory_bytes or find_device(device.kind).memory_bytes)
            for device in self.devices
        }

    def room_bytes(
        self,
        old: Sequence[WaveReplica],
        fresh: Sequence[WaveReplica],
        available_bytes: Callable[[], int],
    ) -> Mapping[str, float]:
        """Return each device's memory while ``fresh`` replicas come up beside ``old`` ones.

        Slots of CPU cores share main memory: free memory serves all new replicas if it holds them
        all, else each slot gets an equal part.
        """
        if not self.on_cpu:
            return self.memory_bytes()
        free = available_bytes() * _FREE_SHARE
        wanted = sum(one.total_bytes * len(one.placed.devices) for one in fresh)
        if wanted <= free:
            return {device.id: inf for device in self.devices}
        here = {device.id: 0.0 for device in self.devices}
        for one in old:
            for device_id in one.placed.devices:
                here[device_id] += one.total_bytes
        return {name: used + free / len(here) for name, used in here.items()}

    def _weights_bytes(self, placed: ShardPlacement) -> float:
        """Return the bytes of weights on the fullest of a replica's devices."""
        return max(
            sum(
                volume(piece.box) * piece.tensor.value_bytes
                for local in shard_map(self.model.architecture, placed.layout, rank).values()
                for piece in local.pieces
            )
            for rank in range(placed.layout.ranks)
        )


def capacity_of(specs: Sequence[ReplicaSpec]) -> tuple[float, ...]:
    """Return capacity in devices: how many requests/s each replica serves is not known here."""
    return (float(sum(spec.shape.device_count for spec in specs)),)


def _arguments(spec: ReplicaSpec) -> tuple[str, ...]:
    return spec.backend.engine_args if isinstance(spec.backend, VllmBackend) else ()
