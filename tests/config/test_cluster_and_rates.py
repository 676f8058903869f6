"""Clusters and rates in words: what is understood, and how the rest is refused."""

import re
from pathlib import Path

import msgspec
import pytest

from oserve.config import load_cluster, load_hosts, load_plan, load_rates, plan_yaml
from oserve.core import (
    AttachedBackend,
    DeploymentPlan,
    LengthClass,
    OServeError,
    Precision,
    ReplicaShape,
    ReplicaSpec,
    VllmBackend,
)


def test_one_node_names_devices_as_serving_does() -> None:
    spec = load_cluster("8xH100")
    assert [device.id for device in spec.devices] == [f"gpu:{index}" for index in range(8)]
    assert {device.node for device in spec.devices} == {"local"}
    assert {device.kind for device in spec.devices} == {"H100"}


def test_nodes_and_kinds_may_be_mixed() -> None:
    spec = load_cluster("2x8xH100 + 3x4xl40s")
    assert len(spec.devices) == 28
    assert len({device.id for device in spec.devices}) == 28
    assert len({device.node for device in spec.devices}) == 5
    assert {device.kind for device in spec.devices} == {"H100", "L40S"}


def test_a_file_says_more(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(
        "network: roce-100\nnodes:\n  - {count: 2, devices: 4, kind: A100, memory_gib: 70}\n"
    )
    spec = load_cluster(str(file))
    assert spec.network == "roce-100"
    assert len(spec.devices) == 8
    assert spec.devices[0].memory_bytes == 70 * 2**30


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0x8xH100", "empty cluster"),
        ("4x0xH100", "empty cluster"),
        ("H100", "not a set of devices"),
        ("8xH100+", "not a set of devices"),
        ("8xH101", "nothing is known"),
        ("99999x9xH100", "too many"),
        ("missing.yaml", "cannot read"),
    ],
)
def test_a_senseless_cluster_is_refused(text: str, said: str) -> None:
    with pytest.raises(OServeError, match=said) as caught:
        load_cluster(text)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nodes: []\n", "empty cluster"),
        ("nodes: [{devices: 8, kind: H100, size: 3}]\n", "unknown key"),
        ("nodes: [{devices: -8, kind: H100}]\n", "Expected"),
        ("nodes: [{devices: 8, kind: H100}]\nnetwork: carrier pigeons\n", "nothing is known"),
    ],
)
def test_a_senseless_cluster_file_is_refused(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    with pytest.raises(OServeError, match=said):
        load_cluster(str(file))


def test_rates_in_words() -> None:
    found = load_rates("512x128=3.5, docs:6000x200=0.4")
    assert [kind.name for kind in found] == ["512x128", "docs"]
    assert found[1].prompt_tokens == 6000
    assert found[1].output_tokens == 200
    assert found[1].arrival_rate_rps == 0.4


def test_rates_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "rates.yaml"
    file.write_text(
        "types:\n  - {name: chat, prompt_tokens: 200, output_tokens: 300, arrival_rate_rps: 8}\n"
    )
    assert load_rates(str(file))[0].name == "chat"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no workload types"),
        ("512x128", "not a type"),
        ("512x128=nan", "arrival_rate_rps"),
        ("512x128=inf", "arrival_rate_rps"),
        ("512x128=-1", "arrival_rate_rps"),
        ("-512x128=1", "prompt_tokens"),
        ("512x0=1", "output_tokens"),
        ("512xmany=1", "no number"),
        ("512x128=0", "zero traffic"),
        ("512x128=1,512x128=2", "more than once"),
    ],
)
def test_senseless_rates_are_refused(text: str, said: str) -> None:
    with pytest.raises(OServeError, match=said) as caught:
        load_rates(text)
    assert caught.value.place
    assert caught.value.remedy


