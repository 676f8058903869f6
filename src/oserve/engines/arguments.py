"""From a replica's spec to vLLM's command line and environment. Pure; it holds every flag."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from oserve.core import Device, OServeError, Precision, ReplicaPart, ReplicaSpec, VllmBackend
from oserve.engines.settings import EngineSettings

Platform = Literal["cpu", "cuda"]

_DTYPES = {
    Precision.FP32: "float32",
    Precision.BF16: "bfloat16",
    Precision.FP16: "float16",
}
# The worker extension reads it.
KEEP_WEIGHTS = "OSERVE_KEEP_WEIGHTS"
# The folder through which KV caches move between engines.
CACHES = "OSERVE_CACHES"
# A cache that cannot be read is computed again.
_CONNECTOR = (
    '{"kv_connector":"Connector","kv_connector_module_path":"oserve.engines.caches",'
    '"kv_role":"kv_both","kv_load_failure_policy":"recompute"}'
)
_EXTENSION = "oserve.engines.worker_extension.WorkerExtension"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeInterface:
    """The network interface by which a node's engines reach those on other nodes.

    Without a ``name`` the engine looks up which interface of its machine has the ``address``.
    """

    address: str
    name: str = ""


# If all ranks are on this machine: no name look-ups, no external interface.
_LOOPBACK = NodeInterface(address="127.0.0.1", name="lo")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """Where the ranks of a replica on several nodes meet: an address of the leader's node."""

    address: str
    port: int


def engine_arguments(
    spec: ReplicaSpec,
    *,
    model: str,
    served_model_name: str,
    unix_socket: str,
    platform: Platform,
    settings: EngineSettings,
    standby: bool = False,
    moves_caches: bool = False,
) -> list[str]:
    """Arguments of vLLM's API server; the replica's own come last and win.

    ``standby``: other engines will send the weights, so none are loaded. ``moves_caches``: KV
    caches can move to and from other engines. Raises ``OServeError`` if the precision needs a
    checkpoint that the settings do not name.
    """
    shape = spec.shape
    arguments = [
        *_weights(spec, model, platform, settings),
        *("--served-model-name", served_model_name),
        *("--uds", unix_socket),
        *("--tensor-parallel-size", str(shape.tensor_parallel_size)),
        *("--pipeline-parallel-size", str(shape.pipeline_parallel_size)),
        *("--max-num-seqs", str(shape.max_num_seqs)),
        *("--max-num-batched-tokens", str(shape.max_num_batched_tokens)),
        # Requests without a priority are served first come, first served.
        *("--scheduling-policy", "priority"),
        *("--worker-extension-cls", _EXTENSION),
        # The gateway keeps records of requests; a log line for each would cost engine time.
        "--disable-uvicorn-access-log",
        "--enable-request-id-headers",
    ]
    kv_cache_memory_bytes = shape.kv_cache_memory_bytes
    if kv_cache_memory_bytes is None:
        # On CPU the settings have a size (``memory_check``): without one, each engine would take a
        # share of the machine's whole memory.
        kv_cache_memory_bytes = settings.kv_cache_memory_bytes
    if kv_cache_memory_bytes:
        arguments += ["--kv-cache-memory-bytes", str(kv_cache_memory_bytes)]
    if settings.max_model_len is not None:
        arguments += ["--max-model-len", str(settings.max_model_len)]
    eager = settings.enforce_eager if settings.enforce_eager is not None else platform == "cpu"
    if eager:
        arguments.append("--enforce-eager")
    if moves_caches:
        arguments += ["--kv-transfer-config", _CONNECTOR]
    if isinstance(spec.backend, VllmBackend):
        arguments += spec.backend.engine_args
    if standby:
        arguments += ["--load-format", "dummy"]
    return arguments


def _weights(
    spec: ReplicaSpec, model: str, platform: Platform, settings: EngineSettings
) -> list[str]:
    """The arguments for the checkpoint and its type."""
    precision = spec.shape.precision
    if precision in _DTYPES:
        return ["--model", model, "--dtype", _DTYPES[precision]]
    variant = settings.variants.get(precision.value)
    if variant is not None:
        return ["--model", variant]
    if precision is Precision.FP8 and platform == "cuda":
        return ["--model", model, "--quantization", "fp8"]
    raise OServeError(
        f"replica {spec.id} asks for {precision} weights, but no such checkpoint is named",
        place=f"engines.variants.{precision}",
        remedy=f"name a checkpoint of the model in {precision} there, or choose bf16",
    )


