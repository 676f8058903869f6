"""The request estimator: output length and workload type at arrival, learned from ended requests.

The output length determines the work and the type of a request. Both are estimated from what is
known at arrival (``workload.output``). The estimator stores only hashes of texts and keys.
"""

import hashlib
from functools import lru_cache

import msgspec

from oserve.control.dispatch.table import EMPTY_TABLE, RoutingTable
from oserve.control.tally import Tally
from oserve.gateway.http.body import GenerateBody
from oserve.gateway.http.prompt import system_prefix
from oserve.workload import classify
from oserve.workload.output import KnownAtArrival, OutputEstimator, OutputExpectation
from oserve.workload.type_probabilities import TypesOfTier, of_tier, types_by_tier

# Below this many observed answers, the mean of the plan is the better estimate.
_ENOUGH_ANSWERS = 20
_MOST_KEY_BYTES = 128


class RequestEstimate(msgspec.Struct, frozen=True, kw_only=True):
    """The estimate of one request: ``probabilities`` of types ``names``, ``kind`` the likeliest.

    ``output``: ``None`` if the client fixes the output length. ``prefix_tokens``: the approximate
    length of the system prompt, as far as it was read. ``arrived_s``: Unix time. ``tier``: the name
    of its service tier; only types of that tier are probable.
    """

    known: KnownAtArrival
    output: OutputExpectation | None
    names: tuple[str, ...]
    probabilities: tuple[float, ...]
    kind: str
    output_tokens: int
    prefix_tokens: int
    arrived_s: float
    tier: str = ""


class RequestEstimator:
    """The estimator of one gateway process. ``estimator`` may have learned before."""

    def __init__(self, estimator: OutputEstimator | None = None) -> None:
        self.estimator = estimator or OutputEstimator()
        self.tally = Tally()
        self._table = EMPTY_TABLE
        self._kinds: dict[str, TypesOfTier] = {}

    def follow(self, table: RoutingTable) -> None:
        """Use the workload types of a new table."""
        before, self._table = self._table, table
        names = tuple(kind.name for kind in table.planned_types or table.length_classes)
        if _centres(table) != _centres(before):
            self._kinds = types_by_tier(table.planned_types)
        self.tally.follow(names)

    def estimate(
        self,
        parsed: GenerateBody,
        *,
        path: bytes,
        headers: dict[bytes, bytes],
        prompt_tokens: int,
        arrived_s: float,
        tier: str = "",
    ) -> RequestEstimate:
        """The estimate of a request that has just arrived; the table must have types."""
        limit = parsed.output_limit
        prefix = system_prefix(parsed)
        session = (parsed.session or "").encode() or headers.get(b"x-session-id", b"")
        known = KnownAtArrival(
            prompt_tokens=prompt_tokens,
            max_tokens=limit,
            endpoint=path.decode("latin-1"),
            tenant=_hashed(parsed.user.encode())
            if parsed.user
            else _hashed_again(headers.get(b"authorization", b"")),
            system=_hashed(prefix),
            session=_hashed(session[:_MOST_KEY_BYTES]),
        )
        certain = parsed.ignore_eos and limit is not None
        return self.estimate_known(
            known,
            certain=certain,
            prefix_tokens=min(prompt_tokens, len(prefix) // 4),
            arrived_s=arrived_s,
            tier=tier,
        )

    def estimate_known(
        self,
        known: KnownAtArrival,
        *,
        certain: bool = False,
        prefix_tokens: int = 0,
        arrived_s: float,
        tier: str = "",
    ) -> RequestEstimate:
        """The estimate from these facts; ``certain``: the answer is as long as its limit."""
        prompt_tokens, limit = known.prompt_tokens, known.max_tokens
        output = None if certain else self.estimator.expect(known)
        probabilities = self._probabilities(prompt_tokens, output, limit, tier)
        names = self.tally.names
        return RequestEstimate(
            known=known,
            output=output,
            names=names,
            probabilities=probabilities,
            kind=names[probabilities.index(max(probabilities))],
            output_tokens=self._output_tokens(prompt_tokens, output, limit),
            prefix_tokens=prefix_tokens,
            arrived_s=arrived_s,
            tier=tier,
        )

    def _probabilities(
        self, prompt_tokens: int, output: OutputExpectation | None, limit: int | None, tier: str
    ) -> tuple[float, ...]:
        """Probabilities of the plan's types; with length classes one is certain."""
        own = of_tier(self._kinds, tier)
        if own is None:
            classes = self._table.length_classes
            held = classify(prompt_tokens, classes)
            return tuple(float(item is held) for item in classes)
        if output is not None:
            return own.of(prompt_tokens, output, limit)
        kind = own.kind(prompt_tokens, max(1, limit or 1))
        return tuple(float(index == kind) for index in range(len(self.tally.names)))

    def _output_tokens(
        self, prompt_tokens: int, output: OutputExpectation | None, limit: int | None
    ) -> int:
        most = max(1, limit) if limit is not None else 1 << 30
        if output is None:
            return most
        if self.estimator.seen < _ENOUGH_ANSWERS:
            return min(most, classify(prompt_tokens, self._table.length_classes).output_tokens)
        return max(1, min(most, round(output.mean_tokens)))

    def ended(
        self,
        estimate: RequestEstimate,
        *,
        completed: bool,
        prompt_tokens: int,
        output_tokens: int,
        now_s: float,
    ) -> str:
        """Learn from an ended request (``now_s``: Unix time); returns the name of its type."""
        kind = None
        current = estimate.names is self.tally.names
        if completed and output_tokens > 0:
            if estimate.output is not None:
                self.estimator.learn(estimate.known, output_tokens)
            own = of_tier(self._kinds, estimate.tier)
            if own is not None and current:
                kind = own.kind(prompt_tokens, output_tokens)
        self.tally.ended(
            now_s,
            arrival_s=estimate.arrived_s,
            probabilities=estimate.probabilities if current else (),
            kind=kind,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
        )
        return estimate.kind if kind is None else estimate.names[kind]


def _centres(table: RoutingTable) -> list[tuple[float, float, str]]:
    return [(kind.prompt_tokens, kind.output_tokens, kind.tier) for kind in table.planned_types]


@lru_cache(maxsize=4096)
def _hashed_again(value: bytes) -> str:
    """As ``_hashed``, for what comes with each request of a client."""
    return _hashed(value)


def _hashed(value: bytes) -> str:
    return hashlib.blake2b(value, digest_size=8).hexdigest() if value else ""
