"""What tenants spend reaches every other process exactly once, whatever is lost or starts anew."""

import json
from collections import Counter
from typing import Any, cast

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from oserve.control.dispatch import events as on
from oserve.core import Request
from oserve.gateway.access.limits import TenantLoad
from oserve.gateway.process.client import HubClient
from oserve.gateway.process.hub import Hub
from oserve.gateway.process.hub_lines import HubLine
from oserve.gateway.process.messages import WorkerReport
from oserve.gateway.process.spending import SpendingExchange, SpendingOutbox
from oserve.gateway.runner import RequestRunner
from oserve.gateway.settings import GatewaySettings, TenancySettings, TenantSettings
from oserve.gateway.snapshot import ClusterSnapshot
from oserve.gateway.stream.session import Session
from oserve.gateway.tenants import Tenants

from .conftest import table_of, table_replica


class Process:
    """One process: what it spent, and what it heard of that others spent."""

    def __init__(self, incarnation: int) -> None:
        self.incarnation = incarnation
        self.outbox = SpendingOutbox()
        self.heard = 0
        self.spent, self.reported, self.known = 0, 0, Counter[str]()

    def spend(self, amount: int) -> None:
        self.outbox.add({}, {f"p{self.incarnation}": float(amount)})
        self.spent += amount

    def talk(self, hub: SpendingExchange, now_s: float, *, lost: str) -> None:
        """One report and its reply, either of which may be lost."""
        batch = self.outbox.take()
        if lost == "report":
            return
        reply = hub.take(self.incarnation, batch, self.heard, now_s)
        self.reported = self.spent - sum(map(int, self.outbox._charges.values()))
        if lost == "reply":
            return
        self.outbox.confirm(batch.number)
        if reply.number and reply.number != self.heard:
            self.heard = reply.number
            for name, amount in reply.charges.items():
                self.known[name] += int(amount)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("spend"), st.integers(0, 2), st.integers(1, 9)),
        st.tuples(st.just("talk"), st.integers(0, 2), st.sampled_from(["", "report", "reply"])),
        st.tuples(st.just("restart"), st.integers(0, 2), st.just(0)),
    ),
    max_size=60,
)


@given(steps)
def test_each_batch_counts_once_although_messages_are_lost_and_processes_start_anew(
    script: list[tuple[str, int, Any]],
) -> None:
    hub, made = SpendingExchange(), 3
    alive = [Process(number) for number in range(3)]
    everybody = list(alive)
    # What each knew when it began counts for it no more.
    missed: dict[int, Counter[str]] = {}

    def begin(process: Process) -> None:
        process.talk(hub, 0.0, lost="")
        sums = {f"p{item.incarnation}": item.reported for item in everybody if item is not process}
        missed[process.incarnation] = Counter(sums)

    for process in alive:
        begin(process)
    for what, index, value in script:
        process = alive[index]
        if what == "spend":
            process.spend(value)
        elif what == "talk":
            process.talk(hub, 0.0, lost=value)
        else:
            hub.forget(process.incarnation)
            alive[index] = Process(made)
            everybody.append(alive[index])
            made += 1
            begin(alive[index])
    for _ in range(3):
        for process in alive:
            process.talk(hub, 0.0, lost="")
    for process in alive:
        for other in everybody:
            if other is not process:
                name = f"p{other.incarnation}"
                expected = other.reported - missed[process.incarnation][name]
                assert process.known[name] == expected, name


def test_a_process_that_ends_slowly_reports_to_the_last_and_is_kept_nothing_for() -> None:
    hub = SpendingExchange()
    slow, other = Process(1), Process(2)
    slow.talk(hub, 0.0, lost="")
    other.talk(hub, 0.0, lost="")
    slow.spend(3)
    slow.talk(hub, 0.0, lost="reply")
    hub.forget(1)
    # It tells the same again, and what came last.
    slow.talk(hub, 0.0, lost="")
    slow.spend(4)
    slow.talk(hub, 0.0, lost="")
    other.talk(hub, 0.0, lost="")
    other.talk(hub, 0.0, lost="")
    assert other.known == {"p1": 7}
    assert hub._outboxes.keys() == {2}


def test_a_process_that_starts_knows_of_the_last_minute_but_of_no_charges() -> None:
    hub, first = SpendingExchange(), SpendingOutbox()
    first.add({"a": (50.0, 10.0)}, {"\ta": 5.0})
    hub.take(1, first.take(), 0, 1000.0)
    first.confirm(first.take().number)
    first.add({"a": (1.0, 1.0)}, {"\ta": 5.0})
    hub.take(1, first.take(), 0, 1060.0)
    late = hub.take(2, SpendingOutbox().take(), 0, 1061.0)
    assert (late.uses, late.charges) == ({"a": (51.0, 11.0)}, {})
    assert hub.take(3, SpendingOutbox().take(), 0, 1200.0).uses == {}


