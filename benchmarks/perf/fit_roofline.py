"""Fits the roofline's coefficients to aiconfigurator's steps; writes the data file.

    .venv/bin/pip install aiconfigurator-core==0.12.0
    .venv/bin/python benchmarks/perf/fit_roofline.py [--write]

For each device and precision that aiconfigurator has vLLM data for: random steps of three models
at TP 1 to 8; half of them to fit, the other half to report the error on.
"""

import argparse
import random
from collections.abc import Callable
from pathlib import Path

import yaml

from oserve.core import Precision, ReplicaShape
from oserve.perf.aiconfigurator import SYSTEMS, VERSION, AiConfigurator
from oserve.perf.device import find_device
from oserve.perf.fit import MeasuredStep, fit_coefficients, relative_errors
from oserve.perf.known_models import find_model
from oserve.perf.roofline import Coefficients, Roofline, StepModel

MODELS = ("llama-3.1-70b", "llama-3.1-8b", "qwen3-32b")
SIZES = (1, 2, 4, 8)
STEPS = 60
FREE = {
    "gemm": (0.1, 1.0),
    "gemm_depth": (1e-3, 1.0),
    "memory": (0.2, 1.0),
    "kv": (0.1, 1.0),
    "attention": (0.05, 1.0),
    "all_reduce": (0.05, 1.5),
    "all_reduce_latency_s": (1e-8, 5e-5),
    "all_reduce_crowding": (1e-3, 2.0),
    "layer_s": (1e-6, 3e-4),
    "mixed_s": (1e-7, 2e-4),
    "step_s": (1e-7, 5e-3),
}
OUT = Path(__file__).parents[2] / "src" / "oserve" / "perf" / "data" / "coefficients.yaml"
HEAD = f"""\
# Coefficients of the roofline (perf/roofline.py), by device kind and precision.
# Made by benchmarks/perf/fit_roofline.py --write from aiconfigurator-core {VERSION} (vLLM data);
# error_percent: mean absolute error on steps that were not used to fit, prefill and decode.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the data file")
    wanted = parser.parse_args()
    table: dict[str, dict[str, object]] = {}
    print(f"{'device':9} {'type':5} {'steps':>6}  error % prefill / decode   by model")
    for kind in SYSTEMS:
        for precision in (Precision.BF16, Precision.FP8):
            if kind == "A100-80" and precision is Precision.FP8:
                continue  # No fp8 units; aiconfigurator has no measurements either.
            table.setdefault(kind, {})[precision.value] = _fit(kind, precision)
    if wanted.write:
        OUT.write_text(HEAD + yaml.safe_dump(table, sort_keys=False), encoding="utf-8")
        print(f"written to {OUT.relative_to(Path.cwd())}")


def _fit(kind: str, precision: Precision) -> dict[str, object]:
    steps: list[MeasuredStep] = []
    models: dict[str, Callable[[Coefficients], StepModel]] = {}
    draw = random.Random(f"{kind} {precision}")
    for name in MODELS:
        for tp in SIZES:
            label = f"{name}/{tp}"
            engine = AiConfigurator(
                name, kind, ReplicaShape(tensor_parallel_size=tp, precision=precision)
            )
            steps += [_step(draw, engine, label) for _ in range(STEPS)]
            models[label] = _maker(name, kind, tp, precision)
    draw.shuffle(steps)
    half = len(steps) // 2
    fit = fit_coefficients(steps[:half], models, free=FREE, start=Coefficients())
    rest = steps[half:]
    errors = relative_errors(rest, {label: make(fit) for label, make in models.items()})

    def mean(keep: Callable[[MeasuredStep], bool]) -> float:
        kept = [abs(e) for e, step in zip(errors, rest, strict=True) if keep(step)]
        return round(100 * sum(kept) / len(kept), 1)

    prefill, decode = mean(lambda s: s.prefill_tokens > 0), mean(lambda s: s.prefill_tokens == 0)
    by_model = {name: mean(lambda s, name=name: s.engine.startswith(name)) for name in MODELS}  # type: ignore[misc]
    print(f"{kind:9} {precision:5} {len(steps):6}  {prefill:8} / {decode}   {by_model}", flush=True)
    values = {key: float(f"{value:.4g}") for key, value in fit.as_dict().items()}
    return {**values, "error_percent": [prefill, decode]}


def _maker(
    name: str, kind: str, tp: int, precision: Precision
) -> Callable[[Coefficients], StepModel]:
    facts, device = find_model(name), find_device(kind)
    return lambda fit: Roofline(facts, device, fit, tensor_parallel_size=tp, precision=precision)


def _step(draw: random.Random, engine: AiConfigurator, label: str) -> MeasuredStep:
    """A step of decoding alone, or one whole prompt among decoding sequences."""
    if draw.random() < 0.5:
        decoding, context = 2 ** draw.randrange(9), draw.choice([128, 512, 1024, 2048, 4096, 8192])
        load = (0.0, 0.0, float(decoding), float(decoding * context))
    else:
        prompt = 2 ** draw.randrange(7, 14)
        decoding = draw.choice([0, 0, 8, 32, 64, 128, 256])
        load = (
            float(prompt),
            prompt * prompt / 2,
            float(decoding),
            float(decoding * (prompt + 128)),
        )
    return MeasuredStep(
        prefill_tokens=load[0],
        attended_tokens=load[1],
        decode_seqs=load[2],
        kv_tokens=load[3],
        seconds=float(engine.step_s(*load)),
        engine=label,
    )


if __name__ == "__main__":
    main()
