"""Limits of tenants: requests, tokens and requests in flight; salts; fair shares over processes."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from oserve.core import KeyRole, OverloadAction, Tier
from oserve.gateway.access.key_file import KeyStore
from oserve.gateway.access.limits import TenantLimits, TenantLoad
from oserve.gateway.http.api_form import AUXILIARY
from oserve.gateway.http.errors import ApiError
from oserve.gateway.http.headers import client_headers
from oserve.gateway.settings import GatewaySettings, TenancySettings, TenantSettings
from oserve.look.files import charts_version
from oserve.sim import EmulatedEngine, EngineSpeed
from oserve.wire import ResponseHead

from .conftest import Make, until

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
@example([(17.11325188012268, 86), (0.0, 100), (0.0, 64)])
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
    assert requests <= 10 + now_s / 6 + 1e-3
    assert tokens <= 200 + now_s * 200 / 60 + 1e-3


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


def test_more_tenants_than_are_usually_kept_get_no_fresh_budgets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only those whose buckets are full again are forgotten, and a look at all is rare."""
    limits, tenants, looks = limits_of(requests_per_min=1, max_inflight=5), 10_000, 0
    look = TenantLimits._forget_idle

    def counted(limits: TenantLimits, now_s: float) -> None:
        nonlocal looks
        looks += 1
        look(limits, now_s)

    monkeypatch.setattr(TenantLimits, "_forget_idle", counted)
    for number in range(tenants):
        limits.admit(f"t{number}", 1, 0.0)
        limits.ended(f"t{number}", 1, 1, 0.0)
    for number in range(tenants):
        with pytest.raises(ApiError, match="requests per min"):
            limits.admit(f"t{number}", 1, 1.0)
    assert looks < 5
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
    with pytest.raises(ApiError, match="requests per min"):
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


async def test_every_429_has_one_form_for_streams_and_others(
    make_front: Make, tmp_path: Path
) -> None:
    """As OpenAI's: type and code in the body, Retry-After, the limits of the tenant in headers."""
    store = KeyStore(tmp_path / "keys.json")
    tier = Tier(name="t", ttft_s=0.001, overload=OverloadAction.REJECT)
    tenants = {
        "requests": TenantSettings(requests_per_min=1, tokens_per_min=10**6),
        "tokens": TenantSettings(requests_per_min=100, tokens_per_min=20),
        "inflight": TenantSettings(requests_per_min=100, max_inflight=1),
        "queue": TenantSettings(requests_per_min=100, max_queued=1),
        "tier": TenantSettings(requests_per_min=100),
    }
    keys = {name: store.add(name, KeyRole.USE)[1] for name in tenants}
    settings = GatewaySettings(
        port=0, shutdown_grace_s=0.0, tenancy=TenancySettings(tenants=tenants)
    )
    engine = EmulatedEngine(speed=EngineSpeed(ttft_s=30.0))
    front = await make_front(
        engine, settings=settings, keys_file=tmp_path / "keys.json", max_inflight=1
    )
    runner = front.gateway.runner

    async def ask(name: str, **fields: object) -> tuple[int, dict[str, str], Any]:
        headers = {"authorization": f"Bearer {keys[name]}"}
        return await front.post("/v1/completions", {**TEXT, **fields}, headers=headers)

    # The one slot is taken, and each tenant has what takes it to its limit.
    running = [asyncio.ensure_future(ask(name, max_tokens=15)) for name in tenants]
    await until(lambda: len(runner.active) == len(running))
    seen = {}
    for name in tenants:
        if name == "tier":
            runner.update(replace(runner.table, tiers=(tier,), default_tier="t"))
        answers = [await ask(name, stream=stream, max_tokens=15) for stream in (False, True)]
        forms = []
        for status, headers, body in answers:
            assert status == 429
            assert int(headers["retry-after"]) >= 1
            limits = {key for key in headers if key.startswith("x-ratelimit-")}
            assert "x-ratelimit-remaining-requests" in limits
            assert headers["content-type"] == "application/json"
            assert set(body["error"]) == {"message", "type", "param", "code"}
            forms.append((body["error"]["type"], body["error"]["code"], limits))
        assert forms[0] == forms[1]
        seen[name] = forms[0][:2]
    assert seen == {
        "requests": ("requests", "rate_limit_exceeded"),
        "tokens": ("tokens", "rate_limit_exceeded"),
        "inflight": ("requests", "rate_limit_exceeded"),
        "queue": ("requests", "queue_full"),
        "tier": ("requests", "tier_limit"),
    }
    refused = runner.metrics.snapshot()["oserve_tenant_refused"]
    assert sorted(refused) == [
        "inflight\tinflight_limit_reached",
        "requests\trequests_limit_reached",
        "tokens\ttokens_limit_reached",
    ]
    await front.gateway.close()
    await asyncio.gather(*running, return_exceptions=True)


