"""What tenants spend anew, exchanged between gateway processes: each batch counts exactly once.

Only new use travels, never a sum since some start: so nothing is counted again when a process or a
hub starts anew, and what an ended process has reported stays counted. A batch is numbered and sent
until its receiver has named its number.
"""

import secrets
from collections import OrderedDict
from collections.abc import Mapping

import msgspec

# Numbers of another sender, such as the hub of the next server, must not look like those heard.
_NUMBER_BITS = 48
# A process that starts hears of what was used at least so long before, which is what its buckets
# of a minute's allowance would know of.
_RECENT_S = 60.0
_MOST_ENDED = 10_000

Uses = dict[str, tuple[float, float]]
"""By tenant: requests and tokens."""
Charges = dict[str, float]
"""By tier and tenant, joined by a tab: device-seconds."""


class Spending(msgspec.Struct, frozen=True, kw_only=True):
    """New use and new charges; ``number`` 0: nothing."""

    number: int = 0
    uses: Uses = {}
    charges: Charges = {}


class SpendingOutbox:
    """What one receiver has not confirmed yet."""

    def __init__(self) -> None:
        self._sent = Spending()
        self._number = secrets.randbits(_NUMBER_BITS)
        self._uses: Uses = {}
        self._charges: Charges = {}

    def add(self, uses: Mapping[str, tuple[float, float]], charges: Mapping[str, float]) -> None:
        """Add what is to be sent."""
        add_uses(self._uses, uses)
        for name, more_s in charges.items():
            self._charges[name] = self._charges.get(name, 0.0) + more_s

    def take(self) -> Spending:
        """The batch to send: the unconfirmed one, or else all that is new."""
        if not self._sent.number and (self._uses or self._charges):
            self._number += 1
            self._sent = Spending(number=self._number, uses=self._uses, charges=self._charges)
            self._uses, self._charges = {}, {}
        return self._sent

    def confirm(self, number: int) -> None:
        """The receiver has the batch of that number."""
        if number == self._sent.number:
            self._sent = Spending()


class SpendingExchange:
    """The hub's part: what each process spends goes to all others once."""

    def __init__(self) -> None:
        self._outboxes: dict[int, SpendingOutbox] = {}
        self._heard: dict[int, int] = {}
        # Processes that count as ended may still report what they spent to the last.
        self._ended: OrderedDict[int, None] = OrderedDict()
        # Use of the present minute and of the one before, for processes that start.
        self._recent: tuple[Uses, Uses] = {}, {}
        self._since_s = 0.0

    def take(self, incarnation: int, spent: Spending, heard: int, now_s: float) -> Spending:
        """Enter what a process spent, and that it has the batch ``heard``; returns its batch."""
        self._pass_time(now_s)
        own = self._outboxes.get(incarnation)
        if own is None and incarnation not in self._ended:
            own = self._outboxes[incarnation] = SpendingOutbox()
            for uses in self._recent:
                own.add(uses, {})
        if spent.number and self._heard.get(incarnation) != spent.number:
            self._heard[incarnation] = spent.number
            for other, outbox in self._outboxes.items():
                if other != incarnation:
                    outbox.add(spent.uses, spent.charges)
            add_uses(self._recent[0], spent.uses)
        if own is None:
            return Spending()
        own.confirm(heard)
        return own.take()

    def forget(self, incarnation: int) -> None:
        """A process has ended."""
        self._outboxes.pop(incarnation, None)
        self._ended[incarnation] = None
        if len(self._ended) > _MOST_ENDED:
            self._heard.pop(self._ended.popitem(last=False)[0], None)

    def _pass_time(self, now_s: float) -> None:
        if now_s - self._since_s >= _RECENT_S:
            late = now_s - self._since_s >= 2 * _RECENT_S
            self._recent = {}, {} if late else self._recent[0]
            self._since_s = now_s


def add_uses(sums: Uses, uses: Mapping[str, tuple[float, float]]) -> None:
    """Add uses to sums."""
    for name, (requests, tokens) in uses.items():
        before = sums.get(name, (0.0, 0.0))
        sums[name] = before[0] + requests, before[1] + tokens


def by_name(charged: Mapping[tuple[str, str], float]) -> Charges:
    """Charges by tier and tenant as they are sent."""
    return {f"{tier}\t{tenant}": spent_s for (tier, tenant), spent_s in charged.items()}


def by_flow(charges: Charges) -> dict[tuple[str, str], float]:
    """The reverse of ``by_name``."""
    found = {}
    for name, spent_s in charges.items():
        tier, _, tenant = name.partition("\t")
        found[tier, tenant] = spent_s
    return found
