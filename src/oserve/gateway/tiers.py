"""The tier of a request: from its caller, its headers and OpenAI's ``service_tier``."""

import math
import re

import msgspec

from oserve.control.dispatch.table import RoutingTable
from oserve.core import Caller, Promise, Request, Tier
from oserve.gateway.http.body import GenerateBody
from oserve.gateway.http.errors import ApiError, bad_request

TIER_HEADER = b"x-oserve-tier"
TTFT_HEADER = b"x-slo-ttft-ms"
TPOT_HEADER = b"x-slo-tpot-ms"
_FIELD = "service_tier"
# OpenAI's words. The first two leave the choice to the key and the settings.
_ANY = frozenset({"auto", "default"})
_WORDS = ("auto", "default", "flex", "priority", "scale")
_NUMBER = re.compile(rb"[0-9]{1,9}(?:\.[0-9]{1,6})?")


def promise_of(
    table: RoutingTable, caller: Caller, headers: dict[bytes, bytes], parsed: GenerateBody
) -> Promise | None:
    """What a request is promised; ``None`` if the settings name no tiers.

    Raises ApiError for an unknown tier, one that the caller may not use, or an invalid limit.
    """
    if not table.tiers:
        return None
    tier = _tier(table, caller, headers, parsed)
    return Promise.of(
        tier, ttft_s=_limit_s(headers, TTFT_HEADER), tpot_s=_limit_s(headers, TPOT_HEADER)
    )


def service_tier_of(request: Request | None, parsed: GenerateBody) -> str:
    """OpenAI's word for the tier that serves a request; "" if the request does not use the field.

    OpenAI tells which tier was used, and only to requests that have the field.
    """
    promise = request.promise if request is not None else None
    if promise is None or bytes(parsed.read.service_tier) in {b"", b"null"}:
        return ""
    return promise.tier.service_tier or "default"


def _tier(
    table: RoutingTable, caller: Caller, headers: dict[bytes, bytes], parsed: GenerateBody
) -> Tier:
    name = caller.tier or table.default_tier
    asked = headers.get(TIER_HEADER)
    if asked is not None:
        name = asked.decode("latin-1")
        found = next((tier for tier in table.tiers if tier.name == name), None)
        if found is None:
            known = ", ".join(tier.name for tier in table.tiers)
            raise bad_request(
                f"There is no tier `{name[:64]}`; the tiers are {known}",
                param=TIER_HEADER.decode(),
                code="unknown_tier",
            )
        # A word that is no word of OpenAI is refused even so.
        _word(parsed)
    else:
        found = _by_word(table, _word(parsed))
        found = found or next((tier for tier in table.tiers if tier.name == name), None)
    if found is None:
        # The key's own tier is no longer in the settings.
        return next(tier for tier in table.tiers if tier.name == table.default_tier)
    if found.name != caller.tier and not caller.may_use(found.name):
        raise ApiError(
            status=403,
            message=f"This key may not use the tier `{found.name}`",
            type="permission_error",
            param=TIER_HEADER.decode() if asked is not None else _FIELD,
            code="tier_not_allowed",
        )
    return found


def _word(parsed: GenerateBody) -> str:
    raw = bytes(parsed.read.service_tier)
    if raw in {b"", b"null"}:
        return ""
    try:
        word = msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError):
        word = None
    if word not in _WORDS:
        raise bad_request(
            f"`{_FIELD}` must be one of {', '.join(_WORDS)}", param=_FIELD, code="invalid_value"
        )
    return str(word)


def _by_word(table: RoutingTable, word: str) -> Tier | None:
    """The tier that a word of OpenAI asks for; ``None``: the usual one."""
    if not word or word in _ANY:
        return None
    found = next((tier for tier in table.tiers if tier.service_tier == word), None)
    if found is None:
        raise bad_request(
            f"No tier here is called `{word}` in `{_FIELD}`", param=_FIELD, code="unknown_tier"
        )
    return found


def _limit_s(headers: dict[bytes, bytes], name: bytes) -> float | None:
    given = headers.get(name)
    if given is None:
        return None
    value = float(given) if _NUMBER.fullmatch(given) else math.nan
    if not value > 0:
        raise bad_request(
            f"`{name.decode()}` must be a number of milliseconds above 0", param=name.decode()
        )
    return value / 1e3
