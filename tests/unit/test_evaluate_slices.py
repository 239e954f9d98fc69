"""Laws of `evaluate --by --compare`: slices of the metadata, two models on the same images, bad input said."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eagleray.core import commits
from eagleray.core.errors import ConfigError, DataError
from eagleray.core.records import read_record
from eagleray.flows.evaluate import EvaluateConfig, run
from eagleray.flows.ingest import IngestConfig
from eagleray.flows.ingest import run as ingest
from eagleray.vision.bundle import load_bundle
from eagleray.vision.corpus import open_corpus, samples

from tests.tiny_model import CLASSES, make_bundle


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, make_photo: Callable[..., bytes]) -> Path:
    """60 little photos of 5 labels, 3 sites (one of the photos has none) and 2 devices."""
    home = tmp_path_factory.mktemp("corpus")
    folder = home / "photos"
    folder.mkdir()
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "label", "site", "device"])
        for number in range(60):
            (folder / f"{number:03d}.jpg").write_bytes(make_photo(number, width=40, height=32))
            site = "" if number == 7 else ("north", "south", "east")[min(2, number // 25)]
            writer.writerow([f"{number:03d}.jpg", CLASSES[number % 5], site, f"d{number % 2}"])
    ingest(IngestConfig(sources=(str(folder),), out=str(home / "corpus"), labels="none"))
    return home / "corpus"


def config(corpus: Path, model: Path, out: Path, **changes: Any) -> EvaluateConfig:
    given = {"runtime": "onnx", "resamples": 50, "split": "all", "min_slice": 20, **changes}
    return EvaluateConfig(corpus=str(corpus), model=str(model), out=str(out), **given)


def quiet(asked: EvaluateConfig) -> dict[str, Any]:
    return run(asked, is_quiet=True)


def test_slices_are_of_the_metadata_and_add_up(corpus: Path, tiny_model: Path, tmp_path: Path) -> None:
    said = quiet(config(corpus, tiny_model, tmp_path / "run", by="site, device"))
    assert list(said["slices"]) == ["site", "device"]
    rows = {row["id"]: row for row in commits.open_scores(tmp_path / "run" / "scoring").to_table().to_pylist()}
    for column, slicing in said["slices"].items():
        assert sum(part["n"] for part in slicing["slices"]) == said["n"] == 60
        for part in slicing["slices"]:
            own = [s for s in samples(open_corpus(corpus)) if s.metadata.get(column, "") == part["value"]]
            assert len(own) == part["n"]
            assert part["top1"]["value"] == pytest.approx(np.mean([rows[s.id]["label"] == s.labels[0] for s in own]))
            assert part["is_small"] == (part["n"] < 20)
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "By site" in page
    assert "(no value)" in page
    assert "Below 20 independent images or groups" in page


def test_what_was_asked_before_stays_as_it_was(corpus: Path, tiny_model: Path, tmp_path: Path) -> None:
    plain = quiet(config(corpus, tiny_model, tmp_path / "run"))
    assert not {"slices", "comparison"} & set(plain)
    sliced = quiet(config(corpus, tiny_model, tmp_path / "run", by="site"))
    added = {"slices", "key", "config_digest"}
    assert {name: value for name, value in sliced.items() if name not in added} == {
        name: value for name, value in plain.items() if name not in added
    }
    assert quiet(config(corpus, tiny_model, tmp_path / "run", min_slice=7))["key"] == plain["key"]


def test_two_models_are_judged_on_the_same_images(corpus: Path, tiny_model: Path, tmp_path: Path) -> None:
    other = make_bundle(tmp_path / "other", seed=8)
    asked = config(corpus, tiny_model, tmp_path / "run", compare=str(other))
    said = quiet(asked)
    found = said["comparison"]
    scores = [
        {r["id"]: r["label"] for r in commits.open_scores(tmp_path / "run" / name).to_table().to_pylist()}
        for name in ("scoring", "scoring-compared")
    ]
    truth = {s.id: s.labels[0] for s in samples(open_corpus(corpus))}
    right = [{name for name, label in side.items() if truth[name] == label} for side in scores]
    counts = found["mcnemar"]
    assert counts["only_first"] == len(right[0] - right[1])
    assert counts["only_second"] == len(right[1] - right[0])
    assert counts["both"] + counts["neither"] + counts["only_first"] + counts["only_second"] == 60
    assert found["differences"]["top1"]["value"] == pytest.approx((len(right[1]) - len(right[0])) / 60)
    assert found["model"]["digest"] == load_bundle(other).model_digest
    assert found["sentence"] in (tmp_path / "run" / "report.html").read_text("utf-8").replace("&#39;", "'")
    assert read_record(tmp_path / "run" / "record.json").inputs["compared model"] == load_bundle(other).model_digest
    assert list(said["cost"]) == ["tiny", "other"]
    assert quiet(asked) == said
    third = make_bundle(tmp_path / "third", seed=9)
    assert quiet(config(corpus, tiny_model, tmp_path / "run", compare=str(third)))["comparison"] != found


def test_a_model_is_no_different_from_itself(corpus: Path, tiny_model: Path, tmp_path: Path) -> None:
    found = quiet(config(corpus, tiny_model, tmp_path / "run", compare=str(tiny_model)))["comparison"]
    assert not found["is_real"]
    assert "no difference" in found["sentence"]
    assert found["agreement"]["value"] == 1.0


def test_bad_input_says_what_to_do(corpus: Path, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no column 'sit' \(did you mean site\?\)") as caught:
        quiet(config(corpus, tiny_model, tmp_path / "run", by="sit,device"))
    assert "device" in caught.value.expected
    strange = tmp_path / "strange"
    from eagleray.vision.imports import ImportConfig, import_model

    (tmp_path / "labels.txt").write_text("\n".join(("circle", "cross", "square", "moon", "sun")) + "\n")
    import_model(
        ImportConfig(
            model=str(tiny_model / "model.onnx"), out=str(strange), labels=str(tmp_path / "labels.txt"), size=32,
            mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bilinear", crop_pct=1.0, color="rgb",
        )
    )  # fmt: skip
    with pytest.raises(DataError, match=r"2 labels of the split 'all' are unknown to .*strange: star, wave"):
        quiet(config(corpus, tiny_model, tmp_path / "run", compare=str(strange)))
    assert not (tmp_path / "run").exists()


def test_the_verb_prints_slices_and_the_sentence(
    corpus: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from eagleray.cli.main import app

    other = make_bundle(tmp_path / "other", seed=8)
    words = ["evaluate", "--corpus", str(corpus), "--model", str(tiny_model), "--out", str(tmp_path / "run")]
    words += ["--split", "all", "--runtime", "onnx", "--by", "site,device", "--compare", str(other)]
    with pytest.raises(SystemExit) as end:
        app([*words, "--set", "resamples=50"])
    assert not end.value.code
    shown = capsys.readouterr().out
    said = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert said["comparison"]["sentence"] in shown
    for name in ("north", "south", "east", "(no value)", "d0", "d1"):
        assert name in shown
