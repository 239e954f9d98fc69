"""The same flows as Ray jobs, and by ``--address``: recipes, exit codes, a readable log, a token that is asked for."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from eagleray.core import commits, storage
from eagleray.core.errors import ArtifactError, TrainingDiverged
from eagleray.vision.bundle import load_bundle

from tests.conftest import ROOT
from tests.journeys.conftest import Ray, run, scores


def submit(ray: Ray, *entrypoint: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    ray_command = str(Path(sys.executable).parent / "ray")
    words = [ray_command, "job", "submit", "--address", ray.dashboard, "--working-dir", str(ROOT / "jobs")]
    return subprocess.run(
        [*words, "--", *entrypoint], env=env or ray.env, capture_output=True, text=True, timeout=240, check=False
    )


def test_ingest_and_score_as_jobs(ray: Ray, archive: Path, tiny_model: Path, tmp_path: Path) -> None:
    corpus, out = tmp_path / "corpus", tmp_path / "scores"
    ingested = submit(
        ray,
        sys.executable,
        "ingest.py",
        "--recipe",
        "recipes/ingest-smoke.yaml",
        f"sources=[{archive}]",
        f"out={corpus}",
    )
    assert ingested.returncode == 0, ingested.stdout + ingested.stderr
    manifest = storage.read_json(corpus / "manifest.json")
    assert manifest["uris_in"] == manifest["images"] + manifest["duplicates"] + manifest["quarantined"] == 2402
    scored = submit(
        ray,
        *(sys.executable, "score.py", "--recipe", "recipes/score-smoke.yaml"),
        *(f"source={corpus}", f"model={tiny_model}", f"out={out}", "top_k=3"),
    )
    assert scored.returncode == 0, scored.stdout + scored.stderr
    assert commits.read_manifest(out)["images_in"] == 2402
    assert {len(labels) for labels in scores(out)["topk_labels"].to_pylist() if labels} == {3}
    state = storage.read_json(out / "run.json")
    assert state["where"]["mode"] == "ray cluster"
    assert state["where"]["workers"] == 2
    assert "score  2,402/2,402" in scored.stdout  # progress is readable in the job's log
    assert (out / "report.html").exists()


def test_a_job_that_fails_says_why_and_is_not_a_success(ray: Ray, tiny_model: Path, tmp_path: Path) -> None:
    failed = submit(
        ray, sys.executable, "score.py", f"source={tmp_path}/absent", f"model={tiny_model}", f"out={tmp_path}/o"
    )
    assert failed.returncode != 0
    assert "error: " in failed.stdout
    assert "Traceback" not in failed.stdout.split("error: ", 1)[1].split("do: ")[0]
    wrong = submit(ray, sys.executable, "score.py", "sorce=x", "top_k=many", "model=m", "out=o")
    assert wrong.returncode != 0
    for text in ("sorce: no such key; did you mean source?", "source: missing", "top_k:"):
        assert text in wrong.stdout


SMALL = ("size_px=32", "splits.stratify=true", "has_report=false")
NEW = ("parent=test_resnet", "is_pretrained=false")


def job(name: str, *keys: str) -> tuple[str, ...]:
    """An entry point of jobs/ with its smoke recipe."""
    return (sys.executable, f"{name}.py", "--recipe", f"recipes/{name}-smoke.yaml", *keys)


def exit_code(ray: Ray, done: subprocess.CompletedProcess[str]) -> int:
    """What the job itself ended with: `ray job submit` says 1 for every failure."""
    (name,) = set(re.findall(r"raysubmit_\w+", done.stdout))
    script = "import sys, ray.job_submission as r; print(r.JobSubmissionClient(sys.argv[1]).get_job_info(sys.argv[2]).driver_exit_code)"  # noqa: E501
    words = [sys.executable, "-c", script, ray.dashboard, name]
    asked = subprocess.run(words, env=ray.env, capture_output=True, text=True, check=True)
    return int(asked.stdout.split()[-1])


def test_a_training_as_a_job(ray: Ray, corpus: Path, tmp_path: Path) -> None:
    done = submit(ray, *job("finetune", f"corpus={corpus}", *NEW, *SMALL, f"out={tmp_path}/tuned"))
    assert done.returncode == 0, done.stdout + done.stderr
    state = storage.read_json(tmp_path / "tuned.run" / "run.json")
    assert (state["state"], state["step"]) == ("finished", 8)
    assert (state["where"]["mode"], state["where"]["workers"]) == ("ray cluster", 2)
    assert state["evaluation"]["n"] == load_bundle(tmp_path / "tuned").lineage["trained_on"]["split"]["images"]["test"]
    assert "2 workers on cpu" in done.stdout
    assert "step 8/8" in done.stdout


@pytest.mark.full
def test_a_training_job_that_diverges_ends_with_its_code(ray: Ray, corpus: Path, tmp_path: Path) -> None:
    diverging = ("optimizer=sgd", "lr=1e30", "warmup_epochs=0", *NEW, *SMALL)
    failed = submit(ray, *job("finetune", f"corpus={corpus}", *diverging, f"out={tmp_path}/wild"))
    assert failed.returncode != 0
    assert "at step" in failed.stdout
    assert "Traceback" not in failed.stdout.split("error: ", 1)[1].split("do: ")[0]
    assert exit_code(ray, failed) == TrainingDiverged.exit_code
    assert not (tmp_path / "wild").exists()


@pytest.mark.full
def test_pretrain_finetune_and_evaluate_as_jobs(ray: Ray, corpus: Path, tmp_path: Path) -> None:
    keys = (f"corpus={corpus}", *SMALL)
    first = submit(ray, *job("pretrain", *keys, "method=byol", "backbone=test_resnet", f"out={tmp_path}/ssl"))
    assert first.returncode == 0, first.stdout + first.stderr
    assert storage.read_json(tmp_path / "ssl.run" / "run.json")["where"]["mode"] == "ray cluster"
    second = submit(ray, *job("finetune", *keys, f"parent={tmp_path}/ssl", f"out={tmp_path}/tuned"))
    assert second.returncode == 0, second.stdout + second.stderr
    lineage = load_bundle(tmp_path / "tuned").lineage
    assert lineage["parent"]["model_digest"] == load_bundle(tmp_path / "ssl").model_digest
    judged = (f"corpus={corpus}", f"model={tmp_path}/tuned", f"out={tmp_path}/judged", "splits.stratify=true")
    third = submit(ray, *job("evaluate", *judged))
    assert third.returncode == 0, third.stdout + third.stderr
    assert storage.read_json(tmp_path / "judged" / "metrics.json")["top1"]["value"] is not None
    assert (tmp_path / "judged" / "report.html").exists()
    more = {"pretrain": "backbone=test_resnet", "finetune": "parent=test_resnet", "evaluate": f"model={tmp_path}/tuned"}
    for name, key in more.items():
        failed = submit(ray, *job(name, f"corpus={tmp_path}/none", key, f"out={tmp_path}/o"))
        assert failed.returncode != 0
        assert exit_code(ray, failed) == ArtifactError.exit_code, failed.stdout


@pytest.mark.parametrize("token", ["absent", "wrong"])
def test_a_cluster_asks_for_its_token(ray: Ray, archive: Path, tiny_model: Path, tmp_path: Path, token: str) -> None:
    path = tmp_path / "token"
    path.write_text("0" * 64)
    path.chmod(0o600)
    env = {**ray.env, "RAY_AUTH_TOKEN_PATH": str(path if token == "wrong" else tmp_path / "none")}
    words = ["score", str(archive), "--model", str(tiny_model), "--out", str(tmp_path / "o"), "--address", ray.address]
    refused = run(env, *words, "--runtime", "onnx")
    assert refused.returncode == 10, refused.stderr
    assert "token" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_the_embedded_ray_listens_on_loopback_only_and_gives_the_same(
    ray: Ray, archive: Path, tiny_model: Path, tmp_path: Path
) -> None:
    env = {key: value for key, value in ray.env.items() if key not in ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER",)}
    env["RAY_AUTH_TOKEN_PATH"] = str(tmp_path / "token")
    script = (
        "import json, psutil, os; from eagleray.flows import runtime\n"
        "with runtime.cluster(None) as where:\n"
        "    tree = psutil.Process().children(recursive=True)\n"
        "    found = {c.laddr.ip for p in tree for c in p.net_connections('inet') if c.status == 'LISTEN'}\n"
        "    print(json.dumps({'listens': sorted(found), 'mode': where['mode']}))\n"
    )
    seen = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert seen.returncode == 0, seen.stderr
    assert set(json.loads(seen.stdout.splitlines()[-1])["listens"]) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    assert (tmp_path / "token").stat().st_mode & 0o077 == 0
    words = ["score", str(archive), "--model", str(tiny_model), "--runtime", "onnx", "--set", "has_report=false"]
    embedded = run(env, *words, "--out", str(tmp_path / "embedded"))
    assert embedded.returncode == 0, embedded.stderr
    local = run(env, *words, "--out", str(tmp_path / "local"), "--set", "in_process_below=100000")
    assert local.returncode == 0, local.stderr
    assert storage.read_json(tmp_path / "embedded" / "run.json")["where"]["mode"] == "embedded ray"
    assert storage.read_json(tmp_path / "local" / "run.json")["where"]["mode"] == "in process"
    assert scores(tmp_path / "embedded").drop_columns("score").equals(scores(tmp_path / "local").drop_columns("score"))
    assert (tmp_path / "embedded" / "record.json").exists()
