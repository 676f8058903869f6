"""JSON documents of an emulated answer: choices, log probabilities, usage, bodies, chunks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from oserve.sim.dialects import Dialect, UsageForm
from oserve.sim.tokenizer_stub import TokenizerStub

Json = Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """A request that an emulated engine has accepted.

    ``body`` is the checked JSON body. ``limit``: output tokens at most.
    """

    body: Json
    id: str
    chat: bool
    prompt: Sequence[int]
    limit: int

    @property
    def streams(self) -> bool:
        """Whether the answer is an event stream."""
        return bool(self.body.get("stream"))

    @property
    def wants_token_ids(self) -> bool:
        """Whether choices carry vLLM's token ids."""
        return bool(self.body.get("return_token_ids"))

    @property
    def stream_options(self) -> Json:
        """OpenAI's ``stream_options``; empty if absent."""
        options = self.body.get("stream_options")
        return options if isinstance(options, dict) else {}


class Documents:
    """Documents of one answer, in the form of its server."""

    def __init__(self, request: GenerationRequest, dialect: Dialect, tokens: TokenizerStub) -> None:
        self._request = request
        self._dialect = dialect
        self._tokenizer = tokens
        self._model = str(request.body.get("model") or "emulated")
        self._offset = 0

    def choice(
        self,
        content: object,
        finish_reason: str | None,
        *,
        stop_reason: str | int | None,
        tokens: Sequence[int] | None = None,
    ) -> dict[str, object]:
        """``content``: a text, or a chat's delta or message. ``tokens``: included on request."""
        chat = self._request.chat
        choice: dict[str, object] = {"index": 0, "finish_reason": finish_reason, "logprobs": None}
        if finish_reason is not None or not chat:
            choice["stop_reason"] = stop_reason
        if chat:
            choice["delta" if self._request.streams else "message"] = content
        else:
            choice["text"] = content
            choice["prompt_token_ids"] = None
        choice["token_ids"] = None
        if tokens is not None and self._request.wants_token_ids:
            choice["token_ids"] = list(tokens)
        return choice

    def logprobs(self, tokens: Sequence[int]) -> Json | None:
        """Synthetic log probabilities; ``None`` unless requested."""
        body = self._request.body
        wanted = body.get("logprobs")
        if wanted is None or wanted is False:
            return None
        texts = [self._tokenizer.piece(token).decode(errors="replace") for token in tokens]
        if self._request.chat:
            return {
                "content": [_chat_logprob(text, _whole(body, "top_logprobs")) for text in texts]
            }
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "text_offset": offsets,
            "token_logprobs": [-0.5] * len(texts),
            "tokens": texts,
            "top_logprobs": [
                dict(_likeliest(text)[: _whole(body, "logprobs") + 1]) for text in texts
            ],
        }

    def usage(self, made_tokens: int) -> Json:
        """Token counts so far."""
        prompt_tokens = len(self._request.prompt)
        return {
            "prompt_tokens": prompt_tokens,
            "total_tokens": prompt_tokens + made_tokens,
            "completion_tokens": made_tokens,
        }

    def document(self, choices: Sequence[Json], **more: object) -> bytes:
        """A whole body, or the data of an event."""
        kind = "chat.completion" if self._request.chat else "text_completion"
        if self._request.chat and self._request.streams:
            kind += ".chunk"
        head: dict[str, object] = {
            "id": self._request.id,
            "object": kind,
            "created": 0,
            "model": self._model,
        }
        if choices or self._dialect.usage is not UsageForm.WITHOUT_CHOICES:
            head["choices"] = choices
        return self._dialect.text({**head, **more})


def _whole(body: Json, name: str) -> int:
    value = body.get(name)
    return int(value) if isinstance(value, int | float) else 0


def _likeliest(text: str) -> list[tuple[str, float]]:
    return [(text, -0.5), (text + "?", -1.5), (text + "!", -2.5)]


def _chat_logprob(text: str, most: int) -> Json:
    return {
        **_entry(text, -0.5),
        "top_logprobs": [_entry(other, value) for other, value in _likeliest(text)[:most]],
    }


def _entry(text: str, value: float) -> dict[str, object]:
    return {"token": text, "logprob": value, "bytes": list(text.encode())}
