"""The engine cache: an entry is loaded only when it was built and signed here, for this very use."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from eagleray.core.errors import ArtifactError
from eagleray.infer.runtimes import engine_cache
from eagleray.infer.runtimes.engine_build import BuildSettings, Target
from eagleray.infer.runtimes.engine_cache import EngineKey, load, path_of, store

KEY = EngineKey(onnx_sha256="ab" * 32, target=Target("8.9", "NVIDIA L4", "580.65"), library="tensorrt", version="11.0")
OTHERS = [
    replace(KEY, onnx_sha256="cd" * 32),
    replace(KEY, target=Target("12.0", "NVIDIA L4", "580.65")),
    replace(KEY, target=Target("8.9", "NVIDIA L40", "580.65")),
    replace(KEY, target=Target("8.9", "NVIDIA L4", "590.1")),
    replace(KEY, library="tensorrt_rtx"),
    replace(KEY, version="11.1"),
    replace(KEY, settings=BuildSettings(buckets=(1,))),
    replace(KEY, settings=BuildSettings(memory_mib=1)),
]
ENGINE = bytes(range(256)) * 8


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EAGLERAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "engines"


def test_what_was_stored_is_loaded() -> None:
    assert load(KEY) is None
    assert store(KEY, ENGINE) == path_of(KEY)
    assert load(KEY) == ENGINE
    assert load(KEY, engine_cache.TIMINGS) is None


@pytest.mark.parametrize("other", OTHERS)
def test_another_value_of_any_part_of_the_key_is_another_engine(other: EngineKey) -> None:
    store(KEY, ENGINE)
    assert load(other) is None


@pytest.mark.parametrize("other", OTHERS)
def test_an_entry_cannot_stand_in_for_another(other: EngineKey, capsys: pytest.CaptureFixture[str]) -> None:
    path = store(KEY, ENGINE)
    assert path is not None
    path.rename(path_of(other))
    assert load(other) is None
    assert "not built and signed here for this use" in capsys.readouterr().err
    path_of(other).rename(path_of(KEY, engine_cache.KERNELS))
    assert load(KEY, engine_cache.KERNELS) is None


def test_any_changed_byte_is_refused_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    path = store(KEY, ENGINE)
    assert path is not None
    whole = path.read_bytes()
    for position in (*range(0, 60), 60 + len(ENGINE) // 2, len(whole) - 1):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        assert load(KEY) is None, position
    for text in (b"", whole[:20], whole[:-1], whole + b"\0", ENGINE):
        path.write_bytes(text)
        assert load(KEY) is None
    assert str(path) in capsys.readouterr().err
    path.write_bytes(whole)
    assert load(KEY) == ENGINE


def test_an_entry_that_was_signed_elsewhere_is_refused(folder: Path) -> None:
    store(KEY, ENGINE)
    (folder / "signing.key").unlink()  # the next one is another
    assert load(KEY) is None
    store(KEY, ENGINE)
    assert load(KEY) == ENGINE


def test_the_key_is_its_owners_alone(folder: Path) -> None:
    store(KEY, ENGINE)
    secret = folder / "signing.key"
    assert (secret.stat().st_mode & 0o777, secret.stat().st_size) == (0o600, 32)
    secret.chmod(0o640)
    for act in (lambda: load(KEY), lambda: store(KEY, ENGINE)):
        with pytest.raises(ArtifactError, match="mode 0640"):
            act()
    secret.chmod(0o600)
    secret.write_bytes(b"short")
    with pytest.raises(ArtifactError, match="5 bytes"):
        load(KEY)


def test_a_key_that_is_a_link_is_not_followed(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_bytes(bytes(32))
    (tmp_path / "mine").chmod(0o600)
    folder.mkdir(parents=True)
    (folder / "signing.key").symlink_to(tmp_path / "mine")
    assert store(KEY, ENGINE) is None
    assert "will be built at every start" in capsys.readouterr().err


def test_many_that_start_at_once_use_one_key() -> None:
    secrets: list[bytes] = []
    threads = [threading.Thread(target=lambda: secrets.append(engine_cache._secret())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(secrets) == 8
    assert len(set(secrets)) == 1
    assert os.listdir(os.path.dirname(path_of(KEY))) == ["signing.key"]


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("EAGLERAY_CACHE", str(tmp_path / "file"))
    assert store(KEY, ENGINE) is None
    assert load(KEY) is None
    assert "cannot be" in capsys.readouterr().err