def part_arguments(
    whole: Sequence[str], part: ReplicaPart, meeting: Rendezvous, *, platform: Platform
) -> list[str]:
    """Arguments of one part of a replica over several nodes.

    ``whole``: from ``engine_arguments``, the same list for every part. vLLM does not compare what
    the parts were told, and different shapes would hang or compute nonsense.
    """
    arguments = [
        *whole,
        *("--distributed-executor-backend", "mp"),
        *("--nnodes", str(part.count)),
        *("--node-rank", str(part.index)),
        *("--master-addr", meeting.address),
        *("--master-port", str(meeting.port)),
    ]
    if platform == "cpu":
        # vLLM takes every CPU rank for a node of its own unless their devices are listed.
        arguments += ["--device-ids", ",".join(map(str, range(len(part.ranks))))]
    if part.index > 0:
        arguments.append("--headless")
    return arguments


def runs_eagerly(arguments: Sequence[str]) -> bool:
    """Whether these arguments turn compilation off; the last one wins."""
    words = [word for word in arguments if word in {"--enforce-eager", "--no-enforce-eager"}]
    return bool(words) and words[-1] == "--enforce-eager"


def engine_environment(
    devices: Sequence[Device],
    *,
    platform: Platform,
    local_model: bool,
    eager: bool,
    folder: str,
    keep_weights: bool = False,
    caches: str = "",
    interface: NodeInterface | None = None,
) -> dict[str, str]:
    """Environment variables to add for one engine on these devices (in rank order).

    ``local_model``: the model is a folder, so that no model hub is needed. ``eager``: nothing is
    compiled. ``folder``: for sockets and other files of this engine alone (under 69 bytes, since
    socket paths must stay under 108); the process that starts the engine removes it.
    ``keep_weights``: keep them as loaded, so that they can move to other engines. ``caches``: the
    folder through which KV caches move. ``interface``: to the other parts of the replica, if it
    has several; then the devices are those of one part.
    """
    environment = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TMPDIR": folder,
        "VLLM_RPC_BASE_PATH": folder,
        # Adds control routes to the engine's private socket; the gateway exposes none of them.
        "VLLM_SERVER_DEV_MODE": "1",
    }
    if keep_weights:
        environment[KEEP_WEIGHTS] = "1"
    if caches:
        environment[CACHES] = caches
    if local_model:
        environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if platform == "cuda":
        # By UUID where it is known, so that an engine cannot get a GPU that was renumbered.
        indices = ",".join(device.uuid or device.id.partition(":")[2] for device in devices)
        # By default CUDA may number GPUs differently from nvidia-smi.
        environment |= {"CUDA_VISIBLE_DEVICES": indices, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        if interface is None:
            return environment
        return environment | _network(interface)
    if eager:
        # vLLM would still compile some small functions on first use: half a minute of g++ during a
        # request, while the whole engine waits.
        environment["TORCHDYNAMO_DISABLE"] = "1"
    threads = max(1, len(engine_cores(devices)) // max(1, len(devices)))
    return (
        environment
        | {
            "OMP_NUM_THREADS": str(threads),
            # vLLM's own binding would put every engine of a machine on the same cores.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
        | _network(interface or _LOOPBACK)
    )


def _network(interface: NodeInterface) -> dict[str, str]:
    environment = {"VLLM_HOST_IP": interface.address}
    return environment | (interface_variables(interface.name) if interface.name else {})


def interface_variables(name: str) -> dict[str, str]:
    """Variables by which an engine's ranks use that interface, and no other."""
    # Without the sign it would be a prefix for NCCL: eth1 would also mean eth10.
    return {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"}


def engine_cores(devices: Sequence[Device]) -> tuple[int, ...]:
    """CPU cores that an engine on these devices may use; empty for any."""
    return tuple(sorted({core for device in devices for core in device.cores}))
