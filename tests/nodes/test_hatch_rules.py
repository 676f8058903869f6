"""The rules of the greeting and of who is heard: pure, whatever strangers send."""

import asyncio
import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oserve.nodes.agent_messages import AgentOrders
from oserve.nodes.hatch_admission import Admission
from oserve.nodes.hatch_messages import (
    ControlCommand,
    ControlDone,
    ControlReply,
    HatchConfig,
    PeersUpdate,
)
from oserve.nodes.hatch_relay import Visitor
from oserve.wire.hatch import (
    MAX_LINE_BYTES,
    HatchError,
    HatchRefusedError,
    answer_line,
    check_verdict,
    greeting_line,
    is_bulk_name,
    known_name,
    proved_name,
    verdict_line,
)

NONCES = st.text("0123456789abcdef", min_size=32, max_size=32)
TOKENS = st.text(min_size=1, max_size=64)
NAMES = st.text(st.characters(codec="ascii", exclude_characters="\n"), max_size=60)
PARTS = st.sampled_from(
    ["e-1", "..", ".", "", "/", "api.sock", "w0.sock", "w12345.sock", "keeper.sock", "\0", "a.b"]
)


@given(TOKENS, NONCES, NAMES, TOKENS, NONCES)
def test_an_answer_is_right_for_its_token_and_nonce_alone(
    token: str, nonce: str, name: str, other_token: str, other_nonce: str
) -> None:
    line = answer_line(token, greeting_line(nonce), name)
    assert proved_name(token, nonce, line) == name
    if other_token != token:
        assert proved_name(other_token, nonce, line) is None
    if other_nonce != nonce:
        assert proved_name(token, other_nonce, line) is None


@given(TOKENS, NONCES, NAMES, st.data())
def test_an_altered_answer_is_wrong(token: str, nonce: str, name: str, data: st.DataObject) -> None:
    line = bytearray(answer_line(token, greeting_line(nonce), name)[:-1])
    at = data.draw(st.integers(0, len(line) - 1))
    line[at] ^= data.draw(st.integers(1, 255))
    assert proved_name(token, nonce, bytes(line)) is None


@given(st.binary(max_size=100))
def test_any_bytes_are_an_answer_or_not(line: bytes) -> None:
    assert proved_name("token", "0" * 32, line) is None
    if not line.startswith(b"oserve-hatch 1 "):
        with pytest.raises(HatchError):
            answer_line("token", line, "echo")
    if line.rstrip(b"\n") != b"ok":
        with pytest.raises(HatchError):
            check_verdict(line)


@given(st.text(min_size=1, max_size=1000))
def test_a_verdict_is_one_line_and_says_why(reason: str) -> None:
    line = verdict_line(reason)
    assert line.count(b"\n") == 1
    assert len(line) <= MAX_LINE_BYTES
    with pytest.raises(HatchRefusedError):
        check_verdict(line)
    check_verdict(verdict_line())


@given(st.one_of(NAMES, st.lists(PARTS, max_size=4).map("/".join)))
def test_no_name_leads_out_of_the_folder(name: str) -> None:
    if known_name(name):
        folder = "/run/node"
        path = os.path.normpath(f"{folder}/{name}")
        assert path == f"{folder}/{name}"
        assert path.count("/") <= folder.count("/") + 2
    assert not is_bulk_name(name) or known_name(name)


class _Told:
    """A hatch that notes what its visitors did."""

    folder = Path("/nowhere")
    token = "token"
    answer_s = 1.0

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.admitted = 0

    def admit(self, _visitor: Visitor) -> str:
        self.admitted += 1
        return ""

    def turn_away(self, _visitor: Visitor, reason: str) -> None:
        self.reasons.append(reason)

    def left(self, _visitor: Visitor) -> None: ...

    def control(self, _command: ControlCommand) -> ControlReply:
        return ControlDone()


class _Transport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = b""
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.sent += bytes(data)

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True


