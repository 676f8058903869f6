"""Calls to a running engine over its private socket: routes that the gateway never passes on.

Every call has a time limit. A call that the engine refuses, does not answer or answers in an
unknown form raises ``EngineControlError``.
"""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self, TypeVar

import aiohttp
import msgspec

from oserve.core import Endpoint
from oserve.engines.connectors import connector_of
from oserve.engines.rank_commands import (
    METHOD,
    REPLIES,
    CommandDone,
    CommandRefused,
    JobReport,
    LayoutReply,
    ListenerReply,
    RankCommand,
)

Reply = TypeVar("Reply", LayoutReply, ListenerReply, JobReport, CommandDone)
ControlAnswer = TypeVar("ControlAnswer", bound=msgspec.Struct)


class EngineControlError(Exception):
    """An engine did not do what it was asked; the text says why."""


class _RankReplies(msgspec.Struct):
    results: list[str]


class _PrefixReset(msgspec.Struct):
    success: bool = False


class _TokenLogprob(msgspec.Struct):
    logprob: float


class _Choice(msgspec.Struct):
    text: str
    # One entry per prompt token, by token id; the first token has none.
    prompt_logprobs: list[dict[str, _TokenLogprob] | None] | None = None


class _Completion(msgspec.Struct):
    choices: list[_Choice]


class EngineControl:
    """One engine's control routes. Use as an async context manager, or call ``close``."""

    def __init__(self, endpoint: Endpoint, *, timeout_s: float = 30.0) -> None:
        self._timeout_s = timeout_s
        self._endpoint = endpoint
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Disconnect."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def command(
        self,
        commands: RankCommand | Sequence[RankCommand],
        expected: type[Reply],
        *,
        timeout_s: float | None = None,
    ) -> list[Reply]:
        """Have every rank carry out its command, one for each or one for all; replies by rank.

        Raises EngineControlError if a rank refuses, or does not reply with ``expected``.
        """
        listed = [commands] if isinstance(commands, msgspec.Struct) else list(commands)
        body = {
            "method": METHOD,
            "args": [[msgspec.json.encode(command).decode() for command in listed]],
        }
        answer = await self._post("/collective_rpc", body, _RankReplies, timeout_s)
        replies: list[Reply] = []
        for text in answer.results:
            try:
                reply = REPLIES.decode(text)
            except msgspec.DecodeError as error:
                raise EngineControlError(
                    f"a reply cannot be read ({error}); the engine may run another version of "
                    "OServe: restart it"
                ) from None
            if isinstance(reply, CommandRefused):
                raise EngineControlError(reply.reason)
            if not isinstance(reply, expected):
                raise EngineControlError(
                    f"a {expected.__name__} was expected, and a {type(reply).__name__} came"
                )
            replies.append(reply)
        return replies

    async def forget_prefixes(self, timeout_s: float | None = None) -> bool:
        """Empty the prefix cache; False while a running request uses some of it."""
        answer = await self._post("/reset_prefix_cache", None, _PrefixReset, timeout_s)
        return answer.success

    async def complete(
        self, model: str, prompt: list[int], max_tokens: int, timeout_s: float
    ) -> str:
        """The text of one greedy completion."""
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        answer = await self._post("/v1/completions", body, _Completion, timeout_s)
        if not answer.choices:
            raise EngineControlError("a completion came without a choice")
        return answer.choices[0].text

    async def surprise(
        self, model: str, text: str, *, most_tokens: int, timeout_s: float | None = None
    ) -> float:
        """Mean negative log-likelihood of a text under its model, in nats per token.

        Of the last ``most_tokens`` tokens; the exponential of it is the perplexity.
        """
        body = {
            "model": model,
            "prompt": text,
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": 0,
            "truncate_prompt_tokens": most_tokens,
        }
        answer = await self._post("/v1/completions", body, _Completion, timeout_s)
        logprobs = answer.choices[0].prompt_logprobs if answer.choices else None
        # With prompt_logprobs=0 each entry has the prompt's own token only.
        found = [
            token.logprob for entry in (logprobs or [])[1:] if entry for token in entry.values()
        ]
        if not found:
            raise EngineControlError("a completion came without log-probabilities of its prompt")
        return -sum(found) / len(found)

    async def _post(
        self,
        path: str,
        body: Mapping[str, object] | None,
        expected: type[ControlAnswer],
        timeout_s: float | None,
    ) -> ControlAnswer:
        if self._session is None:
            self._session = aiohttp.ClientSession(connector=connector_of(self._endpoint))
        limit = aiohttp.ClientTimeout(total=timeout_s or self._timeout_s)
        try:
            async with self._session.post(
                "http://engine" + path, json=body, timeout=limit
            ) as answer:
                content = await answer.read()
                if answer.status != 200:
                    text = content.decode(errors="replace")[:300]
                    raise EngineControlError(f"{path} answered {answer.status}: {text}")
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise EngineControlError(f"no answer to {path}: {error or 'timed out'}") from None
        try:
            return msgspec.json.decode(content or b"{}", type=expected)
        except msgspec.DecodeError as error:
            raise EngineControlError(f"{path} answered in an unknown form: {error}") from None
