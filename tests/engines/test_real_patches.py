"""The installed vLLM still is what each patch was written against, and still needs it.

Nothing of it is imported: functions are read from the installed files, and run alone where that
shows what they do. A test that fails here says that upstream has changed: look whether the patch is
needed any more, and what it has to be now.
"""

import ast
import time
from multiprocessing import shared_memory
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from oserve.engines.patches import PATCHES, Patch, engine_package
from oserve.engines.patches.patch import installed_misfit, installed_source

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(engine_package() is None, reason="vLLM is not installed"),
]

LOADER = "vllm.model_executor.model_loader"
RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"


def read(place: str) -> Any:
    """The syntax of a function or class in the installed files."""
    lines = installed_source(place).splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip())
    return ast.parse("\n".join(line[indent:] for line in lines)).body[0]


def alone(place: str, **surroundings: Any) -> Any:
    """The function itself, made from its source, in surroundings of the test's."""
    node = read(place)
    node.decorator_list = []
    # Annotations name what is not there.
    node.returns = None
    for argument in (*node.args.args, *node.args.kwonlyargs):
        argument.annotation = None
    namespace = dict(surroundings)
    exec(compile(ast.Module(body=[node], type_ignores=[]), place, "exec"), namespace)
    return namespace[node.name]


def calls(place: str) -> set[str]:
    """What a function or class calls, as it is written there."""
    return {ast.unparse(node) for node in ast.walk(read(place)) if isinstance(node, ast.Call)}


@pytest.mark.parametrize("patch", PATCHES, ids=[patch.name for patch in PATCHES])
def test_what_is_replaced_is_as_it_was(patch: Patch) -> None:
    assert installed_misfit(patch) == ""


def test_model_inspection_starts_a_process() -> None:
    process = Mock()
    process.run.side_effect = InterruptedError
    run = alone(
        "vllm.model_executor.models.registry:_run_in_subprocess",
        subprocess=process,
        tempfile=__import__("tempfile"),
        os=__import__("os"),
        _SUBPROCESS_COMMAND=["command"],
        Callable=Mock(),
    )
    with pytest.raises(InterruptedError):
        run(len)
    process.run.assert_called_once()
    place = "vllm.model_executor.models.registry:_LazyRegisteredModel.inspect_model_cls"
    assert any(call.startswith("_run_in_subprocess(") for call in calls(place))


def test_forked_workers_would_be_spawned() -> None:
    """Set without a condition, and read from the environment afterwards."""
    body = read("vllm.platforms.cpu:CpuPlatform.check_and_update_config").body
    assert "os.environ['VLLM_WORKER_MULTIPROC_METHOD'] = 'spawn'" in map(ast.unparse, body)
    assert "envs.VLLM_WORKER_MULTIPROC_METHOD" in ast.unparse(
        read("vllm.utils.system_utils:get_mp_context")
    )


def test_kernel_overrides_are_looked_for_in_each_worker() -> None:
    place = "vllm.v1.worker.worker_base:WorkerWrapperBase.init_worker"
    assert "current_platform.register_triton_kernel_overrides()" in calls(place)
    own = calls("vllm.platforms.cpu:CpuPlatform.register_triton_kernel_overrides")
    assert any(call.startswith("register_kernels(") for call in own)
    assert "sys.modules.values()" in calls("vllm.triton_utils.dispatcher:_rebind_kernels")


def test_waiting_is_done_without_pause_for_a_second() -> None:
    place = "vllm.distributed.device_communicators.shm_broadcast:SpinCondition"
    gave_way, poller = Mock(), Mock()
    poller.poll.return_value = []
    wait = alone(f"{place}.wait", time=time, sched_yield=gave_way, logger=Mock())
    reader = SimpleNamespace(
        is_reader=True,
        busy_loop_s=1,
        poller=poller,
        last_read=time.monotonic() + 60,
        read_cancel_socket=None,
        local_notify_socket=None,
    )
    wait(reader)
    gave_way.assert_called_once_with()
    poller.poll.assert_not_called()
    # Later it waits for a notice, for as long as it was told.
    reader.last_read = time.monotonic() - 60
    wait(reader, 5000)
    poller.poll.assert_called_once_with(timeout=5000)
    made = read(f"{place}.__init__").args
    defaults = dict(zip([one.arg for one in made.args][::-1], made.defaults[::-1], strict=False))
    assert ast.unparse(defaults["busy_loop_s"]) == "1"
    queue = calls("vllm.distributed.device_communicators.shm_broadcast:MessageQueue")
    given = [call for call in queue if call.startswith("SpinCondition(")]
    assert given
    assert not any("busy_loop_s" in call for call in given)


