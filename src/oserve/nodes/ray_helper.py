"""The helper process between a server and Ray: ``python -m oserve.nodes.ray_helper``.

It alone imports Ray. Ray's calls block while its head is away, and its library can abort the
process that uses it; both are harmless here: calls to the head are made in a thread of their own,
and the server starts this process again when it ends. It tells the server which nodes there are
(``ray_messages``), and keeps one agent on each: a detached actor, pinned to its node, that holds
the node's GPUs or slots in Ray and is found again by its name. No request and no weight passes
through Ray.
"""

import contextlib
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import ray
from ray.exceptions import ActorDiedError, RayError
from ray.util import list_named_actors
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from oserve import __version__
from oserve.core import OServeError
from oserve.nodes.agent import NodeAgent
from oserve.nodes.agent_messages import NodeRefusal, answer_of
from oserve.nodes.node_ledger import (
    AGENT_PREFIX,
    GPU_RESOURCE,
    SLOT_RESOURCE,
    NodeLedger,
    RayNode,
    offered_devices,
    other_agents,
    ray_node,
)
from oserve.nodes.ray_address import check_ray_address, own_ray_address
from oserve.nodes.ray_joining import RAYLET_REMEDY, HelperLines, TokenWatch, await_raylet, knock
from oserve.nodes.ray_messages import (
    PROTOCOL_VERSION,
    HelperEvent,
    HelperFailure,
    HelperReady,
    HelperShutdown,
    HelperStart,
    NodesOffered,
    NodesSettled,
    RayBack,
    RaySilent,
    command_of,
)

_STEP_S = 0.1
_CONNECT_S = 90.0
_GOODBYE_S = 20.0
_MAX_LISTS = 4
_OTHER_S = 8.0
_HELD = "its agent does not start there: another job or actor may hold its GPUs or slots in Ray"
_OTHER_REMEDY = (
    "stop that server, which gives them back; if its machine is gone for good, ray.kill the actors "
    "of that namespace"
)
_REFUSED = "the Ray cluster refuses this process's token, or it has none"
_REFUSED_REMEDY = (
    "give this command the token of the cluster as Ray has it there: RAY_AUTH_MODE=token and "
    "RAY_AUTH_TOKEN_PATH"
)
_HELD_REMEDY = "see ray status; end what holds them, or offer fewer to Ray"


@dataclass(slots=True)
class _Tended:
    """The agent of one node: its handle, and the call under way."""

    handle: Any = None
    call: Any = None
    due_s: float = 0.0
    replaced: bool = False


