"""The settings of OServe: a lever stays only if the simulator confirms a gain.

The search begins with the best tuned homogeneous deployment. It tries least expected work instead
of shortest queue; few prompts owed by engines, so that the gateway decides late and can demote
requests that miss their TTFT; chunk budgets and order again; and different shapes with soft pools.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property

from oserve.control.dispatch.overload import OverloadPolicy
from oserve.evaluate.simulator import Levers, Routing, SimulatedServing
from oserve.study.scene import CHUNKS, SEQS
from oserve.study.tune import JSQ, PENALTIES_S, MeasuredServing, Tuner, by_length

INFLIGHT_PER_DEVICE = (4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0)
"""Limits of requests in flight per device that are tried."""

WINDOWS_S = (300.0, 60.0, 0.0)
"""Seconds within which the freshest request goes first; 0: in order of arrival."""

OVERFLOW_S = (0.5, 2.0, 8.0)
_ROUNDS = 2
# The search ends after a round that gains less.
_ENOUGH_GAIN = 1.005


class OServeTuner(Tuner):
    """The static settings of OServe and of its ablations."""

    @cached_property
    def shapes_only(self) -> MeasuredServing:
        """See ``oserve-shapes``."""
        self._said("different shapes")
        return self.race(self.heterogeneous(JSQ, shares=False), self.best_chunk)

    @cached_property
    def assigned(self) -> MeasuredServing:
        """See ``oserve-assign``."""
        self._said("assignment, soft pools")
        candidates: list[SimulatedServing] = []
        for overflow_s in OVERFLOW_S:
            levers = _pools(JSQ, overflow_s)
            candidates += self.heterogeneous(levers)
            candidates.append(self._with(self.shapes_only.serving, levers))
        return self.race(candidates, self.shapes_only)

    @cached_property
    def everything(self) -> MeasuredServing:
        """See ``oserve-static``."""
        self._said("all levers")
        found = max((self.best_tuned, self.assigned), key=lambda item: item.scale)
        steps = (self.ordered, self.routed, self.demoting, self.reshaped, self.mixed)
        for _ in range(_ROUNDS):
            before = found.scale
            for step in steps:
                found = self.race(step(found.serving), found)
            if found.scale <= before * _ENOUGH_GAIN:
                break
        return found

    @cached_property
    def knowing(self) -> MeasuredServing:
        """``everything`` with a router that knows the true output lengths."""
        known = self.measure(
            self.everything.serving, start=self.everything.scale, knows_outputs=True
        )
        return self.race(self.routed(known.serving), known, knows_outputs=True)

    # -- one lever after the other: variations of a serving --------------------------------------
    def routed(self, serving: SimulatedServing) -> Iterable[SimulatedServing]:
        """The live router in place of the shortest queue; routing shares, if any, form pools."""
        yield self._with(serving, replace(serving.levers, routing=Routing.POOLS))

    def demoting(self, serving: SimulatedServing) -> Iterable[SimulatedServing]:
        """Late choice by prompts owed, with demotion: then engines need no order."""
        overload = OverloadPolicy(ttft_s=self.scene.slo.ttft_s)
        levers = replace(serving.levers, overload=overload)
        for order in dict.fromkeys((levers.order, None)):
            yield self._with(serving, replace(levers, order=order))

    def bounded_by_number(self, serving: SimulatedServing) -> Iterable[SimulatedServing]:
        """Limits of requests in flight."""
        for most in INFLIGHT_PER_DEVICE:
            yield self._with(serving, replace(serving.levers, inflight_per_device=most))

    def ordered(self, serving: SimulatedServing) -> Iterable[SimulatedServing]:
        """Order by prompt length, with and without the freshest first."""
        for window_s in WINDOWS_S:
            for penalty_s in (2.0, *PENALTIES_S):
                order = by_length(penalty_s, freshest_first_s=window_s)
                yield self._with(serving, replace(serving.levers, order=order))
        yield self._with(serving, replace(serving.levers, order=None))

    def reshaped(self, serving: SimulatedServing) -> Iterable[SimulatedServing]:
        """Other homogeneous deployments under the same levers."""
        if len(serving.shapes) == 1:
            yield from self.varied(serving, max_num_batched_tokens=CHUNKS, max_num_seqs=SEQS)
        for shape in self.forms((512, 1024)):
            yield self.homogeneous(shape, serving.levers)

    def mixed(self, serving: SimulatedServing) -> Iterable[SimulatedServing]:
        """Different shapes under the same levers, in soft pools and without."""
        for overflow_s in OVERFLOW_S:
            yield from self.heterogeneous(_pools(serving.levers, overflow_s))
        yield from self.heterogeneous(serving.levers, shares=False)

    def _with(self, serving: SimulatedServing, levers: Levers) -> SimulatedServing:
        return replace(serving, levers=levers)


def _pools(levers: Levers, overflow_s: float) -> Levers:
    gateway = replace(levers.gateway, overflow_s=overflow_s)
    return replace(levers, routing=Routing.POOLS, gateway=gateway)
