"""The files of a model over a hatch: whole, cut off, resumed, damaged, refused."""

import asyncio
import contextlib
import errno
import os
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hatches import RunningHatch, running_hatch
from oserve.core import HatchAddress, OServeError
from oserve.nodes import file_fetch
from oserve.nodes.examination import MAX_FILES, ModelFilesFacts
from oserve.nodes.fetch_messages import FetchEnd, FetchQuery, FileWish, ModelHoldings
from oserve.nodes.file_fetch import FileFetch
from oserve.nodes.file_offer import FileOffer, send_files
from oserve.nodes.model_files import find_holdings
from oserve.nodes.model_staging import SPARE_BYTES, ModelStaging

WEIGHTS = bytes(range(256)) * 2000
ROOM = SPARE_BYTES + (1 << 30)


def make_model(folder: Path, weights: bytes = WEIGHTS) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model-1.safetensors").write_bytes(weights)
    (folder / "model-2.safetensors").write_bytes(weights[::-1])
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_bytes(msgspec.json.encode(index))
    (folder / ".hidden").write_text("stays")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {item.name: item.read_bytes() for item in folder.iterdir() if item.name[0] != "."}


class _Cut(socket.socket):
    """A connection that breaks after so many bytes."""

    left = 0

    def sendall(self, data: Any, flags: int = 0) -> None:
        view = memoryview(data)
        size = min(len(view), self.left)
        super().sendall(view[:size], flags)
        self.left -= size
        if not self.left:
            self.shutdown(socket.SHUT_RDWR)
            raise ConnectionError


