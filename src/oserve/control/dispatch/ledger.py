"""The ledger of outstanding work per replica, in one gateway process.

The ledger counts work in whole picoseconds. So bookings and payments balance exactly, and the
simulator's ledger can be compared with this one.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import msgspec

from oserve.control.dispatch.fair_policy import tight_inflight
from oserve.control.dispatch.overload import FirstTokens, OverloadPolicy, max_prompt_s
from oserve.control.dispatch.table import TableReplica
from oserve.control.dispatch.tiers import with_ttft
from oserve.core import ReplicaLoad, Request

_PS = 10**12
# The learned speed moves by this fraction of the difference with each sample of a busy engine.
_LEARNING_RATE = 0.2
_SAMPLE_S = 0.5
_SPEED_BOUNDS = (0.02, 50.0)
_SAME_FOR_ALL: Mapping[str, float | None] = {}


@dataclass(slots=True)
class _Account:
    name: str
    prefill_s_per_token: float
    decode_s_per_token: float
    max_inflight: int
    max_model_len: int
    engine: tuple[str, float] = ("", 0.0)
    ttft_s: float | None = None
    step_tokens: int = 0
    inflight: int = 0
    prompt_ps: int = 0
    owed_ps: int = 0
    elsewhere_s: float = 0.0
    elsewhere_inflight: int = 0
    speed: float = 1.0
    done_ps: int = 0
    busy_s: float = 0.0
    inflight_s: float = 0.0
    seen_s: float = 0.0
    # The load as computed last; every change of the account drops it.
    load: ReplicaLoad | None = None
    # That load for a tenant that leaves slots free.
    tight: tuple[ReplicaLoad, ReplicaLoad] | None = None


class WorkLedger:
    """Outstanding work per replica; corrects the prior costs by the observed speed.

    The ledger books work in prior seconds (from perf) and divides it by the replica's learned
    ``speed``: prior seconds completed per busy second. Time is passed in by the caller. A replica
    that owes more prompts than ``overload`` allows this one of the gateway's ``processes`` counts
    as full. ``learns``: false freezes the speeds, so that the prior costs hold.
    """

    def __init__(
        self,
        overload: OverloadPolicy | None = None,
        *,
        processes: int = 1,
        learns: bool = True,
    ) -> None:
        self._accounts: dict[str, _Account] = {}
        self._overload = overload or OverloadPolicy()
        self._processes = processes
        self._learns = learns
        self._first_tokens = FirstTokens(self._overload)

    @property
    def first_token_s(self) -> float:
        """The upper quantile of the seconds from dispatch to first token."""
        return self._first_tokens.seconds

    def use(self, overload: OverloadPolicy) -> None:
        """Apply another policy from now on; the estimate of first tokens is kept."""
        if overload == self._overload:
            return
        self._overload = overload
        self._first_tokens = FirstTokens(overload, self._first_tokens.seconds)
        for account in self._accounts.values():
            account.ttft_s, account.load = overload.ttft_s, None

    def share(self, processes: int) -> None:
        """This is one of so many gateway processes from now on."""
        if processes != self._processes:
            self._processes = processes
            for account in self._accounts.values():
                account.load = None

    def follow(
        self,
        replicas: Iterable[TableReplica],
        ttft_s: Mapping[str, float | None] = _SAME_FOR_ALL,
    ) -> None:
        """Keep accounts for exactly these replicas.

        ``ttft_s``: the time to first token that bounds the prompts owed by a replica, where it is
        not that of the policy; ``None``: no bound.
        """
        accounts: dict[str, _Account] = {}
        for replica in replicas:
            account = self._accounts.get(replica.id)
            engine = (replica.shape, replica.started_s)
            if account is None or account.engine != engine:
                account = _Account(
                    name=replica.id,
                    engine=engine,
                    prefill_s_per_token=replica.prefill_s_per_token,
                    decode_s_per_token=replica.decode_s_per_token,
                    max_inflight=replica.max_inflight,
                    max_model_len=replica.max_model_len,
                )
            if account.prefill_s_per_token != replica.prefill_s_per_token:
                # Booked work keeps the price at which it was booked.
                dearer = replica.prefill_s_per_token / account.prefill_s_per_token
                low, high = _SPEED_BOUNDS
                account.speed = min(high, max(low, account.speed * dearer))
            account.prefill_s_per_token = replica.prefill_s_per_token
            account.decode_s_per_token = replica.decode_s_per_token
            account.max_inflight = replica.max_inflight
            account.max_model_len = replica.max_model_len
            account.step_tokens = replica.step_tokens
            account.ttft_s = ttft_s.get(replica.id, self._overload.ttft_s)
            account.load = None
            accounts[replica.id] = account
        self._accounts = accounts

    def set_elsewhere(self, elsewhere: Mapping[str, tuple[float, int]]) -> None:
        """Set the work (prior seconds) and requests of other gateway processes, per replica."""
        for replica, account in self._accounts.items():
            account.elsewhere_s, account.elsewhere_inflight = elsewhere.get(replica, (0.0, 0))
            account.load = None

    def own(self) -> dict[str, tuple[float, int]]:
        """This process's outstanding prior seconds and requests, per replica."""
        return {name: (acc.owed_ps / _PS, acc.inflight) for name, acc in self._accounts.items()}

    def holds(self, entry: "WorkEntry") -> bool:
        """Whether an entry belongs to an engine in the table, and not to an earlier start."""
        return self._accounts.get(entry.account.name) is entry.account

    def loads(self, replicas: Iterable[str]) -> dict[str, ReplicaLoad]:
        """The router's view of these replicas."""
        accounts = self._accounts
        return {name: accounts[name].load or self._load(accounts[name]) for name in replicas}

    def tight_loads(self, replicas: Iterable[str], reserve: float) -> dict[str, ReplicaLoad]:
        """As ``loads``, for who leaves this part of the running sequences free."""
        return {name: self._tight(self._accounts[name], reserve) for name in replicas}

    def _tight(self, account: _Account, reserve: float) -> ReplicaLoad:
        load = account.load or self._load(account)
        if account.tight is None or account.tight[0] is not load:
            most = tight_inflight(account.max_inflight, reserve)[account.prompt_ps > 0]
            less = min(load.max_inflight, most)
            account.tight = load, msgspec.structs.replace(load, max_inflight=less)
        return account.tight[1]

    def _load(self, account: _Account) -> ReplicaLoad:
        inflight = account.inflight + account.elsewhere_inflight
        overload = self._overload
        if account.ttft_s != overload.ttft_s:
            overload = with_ttft(overload, account.ttft_s)
        most_s = max_prompt_s(
            overload,
            step_tokens=account.step_tokens,
            prefill_s_per_token=account.prefill_s_per_token / account.speed,
        )
        full = account.prompt_ps >= most_s * account.speed / self._processes * _PS
        account.load = ReplicaLoad(
            replica=account.name,
            work_s=(account.owed_ps / _PS + account.elsewhere_s) / account.speed,
            inflight=inflight,
            max_inflight=min(account.max_inflight, inflight) if full else account.max_inflight,
            prefill_s_per_token=account.prefill_s_per_token / account.speed,
            decode_s_per_token=account.decode_s_per_token / account.speed,
            max_model_len=account.max_model_len,
            prompt_s=account.prompt_ps / _PS / account.speed,
            slots=account.max_inflight - inflight,
        )
        return account.load

    def admit(
        self,
        replica: str,
        request: Request,
        now_s: float,
        *,
        cached_tokens: int = 0,
        streams: bool = True,
    ) -> "WorkEntry":
        """Book a request at a replica, which has ``cached_tokens`` of its prompt.

        The prefill of a request that does not stream ends unseen, so it counts as work only, not
        as a prompt owed.
        """
        account = self._accounts[replica]
        self._tick(account, now_s)
        account.load = None
        prefill_s = (request.prompt_tokens - cached_tokens) * account.prefill_s_per_token
        total_ps = _ps(prefill_s + request.output_tokens * account.decode_s_per_token)
        # The parts of a sum may round up where the sum does not.
        prefill_ps = min(total_ps, _ps(prefill_s))
        account.inflight += 1
        account.owed_ps += total_ps
        entry = WorkEntry(self, account, total_ps, prefill_ps, now_s if streams else None)
        account.prompt_ps += entry.prompt_ps
        return entry

    def _tick(self, account: _Account, now_s: float) -> None:
        if account.inflight > 0:
            passed_s = max(0.0, now_s - account.seen_s)
            account.busy_s += passed_s
            account.inflight_s += passed_s * account.inflight
        account.seen_s = now_s
        if account.busy_s < _SAMPLE_S or account.done_ps <= 0:
            return
        if self._learns:
            low, high = _SPEED_BOUNDS
            sample = min(high, max(low, account.done_ps / _PS / account.busy_s))
            # A single stream leaves the batch almost empty and shows little of the engine's speed.
            fullness = min(1.0, account.inflight_s / account.busy_s / 4.0)
            account.speed += _LEARNING_RATE * fullness * (sample - account.speed)
            account.load = None
        account.busy_s = account.inflight_s = 0.0
        account.done_ps = 0

    # -- called by entries ----------------------------------------------------------------------
    def pay(self, account: _Account, paid_ps: int, now_s: float) -> None:
        """Subtract completed work."""
        account.owed_ps -= paid_ps
        account.done_ps += paid_ps
        account.load = None
        self._tick(account, now_s)

    def add(self, account: _Account, more_ps: int, now_s: float) -> None:
        """Add work to an entry that was booked too low."""
        self._tick(account, now_s)
        account.owed_ps += more_ps
        account.load = None

    def close(self, account: _Account, left_ps: int, now_s: float, *, done: bool) -> None:
        """Close an entry; unfinished work is written off and does not count as speed."""
        self._tick(account, now_s)
        account.owed_ps -= left_ps
        account.inflight -= 1
        account.load = None
        if done:
            account.done_ps += left_ps

    def prompt_done(self, account: _Account, prompt_ps: int) -> None:
        """Subtract a prompt from the prompts owed."""
        account.prompt_ps -= prompt_ps
        account.load = None

    def first_token(self, took_s: float) -> None:
        """Record the seconds from the dispatch of a stream to its first token."""
        if self._learns:
            self._first_tokens.observe(took_s)


