"""How attached servers are found to be, from what they answer."""

from typing import Any

import pytest

from oserve.core import AttachedBackend, Endpoint
from oserve.engines.attached import AttachedProbe, Finding, health_paths
from oserve.engines.probe import ProbeReply

CARDS = b'{"data": [{"id": "m", "max_model_len": 9}]}'


class Scripted:
    """Answers by path; 404 to all others."""

    def __init__(self, **answers: int | ProbeReply) -> None:
        self.asked: list[str] = []
        self.answers = {
            "/" + path.replace("__", "/"): item
            if isinstance(item, ProbeReply)
            else ProbeReply(status=item)
            for path, item in answers.items()
        }

    async def ask(self, method: str, path: str, body: Any = None) -> ProbeReply:
        self.asked.append(path)
        return self.answers.get(path, ProbeReply(status=404))


async def look(
    url: str, how: str = "try_out", given: str = "", key: str = "", **answers: Any
) -> tuple[Finding, list[str]]:
    probe = Scripted(**answers)
    endpoint = Endpoint(url=url, health=given, api_key=key)
    found = await getattr(AttachedProbe(probe, endpoint, "m"), how)()  # type: ignore[arg-type]
    return found, probe.asked


@pytest.mark.parametrize(
    ("url", "answers", "health"),
    [
        ("http://h", {"health": 200}, "/health"),
        ("http://h/v1", {"v1__models": ProbeReply(status=200, body=CARDS)}, "/v1/models"),
        ("http://h", {"ping": 200}, "/ping"),
        ("http://h", {"v2__health__ready": 204}, "/v2/health/ready"),
        ("http://h/a", {"a__health": 200, "health": 200}, "/a/health"),
        ("http://h/a", {"health": 200}, "/health"),
        ("http://h/predictions/m/1.0", {"ping": 200}, "/ping"),
    ],
)
async def test_the_health_path_is_found(url: str, answers: dict[str, Any], health: str) -> None:
    found, _ = await look(url, "whole", **answers)
    assert (found.trouble, found.health) == ("", health)


async def test_torchserve_is_asked_nothing_that_it_takes_for_a_prediction() -> None:
    assert health_paths("http://h/predictions/m/1.0/v1") == ["/ping"]
    _, asked = await look("http://h/predictions/m/1.0", "whole", ping=200)
    assert asked == ["/ping"]


async def test_a_path_that_was_found_is_asked_alone_until_it_is_gone() -> None:
    probe = Scripted(ping=200)
    watch = AttachedProbe(probe, Endpoint(url="http://h"), "m")  # type: ignore[arg-type]
    await watch.health()
    probe.asked.clear()
    assert not (await watch.health()).trouble
    assert probe.asked == ["/ping"]
    probe.answers = {"/health": ProbeReply(status=200)}
    assert (await watch.health()).health == "/health"
    probe.answers = {"/health": ProbeReply(status=503)}
    assert "not healthy" in (await watch.health()).trouble


@pytest.mark.parametrize(
    ("answers", "trouble", "remedy"),
    [
        ({"health": ProbeReply(status=0, why="cannot connect")}, "cannot connect", "start it"),
        ({}, "no path tells its health", "attach.health"),
        ({"health": 401}, "/health answers 401", "api_key_env"),
        ({"health": 503}, "not healthy", "its own log"),
        ({"health": 200, "v1__models": 403}, "/v1/models answers 403", "api_key_env"),
        ({"health": 200, "v1__completions": 401}, "answers 401", "api_key_env"),
        ({"health": 200}, "answers 404 for the model 'm'", "attach.model"),
        ({"health": 200, "v1__completions": 500}, "answers 500", "its own log"),
        ({"health": 200, "v1__completions": 429}, "answers 429", "its own log"),
        (
            {"health": 200, "v1__completions": ProbeReply(status=0, why="no answer within 5 s")},
            "no answer",
            "its own log",
        ),
    ],
)
async def test_what_is_wrong_is_told_with_its_remedy(
    answers: dict[str, Any], trouble: str, remedy: str
) -> None:
    found, _ = await look("http://h", **answers)
    assert trouble in found.trouble
    assert remedy in found.remedy
    if "api_key_env" in remedy:
        found, _ = await look("http://h", key="k", **answers)
        assert "check the value" in found.remedy


async def test_a_doubtful_server_still_serves() -> None:
    card = ProbeReply(status=200, body=b'{"data": [{"id": "other"}]}')
    found, _ = await look("http://h", v1__models=card, v1__completions=200)
    assert found.trouble == ""
    assert "lists other and not m" in found.doubt
    found, _ = await look("http://h", v1__models=card, v1__completions=400)
    assert "answers 400" in found.doubt
    for body in (b"", b"<html>", b"[]", b'{"data": {}}', b'{"choices": []}'):
        odd = ProbeReply(status=200, body=body)
        found, _ = await look("http://h", v1__models=odd, v1__completions=200)
        assert (found.trouble, found.doubt, found.models) == ("", "", None)


async def test_a_server_may_speak_in_chats_only() -> None:
    found, asked = await look("http://h", ping=200, v1__chat__completions=200)
    assert found == Finding(health="/ping")
    assert asked[-2:] == ["/v1/completions", "/v1/chat/completions"]


async def test_a_health_path_that_is_given_is_asked_alone() -> None:
    found, asked = await look("http://h/a", "whole", given="/up", up=200)
    assert found.health == "/up"
    assert asked == ["/up", "/a/v1/models"]
    found, asked = await look("http://h", "whole", given="/up")
    assert "attach.health" in found.remedy
    assert asked == ["/up"]


def test_an_endpoint_takes_its_secrets_from_the_environment() -> None:
    backend = AttachedBackend(
        url="http://h/a", api_key_env="KEY", headers=(("X-A", "$A"), ("X-B", "$5"), ("X-C", "c"))
    )
    assert backend.variables == ("KEY", "A")
    endpoint = backend.endpoint({"KEY": "k", "A": "a"})
    assert endpoint.api_key == "k"
    assert endpoint.headers == (("X-A", "a"), ("X-B", "$5"), ("X-C", "c"))
