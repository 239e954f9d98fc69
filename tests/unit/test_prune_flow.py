"""From a bundle to a narrower one to a fine-tuned one, by the flow and by the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from eagleray.cli.main import app
from eagleray.core.config import load
from eagleray.core.errors import ConfigError, DataError
from eagleray.flows import prune
from eagleray.vision import backbones
from eagleray.vision.bundle import ModelBundle, load_bundle
from typer.testing import CliRunner

from tests.unit.test_distillation import bundle_of, corpus

__all__ = ["corpus"]
SETTINGS = [word for one in ("threads=1", "runtime=torch", "judge=", "has_report=false") for word in ("--set", one)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    lineage = {"trained_on": {"corpus": "x", "names": ["train"]}}
    return bundle_of(tmp_path_factory.mktemp("bundles") / "wide", "test_resnet", lineage=lineage)


def config(bundle: ModelBundle, out: Path, **more: Any) -> prune.PruneConfig:
    return load(prune.PruneConfig, overrides={"model": str(bundle.path), "out": str(out), "ratio": 0.4, **more})


@pytest.fixture(scope="module")
def narrow(bundle: ModelBundle, tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    return load_bundle(prune.run(config(bundle, tmp_path_factory.mktemp("narrow") / "narrow"))["bundle"])


def test_a_pruned_bundle_says_whence_it_is_and_what_it_saves(bundle: ModelBundle, narrow: ModelBundle) -> None:
    assert narrow.label_ids == bundle.label_ids
    assert narrow.image_spec == bundle.image_spec
    assert narrow.embedding_dim == bundle.embedding_dim
    told = narrow.lineage["prune"]
    assert told["macs_after"] < 0.7 * told["macs_before"]
    assert told["ratio"] == 0.4
    assert narrow.lineage["parent"]["model_digest"] == bundle.model_digest
    assert narrow.lineage["trained_on"] == bundle.lineage["trained_on"], "what evaluate must know"


@pytest.mark.parametrize("mode", ["full", "head"])
def test_a_pruned_bundle_is_finetuned_and_stays_as_narrow(
    corpus: str, narrow: ModelBundle, tmp_path: Path, mode: str
) -> None:
    words = ["finetune", "--corpus", corpus, "--from", str(narrow.path), "--mode", mode, "--out", str(tmp_path / mode)]
    words += ["--epochs", "1", "--batch-size", "8", "--json"]
    ran = CliRunner().invoke(app, [*words, *SETTINGS])
    assert ran.exit_code == 0, ran.output
    said = json.loads(ran.stdout)
    tuned = load_bundle(said["bundle"])
    assert tuned.model_args["channels"] == narrow.model_args["channels"]
    assert tuned.lineage["parent"]["model_digest"] == narrow.model_digest
    assert tuned.model_digest != narrow.model_digest


def test_gradients_of_labelled_images_choose_too(corpus: str, bundle: ModelBundle, tmp_path: Path) -> None:
    told = {"importance": "taylor", "corpus": corpus, "num_images": 8, "batch_size": 4}
    said = prune.run(config(bundle, tmp_path / "a", **told))
    assert load_bundle(said["bundle"]).lineage["prune"]["importance"] == "taylor"
    with pytest.raises(DataError, match="no image is in the split 'nowhere'"):
        prune.run(config(bundle, tmp_path / "c", **{**told, "split": "nowhere"}))


def test_what_cannot_be_pruned_is_refused(bundle: ModelBundle, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give corpus=CORPUS"):
        config(bundle, tmp_path / "x", importance="taylor")
    with pytest.raises(ConfigError, match="less than 1"):
        config(bundle, tmp_path / "x", ratio=1.0)
    with pytest.raises(ConfigError, match="imported from an ONNX file"):
        prune.run(config(load_bundle(tiny_model), tmp_path / "x"))
    assert not (tmp_path / "x").exists()
    assert "channels" not in backbones.saved_args(backbones.create(backbones.Backbone(name="test_resnet")))
