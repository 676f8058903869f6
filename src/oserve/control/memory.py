"""Taking up what an earlier controller remembered, also where the workload types are others now.

Types are found anew when a server starts; then each old type's counts go to the new type with the
nearest centre, which keeps every total (see ``forecast.retype``).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from oserve.control.controller import Controller
from oserve.core import OServeError
from oserve.forecast.retype import mapped, nearest_types

Centres = Sequence[tuple[float, float]]


def remembered(controller: Controller, centres: Centres) -> dict[str, Any]:
    """Plain data that ``recall`` takes; ``centres`` of the types, (prompt, output) in tokens."""
    return {
        "names": list(controller.names),
        "centres": [list(centre) for centre in centres],
        "state": controller.state(),
    }


def same_types(memory: Mapping[str, Any], names: Sequence[str], centres: Centres) -> bool:
    """Whether it was remembered of types of these names and centres."""
    if list(memory["names"]) != list(names) or len(memory["centres"]) != len(centres):
        return False
    return bool(np.allclose(memory["centres"], centres, rtol=1e-3))


def recall(controller: Controller, memory: Mapping[str, Any], centres: Centres) -> bool:
    """Take it up as far as it fits; tells whether anything was."""
    try:
        old = [(float(prompt), float(output)) for prompt, output in memory["centres"]]
        state = memory["state"]
        if same_types(memory, controller.names, centres):
            controller.restore(state)
        else:
            _adopt(controller, state, old, centres)
    except (KeyError, TypeError, ValueError, OServeError):
        return False
    return True


def _adopt(
    controller: Controller, state: Mapping[str, Any], old: Centres, centres: Centres
) -> None:
    """Counts of the old types as counts of the new ones; what follows from them is made anew."""
    goes_to = nearest_types(np.log1p(old), np.log1p(centres))
    k = len(centres)
    history = _history(state["forecaster"])
    controller.monitor.replay_history(mapped(history, goes_to, k))
    held = state["collector"]
    counts = np.array(held["counts"], dtype=np.float64).reshape(-1, len(old))
    controller.monitor.collector.restore(
        {**held, "names": list(controller.names), "counts": mapped(counts, goes_to, k).tolist()}
    )
    controller.restore_course(state)


def _history(state: Mapping[str, Any]) -> Any:
    """The windows that a forecaster of any types saw, oldest first."""
    ring = state["_history"]
    rows = ring["_rows"]
    values = [np.nan if value is None else value for value in rows["values"]]
    table = np.array(values, dtype=np.float64).reshape(rows["shape"])
    seen = int(ring["_seen"])
    places = np.arange(max(0, seen - len(table)), seen) % len(table)
    return table[places]
