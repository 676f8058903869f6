"""Tenants in one gateway process: their limits, metrics, and what they are charged."""

from time import monotonic

from oserve.control.dispatch import commands as do
from oserve.gateway.access.limits import TenantLimits
from oserve.gateway.accounting import token_counts
from oserve.gateway.http.errors import ApiError
from oserve.gateway.metrics import Metrics
from oserve.gateway.settings import GatewaySettings
from oserve.gateway.snapshot import ClusterSnapshot
from oserve.gateway.stream.session import Session

MOST_LABELS = 200
"""Tenants with metrics of their own."""
OTHERS = "(others)"


class _Served:
    """The counters of what a label was served with, found once."""

    __slots__ = ("device_s", "output_tokens", "prompt_tokens")

    def __init__(self, metrics: Metrics, label: str) -> None:
        self.prompt_tokens = metrics.counter("oserve_tenant_prompt_tokens", label)
        self.output_tokens = metrics.counter("oserve_tenant_output_tokens", label)
        self.device_s = metrics.counter("oserve_tenant_device_seconds", label)


class Tenants:
    """Admits the requests of tenants and accounts for them. Without keys there are no tenants.

    A bound on a tenant's waiting requests is divided among the processes.
    """

    def __init__(self, settings: GatewaySettings, metrics: Metrics) -> None:
        self._tenancy = settings.tenancy
        self._processes, self._position = settings.processes, 0
        self._metrics = metrics
        self._labels: set[str] = set()
        self._served: dict[str, _Served] = {}
        self.limits = TenantLimits(settings.tenancy)

    def follow(self, snapshot: ClusterSnapshot) -> None:
        """Use what a snapshot says of the other processes."""
        if snapshot.processes:
            self._processes, self._position = snapshot.processes, snapshot.position
        self.limits.set_elsewhere(snapshot.tenants)

    def admit(self, session: Session) -> None:
        """Admit a request. Raises ApiError if its tenant has reached a limit.

        Auxiliary calls count as requests without tokens.
        """
        if not session.tenant:
            return
        request = session.request
        tokens = 0 if request is None else request.prompt_tokens + request.output_tokens
        try:
            session.limit_headers = self.limits.admit(session.tenant, tokens, monotonic())
        except ApiError as error:
            label = self._label(session.tenant)
            self._metrics.count("oserve_tenant_refused", label, error.reason)
            raise

    def fair_name(self, session: Session) -> str:
        """The tenant for fair shares; "" without them."""
        return session.tenant if self._tenancy.fair else ""

    def max_queued(self, session: Session) -> int | None:
        """This process's part of the bound on a tenant's waiting requests; the parts sum to it.

        A bound below one for each process is not divided: by the last reports, whoever comes first
        has it.
        """
        most = self._tenancy.of(session.tenant).max_queued if session.tenant else None
        if most is None:
            return None
        if most < self._processes:
            return max(0, most - self.limits.elsewhere(session.tenant).queued)
        return most // self._processes + (self._position < most % self._processes)

    def ended(self, session: Session, ending: do.Record) -> float | None:
        """Count a request that has ended.

        Returns the output tokens by which its charge is to be corrected; ``None``: it has none.
        """
        tenant = session.tenant
        if not tenant:
            return None
        label = self._label(tenant)
        self._metrics.count("oserve_tenant_requests", label, ending.status.value)
        request = session.request
        if request is None:
            self.limits.ended(tenant, 0, 0, monotonic())
            return None
        prompt_tokens, output_tokens = token_counts(session, ending)
        tokens = prompt_tokens + output_tokens if ending.replica else 0
        estimated = request.prompt_tokens + request.output_tokens
        self.limits.ended(tenant, estimated, tokens, monotonic())
        charge = ending.charge
        if charge is None and not ending.replica:
            return None
        served = self._served.get(label)
        if served is None:
            served = self._served[label] = _Served(self._metrics, label)
        if ending.replica:
            served.prompt_tokens.value += prompt_tokens
            served.output_tokens.value += output_tokens
        if charge is None:
            return None
        own_tokens = max(0, output_tokens - ending.made_tokens)
        served.device_s.value += charge.prompt_s + charge.per_token_s * own_tokens
        return own_tokens

    def _label(self, tenant: str) -> str:
        """A tenant's label in metrics; those beyond the first ``MOST_LABELS`` share one."""
        if tenant not in self._labels:
            if len(self._labels) >= MOST_LABELS:
                return OTHERS
            self._labels.add(tenant)
        return tenant


def salted(key: str, salt: str) -> str:
    """The key of a cached prefix, which tenants with a salt do not share."""
    return f"{key}@{salt}" if key and salt else key
