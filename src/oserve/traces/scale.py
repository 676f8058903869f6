"""Scaling the lengths of a trace to a model with a smaller context."""

from collections.abc import Sequence
from dataclasses import replace

from oserve.core import OServeError
from oserve.traces.request import TraceRequest


def fit_lengths(
    requests: Sequence[TraceRequest],
    *,
    max_model_len: int,
    prompt_scale: float | None = None,
    output_scale: float | None = None,
    reserve_tokens: int = 16,
) -> list[TraceRequest]:
    """Scale all prompts by one factor and all outputs by another, so that each request fits.

    By default both factors are such that the longest prompt and the longest output together fill
    the context, and at most 1. ``reserve_tokens`` stay free for the tokens of a chat template.
    Lengths stay at least 1; a request that is still too long is truncated.
    """
    room = max_model_len - reserve_tokens
    if room < 2:
        raise OServeError(
            f"a context of {max_model_len} tokens has no room for a request",
            place="max_model_len",
            remedy="serve with a longer context",
        )
    for name, factor in (("prompt", prompt_scale), ("output", output_scale)):
        if factor is not None and not 0 < factor < float("inf"):
            raise OServeError(
                f"the {name} scale is {factor}", place=f"--{name}-scale", remedy="give one over 0"
            )
    longest_prompt = max((item.prompt_tokens for item in requests), default=1)
    longest_output = max((item.output_tokens for item in requests), default=1)
    common = min(1.0, room / (longest_prompt + longest_output))
    by_prompt = common if prompt_scale is None else prompt_scale
    by_output = common if output_scale is None else output_scale
    fitted = []
    for item in requests:
        output = min(room - 1, max(1, round(item.output_tokens * by_output)))
        prompt = min(room - output, max(1, round(item.prompt_tokens * by_prompt)))
        fitted.append(replace(item, prompt_tokens=prompt, output_tokens=output))
    return fitted
