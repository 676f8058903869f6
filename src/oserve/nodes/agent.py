"""A node's agent: it sees to it that a keeper and a hatch run on this machine.

It knows neither Ray, which runs it as an actor, nor requests or weights. Keeper and hatch outlive
it and whatever has started it: the keeper is nobody's child, and holds the hatch. The agent is a
guest of the keeper, so that the server's own connection is left alone. Asking for the same twice is
harmless, and mends what has ended in the meantime.
"""

import asyncio
import contextlib
import logging
import os
import sys
from pathlib import Path

import msgspec

from oserve import __version__
from oserve.core import Device, OServeError
from oserve.engines.devices import find_devices, find_gpu_users
from oserve.engines.held_process import HeldProcess
from oserve.engines.holding import (
    HeldEngines,
    KeeperPlace,
    LocalDial,
    keeper_runs,
    private_folder,
)
from oserve.nodes.agent_messages import (
    HATCH_PROCESS,
    AgentAnswer,
    AgentOrders,
    HatchNote,
    NodeRefusal,
    NodeReport,
    orders_of,
)
from oserve.nodes.hatch_identity import stored_identity, write_private
from oserve.nodes.hatch_messages import ADDRESS_FILE, HatchConfig, PublishedHatch, read_published

_log = logging.getLogger("oserve.nodes")

_POLL_S = 0.05
_HATCH_LIMIT_S = 60.0
_HATCH_GRACE_S = 1.0
# Ray sets these for its workers. They would go on to the keeper and to every engine, and a keeper
# is known by its environment, which must be the same for the next agent.
_FOREIGN = ("OMP_NUM_THREADS", "PYTHONUNBUFFERED", "PYTHONBREAKPOINT", "CUDA_VISIBLE_DEVICES")


class NodeAgent:
    """Sets one node up. Its methods take and give JSON, since they are called by Ray."""

    def __init__(self) -> None:
        self._visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        self._lock = asyncio.Lock()
        self._held: HeldEngines | None = None
        self._devices: tuple[Device, ...] = ()
        self._orders: AgentOrders | None = None

    async def up(self, orders: bytes) -> bytes:
        """See that the node is as ordered: ``AgentOrders`` in, ``AgentAnswer`` out."""
        try:
            wanted = orders_of(orders)
        except msgspec.DecodeError as error:
            reason = f"the agent (OServe {__version__}) cannot read its orders: {error}"
            return _encoded(NodeRefusal(node="", reason=reason, remedy=_SAME_VERSION))
        return _encoded(await self.set_up(wanted))

    async def set_up(self, orders: AgentOrders) -> AgentAnswer:
        """See that the node is as ordered."""
        async with self._lock:
            try:
                return await self._set_up(orders)
            except (OServeError, OSError) as error:
                reason = error.message if isinstance(error, OServeError) else str(error)
                remedy = error.remedy if isinstance(error, OServeError) else "see the node's logs"
                return NodeRefusal(node=orders.node, reason=reason, remedy=remedy)

    async def leave(self) -> None:
        """Leave the keeper, and all that it holds, to the next agent."""
        async with self._lock:
            await self._leave()

    async def _leave(self) -> None:
        if self._held is not None:
            await self._held.close()
        self._held, self._devices = None, ()

    async def down(self, orders: bytes) -> None:
        """End everything that ``up`` has set up for these orders, and all that runs there."""
        await self.tear_down(orders_of(orders))

    async def tear_down(self, orders: AgentOrders) -> None:
        """End everything that the keeper holds, the hatch too, and the keeper."""
        async with self._lock:
            await self._leave()
            _settle()
            place = _place(orders)
            if keeper_runs(place.state_dir):
                last = HeldEngines(LocalDial(place, node=orders.node), grace_s=0.0)
                await last.connect()
                await last.close()

    async def _set_up(self, orders: AgentOrders) -> AgentAnswer:
        if orders.version != __version__:
            reason = f"OServe {__version__} is installed there, the server is {orders.version}"
            return NodeRefusal(node=orders.node, reason=reason, remedy=_SAME_VERSION)
        held = await self._connected(orders)
        if orders.engine and held.facts.engine != orders.engine:
            found = held.facts.engine or "no version"
            reason = f"{found} of vLLM is installed there, {orders.engine} on the server"
            return NodeRefusal(node=orders.node, reason=reason, remedy=_SAME_VERSION)
        if not self._devices:
            self._devices = _find_devices(orders, self._visible, engines=bool(held.engines()))
        published = await self._hatch(held, orders)
        return NodeReport(
            node=orders.node,
            hatch=published.address(orders.host),
            devices=self._devices,
            facts=held.facts,
        )

    async def _connected(self, orders: AgentOrders) -> HeldEngines:
        if self._held is None or orders != self._orders:
            await self._leave()
            _settle()
            place = _place(orders)
            self._orders = orders
            self._held = HeldEngines(
                LocalDial(place, node=orders.node), grace_s=orders.grace_s, guest=True
            )
        await self._held.connect()
        return self._held

    async def _hatch(self, held: HeldEngines, orders: AgentOrders) -> PublishedHatch:
        """The hatch, which is started if none runs, or another than was ordered."""
        note = HatchNote(
            node=orders.node, host=orders.host, port=orders.port, devices=self._devices
        )
        # As it comes back from the keeper: JSON has no tuples.
        plain = msgspec.json.decode(msgspec.json.encode(note))
        process = held.processes().get(HATCH_PROCESS)
        if process is not None and process.entry.note != plain:
            _log.info("the hatch was set up otherwise; it is started again")
            process.terminate()
            await process.wait()
            process = None
        place = _place(orders)
        if process is None:
            # One left by a power cut may name the same process id.
            (place.folder / ADDRESS_FILE).unlink(missing_ok=True)
            identity = stored_identity(place.state_dir / "hatch-identity.json", orders.node)
            write_private(token_file(orders), identity.token.encode() + b"\n")
            config = HatchConfig(
                node=orders.node,
                folder=str(place.folder),
                host=orders.host,
                port=orders.port,
                identity=identity,
            )
            process = await held.hold(
                HATCH_PROCESS,
                [sys.executable, "-m", "oserve.nodes.hatch"],
                msgspec.json.encode(config).decode(),
                place.log_dir / "hatch.log",
                _HATCH_GRACE_S,
                plain,
                stays=True,
            )
        return await _listening(process, place)


