"""What tuning a server may do, and what the next server continues with."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from oserve.config import Settings, load_cluster, load_settings, parse_plan
from oserve.control.decision import Mode
from oserve.control.retuning import Attainment, changed
from oserve.core import OServeError, VirtualClock
from oserve.evaluate.background_tuning import BackgroundTuning, ConstantsAsGiven
from oserve.perf.selection import SourceChoice, find_source
from oserve.startup.deployment import ServerDeployment
from oserve.startup.first_plan import NoStepTimes, StepTimes
from oserve.startup.tuning import background_tuning
from oserve.startup.tuning_check import check_tuning

DEVICES = load_cluster("1xL40S").devices
PLAN = parse_plan("replicas: [{id: r0, devices: ['gpu:0']}]", place="plan")
ATTACHED = parse_plan("replicas: [{id: r0, attach: {url: 'http://127.0.0.1:1'}}]", place="plan")


@pytest.fixture(scope="module")
def times() -> StepTimes:
    source, context = find_source(
        SourceChoice(model="qwen3-8b", devices=DEVICES, network="infiniband-400")
    )
    return StepTimes(source=source, context=context)


def settings(more: dict[str, Any] | None = None, folder: Path = Path()) -> Settings:
    given = {"model": "m", "state_dir": str(folder), "planning.slo_ttft_ms": 2000}
    return load_settings(None, given | {"control.tune": "auto"} | (more or {}), {})


def deployed(settings: Settings, times: StepTimes) -> ServerDeployment:
    return ServerDeployment(
        settings=settings, devices=DEVICES, plan=PLAN, models=("m",), why="", times=times
    )


def test_what_cannot_be_simulated_cannot_be_tuned(times: StepTimes) -> None:
    check_tuning(settings(), PLAN, times)
    check_tuning(settings({"control.tune": "off"}), ATTACHED, NoStepTimes(reason="none"))
    for plan, source, more, expected in (
        (ATTACHED, times, {}, "attached"),
        (PLAN, NoStepTimes(reason="nothing was measured"), {}, "nothing was measured"),
        (PLAN, times, {"planning.slo_ttft_ms": None}, "no SLO"),
    ):
        with pytest.raises(OServeError, match=expected) as refused:
            check_tuning(settings(more), plan, source)
        assert refused.value.place == "control.tune"


def test_the_next_server_continues_a_trial_unless_its_settings_differ(
    tmp_path: Path, times: StepTimes
) -> None:
    def started(more: dict[str, Any] | None = None) -> BackgroundTuning:
        made = background_tuning(deployed(settings(more, tmp_path), times), VirtualClock())
        assert isinstance(made, BackgroundTuning)
        return made

    first = started()
    other = replace(first.constants, overflow_s=8.0)
    state = changed(first.state, other, Attainment(requests=1000, met=970), now_s=5.0)
    first._save(state)
    assert started().state == state
    assert started().constants == other
    assert started({"control.tune": "advise"}).constants == state.given
    fresh = started({"gateway.overflow_s": 0.5})
    assert fresh.state.trial is None
    assert fresh.constants.overflow_s == 0.5
    off = background_tuning(
        deployed(settings({"control.tune": "off"}, tmp_path), times), VirtualClock()
    )
    assert isinstance(off, ConstantsAsGiven)
    assert off.document() == {"mode": Mode.OFF.value}
    assert msgspec.json.encode(first.document())
