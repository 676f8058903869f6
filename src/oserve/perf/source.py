"""Sources of step times for any shape of one model: the roofline, or aiconfigurator's tables."""

import functools
from collections.abc import Mapping, Sequence

from oserve.core import Precision, ReplicaShape
from oserve.perf.aiconfigurator import AiConfigurator
from oserve.perf.coefficients import find_coefficients
from oserve.perf.costs import measured_costs
from oserve.perf.device import DeviceFacts, Link, find_device, find_link
from oserve.perf.memory import MEMORY_SHARE, MemoryFit, memory_fit
from oserve.perf.model import ModelFacts
from oserve.perf.power import ReplicaWork, replica_power_w
from oserve.perf.roofline import Roofline, StepModel, hops_between_nodes
from oserve.perf.sequence_cache import SequenceCache

_PIPELINE = (
    "pipeline parallelism was not measured: the model has even stages and no bubbles, which "
    "flatters it; exclude it with --pipeline-parallel-size 1"
)
_UNMEASURED = (
    "its layers differ: KV room is shown for requests of 8,192 tokens, but counts by those of the "
    "workload; step times of windowed, latent and linear attention follow from coefficients of "
    "full attention"
)
DEFAULT_NETWORK = "infiniband-400"


class RooflineSource:
    """The roofline with shipped coefficients.

    ``node_devices``: devices per node by kind; a replica larger than a node communicates over
    ``network``, a name in the catalogue or a measured link. ``memory_bytes``: memory by kind, where
    it differs from the data sheet's.
    """

    def __init__(
        self,
        model: ModelFacts,
        *,
        node_devices: Mapping[str, int] | None = None,
        network: str | Link = DEFAULT_NETWORK,
        memory_bytes: Mapping[str, int] | None = None,
        memory_share: float = MEMORY_SHARE,
    ) -> None:
        self._model = model
        self._node_devices = dict(node_devices or {})
        self._network = network if isinstance(network, Link) else find_link(network)
        self._memory_bytes = dict(memory_bytes or {})
        self._share = memory_share
        self._made: dict[tuple[str, Precision, int, int], StepModel] = {}

    @property
    def model(self) -> ModelFacts:
        return self._model

    @property
    def origin(self) -> str:
        return "roofline"

    def caveats(self, shapes: Sequence[ReplicaShape]) -> tuple[str, ...]:
        """See ``PerformanceSource``."""
        said = [f"the model was read with {self._model.read_by}"] if self._model.read_by else []
        if self._model.stored is not None and self._model.stored.caveat:
            said.append(self._model.stored.caveat)
        if self._model.kinds:
            said.append(_UNMEASURED)
        if any(shape.pipeline_parallel_size > 1 for shape in shapes):
            said.append(_PIPELINE)
        for shape in shapes:
            origin = find_coefficients(shape.device_kind, shape.precision).origin
            if origin.startswith("borrowed"):
                said.append(f"{shape.device_kind} in {shape.precision}: coefficients {origin}")
        return tuple(dict.fromkeys(said))

    def step_model(self, shape: ReplicaShape) -> StepModel:
        """See ``PerformanceSource``; shapes that differ only in limits share a model."""
        tp, pp = shape.tensor_parallel_size, shape.pipeline_parallel_size
        key = (shape.device_kind, shape.precision, tp, pp)
        if key not in self._made:
            self._made[key] = self._make(shape)
        return self._made[key]

    def kv_tokens(self, shape: ReplicaShape) -> int:
        return self.memory(shape).kv_tokens

    def sequence_cache(self, shape: ReplicaShape) -> SequenceCache | None:
        """See ``PerformanceSource``."""
        return self.memory(shape).cache

    def memory(self, shape: ReplicaShape) -> MemoryFit:
        """The memory use of a shape on its devices."""
        device = _device(shape.device_kind)
        total = self._memory_bytes.get(shape.device_kind, device.memory_bytes)
        return memory_fit(self._model, shape, total, share=self._share)

    def power_w(self, shape: ReplicaShape, work: ReplicaWork, seconds: float) -> float:
        power = _device(shape.device_kind).power
        costs = measured_costs(self.step_model(shape), shape)
        return replica_power_w(power, costs, shape, work, seconds)

    def _make(self, shape: ReplicaShape) -> StepModel:
        kind = shape.device_kind
        return Roofline(
            self._model,
            _device(kind),
            find_coefficients(kind, shape.precision).coefficients,
            tensor_parallel_size=shape.tensor_parallel_size,
            pipeline_parallel_size=shape.pipeline_parallel_size,
            precision=shape.precision,
            tensor_link=self._beyond(kind, shape.tensor_parallel_size),
            stage_link=self._network,
            node_hops=hops_between_nodes(shape, self._node_devices.get(kind)),
        )

    def _beyond(self, kind: str, devices: int) -> Link | None:
        """The network, for a group that spans nodes."""
        most = self._node_devices.get(kind)
        return self._network if most is not None and devices > most else None


class AiConfiguratorSource(RooflineSource):
    """Step times from aiconfigurator; memory and power from the roofline."""

    def caveats(self, shapes: Sequence[ReplicaShape]) -> tuple[str, ...]:
        """See ``PerformanceSource``."""
        piped = any(shape.pipeline_parallel_size > 1 for shape in shapes)
        return (_PIPELINE,) if piped else ()

    @property
    def origin(self) -> str:
        return "aiconfigurator"

    def _make(self, shape: ReplicaShape) -> StepModel:
        return AiConfigurator(self._model.name, shape.device_kind, shape)


@functools.cache
def _device(kind: str) -> DeviceFacts:
    return find_device(kind)