def test_segment_names_do_not_tell_whose_they_are() -> None:
    make = alone(
        "multiprocessing.shared_memory:_make_filename",
        secrets=__import__("secrets"),
        _SHM_NAME_PREFIX="/psm_",
        _SHM_SAFE_NAME_LENGTH=14,
    )
    assert make().startswith("/psm_")
    assert len(make()) <= 14
    # Who makes a segment gives it no name, so that Python does.
    ring = calls("vllm.distributed.device_communicators.shm_broadcast:ShmRingBuffer")
    assert "shared_memory.SharedMemory(create=True, size=self.total_bytes_of_buffer)" in ring
    assert vars(shared_memory)["_make_filename"]


def test_pipeline_buffer_is_made_by_the_dummy_run_only() -> None:
    gather = alone(f"{RUNNER}.sync_and_gather_intermediate_tensors", IntermediateTensors=dict)
    with pytest.raises(AssertionError):
        gather(SimpleNamespace(intermediate_tensors=None), 1, {}, True)
    assigned = {
        function.name
        for function in read(RUNNER).body
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and ast.unparse(node) == "self.intermediate_tensors"
    }
    assert assigned == {"__init__", "_dummy_run"}
    cpu = ast.unparse(read("vllm.v1.worker.cpu_model_runner:CPUModelRunner"))
    assert "intermediate_tensors" not in cpu
    assert "_dummy_run" not in cpu
    # On CPU that run is for warming up, which is left out with OServe's arguments.
    mode = SimpleNamespace(NONE=0)
    warms = alone(
        "vllm.v1.worker.cpu_worker:CPUWorker._should_warm_up_model",
        envs=SimpleNamespace(VLLM_CPU_CI_ENV=False),
        CompilationMode=mode,
    )
    worker = SimpleNamespace(
        compilation_config=SimpleNamespace(mode=mode.NONE),
        cache_config=SimpleNamespace(kv_cache_memory_bytes=1 << 28),
    )
    assert warms(worker) is False


def test_kept_weights_are_packed_when_they_have_been_loaded() -> None:
    """Models are made and packed by the names that are replaced; linear weights go then."""
    load = f"{LOADER}.base_loader:BaseModelLoader"
    made = calls(f"{load}.create_model")
    assert any(call.startswith("initialize_model(vllm_config=vllm_config") for call in made)
    assert "process_weights_after_loading(model, model_config, target_device)" in calls(
        f"{load}.load_model"
    )
    linear = "vllm.model_executor.layers.linear:UnquantizedLinearMethod"
    packing = read(f"{linear}.process_weights_after_loading")
    assert "dispatch_cpu_unquantized_gemm(layer, remove_weight=True)" in ast.unparse(packing)
    dispatch = ast.unparse(read("vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm"))
    assert "if remove_weight:\n" in dispatch


def test_blank_weights_would_be_filled_and_packed() -> None:
    param = Mock(dummy_weight_value=None)
    param.device.type = "cpu"
    fill = alone(
        f"{LOADER}.weight_utils:initialize_single_dummy_weight",
        torch=Mock(**{"finfo.return_value": SimpleNamespace(bits=16)}),
        current_platform=Mock(**{"is_tpu.return_value": False}),
    )
    fill(param)
    param.uniform_.assert_called_once()
    loader = f"{LOADER}.dummy_loader:DummyModelLoader.load_weights"
    assert "initialize_single_dummy_weight(tensor)" in calls(loader)
    # Imported where it is called, so that the name that is replaced is the one that is found.
    for place in (
        "vllm.model_executor.layers.linear:UnquantizedLinearMethod",
        "vllm.model_executor.layers.vocab_parallel_embedding:UnquantizedEmbeddingMethod",
    ):
        packing = ast.unparse(read(f"{place}.process_weights_after_loading"))
        name = "dispatch_cpu_unquantized_gemm"
        assert f"from vllm.model_executor.layers.utils import {name}" in packing
