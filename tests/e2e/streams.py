"""Streams of many kinds, and what a client makes of them."""

import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

TOKENS = 150
_WISH = {
    "model": "tiny",
    "temperature": 0,
    "ignore_eos": True,
    "max_tokens": TOKENS,
    "stream": True,
    "stream_options": {"include_usage": True},
}


def wish(index: int) -> tuple[str, dict[str, Any]]:
    """Chats and texts, some with stop strings that hold text back, some with logprobs."""
    body: dict[str, Any] = dict(_WISH)
    if index % 3 == 0:
        body["stop"] = ["this will not be said"]
    if index % 4 in {1, 2}:
        body["logprobs"] = 1 if index % 2 else True
    if index % 2:
        return "/v1/completions", {**body, "prompt": f"story {index}: "}
    messages = [{"role": "user", "content": f"tell me of {index}"}]
    return "/v1/chat/completions", {**body, "messages": messages}


async def told(session: aiohttp.ClientSession, url: str, index: int, seen: list[int]) -> Any:
    """Text, tokens with their logprobs, ends and usage of one stream; counts its events."""
    path, body = wish(index)
    text, usage, roles = "", None, 0
    tokens: list[Any] = []
    ends: list[str] = []
    async with session.post(url + path, json=body) as answer:
        assert answer.status == 200
        lines = [line async for line in counted(answer, seen)]
    assert lines[-1] == b"[DONE]"
    for line in lines[:-1]:
        event = json.loads(line)
        assert "error" not in event, event
        for choice in event["choices"]:
            assert choice.get("token_ids") is None
            delta = choice.get("delta", {})
            roles += "role" in delta
            text += choice.get("text") or delta.get("content") or ""
            logprobs = choice.get("logprobs") or {}
            tokens += zip(logprobs.get("tokens", ()), logprobs.get("text_offset", ()), strict=True)
            tokens += [entry["token"] for entry in logprobs.get("content") or ()]
            if choice["finish_reason"]:
                ends.append(choice["finish_reason"])
        usage = event.get("usage") or usage
    return text, tokens, ends, usage, roles


async def counted(answer: aiohttp.ClientResponse, seen: list[int]) -> AsyncIterator[bytes]:
    async for line in answer.content:
        if line.startswith(b"data: "):
            seen[0] += 1
            yield line[6:].strip()
