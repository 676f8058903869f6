"""Settings and plans: precedence, refusals that name the place, secrets."""

from pathlib import Path

import pytest

from oserve.config import api_keys, backend_keys, load_plan, load_settings, parse_override
from oserve.control.decision import Mode
from oserve.core import AttachedBackend, OServeError, Precision, VllmBackend
from oserve.gateway.settings import GatewaySettings

PLAN = """
id: two
workload_types:
  - {name: short, max_prompt_tokens: 256, output_tokens: 64}
  - {name: long}
replicas:
  - id: a
    shape: {tensor_parallel_size: 2, precision: int8, max_num_batched_tokens: 512}
    devices: [cpu:0, cpu:1]
    engine_args: [--seed, "7"]
  - id: b
    attach: {url: "http://127.0.0.1:9000/", api_key_env: B_KEY, model: other}
routing_shares:
  short: {a: 0.25, b: 0.75}
  long: {b: 1}
"""


def write(folder: Path, text: str) -> str:
    path = folder / "file.yaml"
    path.write_text(text)
    return str(path)


def test_command_line_over_environment_over_file_over_default(tmp_path: Path) -> None:
    file = write(tmp_path, "gateway: {port: 1, host: a, processes: 2}\nmodel: m")
    environment = {"OSERVE_GATEWAY_PORT": "2", "OSERVE_GATEWAY_HOST": "b", "HOME": "x"}
    settings = load_settings(file, {"gateway.port": 3}, environment)
    gateway = settings.gateway
    assert (gateway.port, gateway.host, gateway.processes) == (3, "b", 2)
    assert settings.model == "m"
    assert gateway.max_queued == GatewaySettings().max_queued


@pytest.mark.parametrize(
    ("text", "place", "remedy"),
    [
        ("gatway: {}", "gatway", "did you mean gateway?"),
        ("gateway: {prot: 1}", "gateway.prot", "did you mean port?"),
        ("gateway: {order: {polcy: fcfs}}", "gateway.order.polcy", "did you mean policy?"),
        ("gateway: {port: many}", "gateway.port", "correct"),
        ("gateway: {port: 99999}", "gateway.port", "correct"),
        ("gateway: {order: {policy: lifo}}", "gateway.order.policy", "correct"),
        ("- a\n- b", "file.yaml", "docs"),
        ("a: [1, 2", "file.yaml:1", "YAML"),
        ("a: b: c", "file.yaml:1:5", "YAML"),
    ],
)
def test_bad_files_are_refused_with_their_place(
    tmp_path: Path, text: str, place: str, remedy: str
) -> None:
    with pytest.raises(OServeError) as caught:
        load_settings(write(tmp_path, text), {}, {})
    assert place in caught.value.place
    assert remedy in caught.value.remedy


def test_a_missing_file_and_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OServeError, match=r"cannot read"):
        load_settings(str(tmp_path / "none.yaml"), {}, {})
    with pytest.raises(OServeError) as caught:
        load_settings(None, {}, {"OSERVE_GATEWAY_PROT": "1"})
    assert caught.value.place == "OSERVE_GATEWAY_PROT"
    assert "OSERVE_GATEWAY_PORT" in caught.value.remedy
    with pytest.raises(OServeError) as caught:
        parse_override("gateway.prot=1")
    assert "gateway.port" in caught.value.remedy
    with pytest.raises(OServeError):
        parse_override("gateway.port")
    assert parse_override("gateway.port=7") == ("gateway.port", 7)
    assert parse_override("model=7") == ("model", "7")


def test_off_is_a_word_wherever_it_is_written(tmp_path: Path) -> None:
    """YAML takes it for false."""
    file = tmp_path / "settings.yaml"
    file.write_text("control: {mode: off, resume: off}")
    settings = load_settings(str(file), {}, {})
    assert settings.control.mode is Mode.OFF
    assert settings.control.resume is False
    path, value = parse_override("control.mode=off")
    assert load_settings(None, {path: value}, {}).control.mode is Mode.OFF
    assert load_settings(None, {}, {"OSERVE_CONTROL_MODE": "off"}).control.mode is Mode.OFF
    assert parse_override("control.resume=off")[1] is False