class Line:
    """A process's line to the hub, by way of JSON."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub

    async def ask(self, message: bytes, limit_s: float | None) -> bytes:
        del limit_s
        return msgspec.json.encode(self.hub.reply(msgspec.json.decode(message, type=WorkerReport)))


def runner_of(settings: GatewaySettings) -> RequestRunner:
    runner = RequestRunner(settings, None)
    runner.machine.handle(on.TableChanged(table_of(table_replica("r0", "http://r0"))), 0.0)
    return runner


def sent(runner: RequestRunner, number: int, tenant: str) -> None:
    request = Request(
        id=str(number), arrival_s=0.0, workload_type="short", prompt_tokens=100, output_tokens=100
    )
    arrived = on.Arrived(number=number, request=request, tenant=tenant, owner=tenant)
    runner.machine.handle(arrived, 0.0)


async def test_a_server_or_a_process_that_starts_anew_charges_nobody_again() -> None:
    settings = GatewaySettings(
        port=0,
        processes=2,
        tenancy=TenancySettings(default=TenantSettings(requests_per_min=100)),
    )
    runners = [runner_of(settings) for _ in range(3)]
    lines = [Line(Hub()), Line(Hub())]
    lines[1].hub = lines[0].hub
    clients = [
        HubClient(cast("HubLine", line), runner, number)
        for number, (line, runner) in enumerate(zip(lines, runners[:2], strict=True), 1)
    ]

    async def talk(rounds: int = 3) -> None:
        for _ in range(rounds):
            for client in clients:
                await client.sync()

    await talk()
    for number in range(1, 9):
        sent(runners[0], number, "a")
    await talk()

    def level(runner: RequestRunner) -> float:
        flow = runner.machine.waiting.fair._flow("", "a")
        return flow.level_s

    once = level(runners[0])
    assert once > 0.0
    assert abs(level(runners[1]) - once) < 1e-6
    # The next server's hub knows nothing, and hears of the processes one by one.
    lines[0].hub = lines[1].hub = Hub()
    await talk()
    assert abs(level(runners[1]) - once) < 1e-6
    assert abs(level(runners[0]) - once) < 1e-6
    # One that starts is not told of what was served before its time.
    clients.append(HubClient(cast("HubLine", lines[0]), runners[2], 3))
    await talk()
    assert level(runners[2]) == 0.0


def part(tenants: Tenants, tenant: str) -> int:
    session = cast("Session", type("Asking", (), {"tenant": tenant}))
    most = tenants.max_queued(session)
    assert most is not None
    return most


@given(st.integers(1, 50), st.integers(1, 8))
def test_the_parts_of_a_bound_on_waiting_requests_sum_to_it(most: int, processes: int) -> None:
    tenancy = TenancySettings(default=TenantSettings(max_queued=most))
    settings = GatewaySettings(port=1, processes=processes, tenancy=tenancy)
    waiting = [0] * processes
    for turn in range(3 * processes):
        # Each process in turn takes all that it may, by the last reports.
        position = (turn * 3 + 1) % processes
        own = Tenants(settings, runner_of(settings).metrics)
        elsewhere = sum(waiting) - waiting[position]
        loads = {"a": TenantLoad(0, elsewhere)} if elsewhere else {}
        own.follow(ClusterSnapshot(processes=processes, position=position, tenants=loads))
        waiting[position] = max(waiting[position], part(own, "a"))
        assert waiting[position] >= 1 or sum(waiting) == most
    assert sum(waiting) <= most
    if most >= processes:
        parts = []
        for position in range(processes):
            own = Tenants(settings, runner_of(settings).metrics)
            own.follow(ClusterSnapshot(processes=processes, position=position))
            parts.append(part(own, "a"))
        assert sum(parts) == most


def test_requests_in_flight_elsewhere_are_forgotten_when_they_end() -> None:
    settings = GatewaySettings(
        port=1, processes=2, tenancy=TenancySettings(default=TenantSettings(max_inflight=1))
    )
    tenants = Tenants(settings, runner_of(settings).metrics)
    tenants.follow(ClusterSnapshot(processes=2, tenants={"a": TenantLoad(1, 0)}))
    assert tenants.limits.elsewhere("a").inflight == 1
    tenants.follow(ClusterSnapshot(processes=2))
    tenants.limits.admit("a", 1, 0.0)


def test_what_is_spent_survives_json() -> None:
    outbox = SpendingOutbox()
    outbox.add({"a": (1.0, 2.5)}, {"tight\ta": 0.25})
    batch = outbox.take()
    assert msgspec.json.decode(msgspec.json.encode(batch), type=type(batch)) == batch
    assert json.loads(msgspec.json.encode(batch))["charges"] == {"tight\ta": 0.25}
