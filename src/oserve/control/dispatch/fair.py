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
from oserve.control.dispatch.flows import FlowHeap, TenantFlow, TierFlows
from oserve.control.dispatch.passing import PassingOrder
from oserve.control.dispatch.state import Queued, RequestState

# Idle flows are looked through once there are so many more than waiting ones.
_FEW_IDLE = 1024
SEEN_AGAIN_S = 1.0
"""Later arrivals of an active tenant are noted again after so long."""
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
        # Those of the flows that wait.
        self._waiting: dict[FlowKey, TenantFlow] = {}
        self._most_idle = _FEW_IDLE
        # Device-seconds charged since ``take_charges``.
        self._new: dict[FlowKey, float] = {}
        # Tenants by their last arrival, the sum of their weights, and their charges not settled.
        self._active: OrderedDict[str, float] = OrderedDict()
        self._active_weight = 0.0
        # Whether more than one tenant is active; otherwise everything is by rank.
        self.several = False
        self._open: dict[str, int] = {}
        # Counts the times that a flow began to wait.
        self._wakes = self._wakes_before = 0

    def use(self, policy: FairPolicy) -> None:
        """Apply another policy from now on."""
        self._policy = policy
        for (_, tenant), flow in self._flows.items():
            flow.weight = policy.weight(tenant)
        self._active_weight = sum(map(policy.weight, self._active))

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
        self._waiting[flow.key] = flow
        if fresh:
            flow.tier.heaps[state.demoted].push(flow)

    def discard(self, state: RequestState) -> None:
        """Remove a request if it waits here."""
        if self._numbers.pop(state.number, None) is None:
            return
        flow = self.flow(state)
        flow.waiting.discard(state)
        flow.late.discard(state)
        if not flow:
            self._waiting.pop(flow.key, None)
            flow.tier.last = flow

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
            PassingOrder(late, [flow for flow in self._waiting.values() if flow.key[0] == name])
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
        promise, tenant = state.promise, state.tenant
        tier = "" if promise is None else promise.tier.name
        found = self._flows.get((tier, tenant))
        return self._flow(tier, tenant) if found is None else found

    def _flow(self, tier: str, tenant: str) -> TenantFlow:
        key = (tier, tenant)
        found = self._flows.get(key)
        if found is None:
            if len(self._flows) > self._most_idle + 2 * len(self._numbers):
                self._drop_idle()
            own = self._tiers.get(tier)
            if own is None:
                own = self._tiers[tier] = TierFlows()
            found = self._flows[key] = TenantFlow(key, self._policy.weight(tenant), own)
        return found

    def end_round(self) -> None:
        """Requests that entered together have been tried."""
        self._wakes_before = self._wakes

    def woke(self, state: RequestState) -> bool:
        """Whether its tenant began to wait in this round."""
        return self.flow(state).woken > self._wakes_before

    def arrived(self, state: RequestState, now_s: float) -> None:
        """A request of a tenant has arrived, which is active for a while."""
        self._seen(state.tenant, now_s)

    def _seen(self, tenant: str, now_s: float) -> None:
        active = self._active
        seen_s = active.get(tenant)
        if seen_s is None:
            self._active_weight += self._policy.weight(tenant)
        elif now_s - seen_s < SEEN_AGAIN_S:
            return
        active[tenant] = now_s
        active.move_to_end(tenant)
        while active[oldest := next(iter(active))] < now_s - self._policy.active_s:
            del active[oldest]
            self._active_weight -= self._policy.weight(oldest)
        self.several = len(active) > 1

    def over_share(self, state: RequestState, slots: float) -> bool:
        """Whether a tenant has its part of so many slots already, and others are active.

        Such a tenant leaves a few slots free (``FairPolicy.reserve``), so that others need not
        wait until one of its requests ends.
        """
        if not self.several:
            return False
        own = self._open.get(state.tenant, 0)
        return own * self._active_weight >= slots * self._policy.weight(state.tenant)

    def crowded_out(self, state: RequestState) -> RequestState:
        """The latest request of the tenant with the most per weight; ``state`` if that is its own.

        What is more urgent than ``state`` stays, and so do streams that resume.
        """
        waiting: dict[str, list[TenantFlow]] = {}
        for (_, tenant), flow in self._waiting.items():
            waiting.setdefault(tenant, []).append(flow)
        loads = {
            tenant: sum(map(len, flows)) / self._policy.weight(tenant)
            for tenant, flows in waiting.items()
        }
        own = loads.get(state.tenant, 0.0)
        for tenant in sorted(loads, key=lambda name: (-loads[name], name)):
            if loads[tenant] <= own:
                break
            found: list[RequestState] = [
                item
                for flow in waiting[tenant]
                for item in (*flow.waiting, *flow.late)
                if isinstance(item.phase, Queued)
                and (item.demoted or item.urgency_s >= state.urgency_s)
            ]
            if found:
                latest: RequestState = max(found, key=lambda item: item.number)
                return latest
        return state

    def charge(
        self, state: RequestState, *, prompt_s: float, per_token_s: float, passes: bool = False
    ) -> Charge:
        """Charge a request that is sent now: device-seconds of its prompt and of each token.

        ``passes``: it takes a slot that a tenant with a lower counter has left free. That one may
        not take it, so no more than one such request counts for whose turn it is.
        """
        flow = self.flow(state)
        if state.number not in self._numbers and not (self._numbers and flow):
            # It passes an empty queue.
            self._passes(flow)
        tokens = state.request.output_tokens if state.request is not None else 0
        charge = Charge(flow, prompt_s, per_token_s, tokens)
        flow.open += 1
        tenant = state.tenant
        self._open[tenant] = self._open.get(tenant, 0) + 1
        most_s = math.inf
        if passes:
            most_s = max(flow.level_s, flow.tier.floor_s() + charge.paid_s / flow.weight)
        self._add(flow, charge.paid_s)
        flow.level_s = min(flow.level_s, most_s)
        return charge

    def settle(self, charge: Charge, output_tokens: float) -> None:
        """Correct a charge: the request had so many output tokens at that replica."""
        self.begun(charge)
        flow = charge.counter
        flow.open -= 1
        tenant = flow.key[1]
        left = self._open.get(tenant, 0) - 1
        if left > 0:
            self._open[tenant] = left
        else:
            self._open.pop(tenant, None)
        spent_s = charge.prompt_s + charge.per_token_s * output_tokens
        if spent_s != charge.paid_s:
            self._add(flow, spent_s - charge.paid_s)
            charge.paid_s = spent_s

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

    @property
    def flows(self) -> int:
        """Tenants and tiers that have a counter."""
        return len(self._flows)

    def take_charges(self) -> dict[FlowKey, float]:
        """Device-seconds charged in this process since the last call, with corrections."""
        taken, self._new = self._new, {}
        return taken

    def charged_elsewhere(self, charged_s: Mapping[FlowKey, float], now_s: float) -> None:
        """Device-seconds that other processes charged anew: as if it had been here."""
        for (tier, tenant), more_s in charged_s.items():
            flow = self._flow(tier, tenant)
            if more_s > 0.0:
                self._seen(tenant, now_s)
                if not flow:
                    self._passes(flow)
            self._raise(flow, more_s / flow.weight)

    def _add(self, flow: ServiceCounter, device_s: float) -> None:
        key = flow.key
        self._new[key] = self._new.get(key, 0.0) + device_s
        if device_s < 0.0:
            self._raise(flow, device_s / flow.weight)
        else:
            flow.level_s += device_s / flow.weight

    def _raise(self, flow: ServiceCounter, by_s: float) -> None:
        flow.level_s += by_s
        if by_s < 0.0 and self._numbers and isinstance(flow, TenantFlow):
            # A heap notices by itself only that a flow went up.
            for late in (False, True):
                if flow.queue(late=late):
                    flow.tier.heaps[late].push(flow)

    def _lift(self, flow: TenantFlow) -> None:
        flow.level_s = max(flow.level_s, flow.tier.floor_s())

    def _passes(self, flow: TenantFlow) -> None:
        """A tenant is served that does not wait: no credit is left of its idle time."""
        tier = flow.tier
        last = tier.last
        if last is flow and not self._numbers:
            return
        floor_s = tier.floor_s() if self._numbers or last is None else last.level_s
        flow.level_s = max(flow.level_s, floor_s)
        tier.last = flow

    def _drop_idle(self) -> None:
        """Forget flows that would be lifted to where they are, or higher, if they came again."""
        kept = {tier.last.key for tier in self._tiers.values() if tier.last is not None}
        floors = {name: tier.floor_s() for name, tier in self._tiers.items()}
        self._flows = {
            key: flow
            for key, flow in self._flows.items()
            if flow or flow.open or key in kept or flow.level_s > floors.get(key[0], 0.0)
        }
        # So many new ones pay for the next look at all of them.
        self._most_idle = max(_FEW_IDLE, 2 * len(self._flows))
