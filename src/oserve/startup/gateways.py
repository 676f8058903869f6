"""The gateway processes of a server: beside it, and by setting on every other node."""

import socket
from collections.abc import Iterable
from pathlib import Path

from oserve.config import api_keys
from oserve.core import Clock, NodePhase, NodeState, OServeError
from oserve.engines.dial import SILENCE_S
from oserve.engines.group import boot_id
from oserve.engines.holding import HeldEngines
from oserve.gateway.access.key_file import KEY_FILE
from oserve.gateway.access.unix_port import check_unix_socket
from oserve.gateway.http.cors import AllowedOrigins
from oserve.gateway.process.hub import OperatorCallHandler
from oserve.gateway.process.supervisor import GatewaySupervisor, SupervisorOptions
from oserve.gateway.records import RecordStore
from oserve.gateway.settings import GatewaySettings
from oserve.look.points import PageLimits
from oserve.startup.deployment import ServerDeployment
from oserve.startup.folders import ServerFolders
from oserve.startup.gateway_keeper import GatewayKeeper
from oserve.startup.learned_lengths import learned_estimator
from oserve.startup.node_fleet import NodeFleet
from oserve.startup.page_recorder import page_recorder
from oserve.startup.switch_judge import switch_judge

_UNREACHED = {NodePhase.LOST, NodePhase.SILENT}
_EVERYWHERE = {"127.0.0.1", "::1", "localhost", "0.0.0.0", "::", ""}


def gateway_supervisor(
    deployment: ServerDeployment,
    folders: ServerFolders,
    keeper: HeldEngines,
    operate: OperatorCallHandler,
    clock: Clock,
) -> GatewaySupervisor:
    """The gateway processes in front of the cluster. Raises OServeError."""
    settings = deployment.settings.gateway
    check_gateway(settings)
    planning = deployment.settings.planning
    page = page_recorder(
        records=settings.records_file,
        state_file=deployment.state_file,
        limits=PageLimits(
            ttft_s=_seconds(planning.slo_ttft_ms), tpot_s=_seconds(planning.slo_tpot_ms)
        ),
        longest_s=settings.request_timeout_s,
        judge=switch_judge(deployment),
    )
    elsewhere = settings.placement == "every-node" and bool(deployment.settings.cluster.nodes)
    return GatewaySupervisor(
        SupervisorOptions(
            settings=settings,
            models=deployment.models,
            keys=api_keys(settings),
            # Not resolved: a link that leads nowhere is no missing file.
            keys_file=(folders.state / KEY_FILE).absolute(),
            keeper=GatewayKeeper(keeper, folders.log),
            run_dir=folders.run,
            operate=operate if page is None else page.answering(operate),
            clock=clock,
            records=_store(settings) if elsewhere else None,
            # The keeper of a node that is cut off ends everything there after the same time.
            alone_s=SILENCE_S + deployment.settings.engines.orphan_grace_s,
            estimator=learned_estimator(settings.records_file),
            sampler=page,
        )
    )


def _seconds(limit_ms: float | None) -> float | None:
    return None if limit_ms is None else limit_ms / 1e3


def check_gateway(settings: GatewaySettings) -> None:
    """Refuse, with OServeError, what no gateway process could listen with.

    An address of one machine cannot be another's, nor a socket two processes'.
    """
    AllowedOrigins(settings.allowed_origins)
    if settings.unix_socket:
        check_unix_socket(settings.unix_socket)
    if settings.unix_socket and settings.processes > 1:
        raise OServeError(
            f"{settings.processes} gateway processes cannot share a Unix socket",
            place="gateway.unix_socket",
            remedy="set gateway.processes=1, or use the port alone",
        )
    if settings.placement == "every-node" and settings.host not in _EVERYWHERE:
        raise OServeError(
            f"gateways on every node cannot listen on {settings.host}, which is one machine's",
            place="gateway.host",
            remedy="use 0.0.0.0, or 127.0.0.1 for clients on the nodes themselves",
        )


def _store(settings: GatewaySettings) -> RecordStore:
    return RecordStore(Path(settings.records_file), max_records=settings.max_records)


class NodeGatewayKeepers:
    """Tells the supervisor on which nodes there are to be gateways.

    The server's own machine, if it is a node, has those beside the server.
    """

    def __init__(self, fleet: NodeFleet | None, gateways: GatewaySupervisor) -> None:
        self._fleet = fleet
        self._gateways = gateways
        self._keepers: dict[str, GatewayKeeper] = {}
        self._here = (boot_id(), socket.gethostname())

    def follow(self, states: Iterable[NodeState]) -> None:
        """Call it with each observation."""
        if self._fleet is None:
            return
        phases = {state.name: state for state in states}
        up: dict[str, GatewayKeeper] = {}
        for held in self._fleet.joined:
            state = phases.get(held.node)
            if state is None or state.phase in _UNREACHED or self._is_here(held):
                continue
            up[held.node] = self._keepers.setdefault(held.node, GatewayKeeper(held))
        leaving = [name for name in up if phases[name].word == NodePhase.DRAINING.value]
        self._gateways.follow(up, leaving)

    def _is_here(self, held: HeldEngines) -> bool:
        return not held.facts.python or (held.facts.boot, held.facts.host) == self._here