@contextlib.contextmanager
def breaking_offer(path: str, folders: Mapping[str, Path], after_bytes: int) -> Iterator[None]:
    """Offers files to one visitor, and breaks off."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()

    def serve() -> None:
        with contextlib.suppress(OSError):
            visitor, _ = listener.accept()
            with _Cut(fileno=visitor.detach()) as cut:
                cut.left = after_bytes
                send_files(cut, folders)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
        Path(path).unlink()


async def fetched(query: FetchQuery, room: int = ROOM) -> FetchEnd:
    return await asyncio.to_thread(FileFetch(query, free_bytes=room).run)


def query_for(hatch: RunningHatch, source: Path, place: Path) -> FetchQuery:
    return FetchQuery(
        model=str(place),
        source=hatch.address,
        name="fetch/w0.sock",
        files=find_holdings(str(source)).files,
    )


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "..", ".hidden", "", "a\n"])
def test_no_name_of_a_file_leads_out_of_its_folder(name: str) -> None:
    named = {"name": name, "size_bytes": 1, "digest": "0"}
    for message, kind in (
        ({"files": [named]}, ModelHoldings),
        ({"files": [named]}, ModelFilesFacts),
        ({"model": "m", "file": name}, FileWish),
    ):
        with pytest.raises(msgspec.ValidationError, match="matching regex"):
            msgspec.json.decode(msgspec.json.encode(message), type=kind)
    many = {"files": [{**named, "name": str(number)} for number in range(MAX_FILES + 1)]}
    with pytest.raises(msgspec.ValidationError, match="length"):
        msgspec.json.decode(msgspec.json.encode(many), type=ModelHoldings)


async def test_cut_in_the_middle_it_goes_on_and_is_in_place_at_once(tmp_path: Path) -> None:
    source, place = make_model(tmp_path / "source"), tmp_path / "far" / "away" / "model"
    path = "fetch/w0.sock"
    async with running_hatch(tmp_path) as hatch:
        query = query_for(hatch, source, place)
        listener, folders = str(hatch.listener(path)), {str(place): source}
        with breaking_offer(listener, folders, len(WEIGHTS) + 300_000):
            end = await fetched(query)
        assert end.error
        assert not end.refused
        assert end.fetched_bytes > len(WEIGHTS)
        # Nothing is in place before all is there.
        assert not place.exists()
        offer = FileOffer(listener)
        offer.add(str(place), source)
        again = await fetched(query)
        assert again.error == ""
        assert again.resumed_bytes == end.fetched_bytes
        whole = sum(file.size_bytes for file in query.files)
        assert again.resumed_bytes + again.fetched_bytes == whole
        assert contents(place) == contents(source)
        assert find_holdings(str(place)).complete
        assert [item.name for item in place.parent.iterdir()] == ["model"]
        # Asked again there is nothing to do.
        assert (await fetched(query)).fetched_bytes == 0
        offer.close()


async def test_what_was_damaged_meanwhile_is_fetched_again(tmp_path: Path) -> None:
    source, place = make_model(tmp_path / "source"), tmp_path / "model"
    async with running_hatch(tmp_path) as hatch:
        query = query_for(hatch, source, place)
        listener, folders = str(hatch.listener("fetch/w0.sock")), {str(place): source}
        with breaking_offer(listener, folders, len(WEIGHTS) // 2):
            await fetched(query)
        [part] = [
            item
            for item in (tmp_path / ".model.oserve-fetch").glob("model-*.part")
            if item.stat().st_size
        ]
        part.write_bytes(b"x" * part.stat().st_size)
        offer = FileOffer(listener)
        offer.add(str(place), source)
        end = await fetched(query)
        assert end.error == ""
        assert end.resumed_bytes == 2  # the configuration
        assert contents(place) == contents(source)
        offer.close()


async def test_refusals(tmp_path: Path) -> None:
    source, place = make_model(tmp_path / "source"), tmp_path / "model"
    async with running_hatch(tmp_path) as hatch:
        query = query_for(hatch, source, place)
        full = await fetched(query, room=SPARE_BYTES + 1000)
        assert full.refused
        assert "there is no room for the model" in full.error
        assert not (tmp_path / ".model.oserve-fetch").exists()
        relative = await fetched(msgspec.structs.replace(query, model="./tiny"))
        assert relative.refused
        assert "relative path" in relative.error
        # A file of another revision is nobody's to replace.
        place.mkdir()
        (place / "config.json").write_text('{"other": 1}')
        other = await fetched(query)
        assert other.refused
        assert "differs from that of other nodes" in other.error
        assert (place / "config.json").read_text() == '{"other": 1}'
        (place / "config.json").unlink()
        # Who offers nothing is not asked for ever.
        offer = FileOffer(str(hatch.listener("fetch/w0.sock")))
        end = await fetched(query)
        assert (end.refused, end.error) == (False, "config.json: it is not offered")
        offer.close()


@pytest.mark.parametrize(
    ("broken", "refused"),
    [
        (ssl.SSLError(1, "[SSL] record layer failure"), False),
        (ConnectionError("another server has this node fetch the same model"), False),
        (PermissionError(errno.EPERM, "not permitted"), True),
        (OSError(errno.ENOSPC, "full"), True),
    ],
)
def test_only_what_another_try_cannot_help_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: OSError, refused: bool
) -> None:
    def fails(*_address: object) -> None:
        raise broken

    monkeypatch.setattr(file_fetch, "dial_hatch", fails)
    source = make_model(tmp_path / "source")
    end = FileFetch(_query(source, tmp_path / "model"), free_bytes=ROOM).run()
    assert end.error
    assert end.refused == refused


def _query(source: Path, place: Path) -> FetchQuery:
    nobody = HatchAddress(host="127.0.0.1", port=1, certificate="", token="")
    files = find_holdings(str(source)).files
    return FetchQuery(model=str(place), source=nobody, name="fetch/w0.sock", files=files)


def test_while_another_server_fetches_it_is_tried_again(tmp_path: Path) -> None:
    source, place = make_model(tmp_path / "source"), tmp_path / "model"
    query = _query(source, place)
    with ModelStaging(place, query.files, free_bytes=ROOM).opened():
        end = FileFetch(query, free_bytes=ROOM).run()
    assert (end.refused, end.error) == (False, "another server has this node fetch the same model")


def test_it_stops_while_it_reads_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, place = make_model(tmp_path / "source"), tmp_path / "model"
    query = _query(source, place)
    staging = ModelStaging(place, query.files, free_bytes=ROOM)
    with staging.opened():
        staging.part(query.files[0]).write_bytes(b"{")
    near, far = socket.socketpair()
    monkeypatch.setattr(file_fetch, "dial_hatch", lambda *_address: near)
    fetch = FileFetch(query, free_bytes=ROOM)
    fetch.stop()
    far.close()
    assert fetch.run().error == "it was told to stop"


def test_a_folder_that_has_a_part_of_the_files_gets_the_rest(tmp_path: Path) -> None:
    source, place = make_model(tmp_path / "source"), tmp_path / "model"
    files = find_holdings(str(source)).files
    place.mkdir()
    (place / "model-1.safetensors").write_bytes(WEIGHTS)
    staging = ModelStaging(place, files, free_bytes=ROOM)
    missing = staging.missing()
    assert "model-1.safetensors" not in {file.name for file in missing}
    with staging.opened():
        for file in missing:
            staging.part(file).write_bytes((source / file.name).read_bytes())
        # Two servers do not write the same files.
        with (
            pytest.raises(ConnectionError, match="another server"),
            ModelStaging(place, files, free_bytes=ROOM).opened(),
        ):
            pass
        staging.finish(missing)
    assert contents(place) == contents(source)


@pytest.mark.parametrize("name", ["rename", "replace"])
def test_what_cannot_be_put_in_place_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    source, place = make_model(tmp_path / "source"), tmp_path / "model"
    files = find_holdings(str(source)).files
    if name == "replace":
        place.mkdir()
    staging = ModelStaging(place, files, free_bytes=ROOM)
    with staging.opened():
        for file in files:
            staging.part(file).write_bytes((source / file.name).read_bytes())
        with monkeypatch.context() as patch:
            patch.setattr(os, name, _fail)
            with pytest.raises(OSError, match="no"):
                staging.finish(files)
    if name == "rename":
        # It is there meanwhile, by another hand.
        place.mkdir()
        (place / "config.json").write_bytes((source / "config.json").read_bytes())
    whole = sum(file.size_bytes for file in files)
    staging = ModelStaging(place, files, free_bytes=SPARE_BYTES)
    with staging.opened():
        assert staging.have_bytes() == whole
        staging.finish(staging.missing())
    assert contents(place) == contents(source)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["model", "source"]


def _fail(*_names: object) -> None:
    raise OSError(errno.EXDEV, "no")


def test_files_go_nowhere_but_within_a_place_that_is_there(tmp_path: Path) -> None:
    # It may be a disk of its own.
    files = find_holdings(str(make_model(tmp_path / "source"))).files
    place = tmp_path / "model"
    place.mkdir()
    staging = ModelStaging(place, files, free_bytes=ROOM)
    with staging.opened():
        assert all(staging.part(file).is_relative_to(place) for file in files)


def test_a_place_that_nobody_can_write_is_refused_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = find_holdings(str(make_model(tmp_path / "source"))).files
    place = tmp_path / "model"
    place.mkdir()
    monkeypatch.setattr(os, "access", lambda *_: False)
    with (
        pytest.raises(OServeError, match="cannot write at"),
        ModelStaging(place, files, free_bytes=ROOM).opened(),
    ):
        pass


def test_parts_of_another_revision_are_removed_first(tmp_path: Path) -> None:
    old = find_holdings(str(make_model(tmp_path / "old", b"old" * 100))).files
    new = find_holdings(str(make_model(tmp_path / "new"))).files
    place = tmp_path / "model"
    with ModelStaging(place, old, free_bytes=ROOM).opened():
        ModelStaging(place, old).part(old[0]).write_bytes(b"half")
    staging = ModelStaging(place, old, free_bytes=ROOM)
    with staging.opened():
        assert staging.have_bytes() == 4
    staging = ModelStaging(place, new, free_bytes=ROOM)
    with staging.opened():
        assert staging.have_bytes() == 0
        for file in new:
            staging.part(file).write_bytes(b"wrong")
        with pytest.raises(ConnectionError, match="not the file that was promised"):
            staging.finish(new)
    assert not place.exists()


def test_a_model_without_one_of_its_weights_is_not_complete(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    assert find_holdings(str(source)).complete
    (source / "model-2.safetensors").unlink()
    assert not find_holdings(str(source)).complete
    assert not find_holdings(str(tmp_path / "nowhere")).complete
