"""Tiers from settings and options."""

import pytest

from oserve.config.settings import Settings, TierSettings, load_settings
from oserve.config.tiers import check_tiers, default_tier, parse_tiers, tiers_of
from oserve.core import (
    AttachedBackend,
    DeploymentPlan,
    OServeError,
    OverloadAction,
    Precision,
    ReplicaShape,
    ReplicaSpec,
    Tier,
)

GIVEN = {
    "tight": {"ttft_ms": 1000, "tpot_ms": 20, "precisions": ["bf16"], "overload": "reject"},
    "bulk": {"e2e_ms": 60000, "service_tier": "flex", "weight": 0.5},
}


def test_settings_give_tiers_in_seconds_and_the_first_is_the_default() -> None:
    settings = load_settings(None, {"tiers": GIVEN}, {})
    tight, bulk = tiers_of(settings)
    assert tight == Tier(
        name="tight",
        ttft_s=1.0,
        tpot_s=0.02,
        precisions=(Precision.BF16,),
        overload=OverloadAction.REJECT,
    )
    assert bulk == Tier(name="bulk", e2e_s=60.0, service_tier="flex", weight=0.5)
    assert default_tier(settings) == "tight"
    assert default_tier(load_settings(None, {"tiers": GIVEN, "default_tier": "bulk"}, {})) == "bulk"
    assert (tiers_of(Settings()), default_tier(Settings())) == ((), "")


@pytest.mark.parametrize(
    ("tiers", "default", "place"),
    [
        ({"a": {"ttft": 1}}, "", "tiers"),
        ({"a": {"ttft_ms": 0}}, "", "tiers"),
        ({"A B": {}}, "", "tiers"),
        ({"a": {"overload": "drop"}}, "", "tiers"),
        ({"a": {}}, "b", "default_tier"),
        ({"a": {"service_tier": "flex"}, "b": {"service_tier": "flex"}}, "", "tiers.b"),
        ({f"t{number}": {} for number in range(17)}, "", "tiers"),
    ],
)
def test_what_makes_no_sense_is_named(tiers: object, default: str, place: str) -> None:
    with pytest.raises(OServeError) as caught:
        tiers_of(load_settings(None, {"tiers": tiers, "default_tier": default}, {}))
    assert place in caught.value.place


def test_options_give_tiers() -> None:
    chat, bulk = parse_tiers(["chat=500/20/bf16+fp8", "bulk=-/-"])
    assert (chat.ttft_s, chat.tpot_s) == (0.5, 0.02)
    assert chat.precisions == (Precision.BF16, Precision.FP8)
    assert (bulk.ttft_s, bulk.tpot_s, bulk.precisions) == (None, None, ())


@pytest.mark.parametrize("text", ["chat", "chat=5", "chat=a/b", "=1/2", "a=1/2/fp9", "a=0/1"])
def test_an_option_that_is_no_tier_is_refused_with_its_form(text: str) -> None:
    with pytest.raises(OServeError, match=r"tier|limit|precision"):
        parse_tiers([text])


def test_a_plan_must_have_a_replica_for_each_tier() -> None:
    def plan(*specs: ReplicaSpec) -> DeploymentPlan:
        return DeploymentPlan(id="p", replicas=specs, length_classes=(), routing_shares={})

    small = ReplicaSpec(id="a", shape=ReplicaShape(precision=Precision.INT4), devices=())
    whole = ReplicaSpec(id="b", shape=ReplicaShape(), devices=())
    other = ReplicaSpec(
        id="c", shape=ReplicaShape(), devices=(), backend=AttachedBackend(url="http://x")
    )
    tiers = tiers_of(Settings(tiers={"t": TierSettings(precisions=(Precision.BF16,))}))
    check_tiers(plan(small, whole), tiers)
    for lacking in (plan(small), plan(other)):
        with pytest.raises(OServeError, match="bf16"):
            check_tiers(lacking, tiers)
    check_tiers(plan(other), (Tier(name="any"),))
