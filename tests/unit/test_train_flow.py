"""Pretraining and fine-tuning in this process: resume to the bit, Ctrl-C, what is refused, what comes out."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eagleray.core import storage
from eagleray.core.config import load
from eagleray.core.errors import ConfigError, DataError, TrainingDiverged
from eagleray.core.records import read_record
from eagleray.flows import finetune, ingest, pretrain, score
from eagleray.flows.run_folder import RunFolder, Tail, append_line, read_lines
from eagleray.vision.bundle import load_bundle

IMAGES = 36


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, make_photo: Callable[..., bytes]) -> Path:
    """36 little photos in three folders; a class is told by its tint."""
    from PIL import Image

    home = tmp_path_factory.mktemp("pictures")
    for number in range(IMAGES):
        folder = home / "abc"[number % 3]
        folder.mkdir(exist_ok=True)
        generator = np.random.default_rng(number)
        pixels = generator.integers(0, 120, (36, 40, 3), dtype=np.uint8)
        pixels[..., number % 3] += 120
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return home


@pytest.fixture(scope="module")
def corpus(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("corpus") / "corpus"
    ingest.run(ingest.IngestConfig(sources=(str(pictures),), out=str(out), shard_images=10))
    return str(out)


SPLITS = {"stratify": True}


def pretraining(corpus: str, out: Path, **more: Any) -> pretrain.PretrainConfig:
    fixed = {"method": "simclr", "backbone": "test_resnet", "size_px": 32, "batch_size": 12, "epochs": 2}
    values = {**fixed, "threads": 1, "report_every_s": 0, "corpus": corpus, "out": str(out), **more}
    return pretrain.PretrainConfig.model_validate(values)


def finetuning(corpus: str, out: Path, **more: Any) -> finetune.FinetuneConfig:
    fixed = {"parent": "test_resnet", "is_pretrained": False, "size_px": 32, "batch_size": 8, "epochs": 2}
    fixed |= {"runtime": "torch", "splits": SPLITS, "threads": 1, "report_every_s": 0}
    return finetune.FinetuneConfig.model_validate({**fixed, "corpus": corpus, "out": str(out), **more})


@pytest.fixture(scope="module")
def pretrained(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pretrained") / "ssl"
    pretrain.run(pretraining(corpus, out), is_quiet=True)
    return out


def weights(out: Path) -> str:
    return storage.sha256_file(out / "model.safetensors")


def stopping_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends this process Ctrl-C when a step is reached, as a person would."""
    from eagleray.learn import training

    before = training._Loop._step

    def told(self: Any, *args: Any) -> bool:
        if self.progress.step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return before(self, *args)

    monkeypatch.setattr(training._Loop, "_step", told)


def test_a_pretrained_bundle_is_scored_finetuned_and_read_by_timm(
    corpus: str, pretrained: Path, tmp_path: Path
) -> None:
    import timm

    bundle = load_bundle(pretrained)
    assert bundle.label_ids == ("backbone",)
    for name in ("corpus_digest", "config_digest", "run_key", "seed", "versions", "pretrained_on", "method", "parent"):
        assert name in bundle.lineage
    model = timm.create_model(f"local-dir:{pretrained}", pretrained=True)
    assert model.num_classes == 1
    config = score.ScoreConfig(
        source=corpus, model=str(pretrained), out=str(tmp_path / "scores"), embeddings=True, runtime="torch",
        has_report=False,
    )  # fmt: skip
    assert score.run(config, is_quiet=True)["scored"] == IMAGES
    tuned = finetune.run(finetuning(corpus, tmp_path / "tuned", parent=str(pretrained), size_px=None), is_quiet=True)
    lineage = load_bundle(tuned["bundle"]).lineage
    assert lineage["parent"]["model_digest"] == bundle.model_digest
    assert lineage["trained_on"]["names"] == ["train"]
    assert tuned["evaluation"]["split"] == "test"


