"""Who sends the files of a model to whom, and when. Pure.

A node that has the files sends them to one other at a time, and one that has received them sends,
too: so those who have them double with each round, and the disk or hub from which the first one
came is read once.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class FileTransfer:
    """All files that ``receiver`` lacks, from ``sender``."""

    sender: str
    receiver: str


def next_transfers(
    holders: Collection[str],
    seekers: Collection[str],
    rates: Mapping[tuple[str, str], float],
    *,
    busy: Collection[str] = (),
    barred: Collection[tuple[str, str]] = (),
) -> list[FileTransfer]:
    """The transfers to begin now: one for each node at most, those over the fastest links first.

    ``rates``: bytes per second from one node to another, where known; others count as the least
    known. ``busy``: nodes that send or receive already. ``barred``: pairs (sender, receiver) of
    which nothing is to be expected; they are used only where a seeker has no other sender.
    """
    able = sorted(set(holders) - set(busy))
    wanting = sorted(set(seekers) - set(busy) - set(holders))
    hopeless = set(barred)
    slowest = min(rates.values(), default=0.0)
    pairs = sorted(
        ((sender, receiver) for sender in able for receiver in wanting),
        key=lambda pair: (pair in hopeless, -rates.get(pair, slowest), pair),
    )
    hopeful = {
        receiver
        for receiver in wanting
        if any((holder, receiver) not in hopeless for holder in holders)
    }
    taken: set[str] = set()
    found = []
    for sender, receiver in pairs:
        if sender in taken or receiver in taken:
            continue
        if (sender, receiver) in hopeless and receiver in hopeful:
            continue  # it waits for one that may be better
        taken |= {sender, receiver}
        found.append(FileTransfer(sender=sender, receiver=receiver))
    return found


def relay_rounds(
    holders: Collection[str],
    seekers: Collection[str],
    rates: Mapping[tuple[str, str], float] | None = None,
) -> list[list[FileTransfer]]:
    """The whole tree, in rounds, if all transfers of a round take equally long.

    Empty without a holder.
    """
    having, lacking = set(holders), set(seekers) - set(holders)
    rounds: list[list[FileTransfer]] = []
    while having and lacking:
        found = next_transfers(having, lacking, rates or {})
        received = {one.receiver for one in found}
        having |= received
        lacking -= received
        rounds.append(found)
    return rounds


def relay_s(
    rounds: Collection[Collection[FileTransfer]],
    size_bytes: int,
    rates: Mapping[tuple[str, str], float],
) -> float | None:
    """Seconds until all have the files; ``None`` where a rate is not known."""
    total_s = 0.0
    for transfers in rounds:
        known = [rates.get((one.sender, one.receiver), 0.0) for one in transfers]
        if min(known, default=0.0) <= 0:
            return None
        total_s += size_bytes / min(known)
    return total_s
