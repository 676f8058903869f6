"""Service tiers: what a fleet promises to a kind of request, and what a request was promised."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from oserve.core.shape import Precision


class OverloadAction(StrEnum):
    """What happens to a tier's requests when not all can be in time.

    ``FIRST``: they go before those of other tiers, and are never demoted. ``DEMOTE``: one that is
    late is served last. ``SHED``: one that is late is refused. ``REJECT``: so, and one that cannot
    be in time is refused at its arrival already.
    """

    FIRST = "first"
    DEMOTE = "demote"
    SHED = "shed"
    REJECT = "reject"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tier:
    """One service tier. ``None``: no limit.

    ``ttft_s``: arrival to first token; ``tpot_s``: time per output token; ``e2e_s``: arrival to
    last token. ``precisions``: those of replicas that may serve it; empty: any. ``weight``: how
    urgent it is beside others (see ``control.dispatch.tiers``). ``service_tier``: the word of
    OpenAI's field of that name that asks for it.
    """

    name: str
    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None
    precisions: tuple[Precision, ...] = ()
    weight: float = 1.0
    overload: OverloadAction = OverloadAction.DEMOTE
    service_tier: str = ""

    def allows(self, precision: str) -> bool:
        """Whether replicas of this precision may serve the tier; "": it is unknown."""
        return not self.precisions or precision in self.precisions


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """The limits of one request: those of its tier, or tighter ones that its client asked for."""

    tier: Tier
    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    @classmethod
    def of(
        cls, tier: Tier, *, ttft_s: float | None = None, tpot_s: float | None = None
    ) -> "Promise":
        """The promise of a tier, tightened to these limits where they are lower."""
        return cls(
            tier=tier,
            ttft_s=least((tier.ttft_s, ttft_s)),
            tpot_s=least((tier.tpot_s, tpot_s)),
            e2e_s=tier.e2e_s,
        )

    def first_token_s(self, output_tokens: int) -> float | None:
        """Seconds from arrival until the first token is due; ``None``: whenever.

        An end-to-end limit leaves time for ``output_tokens`` at the limit of TPOT; without one, or
        where that takes longer, half of it is for the first token.
        """
        if self.e2e_s is None:
            return self.ttft_s
        rest_s = self.e2e_s / 2 if self.tpot_s is None else (output_tokens - 1) * self.tpot_s
        return least((self.ttft_s, max(self.e2e_s - rest_s, self.e2e_s / 2)))

    def is_kept(self, *, ttft_s: float | None, tpot_s: float | None, e2e_s: float) -> bool:
        """Whether a complete answer with these times kept it; undefined times do."""
        return (
            (self.ttft_s is None or (ttft_s or 0.0) <= self.ttft_s)
            and (self.tpot_s is None or (tpot_s or 0.0) <= self.tpot_s)
            and (self.e2e_s is None or e2e_s <= self.e2e_s)
        )


def least(limits: Iterable[float | None]) -> float | None:
    """The tightest of some limits; ``None`` if there is none."""
    return min((limit for limit in limits if limit is not None), default=None)
