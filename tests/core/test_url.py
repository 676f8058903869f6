"""Addresses of servers as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oserve.core import OServeError
from oserve.core.url import server_url


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000"),
        ("127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("127.0.0.1:8000/v1", "http://127.0.0.1:8000"),
        ("localhost", "http://localhost"),
        ("localhost:8000", "http://localhost:8000"),
        ("gpu_box.lan:8000", "http://gpu_box.lan:8000"),
        ("8000", "http://127.0.0.1:8000"),
        (":8000", "http://127.0.0.1:8000"),
        (":8000/v1", "http://127.0.0.1:8000"),
        ("//host:1", "http://host:1"),
        (" http://host ", "http://host"),
        ("HTTP://Host", "http://host"),
        ("https://host", "https://host"),
        ("https://host/llm/v1", "https://host/llm"),
        ("https://host/llm", "https://host/llm"),
        ("https://host:443/a/b//", "https://host:443/a/b"),
        ("http://host/v1/chat/completions", "http://host"),
        ("http://host/oserve/v1/status", "http://host"),
        ("http://host/oserve/v1", "http://host"),
        ("http://host/predictions/m/1.0/v1/completions", "http://host/predictions/m/1.0"),
        ("[::1]:8000", "http://[::1]:8000"),
        ("http://[::1]/v1", "http://[::1]"),
    ],
)
def test_what_people_write(text: str, url: str) -> None:
    assert server_url(text) == url


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "http://",
        "ftp://host",
        "unix:///run/engine.sock",
        "http://host:many",
        "http://host:0",
        "http://host:70000",
        "http://us er",
        "http://user:word@host",
        "http://host/?a=1",
        "http://host/#top",
        "http://host/a b",
        "http://[::1",
        "http://-x",
        "trace.csv.gz --speed",
        "http:/host",
    ],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(OServeError) as caught:
        server_url(text)
    assert caught.value.place == "--url"
    assert caught.value.remedy


@given(st.text(max_size=30) | st.from_regex(r"(https?://)?[a-z.:\[\]/v1@?#]{1,20}", fullmatch=True))
def test_any_text_is_a_url_or_refused(text: str) -> None:
    try:
        url = server_url(text)
    except OServeError:
        return
    assert url.startswith(("http://", "https://"))
    # The host itself may be called v1.
    assert not url.partition("://")[2].endswith(("/", "/v1"))
    assert server_url(url) == url
