"""What deploy/ holds: schemas, our own command lines and settings, and what names what."""

import importlib
import importlib.util
import json
import re
import shlex
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from oserve.cli import app
from oserve.config import load_settings, parse_override
from oserve.nodes.ray_address import is_ray, ray_address

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
KUBERNETES_VERSION = "1.31.0"
MANIFESTS = sorted((*DEPLOY.glob("kubernetes/*.yaml"), *DEPLOY.glob("kuberay/*.yaml")))
UNITS = sorted((*DEPLOY.glob("systemd/*.service"), *ROOT.glob("packaging/*.service")))

# Of KubeRay's own types (ray-operator/apis/ray/v1), those that are used here.
RAY_CLUSTER = {
    "rayVersion",
    "authOptions",
    "gcsFaultToleranceOptions",
    "headGroupSpec",
    "workerGroupSpecs",
}
RAY_STORAGE = {"redisAddress", "redisPassword", "redisUsername", "externalStorageNamespace"}
RAY_HEAD = {"rayStartParams", "template", "serviceType"}
RAY_WORKERS = {
    "groupName",
    "replicas",
    "minReplicas",
    "maxReplicas",
    "rayStartParams",
    "template",
}


def _documents(*files: Path) -> list[dict[str, Any]]:
    return [item for file in files for item in yaml.safe_load_all(file.read_text()) if item]