def test_limits_of_an_attached_server_are_not_passed_on() -> None:
    head = ResponseHead(
        status=200,
        headers=((b"x-ratelimit-remaining-requests", b"7"), (b"x-other", b"1")),
        length=2,
        chunked=False,
    )
    headers, _ = client_headers(head, plain=False, events=False)
    assert [name for name, _ in headers] == [b"x-other", b"content-length"]


CHAT = {"model": "emulated", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
BODIES = {
    "/v1/completions": TEXT,
    "/v1/chat/completions": CHAT,
    "/v1/chat/completions/batch": CHAT | {"messages": [CHAT["messages"]]},
    "/v1/messages": CHAT,
    "/v1/messages/count_tokens": CHAT,
    "/v1/responses": {"model": "emulated", "input": "hello", "max_output_tokens": 4},
    "/generative_scoring": {
        "model": "emulated",
        "query": "hello",
        "items": ["a"],
        "label_token_ids": [1],
    },
    "/invocations": TEXT,
    "/tokenize": {"model": "emulated", "prompt": "hello"},
    "/detokenize": {"model": "emulated", "tokens": [1, 2]},
}
OPEN = {"/health", "/live", "/ping", "/version", "/openapi.json", "/metrics"}


def tenant_of(path: str) -> str:
    return path[1:].replace("/", ".")


async def test_whatever_a_replica_answers_needs_a_key_and_counts(
    make_front: Make, tmp_path: Path
) -> None:
    store = KeyStore(tmp_path / "keys.json")
    keys = {path: store.add(tenant_of(path), KeyRole.USE)[1] for path in BODIES}
    limits = TenantSettings(requests_per_min=2, tokens_per_min=1000)
    settings = GatewaySettings(
        port=0, shutdown_grace_s=0.0, tenancy=TenancySettings(default=limits)
    )
    front = await make_front(EmulatedEngine(), settings=settings, keys_file=tmp_path / "keys.json")
    for raw, (method, *_) in front.gateway._routes.items():
        path = raw.decode()
        if method == b"POST":
            status = (await front.post(path, BODIES.get(path, {})))[0]
        else:
            status = (await front.get(path))[0]
        # The page has no data, and its charts are there only where Plotly is.
        public = path in OPEN or path in {"/oserve", "/oserve/"}
        if path == "/oserve/charts.js":
            assert status == (200 if charts_version() else 404)
            continue
        assert status == (200 if public else 401), path
        if method == b"POST" and not path.startswith("/oserve/"):
            assert path in BODIES, path
    for path, body in BODIES.items():
        headers = {"authorization": f"Bearer {keys[path]}"}
        statuses = []
        for _ in range(3):
            # The gateway's own answers do not count.
            assert (await front.get("/v1/models", headers=headers))[0] == 200
            status, told, _ = await front.post(path, body, headers=headers)
            statuses.append(status)
            assert told["x-ratelimit-limit-requests"] == "2", path
        # The emulated engine lacks one of them.
        answered = 404 if path == "/detokenize" else 200
        assert statuses == [answered, answered, 429], path
    runner = front.gateway.runner
    await until(lambda: not runner.active)
    assert runner.tenants.limits.loads({}) == {}
    counted = runner.metrics.snapshot()["oserve_tenant_requests"]
    assert {name.partition("\t")[0]: found for name, found in counted.items()} == {
        tenant_of(path): [2.0] for path in BODIES
    }
    charged = runner.machine.waiting.fair.take_charges()
    free = {path.decode() for path in AUXILIARY}
    assert {tenant for _, tenant in charged} == {tenant_of(path) for path in BODIES.keys() - free}
