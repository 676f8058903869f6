"""Files and values that people write: what YAML and JSON let pass in silence is refused."""

import contextlib
import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oserve.config import (
    load_cluster,
    load_plan,
    load_rates,
    load_settings,
    load_switch_costs,
    parse_override,
    parse_plan,
)
from oserve.config.reading import parse_json, parse_yaml
from oserve.core import OServeError
from oserve.perf.known_models import find_model
from oserve.perf.profile import decode_profile


@pytest.mark.parametrize(
    ("read", "text", "line", "first"),
    [
        (
            lambda file: load_settings(file, {}, {}),
            "gateway: {port: 1}\ngateway: {port: 2}\n",
            2,
            1,
        ),
        (
            lambda file: load_settings(file, {}, {}),
            "gateway:\n  port: 1\n  host: a\n  port: 2\n",
            4,
            2,
        ),
        (load_plan, "id: a\nreplicas: [{id: a}]\nid: b\n", 3, 1),
        (
            load_plan,
            "replicas:\n- id: a\n  shape:\n    max_num_seqs: 1\n    max_num_seqs: 2\n",
            5,
            4,
        ),
        (load_cluster, "nodes:\n- {kind: H100, devices: 8}\nnodes: []\n", 3, 1),
        (load_rates, "types:\n- prompt_tokens: 1\n  prompt_tokens: 2\n", 3, 2),
        (load_switch_costs, "join_s: 1\njoin_s: 2\n", 2, 1),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_both_lines(
    tmp_path: Path, read: Callable[[str], object], text: str, line: int, first: int
) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(text)
    with pytest.raises(OServeError, match="appears twice") as caught:
        read(str(path))
    assert caught.value.place.startswith(f"{path}:{line}:")
    assert caught.value.message.endswith(f"first in line {first}")


@pytest.mark.parametrize("read", [load_cluster, load_rates, load_switch_costs, load_plan])
def test_json_files_are_read_as_strictly(tmp_path: Path, read: Callable[[str], object]) -> None:
    path = tmp_path / "file.json"
    path.write_text('{\n\t"nodes": [],\n\t"nodes": []\n}')
    with pytest.raises(OServeError, match="'nodes' appears twice, first in line 2") as caught:
        read(str(path))
    assert caught.value.place == f"{path}:3"


def test_values_of_the_command_line_and_the_environment_are_too() -> None:
    with pytest.raises(OServeError, match="'int8' appears twice"):
        parse_override("engines.variants={int8: a, int8: b}")
    with pytest.raises(OServeError, match="'int8' appears twice") as caught:
        load_settings(None, {}, {"OSERVE_ENGINES_VARIANTS": "{int8: a, int8: b}"})
    assert caught.value.place.startswith("OSERVE_ENGINES_VARIANTS")
    with pytest.raises(OServeError):
        parse_override("gateway.port=[1")
    with pytest.raises(OServeError, match="appears twice"):
        parse_plan("id: a\nid: b", place="body")


def test_models_and_profiles_are_too(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 1,\n "hidden_size": 2}')
    with pytest.raises(OServeError, match="appears twice"):
        find_model(str(tmp_path))
    folder = resources.files("oserve.perf").joinpath("data")
    shipped = [item for item in folder.iterdir() if item.name.endswith(".json")]
    assert shipped
    for item in shipped:
        text = item.read_text("utf-8")
        decode_profile(text.encode(), place=item.name)
        doubled = text.replace('"device_kind":', '"device_kind": "x", "device_kind":', 1)
        with pytest.raises(OServeError, match="appears twice"):
            decode_profile(doubled.encode(), place=item.name)


def test_our_own_tables_hold_no_key_twice() -> None:
    folder = resources.files("oserve.perf").joinpath("data")
    for item in folder.iterdir():
        if item.name.endswith(".yaml"):
            assert parse_yaml(item.read_text("utf-8"), place=item.name)


def test_merges_override_and_may_be_used_again() -> None:
    text = "a: &a {x: 0}\nb: &b\n  <<: *a\n  x: 1\nc: {<<: *b, y: 5}\nd: {<<: *b}\n"
    assert parse_yaml(text, place="f") == {
        "a": {"x": 0},
        "b": {"x": 1},
        "c": {"x": 1, "y": 5},
        "d": {"x": 1},
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: .nan", "no number"),
        ("a: -.inf", "no number"),
        ("a: !!bool x", "makes no sense"),
        ("a: !!int ''", "makes no sense"),
        ("a: 2024-13-01", "makes no sense"),
        ("a: &a [*a]", "inside itself"),
        ("[" * 500, "deep"),
        ("a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
            f"{name}: &{name} [{','.join(['*' + before] * 10)}]\n"
            for before, name in zip("abcdef", "bcdefg", strict=True)
        ), "aliases"),
        ("a: \x00", "special"),
        ("? [1]\n: 2", "unhashable"),
        ("a: !!python/name:os.system", "tag"),
    ],
)  # fmt: skip
def test_what_yaml_allows_and_nobody_means(text: str, words: str) -> None:
    with pytest.raises(OServeError, match=words) as caught:
        parse_yaml(text, place="file")
    assert caught.value.place.startswith("file")


@pytest.mark.parametrize("text", ['{"a": NaN}', '{"a": 1e999}', '{"a":', "[" * 100_000, "[1]"])
def test_bad_json(text: str) -> None:
    with pytest.raises(OServeError):
        parse_json(text, place="file")


names = st.text(max_size=3)
documents = st.recursive(
    st.none() | st.integers() | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=40)
@given(st.dictionaries(names, documents, max_size=5))
def test_json_without_doubled_keys_reads_as_it_is(document: dict[str, object]) -> None:
    assert parse_json(json.dumps(document), place="file") == document
    again = json.dumps(document)[1:]
    for name in document:
        with pytest.raises(OServeError, match="appears twice"):
            parse_json(f"{{{json.dumps(name)}: 0,\n{again}", place="file")


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    for parse in (parse_yaml, parse_json):
        # Whatever else is raised fails the test.
        with contextlib.suppress(OServeError):
            assert isinstance(parse(text, place="file"), dict)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    path.write_bytes(b"\xef\xbb\xbfmodel: m\n")
    assert load_settings(str(path), {}, {}).model == "m"
    path.write_bytes("model: m\nserved_model_name: se\xf1or".encode("latin-1"))
    with pytest.raises(OServeError, match=r"not UTF-8 text \(line 2\)"):
        load_settings(str(path), {}, {})
    for bad in (str(tmp_path), "a\x00b"):
        with pytest.raises(OServeError, match="cannot read"):
            load_settings(bad, {}, {})
