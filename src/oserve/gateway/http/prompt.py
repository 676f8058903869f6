"""The size of a prompt without tokenizing it, and the beginning of its system prompt."""

import re

import msgspec

from oserve.gateway.http.body import GenerateBody
from oserve.workload import PromptSize

# Fields of a chat request that some models' templates put into the prompt.
_RENDERED = ("tools", "documents", "chat_template_kwargs", "response_format")
# An escaped character takes six bytes; an unescaped non-ASCII character takes about three.
_ESCAPE = b"\\u"
_ESCAPE_EXCESS_BYTES = 3
# Messages with parts that are not text are lists.
_LIST = re.compile(rb'"content"\s*:\s*\[')
_TEXT_PARTS = {"text", "input_text", "output_text", "refusal", "thinking"}
_SYSTEM = re.compile(rb'\[\s*\{\s*"role"\s*:\s*"(?:system|developer)"\s*,\s*"content"\s*:\s*"')
_NO_PROMPT = {b"", b"null"}
_HEAD_BYTES = 256
_PREFIX_BYTES = 2048
_BACKSLASH = ord("\\")


class _Message(msgspec.Struct):
    content: msgspec.Raw = msgspec.Raw(b"null")


class _Part(msgspec.Struct):
    type: str | None = None
    text: msgspec.Raw = msgspec.Raw(b"")


_messages = msgspec.json.Decoder(list[_Message])
_parts = msgspec.json.Decoder(list[msgspec.Raw])
_part = msgspec.json.Decoder(_Part)


def prompt_size(parsed: GenerateBody) -> PromptSize:
    """The sizes of the texts, media and token ids that form the prompt."""
    read, most = parsed.read, parsed.truncated_tokens
    if parsed.form.prompt:
        return _size_of(parsed, parsed.form.prompt)
    prompt = bytes(read.prompt)
    if prompt not in _NO_PROMPT:
        if prompt.startswith(b"[") and prompt.lstrip(b"[ \t\r\n")[:1].isdigit():
            # Token ids of one prompt or several; a comma follows each but the last.
            return PromptSize(tokens=prompt.count(b",") + 1, most_tokens=most)
        return PromptSize(text_bytes={"prompt": _text_bytes(prompt)}, most_tokens=most)
    messages = bytes(read.messages)
    if not messages:
        embeds = len(memoryview(read.prompt_embeds))
        return PromptSize(text_bytes={"prompt_embeds": embeds}, most_tokens=most)
    media_bytes, parts = _media(messages) if _LIST.search(messages) else (0, 0)
    sizes = {"messages": max(0, _text_bytes(messages) - media_bytes)}
    for name in _RENDERED:
        raw: msgspec.Raw = getattr(read, name)
        if raw:
            sizes[name] = _text_bytes(bytes(raw))
    return PromptSize(text_bytes=sizes, parts=parts, most_tokens=most)


def _size_of(parsed: GenerateBody, names: tuple[str, ...]) -> PromptSize:
    """The size of the prompt in these fields, of any form."""
    sizes, parts = {}, 0
    for name in names:
        raw = bytes(parsed.fields.get(name, msgspec.Raw(b"")))
        if raw in _NO_PROMPT:
            continue
        media_bytes, media = _media(raw) if _LIST.search(raw) else (0, 0)
        parts += media
        sizes[name] = max(0, _text_bytes(raw) - media_bytes)
    return PromptSize(text_bytes=sizes, parts=parts, most_tokens=parsed.truncated_tokens)


def _text_bytes(raw: bytes) -> int:
    return len(raw) - _ESCAPE_EXCESS_BYTES * raw.count(_ESCAPE)


def _media(messages: bytes) -> tuple[int, int]:
    """Bytes and number of message parts other than text; unreadable parts count as text."""
    size = count = 0
    try:
        for message in _messages.decode(messages):
            content = bytes(message.content)
            if not content.startswith(b"["):
                continue
            for raw in _parts.decode(content):
                part = _part.decode(raw)
                if part.type not in _TEXT_PARTS and not part.text:
                    size += len(memoryview(raw))
                    count += 1
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return 0, 0
    return size, count


def system_prefix(parsed: GenerateBody) -> bytes:
    """The first 2 KiB of the system prompt as JSON text; empty if there is none.

    Requests that share it share the cached prefix, and often have similar output lengths.
    """
    raw = memoryview(parsed.read.messages)
    found = _SYSTEM.match(raw[:_HEAD_BYTES])
    if found is None:
        return b""
    start = found.end()
    text = bytes(raw[start : start + _PREFIX_BYTES])
    end = text.find(b'"')
    while end > 0 and text[end - 1] == _BACKSLASH:
        end = text.find(b'"', end + 1)
    return text if end < 0 else text[:end]
