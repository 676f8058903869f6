"""A plan that cannot work is refused with its place and a remedy."""

from dataclasses import replace

import pytest

from oserve.core import (
    AttachedBackend,
    DeploymentPlan,
    Device,
    LengthClass,
    OServeError,
    ReplicaShape,
    ReplicaSpec,
)
from oserve.plan import check_plan, default_plan

DEVICES = tuple(Device(id=f"cpu:{n}", kind="cpu", node=f"n{n // 2}") for n in range(4))


def spec(name: str, *devices: str, tp: int = 1, pp: int = 1) -> ReplicaSpec:
    shape = ReplicaShape(tensor_parallel_size=tp, pipeline_parallel_size=pp)
    return ReplicaSpec(id=name, shape=shape, devices=devices)


def plan(*replicas: ReplicaSpec) -> DeploymentPlan:
    return DeploymentPlan(
        id="p",
        replicas=replicas,
        length_classes=(LengthClass(name="short", max_prompt_tokens=9), LengthClass(name="long")),
        routing_shares={"short": {replicas[0].id: 1.0}, "long": {replicas[0].id: 1.0}},
    )


GOOD = plan(spec("a", "cpu:0", "cpu:1", tp=2), spec("b", "cpu:2", "cpu:3", pp=2))


def test_a_sound_plan_passes() -> None:
    check_plan(GOOD, DEVICES)


@pytest.mark.parametrize(
    ("bad", "place", "words"),
    [
        (plan(spec("a", "cpu:4")), "replicas[0].devices", "there are 4"),
        (plan(spec("a", "cpu:0"), spec("b", "cpu:0")), "replicas[1].devices", "'a' and to 'b'"),
        (plan(spec("a", "cpu:0", tp=2)), "replicas[0].devices", "= 2 devices, but 1"),
        (plan(spec("a", "cpu:1", "cpu:2", tp=2)), "replicas[0].devices", "over nodes n0, n1"),
        (plan(spec("a", "cpu:0"), spec("a", "cpu:1")), "replicas", "stands 2 times"),
        (replace(GOOD, routing_shares={"short": {"a": 1.0}}), "routing_shares", "'long'"),
        (replace(GOOD, routing_shares={"odd": {"a": 1.0}}), "routing_shares.odd", "no workload"),
        (replace(GOOD, routing_shares={"short": {"z": 1.0}}), "routing_shares.short.z", "'z'"),
        (replace(GOOD, routing_shares={"short": {"a": 0.5}}), "routing_shares.short", "0.5"),
        (replace(GOOD, routing_shares={"short": {"a": float("nan")}}), "short", "numbers"),
        (replace(GOOD, length_classes=(LengthClass(name="s", max_prompt_tokens=5),)), "[0]", "5"),
        (
            replace(
                GOOD,
                length_classes=(
                    LengthClass(name="s", max_prompt_tokens=5),
                    LengthClass(name="m", max_prompt_tokens=5),
                    LengthClass(name="l"),
                ),
            ),
            "workload_types[1]",
            "ascend",
        ),
        (replace(GOOD, replicas=()), "plan", "no replicas"),
        (
            plan(replace(spec("a", "cpu:0"), backend=AttachedBackend(url="http://x"))),
            "replicas[0].devices",
            "attached",
        ),
    ],
)
def test_what_is_wrong_is_named(bad: DeploymentPlan, place: str, words: str) -> None:
    with pytest.raises(OServeError) as caught:
        check_plan(bad, DEVICES)
    assert place in caught.value.place
    assert words in caught.value.message
    assert caught.value.remedy


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_the_default_plan_is_sound_and_uses_every_device(count: int) -> None:
    devices = tuple(Device(id=f"cpu:{n}", kind="cpu") for n in range(count))
    made = default_plan(devices, (ReplicaShape(max_num_seqs=1), ReplicaShape(max_num_seqs=2)))
    check_plan(made, devices)
    assert sum(len(item.devices) for item in made.replicas) == count