@given(st.data())
def test_a_line_may_come_in_any_pieces(data: st.DataObject) -> None:
    told, transport = _Told(), _Transport()
    visitor = Visitor(told, 1, "p")
    visitor.connection_made(transport)
    line = answer_line(told.token, transport.sent, "echo")
    transport.sent = b""
    while line:
        size = data.draw(st.integers(1, len(line)))
        assert transport.sent == b""
        visitor.data_received(line[:size])
        line = line[size:]
    assert transport.sent == b"ok\n"
    payload = data.draw(st.binary(max_size=50))
    visitor.data_received(payload)
    assert transport.sent == b"ok\n" + payload
    assert (told.admitted, told.reasons) == (1, [])


@given(st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=10))
def test_nothing_but_the_right_line_is_let_in(pieces: list[bytes]) -> None:
    told, transport = _Told(), _Transport()
    visitor = Visitor(told, 1, "p")
    visitor.connection_made(transport)
    transport.sent = b""
    for piece in pieces:
        if transport.closed:
            break
        visitor.data_received(piece)
    visitor.connection_lost(None)
    assert told.admitted == 0
    assert transport.sent == b""
    assert len(told.reasons) == 1


# -- who is heard ---------------------------------------------------------------------------------
@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=60), st.integers(1, 8))
def test_greetings_are_bounded_and_the_many_go_first(
    steps: list[tuple[str, bool]], most: int
) -> None:
    admission = Admission(greetings=most, refusals_per_s=1)
    under_way: dict[int, str] = {}
    for key, (peer, ends) in enumerate(steps):
        cut = admission.begun(key, peer)
        under_way[key] = peer
        if cut is not None:
            counts = [list(under_way.values()).count(one) for one in under_way.values()]
            assert list(under_way.values()).count(under_way[cut]) == max(counts)
            assert cut == min(one for one, of in under_way.items() if of == under_way[cut])
            assert admission.over(cut)
            del under_way[cut]
        if ends and key in under_way:
            assert admission.over(key)
            assert not admission.over(key)
            del under_way[key]
        assert len(under_way) <= most


@given(st.lists(st.integers(0, 12), max_size=80), st.integers(1, 5))
def test_refusals_close_an_address_for_the_rest_of_a_second(quarters: list[int], most: int) -> None:
    admission = Admission(greetings=1, refusals_per_s=most)
    now_s, logged, heard = 0.0, 0, 0
    for quarter in quarters:
        now_s += quarter / 4
        if admission.heard("a", now_s):
            heard += 1
            before = admission.refuse("a", "reason", now_s)
            if before is not None:
                logged += 1 + before
        assert admission.heard("b", now_s)
        assert admission.heard("a", now_s + 1.0)
    assert admission.refused.get("reason", 0) == heard
    assert logged <= heard
    assert heard <= most * (int(now_s) + 2)


def test_many_addresses_need_little_memory() -> None:
    admission = Admission(greetings=1, refusals_per_s=1)
    for number in range(5000):
        admission.refuse(str(number), "reason", 0.0)
    assert len(admission._peers) <= 1024
    assert admission.refused == {"reason": 5000}


@pytest.mark.parametrize("name", ["a\n", "a b", "a/b", ".a", ""])
def test_no_name_of_a_node_ends_a_line(name: str) -> None:
    """A line between ranks and hatches ends with a newline, and its words with a space."""
    texts = (
        (AgentOrders, {"node": name, "host": ""}),
        (HatchConfig, {"node": name, "folder": "", "host": ""}),
        (PeersUpdate, {"type": "Peers", "peers": {name: hatch_values()}}),
    )
    for kind, values in texts:
        with pytest.raises(msgspec.ValidationError, match="regex"):
            msgspec.json.decode(msgspec.json.encode(values), type=kind)


def hatch_values() -> dict[str, object]:
    return {"host": "h", "port": 1, "certificate": "c", "token": "t"}
