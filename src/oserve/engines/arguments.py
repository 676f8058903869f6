"""From a replica as wished for to vLLM's command line and environment: pure; all flags are here."""

from collections.abc import Sequence
from typing import Literal

from oserve.core import Device, OServeError, Precision, ReplicaSpec, VllmBackend
from oserve.engines.settings import EngineSettings

Platform = Literal["cpu", "cuda"]

_DTYPES = {
    Precision.FP32: "float32",
    Precision.BF16: "bfloat16",
    Precision.FP16: "float16",
}
# Read by the extension in an engine's workers.
KEEP_WEIGHTS = "OSERVE_KEEP_WEIGHTS"
# Folder through which KV caches go from engine to engine.
CACHES = "OSERVE_CACHES"
# What cannot be taken in is computed again.
_CONNECTOR = (
    '{"kv_connector":"Connector","kv_connector_module_path":"oserve.engines.caches",'
    '"kv_role":"kv_both","kv_load_failure_policy":"recompute"}'
)
_EXTENSION = "oserve.engines.worker_extension.WorkerExtension"


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
    """Arguments of vLLM's API server, the replica's own last so that they win.

    ``standby``: the weights will come from other engines, so none are loaded. ``moves_caches``:
    KV caches can go to and come from other engines.
    Raises ``OServeError`` when the precision needs a checkpoint that the settings do not name.
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
        # Without priorities in the requests this is first come, first served.
        *("--scheduling-policy", "priority"),
        *("--worker-extension-cls", _EXTENSION),
        # One line per request in the log is the gateway's business, and costs engine time.
        "--disable-uvicorn-access-log",
        "--enable-request-id-headers",
    ]
    kv_cache_memory_bytes = shape.kv_cache_memory_bytes
    if kv_cache_memory_bytes is None:
        # On CPU somebody sets it (see ``room``): left to itself, vLLM asks for a share of the
        # machine's whole memory per engine.
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
    """Which checkpoint to load and in which type."""
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


def runs_eagerly(arguments: Sequence[str]) -> bool:
    """Whether these engine arguments leave compilation out; the last word wins."""
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
) -> dict[str, str]:
    """Environment variables to add for one engine on these devices (in rank order).

    ``local_model``: the model is a folder, so nothing needs to be asked of any model hub.
    ``eager``: nothing is to be compiled. ``folder``: for sockets and other files of this engine
    alone (under 69 bytes, since socket paths must stay under 108); whoever starts it removes it.
    ``keep_weights``: as loaded, so that they can be moved to other engines. ``caches``: the folder
    through which KV caches go.
    """
    environment = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TMPDIR": folder,
        "VLLM_RPC_BASE_PATH": folder,
        # Control routes on the engine's private socket; the gateway passes none of them on.
        "VLLM_SERVER_DEV_MODE": "1",
    }
    if keep_weights:
        environment[KEEP_WEIGHTS] = "1"
    if caches:
        environment[CACHES] = caches
    if local_model:
        environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if platform == "cuda":
        indices = ",".join(device.id.partition(":")[2] for device in devices)
        # Without the bus order CUDA may number GPUs otherwise than nvidia-smi does.
        return environment | {"CUDA_VISIBLE_DEVICES": indices, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    if eager:
        # vLLM compiles some small functions all the same, on first use: half a minute of g++ in the
        # middle of a request, with the whole engine waiting.
        environment["TORCHDYNAMO_DISABLE"] = "1"
    threads = max(1, len(engine_cores(devices)) // max(1, len(devices)))
    return environment | {
        "OMP_NUM_THREADS": str(threads),
        # vLLM's own binding puts every engine of a machine on the same cores.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # Ranks of one engine share this machine: no name look-ups, no outside interface.
        "VLLM_HOST_IP": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
    }


def engine_cores(devices: Sequence[Device]) -> tuple[int, ...]:
    """CPU cores that an engine on these devices may use; empty means any."""
    return tuple(sorted({core for device in devices for core in device.cores}))