def token_file(orders: AgentOrders) -> Path:
    """Where the node's token lies for servers that do not hear of it through Ray."""
    return _place(orders).state_dir / "token"


async def _listening(process: HeldProcess, place: KeeperPlace) -> PublishedHatch:
    """Wait until the hatch has told where it listens."""
    ended = asyncio.ensure_future(process.wait())
    try:
        async with asyncio.timeout(_HATCH_LIMIT_S):
            while True:
                found = read_published(place.folder)
                if found is not None and found.pid == process.pid:
                    return found
                if ended.done():
                    break
                await asyncio.sleep(_POLL_S)
        reason = "it ended at once"
    except TimeoutError:
        process.kill()
        reason = f"it did not listen within {_HATCH_LIMIT_S:g} s"
    finally:
        ended.cancel()
    raise OServeError(
        f"the node's hatch did not start: {reason}",
        place="hatch",
        remedy=f"see {place.log_dir / 'hatch.log'} on that node; is the port free?",
    )


def _place(orders: AgentOrders) -> KeeperPlace:
    state_dir = Path(orders.state_dir).expanduser() / orders.node
    state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    return KeeperPlace(
        folder=private_folder(state_dir),
        state_dir=state_dir,
        log_dir=state_dir / "logs",
        method=orders.method,
        grace_s=orders.grace_s,
        detached=True,
    )


def _settle() -> None:
    """Leave nothing in this process that differs from one agent to the next."""
    for name in [name for name in os.environ if name in _FOREIGN or name.startswith("RAY_")]:
        del os.environ[name]
    with contextlib.suppress(OSError):
        os.chdir("/")


def _find_devices(orders: AgentOrders, visible: str | None, *, engines: bool) -> tuple[Device, ...]:
    """This machine's devices, of GPUs those in ``visible`` (as in CUDA_VISIBLE_DEVICES).

    Raises OServeError if they are not as many as Ray offers, or a program that is not ours uses
    one. ``engines``: of ours run already; then strangers cannot be told from them.
    """
    kind = orders.devices
    if orders.gpus == 0 and kind == "auto":
        # GPUs that Ray does not offer are not for OServe.
        kind = "cpu"
    devices = find_devices(kind, orders.slots or orders.cpu_slots)
    gpus = [device for device in devices if device.uuid]
    if not gpus and (kind == "cpu" or not orders.gpus):
        return devices
    if visible:
        names = {name.strip() for name in visible.split(",")}
        gpus = [item for item in gpus if {item.id.partition(":")[2], item.uuid} & names]
    if orders.gpus is not None and len(gpus) != orders.gpus:
        raise OServeError(
            f"Ray offers {orders.gpus} of its GPUs, but {len(gpus)} are visible to the agent",
            place="devices",
            remedy=_COUNT_REMEDY,
        )
    if not engines:
        users = find_gpu_users()
        taken = [item.uuid for item in gpus if item.uuid in users]
        if taken:
            raise OServeError(
                f"another program uses {len(taken)} of its GPUs: {users[taken[0]]} on {taken[0]}",
                place="devices",
                remedy="end that program, or give Ray fewer GPUs on this node",
            )
    return tuple(gpus)


def _encoded(answer: AgentAnswer) -> bytes:
    return msgspec.json.encode(answer)


_COUNT_REMEDY = (
    "offer whole GPUs only (no MIG); start Ray there with CUDA_VISIBLE_DEVICES naming those that "
    "it offers, by index in nvidia-smi or by UUID, and without "
    "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"
)
_SAME_VERSION = "install the same versions of OServe and vLLM on every node"
