"""The ladders of a server: built in a worker process, in the background."""

import asyncio
import logging
import time
from typing import Any

from oserve.control.following import FollowPolicy
from oserve.control.ladder import Ladder, in_words, shapes_of
from oserve.control.ladder_table import ladder_document
from oserve.control.runtime import ControllerRuntime
from oserve.control.shelf import LadderNeed
from oserve.evaluate.ladder_maker import LadderProcess, ladder_model
from oserve.plan.planning import PlanRequest

_log = logging.getLogger("oserve.control")


class Ladders:
    """Prepares the ladders that a controller runtime needs, one at a time."""

    def __init__(
        self, runtime: ControllerRuntime, request: PlanRequest, follow: FollowPolicy
    ) -> None:
        self._runtime = runtime
        self._follow = follow
        self._process = LadderProcess(ladder_model(request, follow.goal))
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        self._prepared = ("", 0)
        self._shown: tuple[Ladder, dict[str, Any]] | None = None

    def prepare(self, now_s: float) -> None:
        """Start to build a ladder if the present one does not fit and none is being built."""
        if self._closed or (self._task is not None and not self._task.done()):
            return
        need = self._runtime.ladder_need(now_s)
        if need is not None:
            self._task = asyncio.ensure_future(self._build(need))
            return
        plan, ladder = self._runtime.controller.plan, self._runtime.shelf.ladder
        if ladder is not None and self._prepared != (plan.id, id(ladder)):
            self._prepared = (plan.id, id(ladder))
            self._task = asyncio.ensure_future(asyncio.to_thread(self._runtime.prepare_switches))

    async def _build(self, need: LadderNeed) -> None:
        began_s = time.monotonic()
        try:
            ladder = await asyncio.to_thread(self._process.ladder, need)
        # After any fault of the simulation the present plan stays.
        except Exception:
            if not self._closed:
                _log.exception("a ladder could not be prepared; the present plan stays")
            return
        self._runtime.learn_ladder(need, ladder)
        _log.info(
            "a ladder of %d deployments at %d loads is prepared (%.1f s)",
            len(ladder.deployments),
            len(ladder.loads),
            time.monotonic() - began_s,
        )

    def renew(self, request: PlanRequest) -> None:
        """Build ladders for another request from now on; blocks while one is being built."""
        self._process.renew(ladder_model(request, self._follow.goal))

    def document(self) -> dict[str, Any] | None:
        """The ladder in use, for the status document; ``None`` before the first is built.

        ``load`` is the load now; ``deployment`` the one of the current plan.
        """
        ladder = self._runtime.shelf.ladder
        if ladder is None:
            return None
        # A status is published every second, and the rungs stay the same.
        if self._shown is None or self._shown[0] is not ladder:
            follow = self._follow
            self._shown = ladder, ladder_document(ladder, follow.goal, headroom=follow.headroom)
        controller = self._runtime.controller
        return self._shown[1] | {
            "load": ladder.load(controller.monitor.now_rps()),
            "deployment": in_words(shapes_of(controller.plan.replicas)),
        }

    def close(self) -> None:
        """End the worker process; a ladder that is being built is dropped."""
        self._closed = True
        self._process.close()
