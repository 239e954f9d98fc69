"""Laws of `certify`: what it publishes is what Classifier and `score` decide; what is not proved is not published."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pytest
from eagleray.core import storage
from eagleray.core.commits import open_scores
from eagleray.core.errors import ConfigError, DataError, KpiNotMet
from eagleray.core.records import read_record
from eagleray.flows import certify, score
from eagleray.flows.certify import CertifyConfig, run
from eagleray.flows.ingest import IngestConfig
from eagleray.flows.ingest import run as ingest
from eagleray.flows.inspection import describe
from eagleray.flows.report import rebuild
from eagleray.infer.classifier import Classifier
from eagleray.vision.bundle import load_bundle, save_bundle
from eagleray.vision.corpus import open_corpus, samples
from eagleray.vision.imports import ImportConfig, import_model
from eagleray.vision.splits import SplitRule, assign, read_index
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from tests.conftest import ROOT

NUM_TRAIN, NUM_CALIBRATION = 300, 700
KPI = "precision(three)>=0.8@0.95; maximize recall(three)"
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="module")
def digits() -> tuple[list[bytes], np.ndarray]:
    """1,100 of scikit-learn's handwritten digits as PNG, and what they are."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pictures = []
    for picture in found.images[:1100]:
        buffer = io.BytesIO()
        Image.fromarray((picture * 15.9).astype(np.uint8)).convert("RGB").save(buffer, "PNG")
        pictures.append(buffer.getvalue())
    return pictures, found.target[:1100]


