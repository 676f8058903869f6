"""A seeded synthetic trace of two kinds of traffic, fitted to published statistics.

Medians follow the publication of Azure's 2023 traces (Patel et al., "Splitwise", ISCA 2024):
conversations have prompts of about 1,000 tokens and answers of about 130; code completion has
prompts of about 1,500 and answers of about 13. Lengths are lognormal, truncated where those traces
end. Arrivals are Poisson.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from oserve.traces.request import TraceRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthModel:
    """Lognormal lengths: medians in tokens; spreads are standard deviations of the logarithm.

    Lengths are truncated at ``max_prompt_tokens`` and ``max_output_tokens``, where Azure's traces
    end.
    """

    prompt_median: float
    prompt_spread: float
    output_median: float
    output_spread: float
    max_prompt_tokens: int = 7500
    max_output_tokens: int = 1500

    def draw(self, source: random.Random) -> tuple[int, int]:
        """Prompt and output tokens of one request, each at least 1."""
        prompt = _length(source, self.prompt_median, self.prompt_spread, self.max_prompt_tokens)
        output = _length(source, self.output_median, self.output_spread, self.max_output_tokens)
        return prompt, output


_KINDS = {
    "conv": LengthModel(
        prompt_median=1020, prompt_spread=1.1, output_median=129, output_spread=0.9
    ),
    "code": LengthModel(prompt_median=1500, prompt_spread=0.9, output_median=13, output_spread=0.9),
}


def synthesise(
    *, rate_rps: float, duration_s: float, seed: int, code_share: float = 0.5
) -> Iterator[TraceRequest]:
    """Requests at ``rate_rps`` for ``duration_s`` seconds; a share of them is code completion."""
    draw = random.Random(seed)
    arrival_s = draw.expovariate(rate_rps)
    while arrival_s < duration_s:
        name = "code" if draw.random() < code_share else "conv"
        prompt, output = _KINDS[name].draw(draw)
        yield TraceRequest(
            arrival_s=arrival_s, prompt_tokens=prompt, output_tokens=output, model=name
        )
        arrival_s += draw.expovariate(rate_rps)


def _length(draw: random.Random, median: float, spread: float, most: int) -> int:
    return max(1, min(most, round(draw.lognormvariate(math.log(median), spread))))
