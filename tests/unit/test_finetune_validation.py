"""Fine-tuning that measures as it goes: on images set aside, the same after a stop, its best weights kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eagleray.core.config import load
from eagleray.core.errors import ConfigError, DataError
from eagleray.flows import finetune, ingest
from eagleray.flows.finetune_start import select
from eagleray.flows.run_folder import read_lines
from eagleray.infer.classifier import Classifier
from eagleray.learn.checkpoints import load_best
from eagleray.learn.validation import METRIC
from eagleray.vision.bundle import load_bundle
from eagleray.vision.shard_images import ShardImages
from safetensors.numpy import load_file

from tests.unit.test_train_flow import corpus, finetuning, pictures, stopping_at, weights

__all__ = ["corpus", "pictures"]  # fixtures


def measured(out: Path) -> list[tuple[int, float]]:
    """(step, figure) of each measurement in metrics.jsonl."""
    rows = read_lines(Path(f"{out}.run/metrics.jsonl"))
    return [(row["step"], row["figures"][METRIC]) for row in rows if METRIC in row["figures"]]


def share_right(config: finetune.FinetuneConfig) -> float:
    """Of the images that were set aside, by the bundle, one at a time."""
    index = select(config)[0].validation
    assert index is not None
    classifier, right = Classifier(load_bundle(config.out), runtime="torch"), 0
    with ShardImages(index.root) as images:
        for at in range(len(index)):
            (answer,) = classifier.predict([images.read(index.shards[index.shard[at]], int(index.row[at]))])
            right += answer.label == index.labels[index.first_targets[at]]
    return right / len(index)


def test_a_share_of_the_training_images_is_measured_every_epoch(corpus: str, tmp_path: Path) -> None:
    config = finetuning(corpus, tmp_path / "tuned", epochs=3, validate_share=0.25)
    whole = select(finetuning(corpus, tmp_path / "tuned"))[0]
    chosen, notes = select(config)
    assert chosen.validation is not None
    trained, held = ({bytes(one) for one in index.ids} for index in (chosen.index, chosen.validation))
    assert not trained & held
    assert trained | held == {bytes(one) for one in whole.index.ids}
    assert set(chosen.validation.class_counts) == {2, 3}  # of 29 in three classes
    assert f"validated on {len(held)} images: 25% of 'train'" in notes
    said = finetune.run(config, is_quiet=True)
    rows, told = read_lines(tmp_path / "tuned.run/metrics.jsonl"), measured(tmp_path / "tuned")
    assert [step for step, _ in told] == [3, 6, 9]
    assert f"{METRIC} {told[-1][1]:.3g}" in next(row["line"] for row in rows if row["step"] == 9)
    kept = {"keep": "last", "step": 9, "images": len(held), METRIC: told[-1][1]}
    assert said["validation"] == load_bundle(said["bundle"]).lineage["validation"] == kept
    assert told[-1][1] == share_right(config)
    page = (tmp_path / "tuned.run/report.html").read_text()
    for text in ("share right on validation images", "Weights kept", "the last, of step 9"):
        assert text in page


def test_the_best_is_kept_and_a_run_that_was_stopped_keeps_the_same(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more: dict[str, Any] = {"epochs": 6, "validate_share": 0.25, "keep": "best", "lr": 0.05, "ema_decay": 0.5}
    config = finetuning(corpus, tmp_path / "whole", **more)
    said = finetune.run(config, is_quiet=True)
    told = measured(tmp_path / "whole")
    best = max(value for _, value in told)
    step = next(step for step, value in told if value == best)
    assert said["validation"] == {"keep": "best", "step": step, "images": 7, METRIC: best}
    assert best == share_right(config)
    found = load_best(tmp_path / "whole.run/checkpoints", METRIC)
    assert found is not None
    kept = {f"backbone.{name}": value for name, value in load_file(tmp_path / "whole/model.safetensors").items()}
    average = found.checkpoint.state["ema"]["state"]
    assert set(kept) <= set(average)
    assert all(np.array_equal(value, average[name].numpy()) for name, value in kept.items())
    with monkeypatch.context() as patch:
        stopping_at(step - 1, patch)  # between the best step and its measurement
        with pytest.raises(KeyboardInterrupt):
            finetune.run(finetuning(corpus, tmp_path / "cut", **more), is_quiet=True)
    finetune.run(finetuning(corpus, tmp_path / "cut", **more), is_quiet=True)
    assert measured(tmp_path / "cut") == told
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


@pytest.fixture
def divided(pictures: Path, tmp_path: Path) -> str:
    """The pictures with a split column: 24 to train, 6 val, 6 test."""
    splits = ("train", "train", "train", "train", "val", "test")
    rows = [
        {"uri": str(path), "label": path.parent.name, "split": splits[int(path.stem) // 3 % 6]}
        for path in sorted(pictures.rglob("*.png"))
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ingest.run(ingest.IngestConfig(sources=(str(tmp_path / "rows.jsonl"),), out=str(tmp_path / "divided")))
    return str(tmp_path / "divided")


def test_a_val_split_is_used_where_there_is_one_and_the_best_is_judged_on_another(divided: str, tmp_path: Path) -> None:
    last = finetune.run(finetuning(divided, tmp_path / "last", epochs=1), is_quiet=True)
    assert (last["validation"]["images"], last["images"], last["evaluation"]["split"]) == (6, 24, "val")
    best = finetune.run(finetuning(divided, tmp_path / "best", epochs=1, keep="best"), is_quiet=True)
    assert (best["validation"]["images"], best["images"], best["evaluation"]["split"]) == (6, 24, "test")
    keys = [dict(finetune.make_work(finetuning(divided, tmp_path / "o", validate_on=name)).key) for name in ("val", "")]
    assert keys[0] == keys[1]  # measuring changes no weight, and so not what the run is


def test_what_is_wrong_is_said(corpus: str, divided: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing to validate on(.|\n)*validate_share"):
        finetune.run(finetuning(corpus, tmp_path / "o", keep="best"), is_quiet=True)
    with pytest.raises(DataError, match="no image is in the split 'vale'; did you mean val"):
        finetune.run(finetuning(divided, tmp_path / "o", validate_on="vale"), is_quiet=True)
    with pytest.raises(DataError, match="trains on 'train' and is to validate on 'train'"):
        finetune.run(finetuning(divided, tmp_path / "o", validate_on="train"), is_quiet=True)
    with pytest.raises(ConfigError, match="mode=head has no epochs"):
        load(finetune.FinetuneConfig, overrides={
            "corpus": "c", "out": "o", "parent": "lite0", "mode": "head", "validate_share": 0.1,
        })  # fmt: skip
    with pytest.raises(ConfigError, match="give one of them"):
        load(
            finetune.FinetuneConfig,
            overrides={"corpus": "c", "out": "o", "parent": "x", "validate_on": "val", "validate_share": 0.1},
        )
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(("labels", "num_validated"), [(("",), 0), (("a",), 6)])
def test_a_val_split_without_labels_or_of_one_class_stops_no_run(
    pictures: Path, tmp_path: Path, labels: tuple[str, ...], num_validated: int
) -> None:
    paths = sorted(pictures.rglob("*.png"))
    rows = [{"uri": str(path), "label": path.parent.name, "split": "train"} for path in paths[6:]]
    rows += [{"uri": str(path), "label": labels[0], "split": "val"} for path in paths[:6]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ingest.run(ingest.IngestConfig(sources=(str(tmp_path / "rows.jsonl"),), out=str(tmp_path / "c")))
    validation = select(finetuning(str(tmp_path / "c"), tmp_path / "o"))[0].validation
    assert (0 if validation is None else len(validation)) == num_validated
