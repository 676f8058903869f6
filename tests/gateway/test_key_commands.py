"""``oserve keys``: it tells which file it changes, and warns of a folder that was not there."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from oserve.cli.keys import app
from oserve.core import OServeError


def called(*words: str) -> Result:
    found = CliRunner().invoke(app, list(words))
    if isinstance(found.exception, OServeError):
        raise found.exception
    return found


def test_each_command_tells_the_whole_path_of_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "state" / "keys.json"
    added = called("add", "acme", "--state-dir", "state")
    assert f"key file: {path}" in added.stderr
    # A pipe gets the key alone.
    key = added.stdout.strip()
    assert key.startswith("oserve-")
    assert "warning: there was no folder" in added.stderr
    assert "warning" not in called("add", "acme", "--state-dir", "state").stderr
    told = called("list", "--json", "--state-dir", "state")
    assert f"key file: {path}" in told.stderr
    (first, _) = json.loads(told.stdout)
    revoked = called("revoke", first["id"], "--state-dir", "state")
    assert f"key file: {path}" in revoked.stderr
    assert f"revoked {first['id']} of tenant acme" in revoked.stderr
    assert key not in added.stderr + told.output + revoked.output


def test_no_other_command_makes_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    assert (
        f"no key file {folder / 'keys.json'}" in called("list", "--state-dir", str(folder)).stderr
    )
    with pytest.raises(OServeError, match="no key") as caught:
        called("revoke", "tenant:acme", "--state-dir", str(folder))
    assert caught.value.place == str(folder / "keys.json")
    assert not folder.exists()
