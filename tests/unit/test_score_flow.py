"""Laws of `score` in process: totals balance, the same command resumes, nothing stale is reused, bad input is said."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from eagleray.core import commits, storage
from eagleray.core.errors import ArtifactError, ClusterError, ConfigError, DataError, StorageError
from eagleray.core.records import read_record
from eagleray.flows.score import ScoreConfig, run

from tests.conftest import ROOT
from tests.tiny_model import make_bundle


@pytest.fixture
def photos(tmp_path: Path, make_photo: Callable[..., bytes]) -> Path:
    folder = tmp_path / "photos"
    for number in range(48):
        path = folder / ("a" if number % 2 else "b") / f"{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make_photo(number))
    (folder / "a" / "empty.jpg").write_bytes(b"")
    return folder


def config(source: Path, model: Path, out: Path, **changes: Any) -> ScoreConfig:
    return ScoreConfig(
        source=str(source), model=str(model), out=str(out), **{"runtime": "onnx", "has_report": False, **changes}
    )


def rows(out: Path) -> dict[str, dict[str, Any]]:
    return {row["uri"].split("::")[0].rsplit("/", 1)[1]: row for row in commits.open_scores(out).to_table().to_pylist()}


def test_a_run_leaves_what_the_readme_says(photos: Path, tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    said = run(config(photos, tiny_model, out, has_report=True), is_quiet=True)
    assert (said["images_in"], said["scored"], said["quarantined"], said["done_now"]) == (49, 48, 1, 49)
    manifest = commits.read_manifest(out)
    assert manifest["images_in"] == 49 == sum(part["rows"] for part in manifest["parts"])
    for part in manifest["parts"]:
        assert storage.sha256_file(out / part["path"]) == part["sha256"]
    record = read_record(out / "record.json")
    for name, digest in record.subjects.items():
        assert storage.sha256_file(out / name) == digest
    assert record.inputs["model"] == manifest["model_digest"]
    state = storage.read_json(out / "run.json")
    assert state["state"] == "finished"
    assert state["where"]["mode"] == "in process"
    assert (out / "report.html").read_text().startswith("<!")
    import pyarrow.parquet as pq

    assert [row["reason"] for row in pq.read_table(out / "quarantine.parquet").to_pylist()] == ["empty"]
    assert not list(out.rglob(f"{storage.ASIDE}*"))


def test_the_same_command_again_has_nothing_to_do(photos: Path, tiny_model: Path, tmp_path: Path) -> None:
    run(config(photos, tiny_model, tmp_path / "run"), is_quiet=True)
    before = (tmp_path / "run" / commits.MANIFEST).stat().st_mtime_ns
    said = run(config(photos, tiny_model, tmp_path / "run"), is_quiet=True)
    assert said["done_now"] == 0
    assert (tmp_path / "run" / commits.MANIFEST).stat().st_mtime_ns == before


def test_a_lost_part_is_scored_again_and_nothing_else(photos: Path, tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(config(photos, tiny_model, out), is_quiet=True)
    before = rows(out)
    part = commits.read_manifest(out)["parts"][0]
    (out / part["path"]).unlink()
    said = run(config(photos, tiny_model, out), is_quiet=True)
    assert said["done_now"] == part["rows"]
    assert rows(out) == before


def test_another_model_scores_everything_again_and_says_so(
    photos: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    run(config(photos, tiny_model, out), is_quiet=True)
    other = make_bundle(tmp_path / "other", seed=8)
    said = run(config(photos, other, out))
    assert said["done_now"] == 49
    assert "stale: " in (text := capsys.readouterr().err)
    assert "model_digest" in text
    digests = {row["model_digest"] for row in rows(out).values()}
    assert digests == {commits.read_manifest(out)["model_digest"]}
    assert len(list((out / commits.LEDGER).iterdir())) == 1
    listed = {part["path"] for part in commits.read_manifest(out)["parts"]}
    assert {f"scores/{path.name}" for path in (out / "scores").iterdir()} == listed


def test_more_labels_a_row_are_another_result(photos: Path, tiny_model: Path, tmp_path: Path) -> None:
    run(config(photos, tiny_model, tmp_path / "run"), is_quiet=True)
    said = run(config(photos, tiny_model, tmp_path / "run", top_k=2), is_quiet=True)
    assert said["done_now"] == 49
    assert {len(row["topk_labels"]) for row in rows(tmp_path / "run").values() if row["label"]} == {2}


def test_a_source_that_changes(
    photos: Path, tiny_model: Path, tmp_path: Path, make_photo: Callable[..., bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    run(config(photos, tiny_model, out), is_quiet=True)
    before = rows(out)
    (photos / "a" / "new.jpg").write_bytes(make_photo(900))
    (photos / "a" / "01.jpg").write_bytes(make_photo(901))
    (photos / "b" / "00.jpg").unlink()
    said = run(config(photos, tiny_model, out))
    assert "the source has changed since the last run: 1 new, 1 changed, 1 vanished" in capsys.readouterr().err
    assert said["images_in"] == 49
    after = rows(out)
    assert set(after) == set(before) - {"00.jpg"} | {"new.jpg"}
    assert after["01.jpg"] != before["01.jpg"]
    assert all(after[name] == before[name] for name in before if name not in ("00.jpg", "01.jpg"))


def test_auto_is_resolved_once_and_kept(photos: Path, tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(config(photos, tiny_model, out, runtime="onnx"), is_quiet=True)
    said = run(config(photos, tiny_model, out, runtime="auto"), is_quiet=True)
    assert said["done_now"] == 0
    assert said["runtime"]["name"] == "onnx"


def test_a_zip_gives_the_same_answers_as_its_folder(photos: Path, tiny_model: Path, tmp_path: Path) -> None:
    archive = shutil.make_archive(str(tmp_path / "photos"), "zip", photos)
    run(config(photos, tiny_model, tmp_path / "run"), is_quiet=True)
    run(config(Path(archive), tiny_model, tmp_path / "zipped"), is_quiet=True)
    folder, zipped = rows(tmp_path / "run"), rows(tmp_path / "zipped")
    assert {n: (r["id"], r["label"], r["score"]) for n, r in folder.items()} == {
        n: (r["id"], r["label"], r["score"]) for n, r in zipped.items()
    }
    assert {row["uri"] for row in zipped.values()} >= {f"zip://a/01.jpg::file://{archive}"}


def test_a_corpus_counts_what_its_ingest_set_aside(
    photos: Path, tiny_model: Path, tmp_path: Path, make_photo: Callable[..., bytes]
) -> None:
    from eagleray.flows.ingest import IngestConfig
    from eagleray.flows.ingest import run as ingest

    (photos / "a" / "copy.jpg").write_bytes(make_photo(3))
    corpus = ingest(IngestConfig(sources=(str(photos),), out=str(tmp_path / "corpus")))
    assert (corpus.uris_in, corpus.images, corpus.duplicates, corpus.quarantined) == (50, 48, 1, 1)
    said = run(config(tmp_path / "corpus", tiny_model, tmp_path / "run"), is_quiet=True)
    assert (said["images_in"], said["scored"], said["quarantined"]) == (50, 49, 1)
    assert storage.read_json(tmp_path / "run" / "run.json")["inferred"] == 48
    run(config(photos, tiny_model, tmp_path / "direct"), is_quiet=True)
    direct, through = rows(tmp_path / "direct"), rows(tmp_path / "run")
    assert set(direct) == set(through)
    for name, row in direct.items():
        for column in ("status", "reason", "label", "decision"):
            assert row[column] == through[name][column]
        assert row["score"] == pytest.approx(through[name]["score"], abs=1e-6)
    assert run(config(tmp_path / "corpus", tiny_model, tmp_path / "run"), is_quiet=True)["done_now"] == 0


def test_bad_input_says_what_to_do(photos: Path, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        run(config(tmp_path / "absent", tiny_model, tmp_path / "r1"), is_quiet=True)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError):
        run(config(tmp_path / "nothing", tiny_model, tmp_path / "r2"), is_quiet=True)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.doc").write_text("x")
    with pytest.raises(ConfigError, match="holds no run"):
        run(config(photos, tiny_model, tmp_path / "foreign"), is_quiet=True)
    assert [path.name for path in (tmp_path / "foreign").iterdir()] == ["thesis.doc"]
    run(config(photos, tiny_model, tmp_path / "r3"), is_quiet=True)
    shutil.copytree(photos, tmp_path / "others")
    with pytest.raises(ConfigError, match="another source"):
        run(config(tmp_path / "others", tiny_model, tmp_path / "r3"), is_quiet=True)
    shutil.copytree(tiny_model, tmp_path / "flipped")
    model = tmp_path / "flipped" / "model.onnx"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match=r"model\.onnx"):
        run(config(photos, tmp_path / "flipped", tmp_path / "r4"), is_quiet=True)
    assert not (tmp_path / "r4").exists()
    with pytest.raises(StorageError if os.geteuid() else ConfigError):
        run(config(photos, tiny_model, Path("/proc/eagleray") if os.geteuid() else model), is_quiet=True)


def test_a_small_run_loads_neither_torch_nor_ray(photos: Path, tiny_model: Path, tmp_path: Path) -> None:
    photo = str(photos / "a" / "01.jpg")
    verbs = [
        ["eagleray", "predict", photo, "--model", str(tiny_model), "--json"],
        ["eagleray", "score", str(photos), "--model", str(tiny_model), "--out", str(tmp_path / "r")],
    ]
    code = (
        "import sys; from eagleray.cli.main import main\n"
        f"for sys.argv in {verbs!r}:\n"
        "    try: main()\n"
        "    except SystemExit as end: assert not end.code, end.code\n"
        "loaded = {'torch', 'ray'} & set(sys.modules); assert not loaded, loaded\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "platform"), "EAGLERAY_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (row,), _ = json.JSONDecoder().raw_decode(done.stdout)
    assert row["status"] == "scored"


def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(
    tiny_model: Path, tmp_path: Path, make_photo: Callable[..., bytes]
) -> None:
    folder, out = tmp_path / "many", tmp_path / "run"
    folder.mkdir()
    for number in range(240):
        (folder / f"{number:03d}.jpg").write_bytes(make_photo(number))
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "journeys" / "faults"), str(ROOT / "platform")]),
        "EAGLERAY_TEST_FAULTS": str(tmp_path / "faults.json"),
    }
    (tmp_path / "faults.json").write_text('{"slow_ms": 60}')
    words = ["score", str(folder), "--model", str(tiny_model), "--out", str(out), "--runtime", "onnx", "--plain"]
    command = [sys.executable, "-m", "eagleray.cli.main", *words]
    process = subprocess.Popen(
        command,
        env=env,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509  a shell's background job has it ignored
    )
    deadline = time.monotonic() + 60
    while len(list(out.glob("_ledger/*/parts/*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=30)
    assert process.returncode == 130, text
    assert "run the same command again: it resumes" in text
    assert "Traceback" not in text
    kept = len(list(out.glob("_ledger/*/parts/*.json")))
    assert kept >= 2
    assert not (out / commits.MANIFEST).exists()
    (tmp_path / "faults.json").unlink()
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert commits.open_scores(out).count_rows() == 240
    attempts = commits.Ledger(out, _key(out)).attempts()
    assert sum(attempts.values()) - len(attempts) <= 2  # what each of two workers had under way


def _key(out: Path) -> str:
    (home,) = (out / commits.LEDGER).iterdir()
    return home.name


def test_poison_in_a_small_archive_costs_itself_only(
    tiny_model: Path, tmp_path: Path, make_photo: Callable[..., bytes]
) -> None:
    folder, out = tmp_path / "photos", tmp_path / "run"
    folder.mkdir()
    for number in range(60):
        data = make_photo(number)
        kind = {20: b"POISON-ABORT", 41: b"POISON-MEMORY"}.get(number, b"")
        comment = b"\xff\xfe\x00\x20" + kind.ljust(30) if kind else b""
        (folder / f"{number:02d}.jpg").write_bytes(data[:2] + comment + data[2:])
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "journeys" / "faults"), str(ROOT / "platform")]),
        "EAGLERAY_TEST_FAULTS": str(tmp_path / "none.json"),
    }
    words = ["score", str(folder), "--model", str(tiny_model), "--out", str(out), "--runtime", "onnx"]
    limits = ["--set", "memory_mib=512", "--set", "has_report=false"]
    command = [sys.executable, "-m", "eagleray.cli.main", *words, *limits]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    refused = {name: row["reason"] for name, row in rows(out).items() if row["status"] == "quarantined"}
    assert refused == {"20.jpg": "poison", "41.jpg": "poison"}
    assert commits.read_manifest(out)["scored"] == 58


def test_an_address_where_nothing_listens_is_said_at_once(photos: Path, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"nothing answers at 127\.0\.0\.1:1") as caught:
        run(config(photos, tiny_model, tmp_path / "run", address="127.0.0.1:1", in_process_below=0), is_quiet=True)
    assert caught.value.exit_code == 10
