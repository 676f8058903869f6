"""The performance model against measurements on real GPUs, and against aiconfigurator.

    .venv/bin/pip install aiconfigurator-core==0.12.0
    .venv/bin/python benchmarks/perf/silicon.py

The wheel carries rows measured end to end with vLLM: b requests kept in flight, I tokens in, O out,
TTFT and TPOT; rate = b / (TTFT + TPOT (O - 1)). Compared here: Llama-3.1-70B in fp8 on H100 and
H200. For bf16, without such rows, steps and rates are compared with aiconfigurator's own.
"""

import csv
import importlib.util
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from oserve.core import Precision, ReplicaShape
from oserve.perf.aiconfigurator import AiConfigurator
from oserve.perf.capacity import closed_loop
from oserve.perf.coefficients import find_coefficients
from oserve.perf.device import find_device
from oserve.perf.known_models import find_model
from oserve.perf.memory import memory_fit
from oserve.perf.roofline import Roofline, StepModel

MODEL = "llama-3.1-70b"
SYSTEMS = {"h100_sxm": "H100", "h200_sxm": "H200"}
# vLLM's default chunk budget for a server on these devices.
CHUNK = 8192


def main() -> None:
    rows = list(measured_rows())
    print(f"{MODEL} fp8, vLLM, measured: {len(rows)} points; mean (median) absolute error in %")
    print(f"{'device':7} {'model':16} {'points':>6} {'TPOT':>14} {'rate':>14}")
    for kind in SYSTEMS.values():
        for provider in ("roofline", "aiconfigurator"):
            errors = [_errors(row, provider) for row in rows if SYSTEMS[row["system"]] == kind]
            tpot, rate = [e[0] for e in errors], [e[1] for e in errors]
            print(f"{kind:7} {provider:16} {len(errors):6} {shown(tpot):>14} {shown(rate):>14}")
    print(f"\n{MODEL} bf16, roofline against aiconfigurator")
    print(f"{'device':7} {'decode step':>14} {'rate':>14}")
    for kind in SYSTEMS.values():
        decode, rates = _against_aiconfigurator(kind)
        print(f"{kind:7} {shown(decode):>14} {shown(rates):>14}")


def measured_rows() -> list[dict[str, str]]:
    """Rows of the wheel's table that are compared."""
    spec = importlib.util.find_spec("aiconfigurator_core")
    if spec is None or spec.origin is None:
        raise SystemExit("install aiconfigurator-core==0.12.0 first (see the top of this file)")
    table = Path(spec.origin).parent / "systems" / "silicon_sample.csv"
    with table.open(encoding="utf-8") as file:
        return [
            row
            for row in csv.DictReader(file)
            if row["backend"] == "vllm"
            and row["model_path"].endswith("Llama-3.1-70B")
            and row["system"] in SYSTEMS
            and row["precision"] == "fp8"
            and row["mode"] == "agg"
        ]


def step_model(kind: str, shape: ReplicaShape, provider: str) -> StepModel:
    if provider == "aiconfigurator":
        return AiConfigurator(MODEL, kind, shape)
    return Roofline(
        find_model(MODEL),
        find_device(kind),
        find_coefficients(kind, shape.precision).coefficients,
        tensor_parallel_size=shape.tensor_parallel_size,
        precision=shape.precision,
    )


def _predict(
    kind: str, shape: ReplicaShape, provider: str, load: tuple[float, float, float]
) -> tuple[float, float]:
    """TPOT in seconds and rate in requests per second, with so many requests in flight."""
    inflight, prompt, output = load
    kv_tokens = memory_fit(find_model(MODEL), shape, find_device(kind).memory_bytes).kv_tokens
    found = closed_loop(
        step_model(kind, shape, provider),
        shape,
        kv_tokens,
        inflight=inflight,
        prompt_tokens=prompt,
        output_tokens=output,
    )
    return found.tpot_s, found.rate_rps


def _errors(row: dict[str, str], provider: str) -> tuple[float, float]:
    shape = ReplicaShape(
        tensor_parallel_size=int(row["tp_size"]),
        precision=Precision.FP8,
        max_num_batched_tokens=CHUNK,
        max_num_seqs=256,
    )
    inflight, prompt, output = (float(row[name]) for name in ("batch_size", "isl", "osl"))
    ttft_s, tpot_s = (float(row[f"silicon_{name}_ms"]) / 1e3 for name in ("ttft", "tpot"))
    rate = inflight / (ttft_s + tpot_s * (output - 1))
    tpot, predicted = _predict(SYSTEMS[row["system"]], shape, provider, (inflight, prompt, output))
    return tpot / tpot_s - 1, predicted / rate - 1


def _against_aiconfigurator(kind: str) -> tuple[list[float], list[float]]:
    decode: list[float] = []
    rates: list[float] = []
    for tp in (4, 8):
        shape = ReplicaShape(
            tensor_parallel_size=tp, max_num_batched_tokens=CHUNK, max_num_seqs=256
        )
        for inflight in (4.0, 16.0, 64.0, 256.0):
            for context in (512.0, 2048.0, 8192.0):
                load = (0.0, 0.0, inflight, inflight * context)
                ours, theirs = (
                    step_model(kind, shape, name).step_s(*load)
                    for name in ("roofline", "aiconfigurator")
                )
                decode.append(float(ours / theirs) - 1)
            for lengths in ((128.0, 1024.0), (1024.0, 1024.0), (2048.0, 128.0), (8192.0, 256.0)):
                own, other = (
                    _predict(kind, shape, name, (inflight, *lengths))[1]
                    for name in ("roofline", "aiconfigurator")
                )
                rates.append(own / other - 1)
    return decode, rates


def shown(errors: Sequence[float]) -> str:
    sizes = np.abs(errors) * 100
    return f"{statistics.fmean(sizes):.1f} ({statistics.median(sizes):.1f})"


if __name__ == "__main__":
    main()
