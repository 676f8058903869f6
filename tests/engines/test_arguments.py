"""vLLM's command line and environment for a replica."""

import msgspec
import pytest

from oserve.core import (
    Device,
    OServeError,
    Precision,
    ReplicaPart,
    ReplicaShape,
    ReplicaSpec,
    VllmBackend,
    parts_of,
)
from oserve.engines.arguments import (
    NodeInterface,
    Platform,
    Rendezvous,
    engine_arguments,
    engine_cores,
    engine_environment,
    part_arguments,
    runs_eagerly,
)
from oserve.engines.settings import EngineSettings


def arguments(
    shape: ReplicaShape,
    *engine_args: str,
    platform: Platform = "cpu",
    settings: EngineSettings | None = None,
) -> list[str]:
    spec = ReplicaSpec(
        id="r", shape=shape, devices=("d",), backend=VllmBackend(engine_args=engine_args)
    )
    return engine_arguments(
        spec,
        model="/models/m",
        served_model_name="m",
        unix_socket="/run/api.sock",
        platform=platform,
        settings=settings or EngineSettings(),
    )


def value(words: list[str], flag: str) -> str | None:
    return words[words.index(flag) + 1] if flag in words else None


def test_shape_becomes_flags() -> None:
    words = arguments(
        ReplicaShape(
            tensor_parallel_size=2,
            pipeline_parallel_size=3,
            precision=Precision.FP32,
            max_num_batched_tokens=512,
            max_num_seqs=7,
        ),
        settings=EngineSettings(max_model_len=4096, kv_cache_memory_bytes=1 << 28),
    )
    assert value(words, "--model") == "/models/m"
    assert value(words, "--served-model-name") == "m"
    assert value(words, "--uds") == "/run/api.sock"
    assert value(words, "--dtype") == "float32"
    assert value(words, "--tensor-parallel-size") == "2"
    assert value(words, "--pipeline-parallel-size") == "3"
    assert value(words, "--max-num-batched-tokens") == "512"
    assert value(words, "--max-num-seqs") == "7"
    assert value(words, "--max-model-len") == "4096"
    assert value(words, "--scheduling-policy") == "priority"
    assert value(words, "--kv-cache-memory-bytes") == str(1 << 28)
    assert "--enforce-eager" in words


def test_own_arguments_come_last() -> None:
    words = arguments(ReplicaShape(), "--max-num-seqs", "3", "--no-enforce-eager")
    assert words[-3:] == ["--max-num-seqs", "3", "--no-enforce-eager"]
    assert not runs_eagerly(words)


def test_on_a_gpu_vllm_sizes_its_cache_and_compiles() -> None:
    words = arguments(ReplicaShape(), platform="cuda")
    assert "--kv-cache-memory-bytes" not in words
    assert not runs_eagerly(words)
    sized = EngineSettings(kv_cache_memory_bytes=7)
    words = arguments(ReplicaShape(), platform="cuda", settings=sized)
    assert value(words, "--kv-cache-memory-bytes") == "7"
    words = arguments(ReplicaShape(kv_cache_memory_bytes=5), platform="cuda", settings=sized)
    assert value(words, "--kv-cache-memory-bytes") == "5"


def test_quantised_weights_come_from_their_own_checkpoint() -> None:
    settings = EngineSettings(variants={"int8": "/models/m-int8"})
    words = arguments(ReplicaShape(precision=Precision.INT8), settings=settings)
    assert value(words, "--model") == "/models/m-int8"
    assert "--dtype" not in words


def test_missing_checkpoint_is_told_where_and_what_to_do() -> None:
    with pytest.raises(OServeError) as caught:
        arguments(ReplicaShape(precision=Precision.INT4))
    assert caught.value.place == "engines.variants.int4"
    with pytest.raises(OServeError):
        arguments(ReplicaShape(precision=Precision.FP8))
    words = arguments(ReplicaShape(precision=Precision.FP8), platform="cuda")
    assert value(words, "--quantization") == "fp8"


