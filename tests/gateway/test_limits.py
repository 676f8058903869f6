"""Limits of tenants: requests, tokens and requests in flight; salts; fair shares over processes."""

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oserve.core import KeyRole
from oserve.gateway.access.key_file import KeyStore
from oserve.gateway.access.limits import TenantLimits, TenantLoad
from oserve.gateway.http.errors import ApiError
from oserve.gateway.settings import GatewaySettings, TenancySettings, TenantSettings
from oserve.sim.engine import EmulatedEngine

from .conftest import Make

TEXT = {"model": "emulated", "prompt": "hello", "max_tokens": 4, "ignore_eos": True}


def limits_of(**fields: int) -> TenantLimits:
    return TenantLimits(TenancySettings(default=TenantSettings(**fields)))


def refused_for_s(limits: TenantLimits, tokens: int, now_s: float) -> int:
    """The Retry-After of a request that comes now; 0 if it is admitted."""
    try:
        limits.admit("a", tokens, now_s)
    except ApiError as error:
        return error.retry_after_s or -1
    return 0


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 100)), max_size=60))
def test_over_any_time_no_more_is_admitted_than_the_limits_say(
    asks: list[tuple[float, int]],
) -> None:
    limits = limits_of(requests_per_min=10, tokens_per_min=200)
    now_s, requests, tokens = 0.0, 0, 0
    for passed_s, wanted in asks:
        now_s += passed_s
        wait_s = refused_for_s(limits, wanted, now_s)
        if wait_s:
            now_s += wait_s
            assert refused_for_s(limits, wanted, now_s) == 0
        requests, tokens = requests + 1, tokens + wanted
    assert requests <= 10 + now_s / 6 + 1e-6
    assert tokens <= 200 + now_s * 200 / 60 + 1e-6


def test_estimates_are_corrected_and_idle_tenants_forgotten() -> None:
    limits = limits_of(tokens_per_min=100)
    limits.admit("a", 90, 0.0)
    with pytest.raises(ApiError):
        limits.admit("a", 20, 0.0)
    limits.ended("a", 90, 10, 0.0)
    headers = dict(limits.admit("a", 20, 0.0))
    assert headers[b"x-ratelimit-remaining-tokens"] == b"70"
    assert headers[b"x-ratelimit-reset-tokens"] == b"18s"
    limits.ended("a", 20, 20, 0.0)
    for number in range(10_000):
        limits.admit(f"t{number}", 0, 100.0)
        limits.ended(f"t{number}", 0, 0, 100.0)
    assert len(limits) <= 4096


def test_more_tenants_than_are_usually_kept_get_no_fresh_budgets() -> None:
    """Only those whose buckets are full again are forgotten, and a look at all is rare."""
    limits, tenants = limits_of(requests_per_min=1, max_inflight=5), 10_000
    for number in range(tenants):
        limits.admit(f"t{number}", 1, 0.0)
        limits.ended(f"t{number}", 1, 1, 0.0)
    for number in range(tenants):
        with pytest.raises(ApiError, match="requests a minute"):
            limits.admit(f"t{number}", 1, 1.0)
    for number in range(4 * tenants):
        limits.admit(f"u{number}", 1, 100.0 * number)
        limits.ended(f"u{number}", 1, 1, 100.0 * number)
    assert len(limits) <= 4096


def test_what_other_processes_admit_counts_here() -> None:
    limits = limits_of(requests_per_min=10, max_inflight=3)
    limits.set_elsewhere({"a": TenantLoad(2, 0)})
    limits.used_elsewhere({"a": (8.0, 0.0)}, 0.0)
    headers = dict(limits.admit("a", 1, 0.0))
    assert headers[b"x-ratelimit-remaining-requests"] == b"1"
    with pytest.raises(ApiError, match="in flight"):
        limits.admit("a", 1, 0.0)
    limits.set_elsewhere({})
    limits.admit("a", 1, 0.0)
    with pytest.raises(ApiError, match="requests a minute"):
        limits.admit("a", 1, 0.0)


def test_what_is_told_of_a_long_past_costs_no_more_than_a_minute() -> None:
    limits = limits_of(requests_per_min=10)
    limits.used_elsewhere({"a": (5000.0, 0.0)}, 0.0)
    assert refused_for_s(limits, 1, 0.0) <= 6


async def test_a_tenant_over_its_limit_gets_429_and_others_do_not(
    make_front: Make, tmp_path: Path
) -> None:
    store = KeyStore(tmp_path / "keys.json")
    (_, one), (_, two) = store.add("one", KeyRole.USE), store.add("two", KeyRole.USE)
    tenancy = TenancySettings(tenants={"one": TenantSettings(requests_per_min=2)}, cache_salt=True)
    settings = GatewaySettings(port=0, shutdown_grace_s=0.0, tenancy=tenancy)
    front = await make_front(EmulatedEngine(), settings=settings, keys_file=tmp_path / "keys.json")

    async def ask(key: str, **fields: str) -> tuple[int, dict[str, str]]:
        headers = {"authorization": f"Bearer {key}"}
        answer = await front.post("/v1/completions", {**TEXT, **fields}, headers=headers)
        return answer[0], answer[1]

    (first, left), (second, _) = await ask(one), await ask(one, cache_salt="mine")
    assert (first, second) == (200, 200)
    assert left["x-ratelimit-limit-requests"] == "2"
    assert left["x-ratelimit-remaining-requests"] == "1"
    third, refused = await ask(one)
    assert third == 429
    assert int(refused["retry-after"]) > 20
    assert refused["x-ratelimit-remaining-requests"] == "0"
    (other, headers), _ = await ask(two), await ask(two)
    assert other == 200
    assert "x-ratelimit-limit-requests" not in headers
    salts = [body["cache_salt"] for body in front.engines[0].seen]
    assert len(set(salts)) == 3
    assert salts[2] == salts[3]
    await asyncio.sleep(0)
    metrics = front.gateway.runner.metrics.snapshot()
    assert metrics["oserve_tenant_refused"] == {"one\trequests_limit_reached": [1.0]}
    assert metrics["oserve_tenant_requests"] == {"one\tcompleted": [2.0], "two\tcompleted": [2.0]}
    assert metrics["oserve_tenant_device_seconds"]["one"][0] > 0.0
    charges = front.gateway.runner.machine.waiting.fair.take_charges()
    assert charges.keys() == {("", "one"), ("", "two")}


async def test_without_keys_nothing_is_salted_charged_or_limited(make_front: Make) -> None:
    tenancy = TenancySettings(default=TenantSettings(requests_per_min=1), cache_salt=True)
    settings = GatewaySettings(port=0, shutdown_grace_s=0.0, tenancy=tenancy)
    front = await make_front(EmulatedEngine(), settings=settings)
    for _ in range(3):
        assert (await front.post("/v1/completions", TEXT))[0] == 200
    assert not any("cache_salt" in body for body in front.engines[0].seen)
    assert front.gateway.runner.machine.waiting.fair.take_charges() == {}
