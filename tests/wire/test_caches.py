"""Caches between two engines: whole or not there."""

import os
from pathlib import Path

from oserve.wire.caches import CacheFolder, Note, giving, new_name, own_name, taken_name, taking


def test_names_are_their_own() -> None:
    name, other = new_name(), new_name()
    assert name != other
    fields = giving(name) | taking(other)
    assert (own_name(fields), taken_name(fields)) == (name, other)
    for strange in (None, {}, {"oserve": 5}, {"oserve": "../x"}, {"oserve": name + "0"}):
        assert own_name(strange) == ""


def test_a_note_is_told_once_all_parts_are_there(tmp_path: Path) -> None:
    folder = CacheFolder(str(tmp_path))
    name = new_name()
    note = Note(tokens=5, parts=2, form="x")
    assert folder.note(name) is None
    folder.put_note(name, note)
    folder.part(name, 0).touch()
    assert folder.note(name) is None
    folder.part(name, 1).touch()
    assert folder.note(name) == note
    folder.remove(name)
    assert list(tmp_path.iterdir()) == []


def test_what_is_lost_or_forgotten(tmp_path: Path) -> None:
    folder = CacheFolder(str(tmp_path))
    name, kept = new_name(), new_name()
    folder.put_note(name, Note(tokens=5, parts=2))
    folder.lose(name)
    assert folder.note(name) == Note()
    folder.ask(kept)
    for path in tmp_path.glob(f"{name}.*"):
        os.utime(path, (1.0, 1.0))
    folder.sweep(60.0)
    assert [path.name for path in tmp_path.iterdir()] == [f"{kept}.asked"]
    assert folder.asked(kept)
    assert not folder.asked(kept)
    gone = CacheFolder(str(tmp_path / "gone"))
    assert not gone.asked(name)
    assert gone.note(name) is None
