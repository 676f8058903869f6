"""Service tiers from the settings, or from a command's options."""

from collections.abc import Sequence

from oserve.config.settings import Settings, TierSettings
from oserve.core import OServeError, OverloadAction, Precision, Tier

_FORM = "NAME=TTFT_MS/TPOT_MS[/PRECISION+PRECISION], for example chat=500/20/bf16 or bulk=-/-"


def tiers_of(settings: Settings) -> tuple[Tier, ...]:
    """The tiers of the settings, in their order.

    Raises OServeError for two tiers with one ``service_tier``, or a default tier that is not there.
    """
    tiers = tuple(_tier(name, own) for name, own in settings.tiers.items())
    words: dict[str, str] = {}
    for tier in tiers:
        other = words.setdefault(tier.service_tier, tier.name) if tier.service_tier else tier.name
        if other != tier.name:
            raise OServeError(
                f"the tier {other!r} has service_tier {tier.service_tier!r} already",
                place=f"tiers.{tier.name}.service_tier",
                remedy="give each word to one tier",
            )
    default = settings.default_tier
    if default and default not in settings.tiers:
        raise OServeError(
            f"there is no tier {default!r}",
            place="default_tier",
            remedy=f"the tiers are {', '.join(settings.tiers)}" if tiers else "name it in tiers",
        )
    return tiers


def default_tier(settings: Settings) -> str:
    """The tier of requests that ask for none; "" without tiers."""
    return settings.default_tier or next(iter(settings.tiers), "")


def parse_tiers(texts: Sequence[str]) -> tuple[Tier, ...]:
    """Tiers as options of a command: ``chat=500/20/bf16``, ``bulk=-/-``; "-" is no limit."""
    tiers: dict[str, Tier] = {}
    for text in texts:
        name, equals, rest = text.partition("=")
        parts = rest.split("/")
        if not equals or not name or name in tiers or not 2 <= len(parts) <= 3:
            raise OServeError(f"{text!r} is not a tier", place="--tier", remedy=_FORM)
        words = [word for word in parts[2].split("+") if word] if len(parts) > 2 else []
        if any(word not in set(Precision) for word in words):
            known = ", ".join(Precision)
            raise OServeError(
                f"{text!r} names an unknown precision",
                place="--tier",
                remedy=f"use some of {known}",
            )
        tiers[name] = Tier(
            name=name,
            ttft_s=_seconds(parts[0], text),
            tpot_s=_seconds(parts[1], text),
            precisions=tuple(Precision(word) for word in words),
            overload=OverloadAction.DEMOTE,
        )
    return tuple(tiers.values())


def _seconds(text: str, whole: str) -> float | None:
    if text.strip() == "-":
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e9:
        raise OServeError(f"{whole!r} has a limit of {text!r}", place="--tier", remedy=_FORM)
    return value / 1e3


def _tier(name: str, own: TierSettings) -> Tier:
    def seconds(value_ms: float | None) -> float | None:
        return None if value_ms is None else value_ms / 1e3

    return Tier(
        name=name,
        ttft_s=seconds(own.ttft_ms),
        tpot_s=seconds(own.tpot_ms),
        e2e_s=seconds(own.e2e_ms),
        precisions=own.precisions,
        weight=own.weight,
        overload=own.overload,
        service_tier=own.service_tier,
    )
