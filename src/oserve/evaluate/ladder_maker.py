"""Makes the ladders that a controller needs, in this process or in a worker process."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from oserve.control.ladder import Goal, Ladder
from oserve.control.runtime import ControllerRuntime
from oserve.control.shelf import LadderNeed
from oserve.core import Device, LengthClass, ReplicaShape
from oserve.evaluate.capacities import LengthSamples
from oserve.evaluate.ladder import LadderBuilder, LadderCase
from oserve.evaluate.simulator import Levers, Simulator
from oserve.evaluate.switch_scorer import model_of
from oserve.evaluate.verification import SERVED_AS
from oserve.evaluate.worker_process import WorkerProcess
from oserve.perf.corrected import Speeds, corrected
from oserve.perf.table import PerformanceSource
from oserve.plan.planning import PlanRequest
from oserve.traces import Slo

_MOST_BUILT = 64
# Whether another ladder is needed is asked so often.
_ASK_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LadderModel:
    """What all ladders of a server have in common; picklable. See ``LadderCase``."""

    source: PerformanceSource
    names: tuple[str, ...]
    lengths: tuple[LengthSamples, ...]
    devices: tuple[Device, ...]
    classes: tuple[LengthClass, ...]
    shapes: tuple[ReplicaShape, ...]
    levers: Levers
    slo: Slo
    goal: Goal
    min_shapes: int = 1
    mixed: bool = True
    seed: int = 0


class LadderMaker:
    """Makes the ladders of one model."""

    def __init__(self, model: LadderModel) -> None:
        self._model = model
        self._simulator = Simulator(model.source)
        self._speeds = Speeds()

    def ladder(self, need: LadderNeed) -> Ladder:
        """The ladder for a need. Raises OServeError if no shape fits the devices."""
        model = self._model
        if need.speeds != self._speeds:
            self._speeds = need.speeds
            self._simulator = Simulator(corrected(model.source, need.speeds))
        each = math.fsum(part * work for part, work in zip(need.mix, need.work, strict=True))
        rate_rps = len(model.devices) / each if each > 0 else 1.0
        case = LadderCase(
            names=model.names,
            rates=tuple(rate_rps * part for part in need.mix),
            lengths=model.lengths,
            work=need.work,
            devices=model.devices,
            classes=model.classes,
            shapes=model.shapes,
            levers=model.levers,
            slo=model.slo,
            goal=model.goal,
            present=(need.present,),
            min_shapes=model.min_shapes,
            mixed=model.mixed,
            burstiness=need.burstiness,
            seed=model.seed,
        )
        return LadderBuilder(self._simulator, case).build()


class LadderCache:
    """Builds each ladder once, for several runs of one model."""

    def __init__(self, model: LadderModel) -> None:
        self._maker = LadderMaker(model)
        self._built: dict[str, Ladder] = {}

    def ladder(self, need: LadderNeed) -> Ladder:
        """See ``LadderMaker``."""
        key = repr(need)
        if key not in self._built:
            if len(self._built) >= _MOST_BUILT:
                self._built.clear()
            self._built[key] = self._maker.ladder(need)
        return self._built[key]


class LadderFeed:
    """Gives a controller runtime its ladders on a virtual clock, as a server does in real time.

    The first is there at once, further ones after ``build_s`` seconds.
    """

    def __init__(self, ladders: LadderCache, *, build_s: float = 30.0) -> None:
        self._ladders = ladders
        self._build_s = build_s
        self._asked_s = -math.inf
        self._coming: tuple[float, LadderNeed, Ladder] | None = None

    def tick(self, runtime: ControllerRuntime, now_s: float) -> None:
        """Once a second, before the runtime decides."""
        if self._coming is not None:
            ready_s, need, ladder = self._coming
            if now_s >= ready_s:
                runtime.learn_ladder(need, ladder)
                self._coming = None
            return
        if now_s < self._asked_s + _ASK_S:
            return
        self._asked_s = now_s
        wanted = runtime.ladder_need(now_s)
        if wanted is None:
            return
        ladder = self._ladders.ladder(wanted)
        if runtime.shelf.ladder is None:
            runtime.learn_ladder(wanted, ladder)
        else:
            self._coming = (now_s + self._build_s, wanted, ladder)


class LadderProcess:
    """A ``LadderMaker`` in a worker process. Calls block; make them in a thread."""

    def __init__(self, model: LadderModel) -> None:
        self._worker = WorkerProcess(partial(LadderMaker, model))

    def ladder(self, need: LadderNeed) -> Ladder:
        """See ``LadderMaker``."""
        return self._worker.call(LadderMaker.ladder, need)

    def renew(self, model: LadderModel) -> None:
        """Make ladders of another model from now on; waits for one that is being made."""
        self._worker.renew(partial(LadderMaker, model))

    def close(self) -> None:
        """End the worker process."""
        self._worker.close()


def ladder_model(
    request: PlanRequest,
    goal: Goal,
    *,
    lengths: Sequence[LengthSamples] = (),
    levers: Levers = SERVED_AS,
) -> LadderModel:
    """The model for a plan request; for ``lengths`` see ``model_of``."""
    model = model_of(request, min_gain=0.0, lengths=lengths, levers=levers)
    return LadderModel(
        source=request.source,
        names=tuple(kind.name for kind in request.demand.types),
        lengths=model.lengths,
        devices=model.devices,
        classes=model.classes,
        shapes=request.shapes,
        levers=levers,
        slo=model.slo,
        goal=goal,
        min_shapes=request.min_shapes,
        seed=model.seed,
    )
