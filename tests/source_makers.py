"""The same little archive in every form that a source may have, and an ingest without worker processes, for tests."""

from __future__ import annotations

import csv
import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from eagleray.flows import ingest
from eagleray.vision.corpus import ShardManifest
from eagleray.vision.intake import SliceIngester

Files = Mapping[str, bytes]  # "label/name" to bytes


def site_of(name: str) -> str:
    """The metadata that the archives of these tests carry for a file."""
    return f"site-{len(name) % 3}"


def metadata_csv(files: Files) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["file_name", "site"])
    writer.writerows([name, site_of(name)] for name in files)
    return text.getvalue().encode("utf-8", "surrogateescape")


def make_folder(home: Path, files: Files) -> str:
    for name, data in {**files, "metadata.csv": metadata_csv(files)}.items():
        path = home / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return str(home / "folder")


def make_zip(home: Path, files: Files, method: int = zipfile.ZIP_DEFLATED) -> str:
    with zipfile.ZipFile(home / "archive.zip", "w", method) as archive:
        for name, data in {**files, "metadata.csv": metadata_csv(files)}.items():
            archive.writestr(name, data)
    return str(home / "archive.zip")


def make_tar(home: Path, files: Files, name: str = "archive.tar", mode: str = "w") -> str:
    write_tar(home / name, {**files, "metadata.csv": metadata_csv(files)}, mode)
    return str(home / name)


def write_tar(path: Path, files: Files, mode: str = "w") -> None:
    with tarfile.open(path, mode) as archive:
        for member, data in files.items():
            info = tarfile.TarInfo(member)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def make_webdataset(home: Path, files: Files) -> str:
    """Two shards; the label in .cls, the metadata in .json."""
    names = list(files)
    for shard in range(2):
        members = {}
        for number, name in list(enumerate(names))[shard::2]:
            members[f"{number:05d}.jpg"] = files[name]
            members[f"{number:05d}.cls"] = name.split("/")[0].encode("utf-8", "surrogateescape")
            members[f"{number:05d}.json"] = json.dumps({"site": site_of(name)}).encode()
        write_tar(home / f"shard-{shard:03d}.tar", members)
    return str(home / "shard-{000..001}.tar")


def make_parquet(home: Path, files: Files) -> str:
    """Images as Hugging Face writes them: struct<bytes, path>, the label as a number of a ClassLabel."""
    classes = sorted({name.split("/")[0] for name in files})
    images = [{"bytes": data, "path": name} for name, data in files.items()]
    table = pa.table(
        {
            "image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            "label": pa.array([classes.index(name.split("/")[0]) for name in files], pa.int64()),
            "site": [site_of(name) for name in files],
        }
    )
    features = {"label": {"names": classes, "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    about = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    pq.write_table(table.replace_schema_metadata(about), home / "archive.parquet", row_group_size=5)
    return str(home / "archive.parquet")


def make_listing(home: Path, files: Files) -> str:
    make_folder(home, files)
    with open(home / "listing.csv", "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "label", "site"])
        writer.writerows([f"folder/{name}", name.split("/")[0], site_of(name)] for name in files)
    return str(home / "listing.csv")


MAKERS: dict[str, Callable[[Path, Files], str]] = {
    "folder": make_folder,
    "zip": make_zip,
    "tar": make_tar,
    "webdataset": make_webdataset,
    "parquet": make_parquet,
    "listing": make_listing,
}


def map_here(
    units: Sequence[Mapping[str, Any]], _: str, settings: Mapping[str, Any], __: object
) -> Iterator[dict[str, Any]]:
    """``map_units`` in this process: a worker process takes a second to start."""
    worker = SliceIngester({**settings, "hang_timeout_s": 0})
    for unit in units:
        yield worker(unit)


@pytest.fixture
def ingest_here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ShardManifest]:
    """Ingests in this process: ``ingest_here(source, out, **settings)``."""
    monkeypatch.setattr(ingest, "map_units", map_here)

    def run(source: str | Sequence[str], out: Path, **settings: Any) -> ShardManifest:
        config = ingest.IngestConfig(sources=source, out=str(out), in_process_below=10**9, **settings)
        return ingest.run(config, is_quiet=True)

    return run
