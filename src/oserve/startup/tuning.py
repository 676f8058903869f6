"""Builds the background tuning of a server."""

import time
from pathlib import Path

import msgspec

from oserve.control.decision import Mode
from oserve.control.retuning import RetuningPolicy, RetuningState, resumed
from oserve.core import Clock
from oserve.evaluate.background_tuning import (
    BackgroundTuning,
    ConstantsAsGiven,
    StoredRecords,
    TuningFacts,
    TuningProcess,
)
from oserve.gateway.constants import constants_of
from oserve.startup.deployment import ServerDeployment
from oserve.startup.store import StateStore, StateUpdate
from oserve.traces import Slo

_SAVED_AS = "tuning"


def background_tuning(
    deployment: ServerDeployment, clock: Clock
) -> BackgroundTuning | ConstantsAsGiven:
    """The tuning that continues where the last server ended, or none if it is off.

    What an earlier server changed stays in force, and on trial, unless the settings give other
    constants than then.
    """
    facts = tuning_facts(deployment)
    given = constants_of(deployment.settings.gateway)
    if facts is None:
        return ConstantsAsGiven(given)
    store = StateStore(deployment.state_file)
    state = resumed(store.saved(_SAVED_AS, RetuningState), given)
    if facts.mode is not Mode.AUTO:
        state = msgspec.structs.replace(state, present=given, trial=None)
    return BackgroundTuning(
        facts,
        state,
        search=TuningProcess(facts),
        records=StoredRecords(facts.records, facts.slo),
        clock=clock,
        unix_s=time.time,
        save=lambda item: store.save(StateUpdate(memory={_SAVED_AS: msgspec.json.encode(item)})),
    )


def tuning_facts(deployment: ServerDeployment) -> TuningFacts | None:
    """The facts of the search; ``None`` if tuning is off."""
    settings, times = deployment.settings, deployment.times
    control, planning, gateway = settings.control, settings.planning, settings.gateway
    if control.tune is Mode.OFF or times is None:
        return None
    ttft_ms, tpot_ms = planning.slo_ttft_ms, planning.slo_tpot_ms
    demotes_by_ms = gateway.overload.ttft_ms
    return TuningFacts(
        mode=control.tune,
        records=Path(gateway.records_file),
        source=times.source,
        context=times.context,
        devices=deployment.devices,
        slo=Slo(
            ttft_s=None if ttft_ms is None else ttft_ms / 1e3,
            tpot_s=None if tpot_ms is None else tpot_ms / 1e3,
        ),
        demotes_by_s=None if demotes_by_ms is None else demotes_by_ms / 1e3,
        ordered=gateway.order.policy == "priority",
        policy=RetuningPolicy(interval_s=control.tune_interval_s),
        min_gain=control.tune_min_gain,
    )
