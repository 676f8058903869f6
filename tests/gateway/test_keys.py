"""Keys: made, stored as hashes, looked up, revoked under load; roles; wrong ones are limited."""

import asyncio
import errno
import json
import logging
import os
import stat
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oserve.core import KeyRole, OServeError
from oserve.gateway.access.audit import AuditEntry, AuditLog
from oserve.gateway.access.door import Door
from oserve.gateway.access.failures import FailureLimiter, source_of
from oserve.gateway.access.key_file import KeyStore, read_keys
from oserve.gateway.http import server
from oserve.gateway.http.errors import ApiError
from oserve.gateway.process.shared_keys import SharedKeys
from oserve.sim.engine import EmulatedEngine

from .conftest import Make

TEXT = {"model": "emulated", "prompt": "hello", "max_tokens": 4}

PEER = "192.0.2.1"


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def refused(door: Door, key: str, peer: str = PEER) -> int:
    with pytest.raises(ApiError) as error:
        door.caller(f"Bearer {key}".encode(), peer)
    assert not key or key not in str(error.value)
    return error.value.status


def test_a_key_is_stored_as_a_hash_that_only_its_user_may_read(tmp_path: Path) -> None:
    path = tmp_path / "state" / "keys.json"
    stored, key = KeyStore(path).add("acme", KeyRole.USE, tier="bulk", tiers=("bulk", "chat"))
    text = path.read_text()
    assert key not in text
    assert key.removeprefix("oserve-") not in text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    caller = Door((), path).caller(f"bearer  {key}".encode(), PEER)
    assert (caller.tenant, caller.role, caller.key) == ("acme", KeyRole.USE, stored.id)
    assert caller.tier == "bulk"
    assert not caller.may_use("tight")


def test_keys_come_and_go_without_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    door = Door((), path)
    assert door.caller(b"", PEER).is_admin
    store = KeyStore(path)
    _, old = store.add("acme", KeyRole.ADMIN)
    door.check()
    assert refused(door, "") == 401
    _, new = store.add("other", KeyRole.USE)
    door.check()
    store.revoke("tenant:acme")
    door.check()
    assert refused(door, old) == 401
    assert door.caller(f"Bearer {new}".encode(), PEER).tenant == "other"
    with pytest.raises(OServeError, match="no key"):
        store.revoke("tenant:acme")
    store.revoke(store.keys()[0].id)
    door.check()
    assert refused(door, new) == 401