@pytest.fixture(scope="module")
def bundle(digits: tuple[list[bytes], np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A linear model of the first 300 digits, as a bundle of an ONNX graph; it errs on some of the others."""
    from sklearn.linear_model import LogisticRegression

    pictures, targets = digits
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(data), formats=["PNG"])) for data in pictures[:NUM_TRAIN]])
    x = (pixels.transpose(0, 3, 1, 2).reshape(NUM_TRAIN, -1) / 255 - 0.5) / 0.5
    fitted = LogisticRegression(C=0.02, max_iter=300).fit(x, targets[:NUM_TRAIN])
    weights = {"w": fitted.coef_.T.astype(np.float32), "b": fitted.intercept_.astype(np.float32)}
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["image"], ["f"]), helper.make_node("Gemm", ["f", "w", "b"], ["logits"])],
        "digits",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    folder = tmp_path_factory.mktemp("digits")
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), folder / "d.onnx")
    (folder / "labels.txt").write_text("\n".join(NAMES) + "\n")
    half = (0.5, 0.5, 0.5)
    model, listed, out = str(folder / "d.onnx"), str(folder / "labels.txt"), str(folder / "bundle")
    kept = {"size": 8, "mean": half, "std": half, "interpolation": "bilinear", "crop_pct": 1.0, "color": "rgb"}
    import_model(ImportConfig(model=model, out=out, labels=listed, **kept))
    return folder / "bundle"


def write_corpus(digits: tuple[list[bytes], np.ndarray], home: Path, row: Callable[[int], dict[str, str]]) -> Path:
    """A corpus whose metadata.csv says ``row(number)`` of each digit."""
    folder = home / "pictures"
    folder.mkdir(parents=True)
    rows = []
    for number, (data, target) in enumerate(zip(*digits, strict=True)):
        name = f"{number:04d}.png"
        (folder / name).write_bytes(data)
        rows.append({"file_name": name, "label": NAMES[target], **row(number)})
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    ingest(IngestConfig(sources=(str(folder),), out=str(home / "corpus"), labels="none", in_process_below=10_000))
    return home / "corpus"


def split_of(number: int) -> dict[str, str]:
    is_train, is_calibration = number < NUM_TRAIN, number < NUM_TRAIN + NUM_CALIBRATION
    return {"split": "train" if is_train else "calibration" if is_calibration else "test"}


@pytest.fixture(scope="module")
def corpus(digits: tuple[list[bytes], np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits with a split column."""
    return write_corpus(digits, tmp_path_factory.mktemp("corpus"), split_of)


def config(corpus: Path, model: Path, out: Path, **changes: Any) -> CertifyConfig:
    given = {"kpi": KPI, "runtime": "onnx", "in_process_below": 10_000, **changes}
    return CertifyConfig(corpus=str(corpus), model=str(model), out=str(out), **given)


def quiet(asked: CertifyConfig) -> dict[str, Any]:
    return run(asked, is_quiet=True)


def with_lineage(bundle: Path, out: Path, lineage: dict[str, Any]) -> Path:
    opened = load_bundle(bundle)
    weights = {name: bundle / name for name in opened.files}
    save_bundle(out, replace(opened, lineage=lineage, files={}, path=Path()), weights)
    return out


def test_what_is_certified_is_what_classifier_and_score_decide(
    digits: tuple[list[bytes], np.ndarray], corpus: Path, bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "certified"
    said = quiet(config(corpus, bundle, out))
    claim = said["claims"][0]
    assert said["is_met"]
    assert claim["bound"] >= 0.8
    assert said["split"]["name"] == "calibration"
    plan = certify.resolve(config(corpus, bundle, out))
    ids = plan.subject.index.ids[plan.subject.keep][~plan.pieces.is_selection]
    certifying = {name.decode() for name in ids.tolist()}
    assert len(certifying) == said["num_certification"]
    known = [sample for sample in samples(open_corpus(corpus)) if sample.id in certifying]
    by_id = {storage.sha256_bytes(data): data for data in digits[0]}
    predictions = Classifier(out, "onnx").predict([by_id[sample.id] for sample in known])
    decided = [p.decision == "three" for p in predictions]
    right = [d and "three" in sample.labels for d, sample in zip(decided, known, strict=True)]
    assert (claim["num_trials"], claim["num_successes"]) == (sum(decided), sum(right))
    assert {p.decision for p in predictions} == {"three", "abstain"}
    score.run(
        score.ScoreConfig(
            source=str(corpus), model=str(out), out=str(tmp_path / "scored"), runtime="onnx", in_process_below=10_000
        ),
        is_quiet=True,
    )
    rows = {row["id"]: row for row in open_scores(tmp_path / "scored").to_table().to_pylist()}
    assert [rows[sample.id]["decision"] for sample in known] == [p.decision for p in predictions]
    recall = said["labels"]["three"]["recall"]
    assert recall["value"] == sum(right) / sum("three" in sample.labels for sample in known)


def test_the_bundle_is_the_parents_with_a_policy_that_says_why(corpus: Path, bundle: Path, tmp_path: Path) -> None:
    said = quiet(config(corpus, bundle, tmp_path / "certified"))
    made, parent = load_bundle(tmp_path / "certified"), load_bundle(bundle)
    assert made.files == parent.files
    assert made.model_digest == parent.model_digest
    assert made.policy is not None
    evidence = made.policy.evidence
    assert evidence is not None
    assert evidence.kpi == said["kpi"] == KPI
    assert (evidence.corpus, evidence.split) == (open_corpus(corpus).digest, "calibration")
    assert [claim.to_json() for claim in evidence.claims] == said["claims"]
    assert evidence.certified_at == said["certified_at"]
    record = read_record(tmp_path / "certified.run" / "record.json")
    assert record.inputs["model"] == parent.model_digest
    assert record.predicate["policy_digest"] == made.policy.digest
    assert record.subjects["bundle/bundle.json"] == storage.sha256_file(tmp_path / "certified" / "bundle.json")
    found = describe(tmp_path / "certified.run")
    assert (found["kind"], found["is_met"], found["verified"]["by_digest"]) == ("certificate", True, 3)
    page = tmp_path / "certified.run" / "report.html"
    before = page.read_bytes()
    page.unlink()
    assert rebuild(tmp_path / "certified.run") == page
    assert page.read_bytes() == before


def test_the_same_command_does_nothing_new_and_another_is_refused(
    corpus: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "certified"
    said = quiet(config(corpus, bundle, out))

    def stamps() -> dict[Path, int]:
        files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"]
        return {path: path.stat().st_mtime_ns for path in files}

    before = stamps()
    assert run(config(corpus, bundle, out)) == said
    assert "nothing to do" in capsys.readouterr().err
    assert stamps() == before
    with pytest.raises(ConfigError, match="did not make"):
        quiet(config(corpus, bundle, out, kpi="precision(two)>=0.8@0.9"))
    (tmp_path / "certified.run" / "record.json").unlink()  # as when it was stopped just before its end
    assert quiet(config(corpus, bundle, out)) == said
    assert read_record(tmp_path / "certified.run" / "record.json").predicate["key"] == said["key"]
    (tmp_path / "certified.run" / "certificate.json").write_text("{}")
    again = quiet(config(corpus, bundle, out))
    assert (again["claims"], again["certified_at"]) == (said["claims"], said["certified_at"])


def test_what_is_not_proved_is_not_published(corpus: Path, bundle: Path, tmp_path: Path) -> None:
    asked = config(corpus, bundle, tmp_path / "no", kpi="precision(eight)>=0.95@0.9; recall(eight)>=0.95@0.9")
    with pytest.raises(KpiNotMet, match=r"not attainable with n=\d+: ") as caught:
        quiet(asked)
    assert caught.value.exit_code == 6
    assert "these images show no more than" in caught.value.expected
    assert not (tmp_path / "no").exists()
    assert describe(tmp_path / "no.run")["is_met"] is False
    assert "not attainable" in (tmp_path / "no.run" / "report.html").read_text("utf-8")
    said = quiet(config(corpus, bundle, tmp_path / "no"))  # the scores are used again, and the attempt is counted
    assert said["attempt"] == 2
    assert "this is attempt 2" in (tmp_path / "no.run" / "report.html").read_text("utf-8")


def test_too_few_positives_are_refused_before_an_image_is_scored(corpus: Path, bundle: Path, tmp_path: Path) -> None:
    asked = config(corpus, bundle, tmp_path / "no", kpi="precision(three)>=0.99@0.95")
    with pytest.raises(
        DataError, match=r"takes at least 299 images of three, all decided rightly; \d+ certify"
    ) as caught:
        quiet(asked)
    assert "about 399 such images" in caught.value.expected
    assert list(tmp_path.iterdir()) == []


def test_images_of_the_training_are_refused_by_digest(corpus: Path, bundle: Path, tmp_path: Path) -> None:
    opened, rule = open_corpus(corpus), SplitRule()
    trained_on = {
        "corpus": opened.digest,
        "split": assign(read_index(opened, rule), rule).to_json(),
        "names": ["train"],
    }
    trained = with_lineage(bundle, tmp_path / "trained", {"trained_on": trained_on})
    for changes in ({"split": "train"}, {"split": "all"}, {"splits": SplitRule(column="")}):
        with pytest.raises(DataError, match="was trained on") as caught:
            quiet(config(corpus, trained, tmp_path / "no", **changes))
        assert "allow_leaks" not in caught.value.fix
    assert not (tmp_path / "no").exists()
    quiet(config(corpus, trained, tmp_path / "yes"))
    assert "on none of these images" in (tmp_path / "yes.run" / "report.html").read_text("utf-8")
    assert load_bundle(tmp_path / "yes").lineage["trained_on"] == trained_on


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"kpi": "precision(thre)>=0.9"}, ConfigError, "did you mean three"),
        ({"kpi": "precision(three)>0.9"}, ConfigError, "column 17"),
        ({"split": "calibraton"}, DataError, "did you mean calibration"),
        ({"otherwise": "two"}, ConfigError, "is a label of the model"),
        ({"kpi": "minimize cost", "costs": {"pairs": {"tree": {"two": 5}}}}, ConfigError, "costs.pairs.tree.two"),
        ({"selection": 1e-9}, DataError, "cannot be divided in two"),
    ],
)
def test_bad_input_is_said_and_leaves_nothing(
    corpus: Path, bundle: Path, tmp_path: Path, changes: dict[str, Any], kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said):
        quiet(config(corpus, bundle, tmp_path / "no", **changes))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_else_is_not_written_into(corpus: Path, bundle: Path, tmp_path: Path) -> None:
    for name in ("thesis", "other.run"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.doc").write_text("x")
    with pytest.raises(ConfigError, match="is no bundle"):
        quiet(config(corpus, bundle, tmp_path / "thesis"))
    with pytest.raises(ConfigError, match="holds no `eagleray certify`"):
        quiet(config(corpus, bundle, tmp_path / "other"))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["other.run", "thesis", "thesis.doc", "thesis.doc"]


def test_of_a_group_one_image_counts_and_none_straddles(
    digits: tuple[list[bytes], np.ndarray], bundle: Path, tmp_path: Path
) -> None:
    grouped = write_corpus(digits, tmp_path, lambda n: {**split_of(n), "group": f"g{split_of(n)['split']}{n // 3}"})
    plan = certify.resolve(config(grouped, bundle, tmp_path / "out", kpi="precision(three)>=0.6@0.8"))
    at = np.flatnonzero(plan.subject.keep)
    named = plan.subject.index.columns["group"].take(pa.array(at)).to_pylist()
    assert len(set(named)) == len(named)
    assert plan.pieces.unit == "group"
    assert len(named) + plan.pieces.num_set_aside == NUM_CALIBRATION
    whole = certify.resolve(config(grouped, bundle, tmp_path / "out", kpi="precision(three)>=0.6@0.8", piece=0.5))
    assert (whole.subject.keep <= plan.subject.keep).all()
    assert 0.4 < whole.subject.keep.sum() / plan.subject.keep.sum() < 0.6


def test_both_pieces_of_a_hashed_split_are_drawn_from_all_of_it(
    digits: tuple[list[bytes], np.ndarray], bundle: Path, tmp_path: Path
) -> None:
    """The test part of a hashed split are the images whose hash lies in one interval: another hash must divide it."""
    plain = write_corpus(digits, tmp_path, lambda n: {})
    plan = certify.resolve(config(plain, bundle, tmp_path / "out", kpi="error_rate<=0.3@0.8"))
    assert plan.subject.config.split == "test"
    assert 0.15 < plan.pieces.is_selection.mean() < 0.35


def test_the_verb_from_a_recipe_prints_the_certificate_and_loads_neither_torch_nor_ray(
    corpus: Path, bundle: Path, tmp_path: Path
) -> None:
    words = ["eagleray", "certify", "--corpus", str(corpus), "--model", str(bundle), "--out", str(tmp_path / "kept")]
    words += ["--recipe", str(ROOT / "jobs/recipes/certify-abstain.yaml"), "--runtime", "onnx"]
    words += ["--set", "in_process_below=10000", "--kpi", "error_rate(kept)<=0.1@0.95; maximize coverage", "--json"]
    code = (
        f"import sys; sys.argv = {words!r}\nfrom eagleray.cli.main import main\n"
        "try: main()\nexcept SystemExit as end: assert not end.code, end.code\n"
        "loaded = {'torch', 'ray'} & set(sys.modules); assert not loaded, loaded\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "platform"), "EAGLERAY_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["claims"][0]["bound"] <= 0.1
    policy = load_bundle(tmp_path / "kept").policy
    assert policy is not None
    assert policy.otherwise == "human"
    assert policy.temperature == said["calibration"]["temperature"] != 1
    assert said["calibration"]["ece_after"] < said["calibration"]["ece_before"]
    assert 0.8 < said["prediction_sets"]["coverage"]["value"] <= 1
