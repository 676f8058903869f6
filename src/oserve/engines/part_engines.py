"""The engines of several nodes that run the parts of one replica; see ``core.parts``."""

import socket
from collections.abc import Sequence
from dataclasses import replace

import msgspec

from oserve.core import Device, Endpoint, OServeError, ReplicaPart, ReplicaSpec, ReplicaState
from oserve.engines.arguments import NodeInterface, Rendezvous, part_arguments
from oserve.engines.engine_starts import EngineCommand, EngineFiles, LaunchFacts, engine_command
from oserve.engines.memory_check import cache_sized
from oserve.engines.node_engines import KeptEngines, NodeEngines
from oserve.engines.parts_process import PartsProcess, start_parts
from oserve.engines.ports import MasterPorts
from oserve.engines.watched import WatchedProcess

# Of a datagram socket that sends nothing.
_ANY_PORT = 9


class PartsEngines(NodeEngines):
    """Starts one replica on several nodes: ``nodes[i]`` starts part ``i`` of ``parts``."""

    def __init__(
        self,
        facts: LaunchFacts,
        parts: Sequence[ReplicaPart],
        nodes: Sequence[NodeEngines],
        ports: MasterPorts,
    ) -> None:
        self.name = nodes[0].name
        self._facts = facts
        self.parts = tuple(parts)
        self._nodes = tuple(nodes)
        self._ports = ports
        self._number = 0

    def files(self, spec: ReplicaSpec, number: int) -> EngineFiles:
        """See ``NodeEngines.files``: the leader's. KV caches of several nodes do not move."""
        self._number = number
        files = self._nodes[0].files(spec, number)
        return replace(files, endpoint=replace(files.endpoint, caches=""))

    async def start(
        self, spec: ReplicaSpec, devices: Sequence[Device], files: EngineFiles, *, standby: bool
    ) -> PartsProcess:
        """See ``NodeEngines.start``."""
        del devices  # the parts have them
        addresses = node_addresses(self._nodes)
        own = [files, *(node.files(spec, self._number) for node in self._nodes[1:])]
        commands = self._commands(spec, own, addresses, standby=standby)

        async def start(part: ReplicaPart) -> WatchedProcess:
            node = self._nodes[part.index]
            return await node.launch(
                spec, part.devices, own[part.index], commands[part.index], standby=standby
            )

        return await start_parts(self.parts, start)

    def _commands(
        self,
        spec: ReplicaSpec,
        files: Sequence[EngineFiles],
        addresses: Sequence[str],
        *,
        standby: bool,
    ) -> list[EngineCommand]:
        """One command for each part: the same arguments but for its place."""
        meeting = Rendezvous(address=addresses[0], port=self._ports.take(addresses[0]))
        facts = self._sized(spec)
        commands = [
            engine_command(
                facts,
                spec,
                part.devices,
                own.folder,
                standby=standby,
                moves_caches=False,
                interface=NodeInterface(address=address),
            )
            for part, own, address in zip(self.parts, files, addresses, strict=True)
        ]
        whole, platform = commands[0].argv, self._facts.platform
        return [
            EngineCommand(
                argv=part_arguments(whole, part, meeting, platform=platform), env=command.env
            )
            for part, command in zip(self.parts, commands, strict=True)
        ]

    def _sized(self, spec: ReplicaSpec) -> LaunchFacts:
        """The facts with a KV cache that fits on every node, if sizes are computed at all."""
        settings = self._facts.settings
        sizes = [
            cache_sized(
                settings,
                self._facts.model,
                part.devices,
                spec.shape,
                node.free_bytes if isinstance(node, KeptEngines) else None,
            ).kv_cache_memory_bytes
            for part, node in zip(self.parts, self._nodes, strict=True)
        ]
        known = [size for size in sizes if size]
        if not known:
            return self._facts
        sized = msgspec.structs.replace(settings, kv_cache_memory_bytes=min(known))
        return replace(self._facts, settings=sized)

    def note_ready(self, state: ReplicaState, step_s: float) -> None:
        """See ``NodeEngines.note_ready``: with the keeper of each part."""
        for node in self._nodes:
            node.note_ready(state, step_s)

    def endpoint_of(self, folder: str) -> Endpoint:
        """The endpoint of an engine that was found, by the name of its folder on every node."""
        leader = self._nodes[0]
        assert isinstance(leader, KeptEngines)  # or there would be nothing to find
        hatch = leader.keeper.hatch
        if hatch is None:
            return Endpoint(unix_socket=str(leader.keeper.folder / folder / "api.sock"))
        return Endpoint(unix_socket=f"{folder}/api.sock", hatch=hatch)

    def clear(self, state: ReplicaState) -> None:
        """See ``NodeEngines.clear``."""
        for node in self._nodes:
            node.clear(state)

    async def close(self) -> None:
        """The nodes close themselves."""


def node_addresses(nodes: Sequence[NodeEngines]) -> list[str]:
    """The address of each node by which the others reach it: that of its hatch, or our own.

    Raises ``OServeError`` if a name cannot be resolved, or if no other node tells our own address.
    """
    hatches = [node.keeper.hatch if isinstance(node, KeptEngines) else None for node in nodes]
    found = [_address(hatch.host) if hatch is not None else "" for hatch in hatches]
    others = [address for address in found if address]
    return [address or _own_address(others[0]) for address in found]


def _address(host: str) -> str:
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise OServeError(
            f"the address of node {host} is unknown: {error}",
            place="cluster.hosts",
            remedy="name its address there",
        ) from None


def _own_address(other: str) -> str:
    """This machine's address on the way to another; nothing is sent."""
    family = socket.AF_INET6 if ":" in other else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((other, _ANY_PORT))
        return str(probe.getsockname()[0])
