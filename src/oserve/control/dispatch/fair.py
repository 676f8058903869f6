"""Fair shares between tenants: virtual counters, charged in device-seconds.

Each tenant has a counter in each tier (VTC, arXiv 2401.00588): the device-seconds that its requests
were charged, divided by its weight. Of the tenants that wait, the one with the lowest counter goes
next. A dispatch charges the expected work at the replica chosen, times the replica's devices; the
end of the answer corrects that. A tenant that waited for nothing is lifted to the lowest counter of
those that wait, so idle time saves no credit. Somebody is served whenever a replica has room.

If estimates are exact, the counters of two tenants that wait all the time never differ by more than
the largest request, so their service over any time differs by at most twice that. A bounded debt
for locality adds itself to both, and so do errors of estimates of requests in flight, until those
end.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping

from oserve.control.dispatch.charge import Charge, FlowKey, ServiceCounter
from oserve.control.dispatch.fair_policy import FairPolicy
from oserve.control.dispatch.flows import TenantFlow
from oserve.control.dispatch.passing import PassingOrder
from oserve.control.dispatch.state import RequestState
from oserve.control.dispatch.tier_flows import FlowHeap, TierFlows

# Idle flows are dropped once there are so many more than waiting ones.
_MOST_IDLE = 1024
LEAD = 2.0
"""By how much the time until an engine begins a tenant's requests may be underestimated."""
MOST_AHEAD_S = 60.0
"""The furthest that a tenant's requests are put back in an engine's queue, in seconds."""


