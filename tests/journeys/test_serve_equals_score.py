"""Batch equals online: the same 300 real images by ``score`` and over HTTP, on one engine."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from eagleray.vision.bundle import load_bundle, save_bundle
from eagleray.vision.prediction import ThresholdPolicy

from tests.journeys.conftest import run, scores
from tests.journeys.serving import served

IMAGES = 300
FARTHEST_DP = 1e-6  # one engine, one decoder; batches of another size may round otherwise in the last bit


@pytest.fixture(scope="module")
def photos(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """250 photos of ImageNet and 50 of rubbish, as files."""
    folder = tmp_path_factory.mktemp("photos")
    for name, count in (("imagenet250", 250), ("trashnet", IMAGES - 250)):
        with zipfile.ZipFile(shared_data / f"{name}.zip") as archive:
            members = [m for m in archive.namelist() if m.lower().endswith((".jpg", ".jpeg", ".png"))][:count]
            for number, member in enumerate(members):
                (folder / f"{name}-{number:03d}{Path(member).suffix}").write_bytes(archive.read(member))
    assert len(list(folder.iterdir())) == IMAGES
    return folder


def test_three_hundred_photos(photos: Path, tiny_model: Path, tmp_path: Path) -> None:
    plain = load_bundle(tiny_model)
    policy = ThresholdPolicy(dict.fromkeys(plain.label_ids, 0.3), otherwise="look")
    files = {name: plain.path / name for name in plain.files}
    model = save_bundle(tmp_path / "model", dataclasses.replace(plain, files={}, policy=policy), files).path
    with served(tmp_path / "serve", [f"m={model}"], "--set", "limits.max_queue_s=10") as service:
        paths = sorted(photos.iterdir())
        with ThreadPoolExecutor(6) as pool:
            replies = list(pool.map(lambda path: service.predict(path.read_bytes()), paths))
    assert [reply.status for reply in replies] == [200] * IMAGES
    online = {path.name: reply.json for path, reply in zip(paths, replies, strict=True)}
    done = run(service.env, *("score", str(photos), "--model", str(model), "--out", str(tmp_path / "out")),
               *("--runtime", "onnx", "--set", "has_report=false"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = {Path(row["uri"]).name: row for row in scores(tmp_path / "out").to_pylist()}
    assert set(rows) == set(online)
    for name, row in rows.items():
        said = online[name]
        assert (said["label"], said["decision"]) == (row["label"], row["decision"]), name
        assert said["model"]["digest"] == row.get("model_digest", said["model"]["digest"])
        assert [entry["label"] for entry in said["topk"]] == row["topk_labels"]
        far = [abs(entry["score"] - score) for entry, score in zip(said["topk"], row["topk_scores"], strict=True)]
        assert max(far) <= FARTHEST_DP, (name, json.dumps(far))
    decided = {row["decision"] for row in rows.values()}
    assert len(decided) > 1
    print(f"\n{IMAGES} photos, batches of {sorted({r.json['timing_ms']['batch_size'] for r in replies})}")
