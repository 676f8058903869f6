"""Which fields of a request a continuation copies, and which prevent a stream from moving.

Any other field that is given and not null prevents it: an engine may hold state for that field, and
OServe cannot transfer it.
"""

from typing import Any

import msgspec

from oserve.gateway.http.body import Fields, as_flag, as_integer


class UnmovableError(Exception):
    """Why a stream cannot continue on another replica."""


# Stateless, or treating prompt and output alike (repetition_penalty).
_COPIED = frozenset(
    {
        "model",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "seed",
        "stop",
        "stop_token_ids",
        "ignore_eos",
        "min_tokens",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "include_stop_str_in_output",
        "logit_bias",
        "allowed_token_ids",
        "logprobs",
        "return_tokens_as_token_ids",
        "user",
        "session_id",
        "cache_salt",
        "stream_interval",
    }
)
# Used only to build the prompt, or set anew.
_DROPPED = frozenset(
    {
        "messages",
        "prompt",
        "stream",
        "stream_options",
        "max_tokens",
        "max_completion_tokens",
        "top_logprobs",
        "return_token_ids",
        "priority",
        "request_id",
        "add_generation_prompt",
        "continue_final_message",
        "add_special_tokens",
        "chat_template",
        "chat_template_kwargs",
        "documents",
        "reasoning_effort",
        "include_reasoning",
        "parallel_tool_calls",
        "truncate_prompt_tokens",
        "truncation_side",
        "length_penalty",
        "metadata",
        "store",
        "service_tier",
    }
)
# Harmless at this value only.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "use_beam_search": (False,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "tools": ([],),
    "tool_choice": ("none",),
    "response_format": ({"type": "text"},),
    "bad_words": ([],),
    "logit_processors": ([],),
    "return_prompt_text": (False,),
    "watermarking": (False,),
    "mm_processor_kwargs": ({},),
}
# The default limit of completions, in tokens.
_USUAL_LIMIT = 16
# Converted here, since engines accept other spellings.
_INTEGERS = ("max_tokens", "max_completion_tokens", "min_tokens", "seed", "top_logprobs")
_FLAGS = ("include_stop_str_in_output", "return_token_ids")


def values_of(fields: Fields, *, chat: bool) -> dict[str, Any]:
    """The values of a body's fields; UnmovableError if one cannot be converted."""
    found: dict[str, Any] = {}
    flags = (*_FLAGS, "logprobs") if chat else _FLAGS
    integers = _INTEGERS if chat else (*_INTEGERS, "logprobs")
    for name, raw in fields.items():
        try:
            value = msgspec.json.decode(raw)
            if name in integers and value is not None:
                value = as_integer(value)
            elif name in flags and value is not None:
                value = as_flag(value)
            elif name == "temperature" and isinstance(value, str):
                value = float(value)
            elif name == "stream_options" and value is not None:
                value = {key: as_flag(flag) for key, flag in value.items() if flag is not None}
            elif name == "stop" and value is not None:
                _check_texts(value)
        except (msgspec.DecodeError, RecursionError, ValueError, AttributeError):
            raise UnmovableError(f"`{name[:64]}` cannot be parsed") from None
        found[name] = value
    return found


def _check_texts(value: object) -> None:
    """Raise ValueError unless the value is a string or a list of strings."""
    if not all(isinstance(item, str) for item in (value if isinstance(value, list) else [value])):
        raise ValueError("Expected a string or a list of strings")


def migration_obstacle(body: dict[str, Any], *, chat: bool) -> str:
    """Why a request cannot continue on another replica, or ""."""
    for key, value in body.items():
        if value is None or key in _COPIED or key in _DROPPED or value in _NEUTRAL.get(key, ()):
            continue
        return f"the state of `{key[:64]}` cannot be transferred"
    if chat:
        messages = body.get("messages") or []
        if not isinstance(messages, list):
            return "its messages are no list"
        for message in messages:
            parts = message.get("content") if isinstance(message, dict) else None
            if isinstance(parts, list) and any(
                isinstance(part, dict) and part.get("type", "text") != "text" for part in parts
            ):
                return "its prompt has more than text"
        return ""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int):
        return "it has several prompts"
    return ""


def completion_fields(
    body: dict[str, Any], *, chat: bool, made: int, sampled: bool
) -> dict[str, Any]:
    """The fields of a text completion that continues after ``made`` tokens.

    Seeded sampling restarts from a seed that depends on the position, since the state of an
    engine's generator cannot be transferred.
    """
    fields = {key: body[key] for key in _COPIED if body.get(key) is not None}
    limit = output_limit(body, chat=chat)
    fields["max_tokens"] = None if limit is None else limit - made
    if fields.get("min_tokens"):
        fields["min_tokens"] = max(0, fields["min_tokens"] - made)
    if sampled and "seed" in fields:
        fields["seed"] += made
    if chat:
        wanted = fields.pop("logprobs", False)
        if wanted:
            fields["logprobs"] = body.get("top_logprobs") or 0
    return fields


def output_limit(body: dict[str, Any], *, chat: bool) -> int | None:
    """The limit of the answer, in tokens; ``None``: the rest of the context."""
    limit: int | None = body.get("max_tokens", None if chat else _USUAL_LIMIT)
    if chat and body.get("max_completion_tokens") is not None:
        limit = body["max_completion_tokens"]
    return limit
