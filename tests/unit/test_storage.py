"""Laws of core.storage: whole or absent, first writer wins, one writer a folder."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
from eagleray.core import storage
from eagleray.core.errors import ConfigError, StorageError


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_write_atomic_replaces_whole(tmp_path: Path) -> None:
    storage.write_atomic(tmp_path / "a", b"one")
    storage.write_atomic(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"two"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_no_space_leaves_the_older_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_atomic(tmp_path / "a", b"one")
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(StorageError, match="No space left") as caught:
        storage.write_atomic(tmp_path / "a", b"two")
    assert caught.value.exit_code == 9
    assert "free some space" in str(caught.value)
    assert (tmp_path / "a").read_bytes() == b"one"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("write", [storage.write_atomic, storage.publish_new, storage.write_new])
def test_no_space_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: object) -> None:
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(StorageError):
        write(tmp_path / "a", b"two")  # type: ignore[operator]
    assert list(tmp_path.iterdir()) == []


def test_publish_new_never_replaces(tmp_path: Path) -> None:
    assert storage.publish_new(tmp_path / "a", b"first")
    assert not storage.publish_new(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"first"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_of_many_racing_publishers_one_wins(tmp_path: Path) -> None:
    wins: list[int] = []
    start = threading.Barrier(8)

    def race(number: int) -> None:
        start.wait()
        if storage.publish_new(tmp_path / "a", str(number).encode()):
            wins.append(number)

    threads = [threading.Thread(target=race, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1
    assert (tmp_path / "a").read_bytes() == str(wins[0]).encode()


def test_only_one_writer(tmp_path: Path) -> None:
    with (
        storage.only_writer(tmp_path / ".lock", what="x"),
        pytest.raises(ConfigError, match="another command is writing x"),
        storage.only_writer(tmp_path / ".lock", what="x"),
    ):
        pass
    with storage.only_writer(tmp_path / ".lock", what="x"):
        pass


def test_a_file_in_the_way_of_a_folder_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        storage.make_folder(tmp_path / "a")
    with pytest.raises(ConfigError, match="remote URI"):
        storage.make_folder("s3://bucket/out")
