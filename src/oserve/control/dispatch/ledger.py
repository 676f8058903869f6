"""The work each replica still owes, in seconds, as one gateway process sees it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from oserve.control.dispatch.overload import FirstTokens, OverloadPolicy, max_prompt_s
from oserve.control.dispatch.router import work_s
from oserve.control.dispatch.table import TableReplica
from oserve.core import ReplicaLoad, Request

# Speed follows what was seen with this weight per sample of a busy engine.
_LEARNING_RATE = 0.2
_SAMPLE_S = 0.5
_SPEED_BOUNDS = (0.02, 50.0)


@dataclass(slots=True)
class _Account:
    prefill_s_per_token: float
    decode_s_per_token: float
    max_inflight: int
    max_model_len: int
    engine: tuple[str, float] = ("", 0.0)
    step_tokens: int = 0
    inflight: int = 0
    prompt_s: float = 0.0
    owed_s: float = 0.0
    elsewhere_s: float = 0.0
    elsewhere_inflight: int = 0
    speed: float = 1.0
    done_s: float = 0.0
    busy_s: float = 0.0
    inflight_s: float = 0.0
    seen_s: float = 0.0


class WorkLedger:
    """Outstanding work per replica; corrects the prior costs by the speed it observes.

    Work is booked in prior seconds (from perf) and divided by the replica's learned ``speed``:
    prior seconds it completes per second of being busy. Time is passed in by the caller.
    A replica that owes more prompts than ``overload`` allows, by this one of the gateway's
    ``processes``, shows as full.
    """

    def __init__(self, overload: OverloadPolicy | None = None, *, processes: int = 1) -> None:
        self._accounts: dict[str, _Account] = {}
        self._overload = overload or OverloadPolicy()
        self._processes = processes
        self._first_tokens = FirstTokens(self._overload)

    @property
    def first_token_s(self) -> float:
        """Seconds that most first tokens take from the hand-over on."""
        return self._first_tokens.seconds

    def follow(self, replicas: Iterable[TableReplica]) -> None:
        """Keep accounts for exactly these replicas."""
        kept: dict[str, _Account] = {}
        for replica in replicas:
            account = self._accounts.get(replica.id)
            engine = (replica.shape, replica.started_s)
            if account is None or account.engine != engine:
                account = _Account(
                    engine=engine,
                    prefill_s_per_token=replica.prefill_s_per_token,
                    decode_s_per_token=replica.decode_s_per_token,
                    max_inflight=replica.max_inflight,
                    max_model_len=replica.max_model_len,
                )
            if account.prefill_s_per_token != replica.prefill_s_per_token:
                # What is booked stays booked at the price it was: it is paid back at that.
                dearer = replica.prefill_s_per_token / account.prefill_s_per_token
                low, high = _SPEED_BOUNDS
                account.speed = min(high, max(low, account.speed * dearer))
            account.prefill_s_per_token = replica.prefill_s_per_token
            account.decode_s_per_token = replica.decode_s_per_token
            account.max_inflight = replica.max_inflight
            account.max_model_len = replica.max_model_len
            account.step_tokens = replica.step_tokens
            kept[replica.id] = account
        self._accounts = kept

    def set_elsewhere(self, elsewhere: Mapping[str, tuple[float, int]]) -> None:
        """Work (prior seconds) and requests that other gateway processes have there."""
        for replica, account in self._accounts.items():
            account.elsewhere_s, account.elsewhere_inflight = elsewhere.get(replica, (0.0, 0))

    def own(self) -> dict[str, tuple[float, int]]:
        """What this process has outstanding: prior seconds and requests, per replica."""
        return {name: (acc.owed_s, acc.inflight) for name, acc in self._accounts.items()}

    def loads(self, replicas: Iterable[str]) -> dict[str, ReplicaLoad]:
        """The router's view of these replicas."""
        return {name: self._load(name, self._accounts[name]) for name in replicas}

    def _load(self, name: str, account: _Account) -> ReplicaLoad:
        inflight = account.inflight + account.elsewhere_inflight
        most_s = max_prompt_s(
            self._overload,
            step_tokens=account.step_tokens,
            prefill_s_per_token=account.prefill_s_per_token / account.speed,
        )
        full = account.prompt_s / account.speed >= most_s / self._processes
        return ReplicaLoad(
            replica=name,
            work_s=(account.owed_s + account.elsewhere_s) / account.speed,
            inflight=inflight,
            max_inflight=min(account.max_inflight, inflight) if full else account.max_inflight,
            prefill_s_per_token=account.prefill_s_per_token / account.speed,
            decode_s_per_token=account.decode_s_per_token / account.speed,
            max_model_len=account.max_model_len,
        )

    def admit(
        self,
        replica: str,
        request: Request,
        now_s: float,
        *,
        cached_tokens: int = 0,
        streams: bool = True,
    ) -> "WorkEntry":
        """Book a request that is being handed to a replica, which has some of it cached.

        Of one that does not stream nobody sees when its prompt is done: it counts as work only.
        """
        account = self._accounts[replica]
        self._tick(account, now_s)
        load = self._load(replica, account)
        total_s = work_s(request, load, cached_tokens) * account.speed
        prefill_s = (request.prompt_tokens - cached_tokens) * account.prefill_s_per_token
        account.inflight += 1
        account.owed_s += total_s
        entry = WorkEntry(
            self,
            account,
            total_s,
            prefill_s,
            prompt_s=prefill_s if streams else 0.0,
            given_s=now_s if streams else None,
        )
        account.prompt_s += entry.prompt_s
        return entry

    def _tick(self, account: _Account, now_s: float) -> None:
        if account.inflight > 0:
            passed_s = max(0.0, now_s - account.seen_s)
            account.busy_s += passed_s
            account.inflight_s += passed_s * account.inflight
        account.seen_s = now_s
        if account.busy_s < _SAMPLE_S or account.done_s <= 0.0:
            return
        low, high = _SPEED_BOUNDS
        sample = min(high, max(low, account.done_s / account.busy_s))
        # A lone stream leaves the batch empty and says little of what the engine can do.
        fullness = min(1.0, account.inflight_s / account.busy_s / 4.0)
        account.speed += _LEARNING_RATE * fullness * (sample - account.speed)
        account.busy_s = account.inflight_s = account.done_s = 0.0

    def pay(self, account: _Account, paid_s: float, now_s: float) -> None:
        """Work done (prior seconds)."""
        account.owed_s = max(0.0, account.owed_s - paid_s)
        account.done_s += paid_s
        self._tick(account, now_s)

    def owe(self, account: _Account, more_s: float, now_s: float) -> None:
        """More work than was booked (prior seconds)."""
        self._tick(account, now_s)
        account.owed_s += more_s

    def close(self, account: _Account, left_s: float, now_s: float, *, done: bool) -> None:
        """A request left its replica; unfinished work is written off, not counted as speed."""
        self._tick(account, now_s)
        account.owed_s = max(0.0, account.owed_s - left_s)
        account.inflight -= 1
        if done:
            account.done_s += left_s
        if account.inflight == 0:
            account.owed_s = account.prompt_s = 0.0

    def first_token(self, took_s: float) -> None:
        """A stream had its first token so long after it was handed over."""
        self._first_tokens.observe(took_s)

    def prompt_done(self, account: _Account, prompt_s: float) -> None:
        """A prompt (prior seconds) is no longer owed."""
        account.prompt_s = max(0.0, account.prompt_s - prompt_s)