class WorkEntry:
    """The booking of one request. ``given_s``: the time of dispatch, for requests that stream."""

    __slots__ = ("_given_s", "_ledger", "_left_ps", "_open", "_prefill_ps", "account", "prompt_ps")

    def __init__(
        self,
        ledger: WorkLedger,
        account: _Account,
        total_ps: int,
        prefill_ps: int,
        given_s: float | None,
    ) -> None:
        self.prompt_ps = prefill_ps if given_s is not None else 0
        self._given_s = given_s
        self._ledger = ledger
        self.account = account
        self._left_ps = total_ps
        self._prefill_ps = prefill_ps
        self._open = True

    @property
    def open(self) -> bool:
        """Whether the slot is still booked."""
        return self._open

    @property
    def left_s(self) -> float:
        """Its outstanding work in prior seconds."""
        return self._left_ps / _PS

    def first_byte(self, now_s: float) -> None:
        """The engine has computed the prompt."""
        self._left_ps -= self._prefill_ps
        self._prompt_done()
        self._ledger.pay(self.account, self._prefill_ps, now_s)
        if self._given_s is not None and self.account.ttft_s is not None:
            self._ledger.first_token(now_s - self._given_s)

    def outgrown(self, more_tokens: float, now_s: float) -> None:
        """Book so many more output tokens, since the answer is longer than expected."""
        if self._open:
            more_ps = _ps(more_tokens * self.account.decode_s_per_token)
            self._left_ps += more_ps
            self._ledger.add(self.account, more_ps, now_s)

    def close(self, now_s: float, *, done: bool) -> None:
        """Free the slot. Idempotent."""
        if self._open:
            self._open = False
            self._prompt_done()
            self._ledger.close(self.account, self._left_ps, now_s, done=done)

    def _prompt_done(self) -> None:
        if self.prompt_ps:
            self._ledger.prompt_done(self.account, self.prompt_ps)
            self.prompt_ps = 0


def _ps(seconds: float) -> int:
    return int(seconds * _PS + 0.5)
