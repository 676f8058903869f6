"""Fuzzed request bodies, for tests of parsers.

Arbitrary bytes, and JSON in which any field may hold any value: numbers beyond floats, lone
surrogates, Latin-1, duplicate keys, lists a thousand deep, well-formed requests cut anywhere.
"""

from collections.abc import Callable
from random import Random

_FIELDS = (
    *("model", "prompt", "messages", "stream", "stream_options", "max_tokens", "ignore_eos"),
    *("max_completion_tokens", "priority", "return_token_ids", "echo", "tools", "user"),
    *("session_id", "kv_transfer_params", "ec_transfer_params", "vllm_xargs", "temperature"),
    *("seed", "stop", "stop_token_ids", "min_tokens", "logprobs", "top_logprobs", "n"),
    *("truncate_prompt_tokens", "response_format", "documents", "chat_template_kwargs"),
    *("stream_interval", "include_stop_str_in_output", "presence_penalty", "prompt_embeds"),
)
# Fields that no server reads, or that take any value.
_FREE = ("x", "metadata", "logit_bias", "tools", "documents", "response_format", "service_tier")
_TOKENS = (
    *(b"null", b"null", b"null", b"true", b"false", b"0", b"1", b"-1", b"16", b"3.0", b"0.5"),
    *(b"1e400", b"-1e400", b"9" * 400, b"-" + b"9" * 30, b"9" * 5000, b"18446744073709551616"),
    *(b'""', b'"5"', b'" 7 "', b'"yes"', b'"FALSE"', b'"nan"', b'"emulated"', b'"other"'),
    *(b'"a b c"', b'"\xc3\xa9"', rb'"\ud83d\ude42"', rb'"\u0000"', b'"' + b"a b " * 500 + b'"'),
    *(b"[]", b"{}", b"[1,2,3]", b"[[1],[2,3]]", b"[-1]", b"[1.5]", b'["a","b"]', b"[null]"),
    *(b'{"include_usage":true}', b'{"include_usage":"no","continuous_usage_stats":true}'),
    *(b'{"oserve":"' + b"0" * 32 + b'"}', b'{"oserve_from":"' + b"0" * 32 + b'"}'),
    *(b'{"do_remote_prefill":true}', b'{"do_remote_prefill":null}', b'{"a":1e400}'),
    b'[{"role":"user","content":"a b"}]',
    b'[{"role":"user","content":[{"type":"image_url","image_url":{"url":"data:,"}}]}]',
    *(b'[{"content":5}]', b"[[[[]]]]", b"[" * 200 + b"]" * 200, b'{"a":' * 300 + b"1" + b"}" * 300),
)
_BROKEN = (
    *(b"NaN", b"Infinity", b"-Infinity", b"01", b"+1", b"1.", b".5", b"0x10", b"undefined", b""),
    *(b'"se\xf1or"', b'"\xed\xa0\x80"', b'"\xff\xfe"', rb'"\ud800"', rb'"\udc00\ud800"', rb'"\q"'),
    *(rb'"\u12"', b'"a\nb"', b'"a\x00b"', b'"\x1b[31m"', b'"open', b",", b"}", b"\x00"),
    b"[" * 2000 + b"]" * 2000,
)
_GOOD = (
    b'{"model":"emulated","prompt":"a b c","max_tokens":4%b}',
    b'{"model":"emulated","messages":[{"role":"user","content":"a b"}],"max_tokens":4%b}',
    b'{"prompt":[1,2,3],"max_tokens":3%b}',
)


def fuzzed_body(draw: Random) -> bytes:
    """One body; the same for the same state of ``draw``."""
    return draw.choice(_KINDS)(draw)


def _noise(draw: Random) -> bytes:
    return draw.randbytes(draw.choice((0, 1, 2, 10, 100, 2000)))


def _almost(draw: Random) -> bytes:
    """A valid request with odd fields added."""
    more = b"".join(b"," + _member(draw) for _ in range(draw.randint(0, 4)))
    stream = b',"stream":true' if draw.random() < 0.5 else b""
    return draw.choice(_GOOD) % (stream + more)


def _object(draw: Random) -> bytes:
    return b"{" + b",".join(_member(draw) for _ in range(draw.randint(0, 8))) + b"}"


def _member(draw: Random) -> bytes:
    name = draw.choice(_FREE if draw.random() < 0.6 else _FIELDS).encode()
    if draw.random() < 0.02:
        name = draw.choice((b"\xf1", rb"\ud800", rb"us\u0065r", b"", b"a\x00", b"__class__"))
    return b'"%b":%b' % (name, draw.choice(_BROKEN if draw.random() < 0.04 else _TOKENS))


def _spoiled(draw: Random) -> bytes:
    """A valid request with a few bytes changed, dropped or repeated, or truncated."""
    body = bytearray(_almost(draw))
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(body) + 1)
        spoil = draw.randrange(4)
        if spoil == 0:
            body[at : at + 1] = draw.randbytes(1)
        elif spoil == 1:
            del body[at : at + draw.randint(1, 5)]
        elif spoil == 2:
            body[at:at] = body[at : at + 20]
        elif draw.random() < 0.3:
            del body[at:]
    return bytes(body)


def _coded(draw: Random) -> bytes:
    """Valid JSON, but not in UTF-8, or after a byte order mark."""
    text = '{"prompt":"señor","max_tokens":2,"priority":1}'
    coding = draw.choice(("latin-1", "utf-16", "utf-32", "utf-8-sig", "cp037", "utf-16-be"))
    return text.encode(coding)


_KINDS: tuple[Callable[[Random], bytes], ...] = (
    *(_noise, _object, _almost, _almost, _almost, _almost, _almost),
    *(_spoiled, _coded),
)
