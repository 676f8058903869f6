"""The platform that vLLM has chosen."""


def on_cpu() -> bool:
    """Whether this process' vLLM computes on the CPU. Imports vLLM's platforms."""
    from vllm.platforms import current_platform  # noqa: PLC0415 - not before it is asked

    return bool(current_platform.is_cpu())
