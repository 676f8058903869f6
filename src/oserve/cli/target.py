"""The server under load: its model, its tokenizer's ratio, and its API dialect."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp
import msgspec

from oserve.cli.answers import USUAL, ApiDialect, BenchAnswer, error_message
from oserve.cli.prompts import PromptWriter, sample_text
from oserve.cli.remote import unreachable
from oserve.core import OServeError
from oserve.core.url import server_url
from oserve.traces import OutcomeStatus

_SAMPLE_WORDS = (50, 550)
_PROBE_WORDS = 60
_PROBE_TOKENS = 4
# Fields of vLLM and newer fields of OpenAI that a server may reject; tried with and without each.
_REFUSED = ((True, True), (False, True), (True, False), (False, False))


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchTarget:
    """The server under load. ``max_model_len`` is 0 if the server does not report it.

    ``tenant_keys``: the API key of each tenant of a trace; others use ``api_key``.
    """

    url: str
    model: str
    max_model_len: int
    api_key: str = ""
    chat: bool = False
    timeout_s: float = 600.0
    dialect: ApiDialect = USUAL
    tenant_keys: Mapping[str, str] = field(default_factory=dict)

    @property
    def headers(self) -> dict[str, str]:
        """The headers of every request."""
        return {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    @property
    def path(self) -> str:
        """The path of completions."""
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    def body(self, prompt: str, output_tokens: int) -> dict[str, Any]:
        """The body of a streamed request for ``output_tokens`` tokens."""
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": output_tokens,
            "stream": True,
        }
        if self.dialect.ignore_eos:
            body["ignore_eos"] = True
        if self.dialect.stream_options:
            body["stream_options"] = {"include_usage": True}
        if self.chat:
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        return body


class _Card(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Cards(msgspec.Struct):
    data: list[_Card]


_CARDS_DECODER = msgspec.json.Decoder(_Cards)


async def find_target(
    session: aiohttp.ClientSession,
    url: str,
    *,
    model: str,
    api_key: str,
    chat: bool,
    timeout_s: float,
) -> BenchTarget:
    """Ask the server for its models; the first one if ``model`` is empty. Raises OServeError."""
    target = BenchTarget(
        url=server_url(url),
        model=model,
        max_model_len=0,
        api_key=api_key,
        chat=chat,
        timeout_s=timeout_s,
    )
    status, body = await _ask(session, target, "/v1/models")
    if status in {401, 403}:
        raise OServeError(
            f"it rejects the API key, or requires one: {error_message(body)}",
            place=target.url,
            remedy="give --api-key, or set OPENAI_API_KEY",
        )
    cards = _cards(body) if status == 200 else None
    if not cards:
        if model:
            # A server that lists no models may still serve this one.
            return target
        what = "has no model" if cards == [] else f"is not in OpenAI's form (status {status})"
        raise OServeError(
            f"its /v1/models {what}", place=target.url, remedy="check the URL, or give --model"
        )
    chosen = next((card for card in cards if not model or card.id == model), None)
    if chosen is None:
        names = ", ".join(card.id for card in cards[:20])
        raise OServeError(
            f"the model {model!r} is not served", place="--model", remedy=f"there is {names}"
        )
    return replace(target, model=chosen.id, max_model_len=chosen.max_model_len or 0)


async def calibrated_writer(
    session: aiohttp.ClientSession, target: BenchTarget, *, seed: int
) -> PromptWriter:
    """Calibrate a writer on two samples of the tokenizer; a guess if ``/tokenize`` is missing."""
    samples = []
    for words in _SAMPLE_WORDS:
        body = {"model": target.model, "prompt": sample_text(words, seed)}
        try:
            _, answered = await _ask(session, target, "/tokenize", body)
            samples.append((words, int(msgspec.json.decode(answered)["count"])))
        except (OServeError, ValueError, KeyError, TypeError):
            return PromptWriter.measured([], seed=seed)
    return PromptWriter.measured(samples, seed=seed)


async def warmed_up(
    session: aiohttp.ClientSession, target: BenchTarget, *, seed: int
) -> tuple[BenchTarget, tuple[int, int] | None]:
    """Detect the target's dialect with one short request; also return its words and tokens.

    Later requests omit fields that the server rejects. A server that is overloaded now gets the
    usual dialect. Raises OServeError, with the server's message, if it rejects the request.
    """
    prompt = sample_text(_PROBE_WORDS, seed + 1)
    rejections: list[tuple[int, bytes]] = []
    for stream_options, ignore_eos in _REFUSED:
        asked = replace(
            target, dialect=ApiDialect(stream_options=stream_options, ignore_eos=ignore_eos)
        )
        status, body, answer = await _probe(session, asked, prompt)
        if status == 200:
            return replace(asked, dialect=_learned(asked, answer)), _length(answer)
        rejections.append((status, body))
        if status not in {400, 422}:
            break
    status, body = rejections[0]
    if status == 429 or status >= 500:
        return target, None
    remedy = "see what it says"
    if status in {404, 405}:
        remedy = "check the URL; --chat asks for chat completions, without it for completions"
    elif status in {401, 403}:
        remedy = "give --api-key, or set OPENAI_API_KEY"
    raise OServeError(
        f"it rejects requests: status {status} to {target.path}: {error_message(body)}",
        place=target.url,
        remedy=remedy,
    )


def _learned(target: BenchTarget, answer: BenchAnswer) -> ApiDialect:
    status, error = answer.verdict(_PROBE_TOKENS, ApiDialect(done=False, usage=False, exact=False))
    if status is OutcomeStatus.FAILED:
        raise OServeError(
            f"the first request failed: {error}", place=target.url, remedy="see what it says"
        )
    # vLLM, SGLang and OServe report the context and honour ignore_eos.
    exact = target.dialect.ignore_eos and target.max_model_len > 0
    return replace(
        target.dialect,
        done=answer.done or status is not OutcomeStatus.COMPLETED,
        usage=answer.usage is not None,
        exact=exact,
    )


def _length(answer: BenchAnswer) -> tuple[int, int] | None:
    counted = answer.usage.prompt_tokens if answer.usage else None
    return (_PROBE_WORDS, counted) if counted else None


async def _probe(
    session: aiohttp.ClientSession, target: BenchTarget, prompt: str
) -> tuple[int, bytes, BenchAnswer]:
    answer = BenchAnswer()
    body = msgspec.json.encode(target.body(prompt, _PROBE_TOKENS))
    headers = {"content-type": "application/json", **target.headers}
    try:
        async with session.post(
            target.url + target.path,
            data=body,
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=target.timeout_s, sock_connect=10),
        ) as got:
            whole = await got.read()
            if got.status == 200:
                answer.feed(whole, 1.0)
                answer.end(1.0)
            return got.status, whole, answer
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
        raise unreachable(error, target.url) from None


async def _ask(
    session: aiohttp.ClientSession, target: BenchTarget, path: str, body: Any = None
) -> tuple[int, bytes]:
    method = "GET" if body is None else "POST"
    try:
        async with session.request(
            method,
            target.url + path,
            json=body,
            headers=target.headers,
            timeout=aiohttp.ClientTimeout(total=30.0, sock_connect=10),
        ) as answer:
            return answer.status, await answer.read()
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
        raise unreachable(error, target.url) from None


def _cards(body: bytes) -> list[_Card] | None:
    try:
        return _CARDS_DECODER.decode(body).data
    except (msgspec.DecodeError, RecursionError):
        return None