def _templates(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The pods that a document describes."""
    spec = document.get("spec", {})
    if document["kind"] == "RayCluster":
        groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
        return [group["template"] for group in groups]
    return [spec["template"]] if "template" in spec else []


def _commands() -> Iterator[tuple[str, list[str]]]:
    """Each command line of oserve in deploy/: where it is, and its arguments."""
    for file in MANIFESTS:
        for document in _documents(file):
            for template in _templates(document):
                for container in template["spec"]["containers"]:
                    command = container.get("command", [])
                    if command[:1] == ["oserve"]:
                        yield f"{file.name}: {container['name']}", command[1:]
    for file in UNITS:
        for line in file.read_text().splitlines():
            if line.startswith("ExecStart="):
                words = shlex.split(line.removeprefix("ExecStart="))
                assert Path(words[0]).name == "oserve"
                yield file.name, words[1:]
    for line in (DEPLOY / "ray" / "cluster.yaml").read_text().splitlines():
        if "bin/oserve " in line:
            yield "ray/cluster.yaml", shlex.split(line.partition("bin/oserve ")[2])


COMMANDS = list(_commands())


@pytest.mark.parametrize(("place", "arguments"), COMMANDS, ids=[place for place, _ in COMMANDS])
def test_command_lines_are_those_of_the_cli(place: str, arguments: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    context = command.make_context("oserve", list(arguments))
    while hasattr(command, "resolve_command"):
        name, command, rest = command.resolve_command(
            context, [*context._protected_args, *context.args]
        )
        context = command.make_context(name, list(rest), parent=context)
    given = context.params
    if command.name == "serve" and "override" in given:
        settings = load_settings(
            None, dict(parse_override(item) for item in given["override"] or [])
        )
        assert settings
        if given["cluster"] and is_ray(given["cluster"]):
            ray_address(given["cluster"])


def test_every_place_has_a_command() -> None:
    places = {place.partition(":")[0] for place, _ in COMMANDS}
    assert places >= {"nodes.yaml", "server.yaml", "oserve-node.service", "oserve-server.service"}


def test_settings_in_comments_exist() -> None:
    """Settings that a comment names, such as engines.orphan_grace_s."""
    described = (ROOT / "docs" / "configuration.md").read_text()
    for file in sorted(DEPLOY.rglob("*")):
        if file.is_file():
            for name in re.findall(
                r"\b(?:gateway|engines|control|cluster)\.[a-z_]+", file.read_text()
            ):
                if name not in {"cluster.yaml", "cluster.md"}:
                    assert f"`{name}`" in described, f"{file}: {name}"


@pytest.mark.parametrize("folder", ["kubernetes", "kuberay"])
def test_what_is_named_is_there(folder: str) -> None:
    """Services and policies choose pods that exist; mounts have volumes, probes have ports."""
    documents = _documents(*sorted(DEPLOY.glob(f"{folder}/*.yaml")))
    templates = [item for document in documents for item in _templates(document)]
    labels = [item.get("metadata", {}).get("labels", {}) for item in templates]
    for document in documents:
        spec = document.get("spec", {})
        chosen = spec.get("podSelector", spec.get("selector")) or {}
        chosen = chosen.get("matchLabels", chosen)
        if document["kind"] in {"Service", "NetworkPolicy", "PodDisruptionBudget"}:
            assert any(chosen.items() <= item.items() for item in labels), document["metadata"]
    for document in documents:
        claims = {item["metadata"]["name"] for item in _claims(document)}
        for template in _templates(document):
            pod = template["spec"]
            volumes = {item["name"] for item in pod.get("volumes", [])} | claims
            for container in (*pod.get("initContainers", []), *pod["containers"]):
                mounts = [item["name"] for item in container.get("volumeMounts", [])]
                assert set(mounts) <= volumes
                ports = {item.get("name") for item in container.get("ports", [])}
                for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
                    probe = container.get(kind, {})
                    for way in ("httpGet", "tcpSocket"):
                        port = probe.get(way, {}).get("port", 0)
                        assert isinstance(port, int) or port in ports


def _claims(document: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = document.get("spec", {}).get("volumeClaimTemplates", [])
    return found


def test_every_engine_has_shared_memory() -> None:
    for document in _documents(*MANIFESTS):
        for template in _templates(document):
            for container in template["spec"]["containers"]:
                if "nvidia.com/gpu" in container["resources"]["limits"]:
                    places = {item["mountPath"] for item in container["volumeMounts"]}
                    assert {"/dev/shm", "/models"} <= places


def test_kuberay_fields() -> None:
    (cluster,) = [item for item in _documents(*MANIFESTS) if item["kind"] == "RayCluster"]
    assert cluster["apiVersion"] == "ray.io/v1"
    spec = cluster["spec"]
    assert set(spec) <= RAY_CLUSTER
    assert spec["authOptions"] == {"mode": "token"}
    assert set(spec["gcsFaultToleranceOptions"]) <= RAY_STORAGE
    assert set(spec["headGroupSpec"]) <= RAY_HEAD
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    for group in spec["workerGroupSpecs"]:
        assert set(group) <= RAY_WORKERS
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]


@pytest.mark.parametrize("file", MANIFESTS, ids=[file.name for file in MANIFESTS])
def test_kubernetes_schema(file: Path) -> None:
    """By the schemas of Kubernetes itself; a pod of a RayCluster is checked as a Pod."""
    checker = importlib.import_module("kubernetes_validate")
    for document in _documents(file):
        if document["kind"] != "RayCluster":
            checker.validate(document, KUBERNETES_VERSION, strict=True)
            continue
        for template in _templates(document):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **template}
            checker.validate(pod, KUBERNETES_VERSION, strict=True)


def test_ray_up_schema() -> None:
    """By the schema in the package ``ray``; its checker comes with it."""
    found = importlib.util.find_spec("ray")
    if found is None or found.origin is None:
        pytest.skip("ray is not installed")
    checker = pytest.importorskip("jsonschema")
    schema = json.loads((Path(found.origin).parent / "autoscaler" / "ray-schema.json").read_text())
    (document,) = _documents(DEPLOY / "ray" / "cluster.yaml")
    checker.validate(document, schema)
    assert document["max_workers"] == len(document["provider"]["worker_ips"])


@pytest.mark.parametrize("unit", UNITS, ids=[unit.name for unit in UNITS])
def test_units(unit: Path, tmp_path: Path) -> None:
    """``systemd-analyze verify`` finds nothing but the program missing."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    text = unit.read_text()
    assert "KillMode=process" in text
    assert "PrivateTmp=" not in text
    copy = tmp_path / unit.name
    copy.write_text(text.replace("/opt/oserve/bin/oserve", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    ours = [line for line in done.stderr.splitlines() if unit.name in line]
    assert not ours, done.stderr


def test_the_probe_of_a_node_finds_its_port() -> None:
    (pod,) = [
        item["spec"]["containers"][0]
        for document in _documents(DEPLOY / "kubernetes" / "nodes.yaml")
        for item in _templates(document)
    ]
    _, _, pattern, *_ = pod["readinessProbe"]["exec"]["command"]
    with socket.create_server(("127.0.0.1", 0)) as port:
        number = f"{port.getsockname()[1]:04X}"
        ours = f"{pod['ports'][0]['containerPort']:04X}"
        assert f":{ours} " in pattern
        listening = pattern.replace(f":{ours} ", f":{number} ")
        lines = Path("/proc/net/tcp").read_text().splitlines()
    assert any(re.search(listening, line) for line in lines)


def test_scripts_parse() -> None:
    for script in DEPLOY.rglob("*.sh"):
        subprocess.run(["sh", "-n", str(script)], check=True, timeout=30)