def test_keys_come_from_environment_and_file(tmp_path: Path) -> None:
    file = write(tmp_path, "c\n\nd\n")
    settings = GatewaySettings(api_keys_file=file)
    assert api_keys(settings, {"OSERVE_API_KEYS": "a, b,"}) == {"a", "b", "c", "d"}
    assert api_keys(GatewaySettings(), {}) == frozenset()


def test_a_plan_reads_whole(tmp_path: Path) -> None:
    plan = load_plan(write(tmp_path, PLAN))
    first, second = plan.replicas
    assert first.shape.precision is Precision.INT8
    assert first.shape.device_count == 2
    assert first.backend == VllmBackend(engine_args=("--seed", "7"))
    assert isinstance(second.backend, AttachedBackend)
    assert second.backend.url == "http://127.0.0.1:9000"
    assert plan.routing_shares["short"] == {"a": 0.25, "b": 0.75}
    assert backend_keys(plan, {"B_KEY": "secret"}) == {"B_KEY": "secret"}
    with pytest.raises(OServeError, match="B_KEY"):
        backend_keys(plan, {})


def test_without_types_and_shares_all_replicas_serve_all(tmp_path: Path) -> None:
    plan = load_plan(write(tmp_path, "replicas: [{id: a, devices: [x]}, {id: b, devices: [y]}]"))
    assert plan.routing_shares == {"all": {"a": 0.5, "b": 0.5}}


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("replica: []", "replica", "unknown key"),
        ("replicas: [{id: a, devcies: [x]}]", "replicas[0].devcies", "unknown key"),
        ("replicas: [{id: a, shape: {tp: 2}}]", "replicas[0].shape: tp", "unknown key"),
        ("replicas: [{id: a, shape: {precision: int3}}]", "replicas[0].shape", "int3"),
        ("replicas: [{id: a, shape: {tensor_parallel_size: 0}}]", "tensor_parallel_size", ">= 1"),
        ("replicas: [{id: 'a b'}]", "replicas[0].id", "regex"),
        ("replicas: [{id: a, attach: {url: 'ftp://x'}}]", "attach.url", "regex"),
        ("replicas: [{id: a, attach: {url: 'http://me:secret@x'}}]", "attach.url", "user name"),
        ("replicas: [{id: a, attach: {url: 'http://x/a?b=c'}}]", "attach.url", "own path"),
        ("replicas: [{id: a, attach: {url: 'http://x:99999'}}]", "attach.url", "out of range"),
        ("replicas: [{id: a, attach: {url: 'http://x y'}}]", "attach.url", "no host"),
        ("replicas: [{id: a, attach: {url: 'http://x', health: ping}}]", "health", "regex"),
        ("replicas: [{id: a, attach: {url: 'http://x', headers: {Host: y}}}]", "Host", "be set"),
        ("replicas: [{id: a, attach: {url: 'http://x', headers: {'a b': y}}}]", "a b", "be set"),
        (
            'replicas: [{id: a, attach: {url: "http://x", headers: {a: "b\\r\\nc: d"}}}]',
            "headers.a",
            "cannot carry",
        ),
        (
            "replicas: [{id: a, attach: {url: 'http://x', api_key_env: K,"
            " headers: {Authorization: $V}}}]",
            "Authorization",
            "already",
        ),
        ("replicas: [{id: a, attach: {url: 'http://x', helth: /x}}]", "helth", "unknown key"),
        ("replicas: [{id: a, engine_args: [x], attach: {url: 'http://x'}}]", "engine_args", "not"),
        ("id: x", "file.yaml", "replicas"),
    ],
)
def test_bad_plans_are_refused_with_their_place(
    tmp_path: Path, text: str, place: str, words: str
) -> None:
    with pytest.raises(OServeError) as caught:
        load_plan(write(tmp_path, text))
    assert place in caught.value.place
    assert words in caught.value.message
