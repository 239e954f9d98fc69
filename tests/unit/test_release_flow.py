"""Laws of `release`: what passes is published with its table, what a gate stops is not, and nothing is done twice."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eagleray.core import storage
from eagleray.core.errors import CapabilityError, ConfigError, DataError, KpiNotMet
from eagleray.core.records import read_record
from eagleray.flows import release, release_steps
from eagleray.flows.finetune import FinetuneConfig
from eagleray.flows.finetune import run as finetune
from eagleray.flows.ingest import IngestConfig
from eagleray.flows.ingest import run as ingest
from eagleray.flows.inspection import describe
from eagleray.flows.release import ReleaseConfig, run
from eagleray.flows.release_images import draw
from eagleray.flows.release_plan import steps
from eagleray.flows.report import rebuild
from eagleray.vision.bundle import ModelBundle, load_bundle
from eagleray.vision.corpus import open_corpus
from eagleray.vision.splits import SplitRule, assign, read_index

COLOURS = {"green": (40, 160, 60), "red": (190, 50, 40), "blue": (40, 60, 190)}
FAST = {
    "rounds": 1,
    "turn_s": 0.01,
    "resamples": 50,
    "runtime": "onnx",
    "in_process_below": 10_000,
    "engines": ["onnx"],
}
QUICK = {"epochs": 1, "batch_size": 16, "size_px": 32, "lr": 1e-3, "threads": 1, "decode_threads": 0}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 little pictures of three colours that a tiny network tells apart, 60 to train and 60 to judge."""
    from PIL import Image

    home = tmp_path_factory.mktemp("corpus")
    (home / "photos").mkdir()
    rng = np.random.default_rng(0)
    with (home / "photos" / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "label", "split"])
        for number in range(120):
            name = list(COLOURS)[number % 3]
            pixels = np.clip(np.array(COLOURS[name]) + rng.normal(0, 25, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(home / "photos" / f"{number:03d}.png")
            writer.writerow([f"{number:03d}.png", name, "train" if number % 2 else "test"])
    ingest(IngestConfig(sources=(str(home / "photos"),), out=str(home / "corpus"), labels="none"))
    return home / "corpus"


@pytest.fixture(scope="module")
def parent(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """timm's test_resnet, trained until it knows the colours."""
    out = tmp_path_factory.mktemp("parent") / "colours"
    given = {**QUICK, "epochs": 6, "is_pretrained": False, "judge": "", "has_report": False}
    finetune(FinetuneConfig(corpus=str(corpus), parent="test_resnet", out=str(out), **given), is_quiet=True)
    return out


def config(corpus: Path, parent: Path, out: Path, **changes: Any) -> ReleaseConfig:
    given = {"max_drop_points": 100.0, "max_class_drop_points": 100.0, "recovery": QUICK, **FAST, **changes}
    return ReleaseConfig(model=str(parent), corpus=str(corpus), out=str(out), **given)


def quiet(asked: ReleaseConfig) -> dict[str, Any]:
    return run(asked, is_quiet=True)


@dataclass(frozen=True)
class Stopped:
    """A release that a gate stopped: its config, and what it raised. One for the module: an export takes seconds."""

    config: ReleaseConfig
    error: KpiNotMet


@pytest.fixture(scope="module")
def stopped(corpus: Path, parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    out = tmp_path_factory.mktemp("stopped") / "b2"
    # 60 images cannot show that nothing is lost: the far end of the interval lies above no drop at all
    asked = config(corpus, parent, out, prune=0.3, gate_on="bound", max_drop_points=0.0)
    with pytest.raises(KpiNotMet, match=r"pruned 30% does not pass: accuracy: a drop of") as caught:
        quiet(asked)
    return Stopped(asked, caught.value)


def test_a_step_is_made_anew_when_what_it_depends_on_is_another(corpus: Path, parent: Path, tmp_path: Path) -> None:
    def told(**changes: Any) -> list[Any]:
        return [dict(step.settings) for step in steps(config(corpus, parent, tmp_path / "b2", **changes))]

    assert told(distill_to="test_resnet") != told(distill_to="test_vit")
    assert told(distill_to=str(parent)) != told(distill_to="test_resnet")
    assert told(precision="int8") != told(precision="int8", split="val")  # it decides which images choose the layers
    with pytest.raises(ValueError, match="not among the engines that are timed"):
        config(corpus, parent, tmp_path / "b2", target="openvino")


def test_a_target_alone_is_judged_like_any_step(corpus: Path, parent: Path, tmp_path: Path) -> None:
    said = quiet(config(corpus, parent, tmp_path / "b2", target="onnx"))
    assert [row["name"] for row in said["rows"]] == ["parent", "on onnx"]
    gates = {gate["name"]: gate["is_passed"] for gate in said["rows"][1]["gates"]}
    assert gates["parity"]
    assert len(gates) > 1
    assert said["rows"][1]["change"]["value"] == 0


def test_int8_is_made_gated_and_published(corpus: Path, parent: Path, tmp_path: Path) -> None:
    said = quiet(config(corpus, parent, tmp_path / "b2", precision="int8", target="onnx", calibration_images=24))
    assert [row["name"] for row in said["rows"]] == ["parent", "int8", "on onnx"]
    assert said["rows"][2]["gates"] == said["rows"][1]["gates"]  # the same model on the same engine
    bundle = load_bundle(tmp_path / "b2")
    assert (bundle.precision, bundle.policy) == ("int8", None)
    assert set(bundle.lineage["tolerance"]) == {"max_abs_dp", "min_top1_agreement", "max_embedding_drift"}
    assert (
        quiet(config(corpus, parent, tmp_path / "b2", precision="int8", target="onnx", calibration_images=24)) == said
    )


def test_a_gate_that_fails_publishes_nothing_and_what_was_made_is_kept(stopped: Stopped) -> None:
    root = stopped.config.root
    assert str(root) in stopped.error.fix
    assert not Path(stopped.config.out).exists()
    assert load_bundle(root / "1-prune" / "bundle")
    table = json.loads((root / "release.json").read_text())
    assert table["state"] == "stopped"
    assert [row["is_passed"] for row in table["rows"]] == [True, False]
    assert "FAILED" in (root / "report.html").read_text("utf-8")
    assert not (root / "record.json").exists()
    seen = describe(root)
    assert (seen["kind"], seen["state"], len(seen["rows"])) == ("release", "stopped", 2)


def test_what_passes_is_published_with_its_table_and_nothing_is_made_twice(
    stopped: Stopped, parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    for name, step in dict(release_steps.STEPS).items():
        monkeypatch.setitem(release_steps.STEPS, name, _counted(step, name, made))  # type: ignore[arg-type]
    out = tmp_path / "b2"
    changes = {"gate_on": "estimate", "max_drop_points": 100.0, "out": str(out), "run_dir": str(stopped.config.root)}
    asked = stopped.config.model_copy(update=changes)
    said = quiet(asked)
    assert made == []  # another limit judges anew, and makes nothing anew
    first, second = said["rows"]
    assert [row["name"] for row in said["rows"]] == ["parent", "pruned 30%"]
    assert second["macs"] < 0.8 * first["macs"]
    assert second["parameters"] < first["parameters"]
    assert second["model_bytes"] < first["model_bytes"]
    assert {gate["name"] for gate in second["gates"]} == {"accuracy", "classes", "parity"}
    assert second["is_passed"]
    bundle = load_bundle(out)
    assert bundle.model_digest == said["digest"] == second["model_digest"]
    told = bundle.lineage["release"]
    assert told["parent"]["model_digest"] == load_bundle(parent).model_digest
    assert [step["step"] for step in told["steps"]] == ["prune"]
    assert bundle.lineage["trained_on"]["names"] == ["train"]
    root = asked.root
    record = read_record(root / "record.json")
    for name in ("release.json", "report.json", "report.html"):
        assert record.subjects[name] == storage.sha256_file(root / name)
    page = (root / "report.html").read_text("utf-8")
    assert "What is given up for what" in page
    assert "Cost of a million images" in page
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file() and path.name != ".lock"}
    assert quiet(asked) == said
    after = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file() and path.name != ".lock"}
    assert after == before
    assert rebuild(root) == root / "report.html"


def _counted(step: Callable[..., ModelBundle], name: str, made: list[str]) -> Callable[..., ModelBundle]:
    def counted(ask: release_steps.Ask, bundle: ModelBundle) -> ModelBundle:
        made.append(name)
        return step(ask, bundle)

    return counted


def test_a_student_learns_from_the_parent_and_a_step_that_was_made_is_not_made_again(
    corpus: Path, parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = {**QUICK, "is_pretrained": False}
    asked = config(corpus, parent, tmp_path / "b2", distill_to="test_efficientnet", student=student, target="onnx")

    def broken(ask: release_steps.Ask, bundle: ModelBundle) -> ModelBundle:
        raise CapabilityError("the engine went away")

    with monkeypatch.context() as patch:
        patch.setitem(release_steps.STEPS, "target", broken)  # type: ignore[arg-type]
        with pytest.raises(CapabilityError, match="went away"):
            quiet(asked)
    assert not (tmp_path / "b2").exists()
    before = (tmp_path / "b2.run" / "1-distill" / "made.json").read_bytes()
    said = quiet(asked)
    assert (tmp_path / "b2.run" / "1-distill" / "made.json").read_bytes() == before
    assert [row["name"] for row in said["rows"]] == ["parent", "student test_efficientnet", "on onnx"]
    assert load_bundle(tmp_path / "b2").architecture == "test_efficientnet"
    assert {row["engine"] for row in said["rows"]} == {"onnx"}


def test_calibration_images_are_of_the_training_split_and_the_same_each_time(corpus: Path, parent: Path) -> None:
    asked, spec = config(corpus, parent, Path("x"), precision="int8"), load_bundle(parent).image_spec
    found = draw(asked, spec, 20, needs_labels=tuple(COLOURS))
    again = draw(asked, spec, 20, needs_labels=tuple(COLOURS))
    assert found.to_json() == again.to_json()
    assert len(found.ids) == len(found.calibration) == 20
    assert len(found.choosing) == len(found.labels) == 20
    index = read_index(open_corpus(corpus), SplitRule())
    splits = assign(index, SplitRule())
    test = {name.decode() for name in index.ids[splits.mask("test")].tolist()}
    assert not set(found.ids) & test
    assert sum(len(batch) for batch in found.batches(8)) == 20
    assert (found.calibration[:, :2] != found.choosing[:, :2]).any()


def test_bad_input_is_said_before_anything_is_made(corpus: Path, parent: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing is asked for"):
        config(corpus, parent, tmp_path / "b2")
    with pytest.raises(ValueError, match="what judges may not train"):
        config(corpus, parent, tmp_path / "b2", prune=0.3, train_split="test")
    with pytest.raises(ConfigError, match=r"epoch: no such key; did you mean epochs\?"):
        quiet(config(corpus, parent, tmp_path / "b2", prune=0.3, recovery={"epoch": 3}))
    with pytest.raises(DataError, match="did you mean test"):
        quiet(config(corpus, parent, tmp_path / "b2", prune=0.3, split="tset"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.doc").write_text("x")
    with pytest.raises(ConfigError, match="did not make"):
        quiet(config(corpus, parent, tmp_path / "full", prune=0.3))
    assert not (tmp_path / "b2").exists()


def test_a_parent_without_weights_cannot_be_trained(corpus: Path, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no weights that can be trained"):
        quiet(config(corpus, tiny_model, tmp_path / "b2", prune=0.3))


def test_the_steps_stand_in_their_order_whatever_is_asked(corpus: Path, parent: Path) -> None:
    asked = config(corpus, parent, Path("x"), target="onnx", precision="int8", prune=0.3, distill_to="test_vit")
    assert [step.name for step in steps(asked)] == ["distill", "prune", "quantize", "target"]
    assert set(release_steps.STEPS) == {"distill", "prune", "quantize", "fp16", "target"}
    assert release.__all__ == ["ReleaseConfig", "run"]


def test_the_verb_prints_the_table(
    corpus: Path, parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from eagleray.cli.main import app

    words = ["release", "--model", str(parent), "--corpus", str(corpus), "--target", "onnx"]
    words += [word for name, value in FAST.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    with pytest.raises(SystemExit) as end:
        app([*words, "--out", str(tmp_path / "b2")])
    assert not end.value.code
    shown = capsys.readouterr().out
    assert "on onnx" in shown
    assert str(tmp_path / "b2") in shown


def test_the_exit_code_is_that_of_the_gate(stopped: Stopped, tmp_path: Path) -> None:
    from eagleray.cli.main import app

    recipe = tmp_path / "stopped.yaml"
    recipe.write_text(json.dumps(stopped.config.model_dump(mode="json")))
    with pytest.raises(SystemExit) as end:
        app(["release", "--recipe", str(recipe)])
    assert end.value.code == KpiNotMet.exit_code
    assert not Path(stopped.config.out).exists()
