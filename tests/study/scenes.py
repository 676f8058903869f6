"""Small scenes: few devices, a short trace, few shapes to search."""

from oserve.config import load_cluster
from oserve.study.scene import Scene, SceneChoice, make_scene
from oserve.traces import Slo, TraceRequest, synthesise


def requests(rate_rps: float = 6.0, duration_s: float = 40.0, seed: int = 3) -> list[TraceRequest]:
    return list(synthesise(rate_rps=rate_rps, duration_s=duration_s, seed=seed))


def small_scene(
    *,
    cluster: str = "4xH100",
    duration_s: float = 40.0,
    interval_s: float = 10.0,
    rate_rps: float = 3.0,
) -> Scene:
    return make_scene(
        SceneChoice(
            model="qwen3-32b",
            devices=load_cluster(cluster).devices,
            slo=Slo(ttft_s=1.0, tpot_s=0.05),
            chunks=(512, 2048),
            seqs=(64,),
            tensor_parallel_sizes=(2, 4),
            pipeline_parallel_sizes=(1,),
            interval_s=interval_s,
        ),
        requests(rate_rps, duration_s),
        source_name="synthetic",
    )
