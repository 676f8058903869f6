"""Audits operators' calls that change the fleet."""

import asyncio
import logging
import time
from pathlib import Path

import msgspec

from oserve.gateway.access.audit import AUDIT_FILE, AuditEntry, AuditLog
from oserve.gateway.process.messages import OperatorAnswer, OperatorCall

_FIELDS_DECODER = msgspec.json.Decoder(dict[str, str])

_log = logging.getLogger("oserve.control")

SWITCH_PATH = "/oserve/v1/switch"
NODES_PATH = "/oserve/v1/nodes"
_DONE = 200
_MOST_ACTION = 200


class CallAudit:
    """Writes to the audit log of a state folder."""

    def __init__(self, folder: Path) -> None:
        self._log = AuditLog(folder / AUDIT_FILE)

    async def note(self, call: OperatorCall, answer: OperatorAnswer) -> None:
        """Write down a call and how it ended, unless it only asked."""
        action = _changing(call)
        if action is None:
            return
        document = msgspec.json.decode(answer.body)
        entry = AuditEntry(
            at_s=round(time.time(), 3),
            actor=call.actor,
            source=call.source,
            action=action,
            outcome="done" if answer.status == _DONE else document["error"]["message"],
            facts={"plan": document["line"]} if "line" in document else {},
        )
        try:
            await asyncio.to_thread(self._log.write, entry)
        except OSError as error:
            _log.error("the audit log cannot be written: %s; %r", error, entry)


def _changing(call: OperatorCall) -> str | None:
    """What a call asks to change; ``None``: it only asks."""
    if call.path == SWITCH_PATH:
        return "switch"
    if call.path != NODES_PATH:
        return None
    try:
        wanted = _FIELDS_DECODER.decode(call.body)
    except msgspec.DecodeError:
        return None
    action = wanted.get("action", "")
    return None if action == "list" else f"{action} {wanted.get('node', '')}"[:_MOST_ACTION]