@pytest.mark.parametrize("text", ["", "{}", '{"salt": "zz"}', '{"salt": "' + "ab" * 65 + '"}'])
def test_a_damaged_file_leaves_the_last_keys_in_force(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.json"
    _, key = KeyStore(path).add("acme", KeyRole.USE)
    door = Door((), path)
    path.write_text(text)
    door.check()
    assert door.caller(f"Bearer {key}".encode(), PEER).tenant == "acme"
    path.unlink()
    door.check()
    assert refused(door, "none") == 401
    path.write_text(text)
    with pytest.raises(OServeError, match="not a key file"):
        Door((), path)


def folder_in_place(path: Path) -> None:
    path.mkdir()


def link_to_nothing(path: Path) -> None:
    path.symlink_to(path.with_name("elsewhere.json"))


def link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def half_a_file(path: Path) -> None:
    path.write_text('{"salt": ')


UNREADABLE = [folder_in_place, link_to_nothing, link_to_itself, half_a_file]


@pytest.mark.parametrize("damage", UNREADABLE)
def test_a_file_that_is_there_but_cannot_be_read_never_leaves_the_gateway_open(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    path = tmp_path / "keys.json"
    door, shared = Door((), path), SharedKeys(path)
    assert not door.guarded
    damage(path)
    with pytest.raises(OServeError, match="the keys cannot be read"):
        Door((), path)
    with pytest.raises(OServeError, match="the keys cannot be read"):
        SharedKeys(path)
    # It comes about while the gateway runs.
    door.check()
    assert refused(door, "") == 401
    sent = shared.newer("", 1e9)
    assert sent is not None
    assert not sent.keys


def test_a_file_that_may_not_be_looked_at_closes_the_gateway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "keys.json"
    KeyStore(path).add("acme", KeyRole.USE)

    def forbidden(self: Path, **_: object) -> os.stat_result:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "stat", forbidden)
    with pytest.raises(OServeError, match="Permission denied"):
        Door((), path)


def test_a_change_that_could_not_be_read_is_read_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys.json"
    store = KeyStore(path)
    _, old = store.add("acme", KeyRole.USE)
    door = Door((), path)
    store.revoke("tenant:acme")

    def exhausted(self: Path) -> bytes:
        raise OSError(errno.EMFILE, "Too many open files", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", exhausted)
        for _ in range(3):
            door.check()
    assert door.caller(f"Bearer {old}".encode(), PEER).tenant == "acme"
    assert caplog.text.count("Too many open files") == 1
    door.check()
    assert refused(door, old) == 401


@pytest.mark.parametrize("name", ["", "a b", "a/b", "ä", "x" * 65])
def test_names_of_tenants_are_plain(tmp_path: Path, name: str) -> None:
    with pytest.raises(OServeError, match="no name of a tenant"):
        KeyStore(tmp_path / "keys.json").add(name, KeyRole.USE)
    assert read_keys(tmp_path / "keys.json") is None


def test_many_wrong_keys_cost_bounded_memory_and_lock_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    _, key = KeyStore(tmp_path / "keys.json").add("acme", KeyRole.USE)
    strong = "a-long-key-of-the-settings"
    caplog.set_level(logging.DEBUG)
    door = Door({strong, "short"}, tmp_path / "keys.json")
    statuses = [refused(door, f"guess-{number}") for number in range(2000)]
    assert statuses == [401] * 20 + [429] * 1980
    assert door.caller(f"Bearer {key}".encode(), PEER).tenant == "acme"
    assert door.caller(f"Bearer {strong}".encode(), PEER).is_admin
    assert refused(door, "short") == 429
    assert door.caller(b"Bearer short", "192.0.2.2").is_admin
    assert refused(door, "x" * 100_000, "192.0.2.3") == 401
    assert "guess" not in caplog.text
    assert key not in caplog.text


sources = st.sampled_from(["192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8:0:1::2", "::1"])


@given(
    st.lists(st.tuples(sources, st.floats(0, 5)), max_size=60),
    st.integers(1, 5),
)
def test_failures_are_bounded_by_rate_and_by_memory_whatever_comes(
    steps: list[tuple[str, float]], most: int
) -> None:
    limiter = FailureLimiter(burst=3, interval_s=2.0, most_sources=most)
    now_s, let_through = 0.0, Counter[str]()
    for peer, passed_s in steps:
        now_s += passed_s
        if limiter.wait_s(peer, now_s) == 0.0:
            limiter.failed(peer, now_s)
            let_through[source_of(peer)] += 1
        assert len(limiter) <= most
        # With room for all five, each is held to the rate, whatever the others do.
        assert most < 5 or let_through[source_of(peer)] <= 3 + now_s / 2.0


def test_one_network_of_ipv6_is_one_source() -> None:
    limiter = FailureLimiter(burst=1, interval_s=2.0)
    limiter.failed("2001:db8::1", 0.0)
    assert limiter.wait_s("2001:db8::ffff", 0.0) > 0.0
    assert limiter.wait_s("2001:db8:0:1::1", 0.0) == 0.0


def test_callers_that_are_kept_are_few_and_gone_when_their_key_is(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    store = KeyStore(path)
    _, key = store.add("acme", KeyRole.USE)
    door = Door({"short"}, path)
    header = f"Bearer {key}".encode()
    assert door.caller(header, PEER) is door.caller(header, PEER)
    # Many spellings of one header are no way to fill the memory.
    for spaces in range(1, 5000):
        assert door.caller(b"Bearer" + b" " * spaces + key.encode(), PEER).tenant == "acme"
    assert len(door._known) <= 4096
    assert door.caller(b"Bearer short", PEER).is_admin
    # One that can be guessed is looked up each time, so that its source is always asked for.
    assert b"Bearer short" not in door._known
    store.revoke("tenant:acme")
    door.check()
    assert refused(door, key) == 401
    salts = {door.cache_salt("acme", b"%d" % number) for number in range(5000)}
    salts.add(door.cache_salt("acme", b"x" * 100_000))
    assert len(salts) == 5001
    assert len(door._made._derived) <= 4096
    assert all(len(name) <= 256 for name in door._made._derived)


async def test_roles_decide_what_a_key_may_do(make_front: Make, tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "keys.json")
    _, use = store.add("acme", KeyRole.USE)
    _, admin = store.add("ops", KeyRole.ADMIN)
    front = await make_front(EmulatedEngine(), keys_file=tmp_path / "keys.json")
    front.gateway.runner.metrics.count("oserve_tenant_requests", "ops", "completed")
    calls = []

    async def operate(*call: object) -> tuple[int, bytes]:
        calls.append(call)
        return 200, b"{}"

    front.gateway.operate = operate
    for path in ("/oserve/v1/plan", "/oserve/v1/switch", "/oserve/v1/nodes"):
        assert (await front.post(path, {}))[0] == 401
        status, _, body = await front.post(path, {}, headers=bearer(use))
        assert (status, body["error"]["code"]) == (403, "admin_required")
        assert (await front.post(path, {}, headers=bearer(admin)))[0] == 200
    assert [call[2] for call in calls] == [f"ops/{store.keys()[1].id}"] * 3
    assert (await front.post("/v1/completions", TEXT, headers=bearer(use)))[0] == 200
    status, own = await front.get("/oserve/v1/status", headers=bearer(use))
    assert (status, json.loads(own)["tenant"]) == (200, "acme")
    assert b"ops" not in own
    assert (await front.get("/oserve/v1/switches", headers=bearer(use)))[0] == 403
    assert b'tenant="ops"' in (await front.get("/metrics", headers=bearer(admin)))[1]
    assert b'tenant="ops"' not in (await front.get("/metrics"))[1]
    assert b'tenant="ops"' not in (await front.get("/metrics", headers=bearer(use)))[1]
    assert (await front.get("/metrics", headers=bearer("wrong")))[0] == 401
    assert (await front.get("/metrics", headers={"x-api-key": "wrong"}))[0] == 401
    assert b'tenant="ops"' in (await front.get("/metrics", headers={"x-api-key": admin}))[1]


async def test_a_key_is_revoked_and_rotated_under_load(
    make_front: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "FOLLOW_INTERVAL_S", 0.01)
    store = KeyStore(tmp_path / "keys.json")
    first, old = store.add("acme", KeyRole.USE)
    front = await make_front(EmulatedEngine(), keys_file=tmp_path / "keys.json")
    _, new = store.add("acme", KeyRole.USE)

    async def status(key: str) -> int:
        return (await front.post("/v1/completions", TEXT, headers=bearer(key)))[0]

    while await status(new) != 200:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    load = [asyncio.ensure_future(status(new)) for _ in range(30)]
    store.revoke(first.id)
    while await status(old) == 200:
        if len(load) < 100:
            load.append(asyncio.ensure_future(status(new)))
    assert await asyncio.gather(*load) == [200] * len(load)


def test_the_audit_log_is_appended_rotated_and_private(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path, most_bytes=200, kept_files=2)
    for number in range(20):
        log.write(AuditEntry(at_s=float(number), actor="user me", action="keys add"))
    files = sorted(os.listdir(tmp_path))
    assert files == ["audit.jsonl", "audit.jsonl.1", "audit.jsonl.2"]
    assert all((tmp_path / name).stat().st_size <= 200 for name in files)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(path.read_text().splitlines()[-1])["at_s"] == 19.0