class WorkEntry:
    """One admitted request's standing with the ledger."""

    __slots__ = ("_account", "_given_s", "_ledger", "_left_s", "_open", "_prefill_s", "prompt_s")

    def __init__(
        self,
        ledger: WorkLedger,
        account: _Account,
        total_s: float,
        prefill_s: float,
        *,
        prompt_s: float,
        given_s: float | None = None,
    ) -> None:
        self.prompt_s = prompt_s
        self._given_s = given_s
        self._ledger = ledger
        self._account = account
        self._left_s = total_s
        self._prefill_s = prefill_s
        self._open = True

    def first_byte(self, now_s: float) -> None:
        """The prompt has been computed."""
        self._left_s -= self._prefill_s
        self._prompt_done()
        self._ledger.pay(self._account, self._prefill_s, now_s)
        if self._given_s is not None:
            self._ledger.first_token(now_s - self._given_s)

    def outgrown(self, more_tokens: float, now_s: float) -> None:
        """The answer is longer than was booked: so many tokens more are expected now."""
        if self._open:
            more_s = more_tokens * self._account.decode_s_per_token
            self._left_s += more_s
            self._ledger.owe(self._account, more_s, now_s)

    def close(self, now_s: float, *, done: bool) -> None:
        """The request left the replica; harmless when repeated."""
        if self._open:
            self._open = False
            self._prompt_done()
            self._ledger.close(self._account, self._left_s, now_s, done=done)

    def _prompt_done(self) -> None:
        self._ledger.prompt_done(self._account, self.prompt_s)
        self.prompt_s = 0.0