class RayHelper:
    """Watches the nodes of one Ray cluster for one server."""

    def __init__(self, start: HelperStart, tell: Callable[[HelperEvent], None]) -> None:
        self._start = start
        self._tell = tell
        self._ledger = NodeLedger(refuse_s=start.refuse_s)
        self._tended: dict[str, _Tended] = {}
        # From the thread that talks to the head, and to it.
        self._lists: queue.Queue[list[RayNode]] = queue.Queue(_MAX_LISTS)
        self._handles: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._wanted: dict[str, tuple[str, RayNode]] = {}
        self._dropped: set[str] = set()
        self._others: dict[str, str] = {}
        self._heard_s = time.monotonic()
        self._silent = False
        self._settled = False
        self._trouble = ""
        self.asked_to_end = threading.Event()
        self.end_nodes = False
        self._ended = threading.Event()

    def run(self) -> None:
        """Watch until told to end."""
        self._heard_s = time.monotonic()
        threading.Thread(target=self._ask_head, daemon=True).start()
        while not self.asked_to_end.is_set():
            self._listen()
            self._call_agents()
            self._collect()
            if self._ledger.settled and not self._settled:
                self._settled = True
                self._tell(NodesSettled())
        if self.end_nodes:
            self._end_agents()
        self._ended.set()

    # -- the thread that talks to the head ------------------------------------------------------
    def _ask_head(self) -> None:
        """All calls that block while the head is away."""
        made: dict[str, Any] = {}
        while not self._ended.is_set():
            try:
                nodes = [ray_node(item) for item in ray.nodes()]
                with contextlib.suppress(queue.Full):
                    self._lists.put_nowait(nodes)
                for key in list(self._dropped):
                    self._dropped.discard(key)
                    made.pop(key, None)
                wanted = self._wanted
                for key in made.keys() - wanted.keys():
                    del made[key]
                for key, (_, node) in wanted.items():
                    if key not in made:
                        made[key] = self._agent(node)
                        self._handles.put((key, made[key]))
                if not self._settled:
                    self._others = other_agents(
                        list_named_actors(all_namespaces=True), self._start.namespace
                    )
                self._trouble = ""
            # Whatever Ray raises, the next round tries again.
            except Exception as error:
                self._trouble = _brief(error)
            self._ended.wait(self._start.poll_s)

    def _agent(self, node: RayNode) -> Any:
        """The agent of a node, which is started if there is none."""
        offered = dict(node.offered)
        gpus = offered.pop(GPU_RESOURCE, 0)
        actor = ray.remote(NodeAgent).options(
            name=f"{AGENT_PREFIX}{node.id}",
            namespace=self._start.namespace,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            max_task_retries=0,
            num_cpus=0,
            num_gpus=gpus,
            resources=offered,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
        )
        return actor.remote()

    # -- the main thread ------------------------------------------------------------------------
    def _listen(self) -> None:
        """Take up lists of nodes, and notice when none come."""
        now_s = time.monotonic()
        while True:
            try:
                nodes = self._lists.get_nowait()
            except queue.Empty:
                break
            self._heard_s = now_s
            for event in self._ledger.observe(nodes, now_s):
                self._tell(event)
            self._wanted = self._ledger.living()
            for key in self._tended.keys() - self._wanted.keys():
                del self._tended[key]
        while not self._handles.empty():
            key, handle = self._handles.get()
            if key in self._wanted:
                self._tended.setdefault(key, _Tended()).handle = handle
        away_s = now_s - self._heard_s
        if away_s >= self._start.silence_s and not self._silent:
            self._silent = True
            reason = self._trouble or f"Ray's head has not answered for {away_s:.0f} s"
            self._tell(RaySilent(reason=reason))
        elif self._silent and away_s < self._start.silence_s:
            self._silent = False
            self._tell(RayBack())

    def _call_agents(self) -> None:
        now_s = time.monotonic()
        for key, agent in self._tended.items():
            if agent.handle is None or agent.call is not None or now_s < agent.due_s:
                continue
            agent.due_s = now_s + self._start.tend_s
            agent.call = agent.handle.up.remote(self._orders(key))

    def _orders(self, key: str) -> bytes:
        name, node = self._wanted[key]
        orders = msgspec.structs.replace(
            self._start.orders,
            node=name,
            host=node.address,
            gpus=int(node.offered.get(GPU_RESOURCE, 0)),
            slots=int(node.offered.get(SLOT_RESOURCE, 0)),
        )
        return msgspec.json.encode(orders)

    def _collect(self) -> None:
        """Take up answers; returns after ``_STEP_S``, or as soon as one has come."""
        calls = {agent.call: key for key, agent in self._tended.items() if agent.call is not None}
        now_s = time.monotonic()
        if not calls:
            self.asked_to_end.wait(_STEP_S)
        else:
            ready, late = ray.wait(list(calls), num_returns=1, timeout=_STEP_S)
            for call in ready:
                self._answered(calls[call], call)
            for call in late:
                self._late(calls[call], now_s)

    def _late(self, key: str, now_s: float) -> None:
        """An agent has not answered yet; it waits for what another one holds, perhaps."""
        if (other := self._others.get(key)) is None:
            self._tell_all(self._ledger.unanswered(key, _HELD, _HELD_REMEDY, now_s))
            return
        reason = f"another server of OServe holds its GPUs or slots in Ray (namespace {other})"
        events = self._ledger.unanswered(key, reason, _OTHER_REMEDY, now_s, after_s=_OTHER_S)
        self._tell_all(events)

    def _answered(self, key: str, call: Any) -> None:
        agent = self._tended[key]
        agent.call = None
        try:
            answer = answer_of(ray.get(call, timeout=_STEP_S))
        except (RayError, msgspec.DecodeError) as error:
            reason = f"its agent failed: {_brief(error)}"
            if isinstance(error, ActorDiedError):
                self._replace(key, agent)
            remedy = f"install OServe {__version__} in the Python of Ray on that node"
            self._tell_all(self._ledger.unanswered(key, reason, remedy, time.monotonic()))
            return
        older = isinstance(answer, NodeRefusal) and answer.version != __version__
        if older and not agent.replaced:
            # It may have been started before OServe was installed anew: try once with another.
            agent.replaced = True
            ray.kill(agent.handle, no_restart=True)
            self._replace(key, agent)
            return
        self._tell_all(self._ledger.answered(key, answer))

    def _replace(self, key: str, agent: _Tended) -> None:
        agent.handle = None
        self._dropped.add(key)

    def _tell_all(self, events: list[HelperEvent]) -> None:
        for event in events:
            self._tell(event)

    def _end_agents(self) -> None:
        """End what the agents have set up, and the agents, within a limit.

        A helper that has just started must find them first.
        """
        deadline_s = time.monotonic() + _GOODBYE_S
        while time.monotonic() < deadline_s:
            self._listen()
            handles = {key: item.handle for key, item in self._tended.items() if item.handle}
            if self._ledger.listed and handles.keys() == self._wanted.keys():
                break
            time.sleep(_STEP_S)
        with contextlib.suppress(RayError):
            calls = [handle.down.remote(self._orders(key)) for key, handle in handles.items()]
            if calls:
                ray.wait(calls, num_returns=len(calls), timeout=_GOODBYE_S)
            for handle in handles.values():
                ray.kill(handle, no_restart=True)


