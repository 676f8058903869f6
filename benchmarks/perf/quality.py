"""What fewer bits cost: perplexity of a page of text, for each precision a model can be served in.

    .venv/bin/python benchmarks/perf/quality.py .oserve/models/smollm2-135m \\
        --set 'engines.variants={int8: .oserve/models/smollm2-135m-int8}'

Starts one engine after another and asks each for the chances that it gives to the page's tokens,
just as a switch does that quantises weights on the way. ``--text`` names another page.
"""

import argparse
import asyncio
import math
from pathlib import Path

from oserve.cli.serve import settings_from
from oserve.core import Precision, ReplicaShape
from oserve.engines.control import EngineControl
from oserve.profiler.profile import limited, profile_devices, started_engine, temporary_cluster

PAGE = Path(__file__).with_name("page.txt")
NAME = "profiled"


async def measured(wanted: argparse.Namespace) -> dict[Precision, float]:
    """Nats a token, by precision."""
    settings = settings_from(None, {"model": wanted.model}, wanted.override)
    devices = profile_devices(settings)
    variants = [Precision(name) for name in settings.engines.variants]
    text = wanted.text.read_text(encoding="utf-8")
    found: dict[Precision, float] = {}
    async with temporary_cluster(settings, devices) as hall:
        for precision in (Precision.FP32, Precision.BF16, *variants):
            shape = limited(ReplicaShape(precision=precision), cpu=devices[0].kind == "cpu")
            async with (
                started_engine(hall, devices, shape) as state,
                EngineControl(state.endpoint, timeout_s=300.0) as control,
            ):
                found[precision] = await control.surprise(NAME, text, most_tokens=wanted.tokens)
            print(f"{precision}: perplexity {math.exp(found[precision]):.3f}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, default=PAGE)
    parser.add_argument("--tokens", type=int, default=2000, help="of the end of the page")
    parser.add_argument("--set", dest="override", action="append")
    found = asyncio.run(measured(parser.parse_args()))
    first, *others = found
    for precision in others:
        rise = math.expm1(found[precision] - found[first])
        print(f"{precision} over {first}: {100 * rise:+.2f} %")


if __name__ == "__main__":
    main()
