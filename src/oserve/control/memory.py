"""The saved state of a controller, and how it is restored when the workload types have changed.

Workload types are fitted anew when a server starts. Then the counts of each old type go to the new
type with the nearest centre, which keeps every total (see ``forecast.retype``). The forecaster also
learns anew where it has to say other quantiles.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from oserve.control.controller import Controller
from oserve.core import OServeError
from oserve.forecast.forecaster import QUANTILES
from oserve.forecast.retype import mapped, nearest_types, saved_history

Centres = Sequence[tuple[float, float]]


def remembered(controller: Controller, centres: Centres) -> dict[str, Any]:
    """State for ``recall``; ``centres`` of the types are (prompt, output) lengths in tokens."""
    return {
        "names": list(controller.names),
        "centres": [list(centre) for centre in centres],
        "quantiles": list(controller.monitor.quantiles),
        "state": controller.state(),
    }


def same_types(memory: Mapping[str, Any], names: Sequence[str], centres: Centres) -> bool:
    """Whether the saved state is of types with these names and centres."""
    if list(memory["names"]) != list(names) or len(memory["centres"]) != len(centres):
        return False
    return bool(np.allclose(memory["centres"], centres, rtol=1e-3))


def recall(controller: Controller, memory: Mapping[str, Any], centres: Centres) -> bool:
    """Restore as much as fits; returns whether anything did."""
    try:
        old = [(float(prompt), float(output)) for prompt, output in memory["centres"]]
        state = memory["state"]
        # Older versions stored no quantiles, and had these.
        levels = tuple(memory.get("quantiles", QUANTILES))
        if same_types(memory, controller.names, centres) and levels == controller.monitor.quantiles:
            controller.restore(state)
        else:
            _restore_mapped(controller, state, old, centres)
    except (KeyError, TypeError, ValueError, OServeError):
        return False
    return True


def _restore_mapped(
    controller: Controller, state: Mapping[str, Any], old: Centres, centres: Centres
) -> None:
    """Map counts of the old types to the new ones; the forecaster learns from them anew."""
    goes_to = nearest_types(np.log1p(old), np.log1p(centres))
    k = len(centres)
    history = saved_history(state["forecaster"])
    controller.monitor.replay_history(mapped(history, goes_to, k))
    held = state["collector"]
    counts = np.array(held["counts"], dtype=np.float64).reshape(-1, len(old))
    controller.monitor.collector.restore(
        {**held, "names": list(controller.names), "counts": mapped(counts, goes_to, k).tolist()}
    )
    controller.restore_course(state)