def _brief(error: BaseException) -> str:
    """The first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


# -- connecting -----------------------------------------------------------------------------------
def connect(start: HelperStart) -> None:
    """Connect this process to Ray. Raises OServeError."""
    address = start.address or own_ray_address(os.environ)
    if address:
        knock(*check_ray_address(address))
    await_raylet()
    try:
        ray.init(
            address=address or "auto",
            namespace=start.namespace,
            log_to_driver=False,
            configure_logging=False,
        )
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise OServeError(
            f"cannot join the Ray cluster: {_brief(error)}",
            place="--cluster",
            remedy=RAYLET_REMEDY,
        ) from None


def _read_commands(helper: RayHelper) -> None:
    """Runs in a thread, until the server closes the line."""
    for line in sys.stdin.buffer:
        try:
            command = command_of(line)
        except msgspec.DecodeError:
            continue
        if isinstance(command, HelperShutdown):
            helper.end_nodes = command.end_nodes
            break
    helper.asked_to_end.set()


def _fail(lines: HelperLines, reason: str, remedy: str) -> None:
    """End at once: Ray's calls cannot be interrupted."""
    lines.tell(HelperFailure(reason=reason, remedy=remedy, final=False))
    os._exit(1)


def _join(start: HelperStart, lines: HelperLines) -> None:
    """Connect, or end this process. Raises OServeError."""
    late = (
        f"Ray did not let this server join within {_CONNECT_S:g} s",
        "see that Ray runs on this machine too (ray status)",
    )
    timer = threading.Timer(_CONNECT_S, _fail, (lines, *late))
    timer.daemon = True
    timer.start()
    watch = TokenWatch(lambda: _fail(lines, _REFUSED, _REFUSED_REMEDY))
    connect(start)
    watch.close()
    timer.cancel()


def main() -> int:
    """Entry point. It ends without Ray's own clearing up, which can hang."""
    lines = HelperLines()
    try:
        start = command_of(sys.stdin.buffer.readline())
    except msgspec.DecodeError as error:
        lines.tell(HelperFailure(reason=str(error), remedy="start it by oserve serve", final=True))
        return 2
    if not isinstance(start, HelperStart) or start.version != PROTOCOL_VERSION:
        reason = f"the server speaks another version of this protocol than {PROTOCOL_VERSION}"
        lines.tell(HelperFailure(reason=reason, remedy="restart the server", final=True))
        return 2
    try:
        _join(start, lines)
    except OServeError as error:
        lines.tell(HelperFailure(reason=error.message, remedy=error.remedy, final=False))
        return 1
    if start.list_only:
        lines.tell(NodesOffered(devices=offered_devices(ray_node(item) for item in ray.nodes())))
        return 0
    helper = RayHelper(start, lines.tell)
    lines.tell(HelperReady(ray=ray.__version__))
    threading.Thread(target=_read_commands, args=(helper,), daemon=True).start()
    helper.run()
    return 0


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)
