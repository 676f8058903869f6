"""The nodes of a running server: operators' words, their memory, and the log of what happens."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from oserve.control.loop import ControlLoop
from oserve.control.nodes import NodeBook
from oserve.control.status import node_documents
from oserve.core import NodePhase, NodeState, Observation, OServeError

_DOCUMENT_DECODER = msgspec.json.Decoder(dict[str, Any])

_log = logging.getLogger("oserve.control")

_DRAINING = NodePhase.DRAINING.value
_TROUBLE = {NodePhase.LOST, NodePhase.SILENT, NodePhase.HELD_DOWN}


class NodeCall(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An operator's call about nodes; ``node`` is empty for the list."""

    action: Literal["list", "cordon", "drain", "uncordon"]
    node: str = ""


_NODE_CALL_DECODER = msgspec.json.Decoder(NodeCall)


class NodeOperations:
    """Carries out operators' words about nodes.

    They are kept in ``STATE_DIR/nodes.json``, so that a cordoned node stays so when the server is
    restarted, and one that flaps finds its losses. Without ``replaces`` no controller moves
    replicas, so those of a draining node drain at once. ``documents``: what else is known of each
    node, for the list.
    """

    def __init__(
        self,
        state_dir: Path,
        loop: ControlLoop,
        *,
        replaces: bool,
        documents: Callable[[], Mapping[str, Mapping[str, Any]]] = dict,
    ) -> None:
        self.documents = documents
        self._path = state_dir / "nodes.json"
        self._loop = loop
        self._replaces = replaces
        self._saved: dict[str, Any] = self._book.state()
        self._phases: dict[str, NodePhase] = {}
        self._recall()

    @property
    def _book(self) -> NodeBook:
        return self._loop.nodes.book

    async def answer(self, body: bytes, observation: Observation | None) -> dict[str, Any]:
        """Execute a call. Raises OServeError for a malformed one, or for an unknown node."""
        try:
            call = _NODE_CALL_DECODER.decode(body)
        except msgspec.DecodeError as error:
            raise OServeError(
                str(error), place="node", remedy="see docs/operations.md, Nodes"
            ) from None
        match call.action:
            case "cordon":
                self._book.cordon(call.node)
            case "drain":
                self._book.drain(call.node)
            case "uncordon":
                self._book.uncordon(call.node)
        if call.action != "list":
            _log.info("node %s: %s, by an operator", call.node, call.action)
            await asyncio.to_thread(self._save)
            observation = await self._loop.look()
        if observation is None:
            return {"nodes": []}
        return {"nodes": node_documents(observation, self.documents())}

    def observe(self, observation: Observation) -> None:
        """Log each change of a node, and save its losses; call it with each observation."""
        if not self._replaces:
            self.evacuate(observation)
        for state in observation.node_states:
            before = self._phases.get(state.name)
            self._phases[state.name] = state.phase
            if before is not None and before is not state.phase:
                level = logging.WARNING if state.phase in _TROUBLE else logging.INFO
                _log.log(level, "%s", _line(state, observation.now_s))
        if observation.node_states and self._book.state() != self._saved:
            self._save()

    def evacuate(self, observation: Observation) -> None:
        """Let draining nodes' replicas leave now, since nothing replaces them any more."""
        self._loop.nodes.evacuated |= {
            state.name for state in observation.node_states if state.word == _DRAINING
        }

    # -- memory ---------------------------------------------------------------------------------
    def _recall(self) -> None:
        try:
            self._book.restore(_DOCUMENT_DECODER.decode(self._path.read_bytes()))
        except FileNotFoundError:
            return
        except (OSError, msgspec.DecodeError, ValueError, TypeError) as error:
            _log.warning("%s cannot be read, so no node is cordoned: %s", self._path, error)
            return
        self._saved = self._book.state()

    def _save(self) -> None:
        state = self._book.state()
        try:
            new = self._path.with_suffix(".new")
            new.write_bytes(msgspec.json.encode(state))
            new.replace(self._path)
        # A full disk must not end serving.
        except OSError as error:
            _log.warning("%s cannot be written: %s", self._path, error.strerror)
        self._saved = state


def _line(state: NodeState, now_s: float) -> str:
    words = f"node {state.name} is {state.phase.value.replace('_', ' ')}"
    if state.phase in {NodePhase.LOST, NodePhase.FETCHING}:
        return f"{words}: {state.reason}"
    if state.phase is NodePhase.HELD_DOWN:
        left_s = max(0.0, state.until_s - now_s)
        return f"{words} for {left_s:.0f} s after loss {state.losses}"
    return words
