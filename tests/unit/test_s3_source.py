"""S3 by way of a local moto server: trees, archives and listings of a bucket; what an outage or a refusal does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from eagleray.core.errors import DataError, StorageError
from eagleray.vision import sources
from eagleray.vision.corpus import ShardManifest, samples
from eagleray.vision.images import ImageRefused, Limits, Reason
from eagleray.vision.sources import remote

from tests.source_makers import MAKERS, Files, ingest_here, make_folder

__all__ = ["ingest_here"]
Ingest = Callable[..., ShardManifest]
BUCKET = "photos"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server_module = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket, and an environment in which s3:// means the local server."""
    import fsspec
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": endpoint})
    s3fs.S3FileSystem.clear_instance_cache()
    fs = s3fs.S3FileSystem()
    fs.mkdir(BUCKET)
    yield f"s3://{BUCKET}"
    fs.rm(BUCKET, recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def files(make_photo: Callable[..., bytes]) -> Files:
    photos = {f"class{n % 3}/ü {n:02d}.jpg": make_photo(n, width=40, height=30) for n in range(10)}
    return {**photos, "class0/copy.jpg": photos["class1/ü 01.jpg"], "class2/empty.jpg": b"", "class1/no.jpg": b"no"}


def upload(folder: Path, bucket: str) -> None:
    import fsspec

    fs, root = fsspec.core.url_to_fs(bucket)
    for path in folder.rglob("*"):
        if path.is_file():
            fs.pipe_file(f"{root}/{path.relative_to(folder)}", path.read_bytes())


@pytest.mark.parametrize("kind", MAKERS)
def test_a_bucket_gives_the_same_corpus(
    kind: str, bucket: str, files: Files, tmp_path: Path, ingest_here: Ingest
) -> None:
    (tmp_path / "a").mkdir()
    source = MAKERS[kind](tmp_path / "a", files)
    upload(tmp_path / "a", bucket)
    uri = f"{bucket}/{Path(source).name}"
    assert sources.detect(uri) == kind
    corpus = ingest_here(uri, tmp_path / "remote", shard_images=4)
    assert corpus.digest == ingest_here(source, tmp_path / "local").digest
    assert (corpus.uris_in, corpus.images, corpus.duplicates, corpus.quarantined) == (13, 10, 1, 2)
    assert all(f"s3://{BUCKET}/" in sample.uri for sample in samples(corpus))
    assert ingest_here(uri, tmp_path / "remote", shard_images=4) == corpus


def test_a_local_listing_of_objects(bucket: str, files: Files, tmp_path: Path) -> None:
    upload(Path(make_folder(tmp_path, files)), bucket)
    lines = [f"{bucket}/{name}" for name in files] + [f"{bucket}/gone.jpg", f"{bucket}/class0"]
    (tmp_path / "list.csv").write_text("\n".join(["uri", *lines]) + "\n", encoding="utf-8")
    table = pa.Table.from_batches(list(sources.list_items(str(tmp_path / "list.csv"))))
    *found, gone, folder = (data for _, data in sources.read_items(table))
    assert found == list(files.values())
    for refusal in (gone, folder):
        assert isinstance(refusal, ImageRefused)
        assert refusal.reason is Reason.UNREADABLE


def test_an_object_over_the_limit_is_not_fetched(
    bucket: str, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(Path(make_folder(tmp_path, files)), bucket)
    monkeypatch.setattr(remote, "_fetch", lambda *_: pytest.fail("fetched"))
    table = pa.Table.from_batches(list(sources.list_items(f"{bucket}/class0")))
    found = [data for _, data in sources.read_items(table, Limits(max_bytes=10))]
    assert [data.reason for data in found if isinstance(data, ImageRefused)] == [Reason.TOO_LARGE] * 5


def test_a_missing_bucket_or_key_is_an_error(bucket: str) -> None:
    for uri in (f"{bucket}/nothing.zip", "s3://no-such-bucket/a.zip", f"{bucket}/nothing/"):
        with pytest.raises(DataError):
            list(sources.list_items(uri))


def test_a_store_that_does_not_answer_is_no_fault_of_the_images(
    bucket: str, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(Path(make_folder(tmp_path, files)), bucket)
    table = pa.Table.from_batches(list(sources.list_items(f"{bucket}/class1")))
    monkeypatch.setattr(remote, "PAUSE_S", 0.001)
    calls = []

    def broken(*_: object) -> bytes:
        calls.append(1)
        raise ConnectionError("the network is down")

    monkeypatch.setattr(remote, "_fetch", broken)
    with pytest.raises(StorageError, match="network is down") as caught:
        list(sources.read_items(table))
    assert "run the same command again" in caught.value.fix
    assert len(calls) >= remote.ATTEMPTS


def test_wrong_credentials_are_no_fault_of_the_images(
    bucket: str, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few protected objects are unreadable; a run of nothing else is an error."""
    upload(Path(make_folder(tmp_path, files)), bucket)
    table = pa.Table.from_batches(list(sources.list_items(f"{bucket}/class1")))

    def denied(*_: object) -> bytes:
        raise PermissionError("Forbidden")

    monkeypatch.setattr(remote, "_fetch", denied)
    found = [data for _, data in sources.read_items(table)]
    assert {data.detail for data in found if isinstance(data, ImageRefused)} == {remote.DENIED}
    monkeypatch.setattr(remote, "DENIED_RUN", 3)
    with pytest.raises(StorageError, match="3 objects in a row"):
        list(sources.read_items(table))
