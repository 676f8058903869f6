"""The facts that switches are prepared from, taken from the settings."""

from collections.abc import Callable, Mapping
from functools import partial

from oserve.config import Settings, parse_plan
from oserve.core import Device, OServeError
from oserve.engines.main_memory import available_memory_bytes
from oserve.perf.device import Link
from oserve.perf.source import DEFAULT_NETWORK
from oserve.switch.learned import LearnedPhases
from oserve.switch.programme import SwitchFacts
from oserve.switching.journal import Recovered, journal_folder, recover
from oserve.switching.model import movable_model


def switch_facts(
    settings: Settings,
    devices: tuple[Device, ...],
    *,
    network: str | Link = DEFAULT_NETWORK,
    measured: Callable[[], Mapping[tuple[str, str], float]] = dict,
    learned: LearnedPhases | None = None,
    available_bytes: Callable[[], int] = available_memory_bytes,
) -> SwitchFacts | str:
    """The facts for switches that move weights, or the reason why weights cannot be moved.

    ``network``, ``measured``: see ``SwitchFacts``.
    """
    if settings.switch.method == "restart":
        return "switch.method requires restarts"
    try:
        on_cpu = all(device.kind == "cpu" for device in devices)
        model = movable_model(
            settings.model,
            keep_weights=settings.engines.keep_weights,
            variants=settings.engines.variants,
            on_cpu=on_cpu,
        )
    except OServeError as error:
        return error.message
    return SwitchFacts(
        model=model,
        devices=devices,
        kv_cache_memory_bytes=settings.engines.kv_cache_memory_bytes or 0,
        available_bytes=available_bytes,
        network=network,
        measured=measured,
        learned=learned or LearnedPhases(),
    )


def recovered_switch(settings: Settings, at_s: float) -> Recovered | None:
    """The unfinished switch of the last server; see ``switching.journal``."""
    return recover(journal_folder(settings.state_dir), at_s, partial(parse_plan, place="journal"))
