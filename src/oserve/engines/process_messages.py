"""Messages of the processes that start engines: the zygote's JSON lines, and the supervisor's one.

Both are started by the process that they talk to, so that they are always of its version.
"""

from typing import Final

import msgspec


class EngineFork(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To the zygote: fork an engine. ``threads``: of its computations; ``cores``: empty for any."""

    name: str
    argv: list[str]
    env: dict[str, str]
    cores: list[int]
    threads: int
    log: str


class ZygoteReady(msgspec.Struct, frozen=True, tag=True):
    """The zygote has imported vLLM."""


class EngineForked(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The engine's first process runs, as leader of a group."""

    name: str
    pid: int


class EngineExited(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """No process of the engine is left; a negative status is a signal."""

    name: str
    status: int


class ForkRefused(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The zygote could not read a message; ``name`` is that of the engine, if it names one."""

    name: str
    reason: str


class SupervisorReady(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """From a supervisor: its command runs, as leader of the group ``pid``."""

    pid: int


ZygoteEvent = ZygoteReady | EngineForked | EngineExited | ForkRefused

_FORKS: Final = msgspec.json.Decoder(EngineFork)
_EVENTS: Final[msgspec.json.Decoder[ZygoteEvent]] = msgspec.json.Decoder(ZygoteEvent)
_READY: Final = msgspec.json.Decoder(SupervisorReady)


class _Named(msgspec.Struct):
    name: str = ""


_NAMED_DECODER = msgspec.json.Decoder(_Named)


def encoded(message: EngineFork | ZygoteEvent | SupervisorReady) -> bytes:
    """One line."""
    return msgspec.json.encode(message) + b"\n"


def fork_of(line: bytes) -> EngineFork | ForkRefused:
    """A message to the zygote, or the answer to one that it cannot read."""
    try:
        return _FORKS.decode(line)
    except msgspec.DecodeError as error:
        try:
            name = _NAMED_DECODER.decode(line).name
        except msgspec.DecodeError:
            name = ""
        return ForkRefused(name=name, reason=f"the zygote cannot read a message: {error}")


def zygote_event_of(line: bytes) -> ZygoteEvent:
    """A message of the zygote. Raises ``msgspec.DecodeError`` if it is none."""
    return _EVENTS.decode(line)


def supervisor_ready_of(line: bytes) -> SupervisorReady | None:
    """A supervisor's message; ``None`` if it ended without one."""
    try:
        return _READY.decode(line)
    except msgspec.DecodeError:
        return None
