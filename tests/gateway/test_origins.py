"""Scripts of web pages: what the Fetch standard wants of answers, and only for named origins."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.conftest import Make
from oserve.core import OServeError
from oserve.gateway.http.cors import AllowedOrigins
from oserve.gateway.settings import GatewaySettings
from oserve.sim import EmulatedEngine

PAGE = "https://chat.example.org"
BODY = {"model": "emulated", "prompt": "hello there", "max_tokens": 3}
ALLOW, WANTED = "access-control-allow-origin", "access-control-request-method"


def settings(*origins: str) -> GatewaySettings:
    return GatewaySettings(port=0, shutdown_grace_s=0.0, allowed_origins=origins)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_page_reads_answers_and_refusals(make_front: Make, stream: bool) -> None:
    front = await make_front(EmulatedEngine(), settings=settings(PAGE, "http://localhost:3000"))
    url = front.url + "/v1/completions"
    for body, status in ((BODY | {"stream": stream}, 200), (BODY | {"model": "another"}, 404)):
        async with front.session.post(url, json=body, headers={"origin": PAGE}) as answer:
            assert answer.status == status
            assert answer.headers.getall(ALLOW) == [PAGE]
            assert answer.headers["access-control-expose-headers"] == "*"
            assert answer.headers["vary"] == "origin"
            await answer.read()
        async with front.session.post(url, json=body, headers={"origin": PAGE + ":1"}) as answer:
            assert answer.status == status
            assert ALLOW not in answer.headers
            assert answer.headers["vary"] == "origin"
            await answer.read()


async def test_a_browser_that_asks_first_needs_no_key(make_front: Make) -> None:
    front = await make_front(
        EmulatedEngine(), settings=settings(PAGE), api_keys=frozenset({"secret"})
    )
    url = front.url + "/v1/chat/completions"
    asked = {"origin": PAGE, WANTED: "POST", "access-control-request-headers": "authorization,x"}
    async with front.session.options(url, headers=asked) as answer:
        assert answer.status == 200
        assert answer.headers[ALLOW] == PAGE
        assert answer.headers["access-control-allow-methods"] == "POST"
        assert answer.headers["access-control-allow-headers"] == "authorization,x"
        assert "access-control-allow-credentials" not in answer.headers
    async with front.session.options(url, headers=asked | {"origin": "null"}) as answer:
        assert answer.status == 200
        assert not [name for name in answer.headers if name.lower().startswith("access-control")]
    # The request itself does need one, and the page can read that.
    async with front.session.post(url, json=BODY, headers={"origin": PAGE}) as answer:
        assert answer.status == 401
        assert answer.headers[ALLOW] == PAGE


async def test_all_origins_or_none(make_front: Make) -> None:
    everyone = await make_front(EmulatedEngine(), settings=settings("*"))
    async with everyone.session.get(everyone.url + "/v1/models", headers={"origin": "null"}) as it:
        assert it.headers[ALLOW] == "*"
    nobody = await make_front(EmulatedEngine())
    async with nobody.session.get(nobody.url + "/v1/models", headers={"origin": PAGE}) as it:
        assert ALLOW not in it.headers
        assert "vary" not in it.headers


@given(
    origins=st.sets(st.sampled_from((PAGE, "http://a:1", "*"))),
    origin=st.sampled_from(("", "null", PAGE, "http://a:1", "http://a", PAGE.upper())),
)
def test_only_named_origins_are_told_anything(origins: set[str], origin: str) -> None:
    allowed = AllowedOrigins(origins)
    request = {b"origin": origin.encode()} if origin else {}
    named = bool(origin) and ("*" in origins or origin in origins)
    fields = dict(allowed.fields(request))
    assert (ALLOW.encode() in fields) == named
    asked = request | {WANTED.encode(): b"POST"}
    assert bool(allowed.preflight(asked, (b"POST",))) == (named or "*" in origins)
    assert allowed.preflight(request, (b"POST",)) == ()


@pytest.mark.parametrize("origin", ["chat.example.org", PAGE + "/", PAGE.upper(), "", "http://a b"])
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(OServeError, match="is no origin"):
        AllowedOrigins([origin])