def test_a_written_plan_reads_back_as_it_was(tmp_path: Path) -> None:
    plan = DeploymentPlan(
        id="both",
        replicas=(
            ReplicaSpec(
                id="a",
                shape=ReplicaShape(
                    tensor_parallel_size=2, precision=Precision.FP8, device_kind="H100"
                ),
                devices=("gpu:0", "gpu:1"),
                backend=VllmBackend(engine_args=("--seed", "7")),
            ),
            ReplicaSpec(
                id="b",
                shape=ReplicaShape(),
                devices=(),
                backend=AttachedBackend(
                    url="https://127.0.0.1:9/a",
                    model="m",
                    priority=True,
                    stream_options=False,
                    health="/ping",
                    headers=(("X-Key", "$KEY"), ("X-B", "c")),
                    ca_file="ca.pem",
                ),
            ),
        ),
        length_classes=(
            LengthClass(name="short prompt", max_prompt_tokens=512, output_tokens=90),
            LengthClass(name="long prompt", output_tokens=30),
        ),
        routing_shares={"short prompt": {"a": 1 / 3, "b": 2 / 3}, "long prompt": {"a": 1.0}},
    )
    file = tmp_path / "plan.yaml"
    file.write_text(plan_yaml(plan, head="Two lines\nof explanation"))
    found = load_plan(str(file))
    assert found.replicas == plan.replicas
    assert found.length_classes == plan.length_classes
    for kind, shares in plan.routing_shares.items():
        assert found.routing_shares[kind] == pytest.approx(shares)
    assert file.read_text().startswith("# Two lines\n# of explanation\n")


HOST = {
    "name": "a",
    "address": "10.0.0.1",
    "port": 7443,
    "token_file": "token",
    "certificate_sha256": ":".join(["Ab"] * 32),
}


def hosts_file(folder: Path, *hosts: dict[str, object], **rest: object) -> str:
    file = folder / "cluster.json"
    file.write_bytes(msgspec.json.encode({"hosts": hosts, **rest}))
    return str(file)


def test_hosts_are_listed_for_serving_alone(tmp_path: Path) -> None:
    file = hosts_file(tmp_path, HOST, {**HOST, "name": "b", "address": "10.0.0.2"})
    hosts = load_hosts(file)
    assert [host.name for host in hosts] == ["a", "b"]
    assert hosts[0].certificate_sha256 == "ab" * 32
    with pytest.raises(OServeError, match="lists hosts"):
        load_cluster(file)


@pytest.mark.parametrize(
    ("change", "said", "place"),
    [
        ({"name": "a b"}, "regex", "hosts[1].name"),
        ({"name": "b\n"}, "regex", "hosts[1].name"),
        ({"address": "10.0.0.2\n"}, "regex", "hosts[1].address"),
        ({"name": "a", "address": "h"}, "a is there already", "hosts[1]"),
        ({"address": "10.0.0.1"}, "10.0.0.1 port 7443 is there already", "hosts[1]"),
        ({"port": 0}, "Expected", "hosts[1].port"),
        ({"address": ""}, "regex", "hosts[1].address"),
        ({"certificate_sha256": "ab"}, "64 hexadecimal", "hosts[1].certificate_sha256"),
        ({"token": "s3cret"}, "unknown key 'token'", "hosts[1].token"),
    ],
)
def test_senseless_hosts_are_refused(
    change: dict[str, object], said: str, place: str, tmp_path: Path
) -> None:
    file = hosts_file(tmp_path, HOST, {**HOST, "name": "b", "address": "10.0.0.2", **change})
    with pytest.raises(OServeError, match=re.escape(said)) as caught:
        load_hosts(file)
    assert place in caught.value.place
    assert "s3cret" not in str(caught.value)


def test_a_file_of_nodes_is_no_list_of_hosts(tmp_path: Path) -> None:
    with pytest.raises(OServeError, match="lists hosts, and no nodes"):
        load_hosts(hosts_file(tmp_path))
    nodes = [{"devices": 1, "kind": "H100"}]
    with pytest.raises(OServeError, match="lists hosts, and no nodes"):
        load_hosts(hosts_file(tmp_path, HOST, nodes=nodes))
