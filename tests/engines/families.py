"""Serves cut-down models of several families with vLLM itself, and tells what they take.

``python families.py FOLDER``: FOLDER has a subfolder with a ``config.json`` for each. vLLM is
imported once; each model then has a process of its own, with dummy weights. A line of JSON for
each: bytes of its parameters, KV cache in tokens, and the tokens it generated.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

CACHE_BYTES = 128 << 20
STEP_TOKENS = 256
CONTEXT = 2048


def served(folder: Path) -> dict[str, Any]:
    from vllm import LLM, SamplingParams  # noqa: PLC0415 - takes long, and once
    from vllm.model_executor.model_loader import base_loader  # noqa: PLC0415
    from vllm.v1.core import kv_cache_utils  # noqa: PLC0415

    build, sizes = base_loader.initialize_model, []

    def counted(*given: Any, **named: Any) -> Any:
        """Count before the kernels of a processor pack the weights into forms of their own."""
        model = build(*given, **named)
        sizes.append(sum(one.numel() * one.element_size() for one in model.parameters()))
        return model

    base_loader.initialize_model = counted

    llm = LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=CONTEXT,
        max_num_batched_tokens=STEP_TOKENS,
        max_num_seqs=4,
        kv_cache_memory_bytes=CACHE_BYTES,
        enable_prefix_caching=False,
    )
    sampling = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, detokenize=False)
    answers = llm.generate([{"prompt_token_ids": [5] * 300}], sampling, use_tqdm=False)
    core: Any = llm.llm_engine.engine_core.engine_core
    caches = core.scheduler.kv_cache_config
    held = kv_cache_utils.get_max_concurrency_for_kv_cache_config(core.vllm_config, caches)
    return {
        "weights": sizes[0],
        "kv_tokens": held * CONTEXT,
        "generated": len(answers[0].outputs[0].token_ids),
    }


def main() -> None:
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_HOST_IP": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    import vllm.model_executor.models.registry  # noqa: PLC0415
    import vllm.v1.engine.llm_engine  # noqa: PLC0415, F401

    for folder in sorted(Path(sys.argv[1]).iterdir()):
        child = os.fork()
        if not child:
            try:
                found = served(folder)
            except BaseException as error:
                found = {"error": repr(error)[:500]}
            print(json.dumps({"name": folder.name, **found}), flush=True)
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