class FairQueue:
    """Waiting requests: fairly between the tenants of a tier, by rank otherwise.

    Has the interface of ``RankQueue``, whose order it has where there is one tenant only.
    ``saved_s``: the prompt work that a request would be spared by a cached prefix, in seconds.
    """

    def __init__(self, saved_s: Callable[[RequestState], float] | None = None) -> None:
        self._policy = FairPolicy()
        self._flows: dict[FlowKey, TenantFlow] = {}
        self._tiers: dict[str, TierFlows] = {}
        self._numbers: dict[int, RequestState] = {}
        self._saved_s = saved_s
        self._elsewhere: dict[FlowKey, float] = {}
        # Tenants by their last arrival, and the sum of their weights.
        self._active: OrderedDict[str, float] = OrderedDict()
        self._active_weight = 0.0
        # By tenant, in all tiers: requests with open charges. Counts the times a flow woke up.
        self._open: dict[str, int] = {}
        self._wakes = self._wakes_before = 0

    def use(self, policy: FairPolicy) -> None:
        """Apply another policy from now on."""
        self._policy = policy
        for (_, tenant), flow in self._flows.items():
            flow.weight = policy.weight(tenant)

    # -- as RankQueue ---------------------------------------------------------------------------
    def __len__(self) -> int:
        return len(self._numbers)

    def __contains__(self, state: RequestState) -> bool:
        return state.number in self._numbers

    def __iter__(self) -> Iterator[RequestState]:
        return iter(self._numbers.values())

    @property
    def entries(self) -> int:
        """Entries in the largest heap, stale ones included."""
        own = [max(flow.waiting.entries, flow.late.entries) for flow in self._flows.values()]
        flows = [heap.entries for tier in self._tiers.values() for heap in tier.heaps]
        return max((*own, *flows), default=0)

    def push(self, state: RequestState) -> None:
        """Add a request, or move it after a change of its rank."""
        flow = self.flow(state)
        if not flow:
            self._lift(flow)
            self._wakes += 1
            flow.woken = self._wakes
        self._numbers[state.number] = state
        flow.queue(late=not state.demoted).discard(state)
        queue = flow.queue(late=state.demoted)
        fresh = not queue
        queue.push(state)
        if fresh:
            self._tier(flow).heaps[state.demoted].push(flow)

    def discard(self, state: RequestState) -> None:
        """Remove a request if it waits here."""
        if self._numbers.pop(state.number, None) is None:
            return
        flow = self.flow(state)
        flow.waiting.discard(state)
        flow.late.discard(state)
        if not flow:
            self._tier(flow).last = flow

    def head(self) -> RequestState | None:
        """The request to serve next."""
        best: RequestState | None = None
        for tier in self._tiers.values():
            for late in (False, True):
                found = self._first(tier.heaps[late], late=late)
                if found is not None and (
                    best is None or (found.rank_s, found.number) < (best.rank_s, best.number)
                ):
                    best = found
        return best

    def _first(self, heap: FlowHeap, *, late: bool) -> RequestState | None:
        flow = heap.lowest()
        if flow is None:
            return None
        if self._policy.debt_s > 0.0 and self._saved_s is not None:
            near = heap.lowest_within(self._policy.debt_s)
            if len(near) > 1:
                heads = [found for one in near if (found := one.queue(late=late).head())]
                # Of equal savings the lowest counter goes first.
                return max(heads, key=self._saved_s, default=None)
        return flow.queue(late=late).head()

    def passing(
        self, skip: Callable[[RequestState], bool] = lambda _: False
    ) -> Iterator[RequestState]:
        """All waiting requests in order of service, each once.

        ``skip``: whether nothing more of this request's tenant is to be tried.

        A request that is sent, demoted or refused while this runs changes the order of the rest.
        """
        groups = [
            PassingOrder(late, [flow for flow in self._flows.values() if flow.key[0] == name])
            for name in self._tiers
            for late in (False, True)
        ]
        while True:
            heads = [
                (head.rank_s, head.number, at) for at, g in enumerate(groups) if (head := g.head())
            ]
            if not heads:
                return
            at = min(heads)[2]
            first = groups[at].head()
            if first is not None and skip(first):
                groups[at].drop()
                continue
            state = groups[at].take()
            if state.number not in self._numbers or state.demoted != groups[at].late:
                continue
            yield state
            if state.demoted and not groups[at].late and state.number in self._numbers:
                groups[at + 1].add(self.flow(state), state)

    # -- counters -------------------------------------------------------------------------------
    def flow(self, state: RequestState) -> TenantFlow:
        """The flow of a request."""
        tier = state.tier
        key = ("" if tier is None else tier.name, state.tenant)
        found = self._flows.get(key)
        if found is None:
            if len(self._flows) > _MOST_IDLE + 2 * len(self._numbers):
                self._drop_idle()
            found = self._flows[key] = TenantFlow(key, self._policy.weight(state.tenant))
        return found

    def end_round(self) -> None:
        """Requests that entered together have been tried."""
        self._wakes_before = self._wakes

    def woke(self, state: RequestState) -> bool:
        """Whether its tenant began to wait in this round."""
        return self.flow(state).woken > self._wakes_before

    def arrived(self, state: RequestState, now_s: float) -> None:
        """A request of a tenant has arrived, which is active for a while."""
        weight = self._policy.weight
        if self._active.pop(state.tenant, None) is None:
            self._active_weight += weight(state.tenant)
        self._active[state.tenant] = now_s
        while True:
            oldest = next(iter(self._active))
            if self._active[oldest] >= now_s - self._policy.active_s:
                return
            del self._active[oldest]
            self._active_weight = sum(weight(tenant) for tenant in self._active)

    def over_share(self, state: RequestState, slots: float) -> bool:
        """Whether a tenant has its part of so many slots already, and others are active.

        Such a tenant leaves a few slots free (``FairPolicy.reserve``), so that others need not
        wait until one of its requests ends.
        """
        if len(self._active) < 2:
            return False
        weight = self._policy.weight(state.tenant)
        return self._open.get(state.tenant, 0) * self._active_weight >= slots * weight

    def waiting_of(self, state: RequestState) -> int:
        """How many requests of its tenant wait in its tier."""
        return len(self.flow(state))

    def crowded_out(self, state: RequestState) -> RequestState:
        """The latest request of the tenant with the most per weight; ``state`` if that is its."""
        own = self.flow(state)
        flows = self._flows.values()
        most = max(len(flow) / flow.weight for flow in flows)
        if most <= len(own) / own.weight:
            return state
        found = (
            item
            for flow in flows
            if len(flow) / flow.weight == most
            for item in (*flow.waiting, *flow.late)
        )
        latest: RequestState = max(found, key=lambda item: item.number)
        return latest

    def charge(
        self, state: RequestState, *, prompt_s: float, per_token_s: float, passes: bool = False
    ) -> Charge:
        """Charge a request that is sent now: device-seconds of its prompt and of each token.

        ``passes``: it takes a slot that a tenant with a lower counter has left free. That one may
        not take it, so no more than one such request counts for whose turn it is.
        """
        flow = self.flow(state)
        if state.number not in self._numbers and not flow:
            # It passes an empty queue.
            self._lift(flow)
            self._tier(flow).last = flow
        tokens = state.request.output_tokens if state.request is not None else 0
        charge = Charge(flow, prompt_s, per_token_s, tokens)
        flow.open += 1
        self._open[state.tenant] = self._open.get(state.tenant, 0) + 1
        most_s = math.inf
        if passes:
            floor_s = self._tier(flow).floor_s()
            most_s = max(flow.level_s, floor_s + charge.paid_s / flow.weight)
        self._add(flow, charge.paid_s)
        flow.level_s = min(flow.level_s, most_s)
        return charge

    def settle(self, charge: Charge, output_tokens: float) -> None:
        """Correct a charge: the request had so many output tokens at that replica."""
        charge.counter.open -= 1
        self.begun(charge)
        self._close(charge.counter.key[1])
        spent_s = charge.prompt_s + charge.per_token_s * output_tokens
        self._add(charge.counter, spent_s - charge.paid_s)
        charge.paid_s = spent_s

    def _close(self, tenant: str) -> None:
        left = self._open[tenant] - 1
        if left:
            self._open[tenant] = left
        else:
            del self._open[tenant]

    def begun(self, charge: Charge) -> None:
        """The replica has computed the prompt of a request, or has lost it. Idempotent."""
        if not charge.begun:
            charge.begun = True
            charge.counter.unbegun_s -= charge.paid_s

    def engine_rank_s(self, charge: Charge, now_s: float, replicas: int) -> float:
        """The rank of a request in an engine's queue; called once, when it is sent.

        That is about when its tenant's share of the engines would begin it: now, and the charges of
        its other requests that no engine has begun. So a late comer goes before what others have
        queued there, however long that takes. Within a tenant it keeps the order of dispatch.
        """
        flow = charge.counter
        weights = max(flow.weight, self._active_weight)
        ahead_s = LEAD * flow.unbegun_s * weights / flow.weight / max(1, replicas)
        flow.unbegun_s += charge.paid_s
        flow.tag_s = max(flow.tag_s, now_s + min(ahead_s, MOST_AHEAD_S))
        return flow.tag_s

    def charged_s(self) -> dict[FlowKey, float]:
        """Device-seconds charged in this process so far."""
        return {key: flow.charged_s for key, flow in self._flows.items() if flow.charged_s}

    def set_elsewhere(self, charged_s: Mapping[FlowKey, float]) -> None:
        """Device-seconds charged by other processes so far; a lower sum than before is new."""
        for key, sum_s in charged_s.items():
            before_s = self._elsewhere.get(key, 0.0)
            more_s = sum_s - before_s if sum_s >= before_s else sum_s
            flow = self._flows.get(key)
            if more_s and flow is None:
                flow = self._flows[key] = TenantFlow(key, self._policy.weight(key[1]))
            if more_s and flow is not None:
                self._raise(flow, more_s / flow.weight)
        self._elsewhere = dict(charged_s)

    def _add(self, flow: ServiceCounter, device_s: float) -> None:
        flow.charged_s += device_s
        self._raise(flow, device_s / flow.weight)

    def _raise(self, flow: ServiceCounter, by_s: float) -> None:
        flow.level_s += by_s
        if by_s < 0.0 and isinstance(flow, TenantFlow):
            # A heap notices by itself only that a flow went up.
            for late in (False, True):
                if flow.queue(late=late):
                    self._tier(flow).heaps[late].push(flow)

    def _lift(self, flow: TenantFlow) -> None:
        flow.level_s = max(flow.level_s, self._tier(flow).floor_s())

    def _tier(self, flow: TenantFlow) -> TierFlows:
        found = self._tiers.get(flow.key[0])
        if found is None:
            found = self._tiers[flow.key[0]] = TierFlows()
        return found

    def _drop_idle(self) -> None:
        """Forget flows that would be lifted to where they are, or higher, if they came again."""
        kept = {tier.last.key for tier in self._tiers.values() if tier.last is not None}
        floors = {name: tier.floor_s() for name, tier in self._tiers.items()}
        self._flows = {
            key: flow
            for key, flow in self._flows.items()
            if flow or flow.open or key in kept or flow.level_s > floors.get(key[0], 0.0)
        }
