"""Orders to a running engine over its private socket: what the gateway never passes on.

Every call has a time limit; what an engine refuses or does not answer is an ``EngineControlError``.
"""

import contextlib
from types import TracebackType
from typing import Any, Self

import aiohttp

from oserve.core import Endpoint


class EngineControlError(Exception):
    """An engine did not do as asked; the text says why."""


class EngineControl:
    """One engine's control routes. Use as an async context manager, or call ``close``."""

    def __init__(self, endpoint: Endpoint, *, timeout_s: float = 30.0) -> None:
        self._timeout_s = timeout_s
        self._socket = endpoint.unix_socket
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
        """Hang up."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def call(self, method: str, *arguments: Any, timeout_s: float | None = None) -> list[Any]:
        """A method of every worker at once, by name; the answers in rank order."""
        body = {"method": method, "args": list(arguments)}
        answer = await self._post("/collective_rpc", body, timeout_s)
        results = answer.get("results")
        if not isinstance(results, list):
            raise EngineControlError(f"{method} had no answer")
        return results

    async def forget_prefixes(self, timeout_s: float | None = None) -> bool:
        """Drop what is cached of prompts; False while a request still uses some of it."""
        answer = await self._post("/reset_prefix_cache", None, timeout_s)
        return bool(answer.get("success"))

    async def complete(
        self, model: str, prompt: list[int], max_tokens: int, timeout_s: float
    ) -> str:
        """One greedy completion."""
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        answer = await self._post("/v1/completions", body, timeout_s)
        with contextlib.suppress(KeyError, IndexError, TypeError):
            return str(answer["choices"][0]["text"])
        raise EngineControlError("its first request had no answer")

    async def surprise(
        self, model: str, text: str, *, most_tokens: int, timeout_s: float | None = None
    ) -> float:
        """Mean negative logarithm of the chances it gives to a text's tokens, nats a token.

        Of its last ``most_tokens``; perplexity is the exponential of it.
        """
        body = {
            "model": model,
            "prompt": text,
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": 0,
            "truncate_prompt_tokens": most_tokens,
        }
        answer = await self._post("/v1/completions", body, timeout_s)
        with contextlib.suppress(KeyError, IndexError, TypeError, AttributeError):
            # The first token has no chance; of each other one only its own is told.
            found = [
                float(entry["logprob"])
                for token in answer["choices"][0]["prompt_logprobs"][1:]
                for entry in token.values()
            ]
            if found:
                return -sum(found) / len(found)
        raise EngineControlError("it told no chances of the tokens of a prompt")

    async def _post(self, path: str, body: Any, timeout_s: float | None) -> dict[str, Any]:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(path=self._socket)
            )
        limit = aiohttp.ClientTimeout(total=timeout_s or self._timeout_s)
        try:
            async with self._session.post(
                "http://engine" + path, json=body, timeout=limit
            ) as answer:
                if answer.status != 200:
                    text = (await answer.text())[:300]
                    raise EngineControlError(f"{path} answered {answer.status}: {text}")
                found = await answer.json(content_type=None)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise EngineControlError(f"no answer to {path}: {error or 'timed out'}") from None
        return found if isinstance(found, dict) else {}