def test_environment_of_a_cpu_engine() -> None:
    devices = (
        Device(id="cpu:0", kind="cpu", cores=(2, 3)),
        Device(id="cpu:1", kind="cpu", cores=(0, 1)),
    )
    words = engine_environment(
        devices, platform="cpu", local_model=True, eager=True, folder="/run/r"
    )
    assert words["OMP_NUM_THREADS"] == "2"
    assert words["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert words["HF_HUB_OFFLINE"] == "1"
    assert words["TMPDIR"] == words["VLLM_RPC_BASE_PATH"] == "/run/r"
    assert words["TORCHDYNAMO_DISABLE"] == "1"
    assert engine_cores(devices) == (0, 1, 2, 3)


def test_environment_of_a_gpu_engine() -> None:
    devices = (Device(id="gpu:3", kind="H100"), Device(id="gpu:1", kind="H100"))
    words = engine_environment(
        devices, platform="cuda", local_model=False, eager=True, folder="/run/r"
    )
    assert words["CUDA_VISIBLE_DEVICES"] == "3,1"
    assert "TORCHDYNAMO_DISABLE" not in words
    assert "HF_HUB_OFFLINE" not in words
    assert engine_cores(devices) == ()


def test_slots_that_share_a_core_run_one_thread_each() -> None:
    devices = tuple(Device(id=f"cpu:{i}", kind="cpu", cores=(0,)) for i in range(2))
    words = engine_environment(
        devices, platform="cpu", local_model=True, eager=True, folder="/run/r"
    )
    assert words["OMP_NUM_THREADS"] == "1"


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"kv_cache": 1}, EngineSettings)
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"start_method": "magic"}, EngineSettings)


def two_parts(kind: str = "cpu") -> tuple[ReplicaPart, ...]:
    """Of two ranks each."""
    devices = {
        f"{node}/{kind}:{rank}": Device(id=f"{node}/{kind}:{rank}", kind=kind, node=node)
        for node in "ab"
        for rank in range(2)
    }
    shape = ReplicaShape(tensor_parallel_size=2, pipeline_parallel_size=2)
    return parts_of(ReplicaSpec(id="r", shape=shape, devices=tuple(devices)), devices)


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_parts_are_told_the_same_but_for_their_place(platform: Platform) -> None:
    whole = arguments(
        ReplicaShape(tensor_parallel_size=2, pipeline_parallel_size=2),
        *("--max-num-seqs", "7", "--nnodes", "9"),
        platform=platform,
    )
    meeting = Rendezvous(address="10.0.0.1", port=25500)
    words = [part_arguments(whole, part, meeting, platform=platform) for part in two_parts()]
    assert all(one[: len(whole)] == whole for one in words)
    leader, other = (one[len(whole) :] for one in words)
    assert other[-1] == "--headless"
    assert "--headless" not in leader
    # The last one wins, so that the engine's own arguments cannot take the parts apart.
    assert value(leader, "--nnodes") == value(other, "--nnodes") == "2"
    assert [value(one, "--node-rank") for one in (leader, other)] == ["0", "1"]
    differing = [pair for pair in zip(leader, other, strict=False) if pair[0] != pair[1]]
    assert differing == [("0", "1")]
    assert value(other, "--master-addr") == "10.0.0.1"
    assert value(other, "--master-port") == "25500"
    assert value(other, "--distributed-executor-backend") == "mp"
    assert value(other, "--device-ids") == ("0,1" if platform == "cpu" else None)


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_parts_meet_on_the_interface_of_their_node(platform: Platform) -> None:
    part = two_parts("gpu" if platform == "cuda" else "cpu")[1]
    found = engine_environment(
        part.devices,
        platform=platform,
        local_model=True,
        eager=True,
        folder="/run/r",
        interface=NodeInterface(address="10.0.0.2", name="eth1"),
    )
    assert found["VLLM_HOST_IP"] == "10.0.0.2"
    assert found["GLOO_SOCKET_IFNAME"] == "eth1"
    if platform == "cuda":
        assert found["NCCL_SOCKET_IFNAME"] == "=eth1"
        assert found["CUDA_VISIBLE_DEVICES"] == "0,1"
