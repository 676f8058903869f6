"""The cost of a switch: seconds of each phase of each wave, and the capacity missing meanwhile.

The constants (``SwitchCosts``) are measured on engines; transfers come from their plan. Whether a
switch is worth its cost is decided elsewhere (``control.policy``).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from oserve.switch.transfer import TransferPlan
from oserve.switch.waves import Wave


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchCosts:
    """Seconds; ``link_share`` is the share of a link's bandwidth that transfers reach.

    ``engine_start_s``: a warmed standby engine with dummy weights; ``further_start_s``: each other
    engine that starts on the same host. ``join_s``: forming the group of a transfer.
    ``quantise_s_per_byte`` counts plain bytes on a device, ``check_s_per_byte`` the bytes that a
    device received; ``verify_s`` is the rest of verifying. ``room_s``: releasing or stopping a
    drained engine that makes room.
    """

    engine_start_s: float = 4.0
    further_start_s: float = 1.0
    join_s: float = 0.5
    link_share: float = 0.8
    quantise_s_per_byte: float = 1e-11
    verify_s: float = 1.0
    check_s_per_byte: float = 0.0
    commit_s: float = 0.05
    drain_s: float = 10.0
    room_s: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseSeconds:
    """Seconds of each phase of a wave; ``room_s``: draining replicas that make room first."""

    room_s: float
    prepare_s: float
    transfer_s: float
    verify_s: float
    commit_s: float
    drain_s: float

    @property
    def until_commit_s(self) -> float:
        """From the start of the wave until its new replicas serve."""
        return self.room_s + self.prepare_s + self.transfer_s + self.verify_s + self.commit_s

    @property
    def total_s(self) -> float:
        """Until the old ones are gone."""
        return self.until_commit_s + self.drain_s


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchCost:
    """Phases by wave; ``ready_s``: from the decision until the last commit.

    ``missing_requests``, by type: the capacity that is not ready on the way, against what was ready
    before, times the seconds it is missing.
    """

    waves: tuple[PhaseSeconds, ...]
    ready_s: float
    total_s: float
    missing_requests: tuple[float, ...]


def switch_cost(
    waves: Sequence[Wave],
    transfers: Sequence[TransferPlan],
    costs: SwitchCosts,
    *,
    hosts: Mapping[str, str],
    capacity_rps: tuple[float, ...],
    scaled: Callable[[PhaseSeconds], PhaseSeconds] = lambda phases: phases,
) -> SwitchCost:
    """Return the cost of waves and their transfers; ``hosts`` gives each new replica's host.

    ``capacity_rps`` is ready before the first wave, by type; ``scaled`` applies what was learned
    (``switch.learned``). The drain of the last wave delays nothing; that of another wave delays the
    next, which may need the room.
    """
    phases = []
    missing = [0.0] * len(capacity_rps)
    for wave, transfer in zip(waves, transfers, strict=True):
        phase = scaled(_phase(wave, transfer, costs, hosts))
        phases.append(phase)
        for index, (full, ready) in enumerate(zip(capacity_rps, wave.capacity_rps, strict=True)):
            missing[index] += max(0.0, full - ready) * phase.until_commit_s
    total_s = sum(phase.total_s for phase in phases)
    return SwitchCost(
        waves=tuple(phases),
        ready_s=total_s - (phases[-1].drain_s if phases else 0.0),
        total_s=total_s,
        missing_requests=tuple(missing),
    )


def transfer_s(transfer: TransferPlan, costs: SwitchCosts) -> float:
    """Return the seconds of a transfer on links that carry nothing else."""
    if not (transfer.copies or transfer.kept):
        return 0.0
    given = transfer.given_bytes
    converted = {conversion.target for conversion in transfer.conversions}
    quantised = max((given.get(target, 0) for target in converted), default=0)
    links_s = transfer.busy_s / costs.link_share + transfer.latency_s
    return costs.join_s + links_s + quantised * costs.quantise_s_per_byte


def verify_s(transfer: TransferPlan, costs: SwitchCosts) -> float:
    """Return the seconds that checking the replicas of a transfer takes."""
    return costs.verify_s + max(transfer.given_bytes.values(), default=0) * costs.check_s_per_byte


def _phase(
    wave: Wave, transfer: TransferPlan, costs: SwitchCosts, hosts: Mapping[str, str]
) -> PhaseSeconds:
    room = bool(wave.release or wave.stop)
    by_host: dict[str, int] = {}
    for replica in wave.start:
        by_host[hosts[replica]] = by_host.get(hosts[replica], 0) + 1
    crowd = max(by_host.values(), default=0)
    return PhaseSeconds(
        room_s=costs.drain_s + costs.room_s if room else 0.0,
        prepare_s=costs.engine_start_s + (crowd - 1) * costs.further_start_s if crowd else 0.0,
        transfer_s=transfer_s(transfer, costs),
        verify_s=verify_s(transfer, costs) if crowd else 0.0,
        commit_s=costs.commit_s,
        drain_s=costs.drain_s if wave.retire else 0.0,
    )