def test_what_a_run_leaves(pretrained: Path) -> None:
    root = Path(f"{pretrained}.run")
    run = storage.read_json(root / "run.json")
    assert (run["state"], run["step"], run["images"], run["starts"]) == ("finished", 6, IMAGES, 1)
    rows = read_lines(root / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert {"loss", "lr", "images_per_s", "data_wait_percent", "eta_s", "peak_memory_gib"} <= set(rows[0])
    assert {"knn_top1", "linear_top1"} <= set(rows[-1]["figures"])
    assert list((root / "events").iterdir())
    assert "Loss" in (root / "report.html").read_text()
    record = read_record(root / "record.json")
    assert record.subjects["bundle/model.safetensors"] == weights(pretrained)
    assert {"corpus", "images"} <= set(record.inputs)


def test_the_same_command_again_does_nothing(corpus: str, pretrained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = weights(pretrained)
    said = pretrain.run(pretraining(corpus, pretrained, workers=0), is_live=False)
    assert "nothing to do" in capsys.readouterr().err
    assert (said["step"], weights(pretrained)) == (6, before)


def test_ctrl_c_checkpoints_and_the_resumed_run_is_the_same_to_the_bit(
    corpus: str,
    pretrained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "ssl"
    with monkeypatch.context() as patch:
        stopping_at(3, patch)
        with pytest.raises(KeyboardInterrupt):
            pretrain.run(pretraining(corpus, out), is_live=False)
    said = capsys.readouterr().err
    assert "a checkpoint of step 4 of 6" in said
    assert "resume: " in said
    assert storage.read_json(Path(f"{out}.run/run.json"))["state"] == "stopped"
    assert not out.exists()
    pretrain.run(pretraining(corpus, out), is_quiet=True)
    assert weights(out) == weights(pretrained)
    root = Path(f"{out}.run")
    assert [row["step"] for row in read_lines(root / "starts.jsonl")] == [0, 4]
    figures = [read_lines(Path(f"{home}.run/metrics.jsonl"))[-1]["figures"] for home in (out, pretrained)]
    assert figures[0] == figures[1]  # the probes went on with the bank that they had


def test_a_torn_newest_checkpoint_is_passed_over(
    corpus: str, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "ssl"
    config = pretraining(corpus, out, checkpoint_every_steps=2)
    with monkeypatch.context() as patch:
        stopping_at(4, patch)
        with pytest.raises(KeyboardInterrupt):
            pretrain.run(config, is_quiet=True)
    newest = sorted(Path(f"{out}.run/checkpoints").iterdir())[-1]
    (newest / "optimizer.safetensors").write_bytes(b"torn")
    pretrain.run(config, is_quiet=True)
    assert [row["step"] for row in read_lines(Path(f"{out}.run/starts.jsonl"))] == [0, 4]
    assert weights(out) == weights(pretrained)


def test_a_checkpoint_of_another_config_is_refused_by_its_keys(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "ssl"
    with monkeypatch.context() as patch:
        stopping_at(1, patch)
        with pytest.raises(KeyboardInterrupt):
            pretrain.run(pretraining(corpus, out), is_quiet=True)
    before = (tmp_path / "ssl.run/run.json").read_bytes()
    with pytest.raises(ConfigError, match=r"2 keys differ:(.|\n)*lr: 0.001 in the checkpoint, 0.01(.|\n)*seed: 0"):
        pretrain.run(pretraining(corpus, out, lr=0.01, seed=1), is_quiet=True)
    assert (tmp_path / "ssl.run/run.json").read_bytes() == before
    pretrain.run(pretraining(corpus, out, lr=0.01, resume="never"), is_quiet=True)
    assert (tmp_path / "ssl.run.1" / "checkpoints").is_dir()  # the earlier run is laid aside, not lost
    assert out.exists()


@pytest.mark.parametrize("mode", ["head", "linear"])
def test_a_head_on_features_tells_the_classes(corpus: str, tmp_path: Path, mode: str) -> None:
    config = finetuning(corpus, tmp_path / "head", mode=mode, epochs=40, lr=0.05, c_values=(1.0, 10.0))
    said = finetune.run(config, is_quiet=True)
    assert said["evaluation"]["top1"]["value"] >= 0.8  # the classes are tints: a random backbone tells them
    page = (tmp_path / "head.run/report.html").read_text()
    assert "Confusion" in page
    assert "Trained on &#39;train&#39;" in page  # `auto` is said as what it stood for
    assert load_bundle(said["bundle"]).lineage["mode"] == mode
    assert finetune.run(config, is_quiet=True)["digest"] == said["digest"]


@pytest.mark.parametrize("mode", ["head", "full"])
def test_several_labels_an_image(pictures: Path, tmp_path: Path, mode: str) -> None:
    """A picture's tint, and whether its number is even, which cannot be seen."""
    listing = tmp_path / "labels.jsonl"
    with listing.open("w") as file:
        for number in range(IMAGES):
            path = pictures / "abc"[number % 3] / f"{number}.png"
            labels = ["abc"[number % 3], *(["even"] if number % 2 == 0 else [])]
            file.write(json.dumps({"uri": str(path), "labels": labels}) + "\n")
    corpus = tmp_path / "corpus"
    ingest.run(ingest.IngestConfig(sources=(str(listing),), out=str(corpus)))
    config = finetuning(str(corpus), tmp_path / "several", mode=mode, is_multi_label=True, allow_missing=True)
    said = finetune.run(config, is_quiet=True)
    bundle = load_bundle(said["bundle"])
    assert bundle.output == "multi_label_logits"
    assert bundle.label_ids == ("a", "b", "c", "even")
    assert said["evaluation"]["n"] > 0
    with pytest.raises(DataError, match="several labels"):
        finetune.run(finetuning(str(corpus), tmp_path / "one", mode=mode, allow_missing=True), is_quiet=True)


def test_full_finetuning_resumes_to_the_bit(corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"ema_decay": 0.9, "balance": "sampler", "judge": "", "split": "all", "mixup_alpha": 0.2}
    finetune.run(finetuning(corpus, tmp_path / "whole", **more), is_quiet=True)
    with monkeypatch.context() as patch:
        stopping_at(5, patch)
        with pytest.raises(KeyboardInterrupt):
            finetune.run(finetuning(corpus, tmp_path / "cut", **more), is_quiet=True)
    finetune.run(finetuning(corpus, tmp_path / "cut", **more), is_quiet=True)
    assert weights(tmp_path / "whole") == weights(tmp_path / "cut")


def test_what_is_wrong_with_a_corpus_is_said(pictures: Path, corpus: str, pretrained: Path, tmp_path: Path) -> None:
    def make(name: str, *folders: str, labels: str = "folder") -> str:
        sources = tuple(str(pictures / folder) for folder in folders)
        parent = tmp_path / name / "in"
        parent.mkdir(parents=True)
        for source in sources:
            shutil.copytree(source, parent / Path(source).name)
        out = tmp_path / name / "corpus"
        ingest.run(ingest.IngestConfig(sources=(str(parent),), out=str(out), labels=labels))
        return str(out)

    with pytest.raises(DataError, match="has no label"):
        finetune.run(finetuning(make("none", "a", "b", labels="none"), tmp_path / "o1"), is_quiet=True)
    with pytest.raises(DataError, match="of one class"):
        finetune.run(finetuning(make("one", "a"), tmp_path / "o2"), is_quiet=True)
    with pytest.raises(DataError, match="labels that are not among the classes: a, b"):
        finetune.run(finetuning(corpus, tmp_path / "o3", parent=str(pretrained), head="keep"), is_quiet=True)
    rare = finetuning(corpus, tmp_path / "o4", splits={"fractions": {"train": 0.06, "test": 0.94}})
    with pytest.raises(DataError, match="classes have no image in the split 'train'"):
        finetune.run(rare, is_quiet=True)
    with pytest.raises(DataError, match="36 images, batches of 48"):
        pretrain.run(pretraining(corpus, tmp_path / "o5", batch_size=48), is_quiet=True)
    assert not [path for path in tmp_path.glob("o?") if path.exists()]


def test_an_unknown_backbone_is_answered_with_the_nearest(corpus: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="resnet18"):
        pretrain.run(pretraining(corpus, tmp_path / "o", backbone="resnet81"), is_quiet=True)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_batch(corpus: str, tmp_path: Path) -> None:
    config = pretraining(corpus, tmp_path / "o", optimizer="sgd", lr=1e30, warmup_epochs=0)
    with pytest.raises(TrainingDiverged, match="at step"):
        pretrain.run(config, is_quiet=True)
    (kept,) = (tmp_path / "o.run").glob("diverged-step-*")
    assert {path.name for path in kept.iterdir()} == {"batch.safetensors", "diverged.json", "task.safetensors"}


def test_a_folder_of_somebody_else_is_not_written_into(corpus: str, pretrained: Path, tmp_path: Path) -> None:
    for name in ("o", "p.run"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        pretrain.run(pretraining(corpus, tmp_path / "o"), is_quiet=True)
    with pytest.raises(ConfigError, match=r"thesis\.txt"):
        pretrain.run(pretraining(corpus, tmp_path / "p"), is_quiet=True)
    with pytest.raises(ConfigError, match="bundle of another run"):
        pretrain.run(pretraining(corpus, pretrained, seed=5, run_dir=str(tmp_path / "r")), is_quiet=True)


def test_a_batch_that_no_resize_may_break_is_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"multiple of 12, e\.g\. 252"):
        load(pretrain.PretrainConfig, overrides={
            "corpus": "c", "out": "o", "method": "simclr", "backbone": "x", "workers": "2,4", "batch_size": 256,
        })  # fmt: skip
    with pytest.raises(ConfigError, match=r"settings\.temprature(.|\n)*temperature"):
        load(pretrain.PretrainConfig, overrides={
            "corpus": "c", "out": "o", "method": "simclr", "backbone": "x", "settings.temprature": 0.1,
        })  # fmt: skip


def test_reports_that_a_resume_overtakes_are_taken_out_and_new_ones_are_news(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3):
        append_line(folder.metrics, {"step": step, "at": float(step)})
    tail = Tail(folder.metrics, since=2.0)
    assert [row["step"] for row in tail.read()] == [3]
    folder.cut_metrics(2)
    append_line(folder.metrics, {"step": 3, "at": 4.0})
    with folder.metrics.open("ab") as file:
        file.write(b'{"step": 4, "at"')  # torn: a kill in the middle of a line
    assert [(row["step"], row["at"]) for row in tail.read()] == [(3, 4.0)]
    assert [row["step"] for row in read_lines(folder.metrics)] == [1, 2, 3]


def test_workers_of_an_attempt_that_has_passed_stop_and_save_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    first = folder.enter()
    assert not folder.is_asked_to_stop(first)
    second = folder.enter()
    assert folder.is_asked_to_stop(first)
    assert not folder.is_asked_to_stop(second)
    folder.put_error(second, {"type": "DataError", "seen": "one"})
    folder.put_error(second, {"type": "DataError", "seen": "two"})
    assert json.loads(json.dumps(folder.get_error(second)))["seen"] == "one"


# --- the probe set --------------------------------------------------------------------------------------------------


def test_a_trained_bundle_is_held_to_sixteen_images_of_its_corpus(corpus: str, pretrained: Path) -> None:
    from eagleray.infer.probes import read_probes
    from eagleray.vision.corpus import open_corpus, read_rows
    from eagleray.vision.images import decode

    bundle, opened = load_bundle(pretrained), open_corpus(corpus)
    probes = read_probes(bundle)
    assert probes is not None
    assert probes.embedding is not None  # a backbone's logits say nothing
    encoded = [
        value.as_py() for shard in opened.shards for value in read_rows(opened.shard_path(shard)).column("image")
    ]
    seen = {decode(data, bundle.image_spec).tobytes() for data in encoded}
    assert len(probes) == 16
    assert {image.tobytes() for image in probes.images_u8_nhwc} <= seen


@pytest.mark.parametrize("kind", ["corpus", "generated"])
def test_no_image_of_the_corpus_travels_where_none_may(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    from types import SimpleNamespace

    from eagleray.flows import training_outputs
    from eagleray.infer import parity
    from eagleray.learn.corpus_index import build_index
    from eagleray.vision.corpus import open_corpus
    from eagleray.vision.images import ImageSpec

    given: list[np.ndarray | None] = []
    monkeypatch.setattr(parity, "prove", lambda bundle, images: given.append(images))
    monkeypatch.setattr(training_outputs, "save_made", lambda path, made, lineage, *, probes, like: probes(None))
    run = SimpleNamespace(config=pretraining(corpus, tmp_path / "ssl", probe_images=kind))
    made = SimpleNamespace(lineage={}, spec=ImageSpec(height=32, width=32))
    training_outputs.write_bundle(run, {}, build_index(open_corpus(corpus)), made)  # type: ignore[arg-type]
    (images,) = given
    assert (images is None) == (kind == "generated")
    assert images is None or images.shape == (16, 32, 32, 3)
