"""Laws of validation: it is what scoring would say, changes no weight, and a run that was stopped measures the same."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eagleray.flows import ingest
from eagleray.learn.augmentation import EvalTransform
from eagleray.learn.checkpoints import Checkpoint, load_best, load_latest, save
from eagleray.learn.corpus_index import CorpusIndex, build_index
from eagleray.learn.order import Position
from eagleray.learn.reports import StepReport
from eagleray.learn.task import Progress
from eagleray.learn.training import Hooks, TrainResult, train
from eagleray.learn.validation import METRIC, Validation
from eagleray.vision.corpus import open_corpus
from eagleray.vision.images import ImageSpec, decode
from eagleray.vision.pieces import piece
from eagleray.vision.shard_images import ShardImages
from eagleray.vision.splits import SplitRule, assign, read_index
from PIL import Image
from torch import multiprocessing

from tests.unit.test_checkpoints import same
from tests.unit.test_training import SETTINGS, Pictures, Student, stop_after

IMAGES, SPEC = 30, ImageSpec(height=8, width=8)
CPU = torch.device("cpu")
FOUR = SETTINGS.model_copy(update={"max_steps": 20})  # epochs of 6 steps, and two more


class Answers(Student):
    """Student, answering: of uint8 pictures, and with a head that can be wrong."""

    def logits(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self.head(self.backbone(batch["image"].permute(0, 3, 1, 2).float() / 255))


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> CorpusIndex:
    home = tmp_path_factory.mktemp("held")
    for number in range(IMAGES):
        (home / "in" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        generator = np.random.default_rng(number)
        pixels = generator.integers(0, generator.integers(20, 256), (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(home / "in" / "ab"[number % 2] / f"{number}.png")
    ingest.run(ingest.IngestConfig(sources=(str(home / "in"),), out=str(home / "corpus"), shard_images=7))
    return build_index(open_corpus(home / "corpus"))


def share_right(index: CorpusIndex, task: Answers) -> float:
    """The slow oracle: one image at a time."""
    right = 0
    with ShardImages(index.root) as images, torch.no_grad():
        for at in range(len(index)):
            data = images.read(index.shards[index.shard[at]], int(index.row[at]))
            pixels = torch.from_numpy(decode(data, SPEC))[None]
            right += int(task.logits({"image": pixels}).argmax()) == index.first_targets[at]
    return float(right / len(index))


def test_it_is_the_share_of_images_whose_best_class_is_right(index: CorpusIndex) -> None:
    task = Answers().eval()
    for batch_size in (1, 4, 64):
        validation = Validation(index, EvalTransform(SPEC), batch_size=batch_size, num_threads=2)
        validation.measure(task, Progress(6, 20, 0, 6), CPU)
        assert validation.value == share_right(index, task)
    several = Validation(index, EvalTransform(SPEC, num_classes=2))
    several.measure(task, Progress(6, 20, 0, 6), CPU)
    assert several.value == share_right(index, task)


def run(index: CorpusIndex | None, *, seed: int = 0, **given: Any) -> tuple[TrainResult, list[Checkpoint], list[Any]]:
    """Trains; the result, the checkpoints, and (step, figure) of each measurement."""
    validation = Validation(index, EvalTransform(SPEC), keeps_best=True) if index is not None else None
    kept: list[Checkpoint] = []
    told: list[tuple[int, float]] = []

    def report(report: StepReport) -> None:
        told.extend((report.step, value) for value in (validation.figures().values() if validation else ()))

    hooks = {"validation": validation, "on_report": report, **given.pop("hooks", {})}
    hooks["on_checkpoint"] = lambda capture, _: kept.append(capture())
    result = train(Answers(seed), Pictures(), FOUR, hooks=Hooks(**hooks), **given)
    return result, kept, told


def test_it_measures_at_the_ends_of_epochs_and_changes_no_weight(index: CorpusIndex) -> None:
    _, alone, none = run(None)
    result, kept, told = run(index)
    assert none == []
    assert [step for step, _ in told] == [6, 12, 18, 20]
    for part in ("model", "optimizer", "ema"):
        assert same(dict(alone[-1].state[part]), dict(kept[-1].state[part])), part
    task = Answers()
    task.load_state_dict(result.average)  # what the bundle would hold, running statistics too
    assert told[-1][1] == share_right(index, task.eval())
    best = max(value for _, value in told)
    first = next(step for step, value in told if value == best)
    assert [one.metrics for one in kept if one.progress.step == first] == [{METRIC: best}]


@pytest.fixture(scope="module")
def undisturbed(index: CorpusIndex) -> tuple[list[Checkpoint], list[tuple[int, float]]]:
    return run(index)[1:]


@pytest.mark.parametrize("stop", [6, 7, 20])
def test_a_stopped_and_resumed_run_measures_what_the_whole_one_does(
    index: CorpusIndex, undisturbed: tuple[list[Checkpoint], list[tuple[int, float]]], tmp_path: Path, stop: int
) -> None:
    whole, told = undisturbed
    first, half, before = run(index, hooks={"should_stop": stop_after(stop)})
    assert first.progress.step == stop
    is_end = stop == FOUR.max_steps  # told to stop, it has no time, unless nothing will go on
    assert [step for step, _ in before] == [step for step, _ in told if step < stop or is_end]
    save(tmp_path, half[-1])
    found = load_latest(tmp_path)
    assert found is not None
    _, resumed, after = run(index, seed=9, start=found.checkpoint)
    assert [value for _, value in before + after] == [value for _, value in told]
    last = (resumed or half)[-1]
    assert same(dict(whole[-1].state["model"]), dict(last.state["model"]))
    assert whole[-1].state["validation"] == last.state["validation"]


def test_the_best_checkpoint_stays_of_equals_the_earliest_and_a_torn_one_is_passed_over(tmp_path: Path) -> None:
    for step, value in ((1, 0.5), (2, 0.75), (3, None), (4, 0.75), (5, 0.25), (6, None)):
        metrics = {} if value is None else {METRIC: value}
        progress = Progress(step, 6, 0, 6)
        state = {"model": {"w": torch.zeros(1)}}
        one = Checkpoint(progress=progress, position=Position(), config={}, state=state, metrics=metrics)
        save(tmp_path, one, keep=2, best=METRIC)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000005", "step-00000006"]
    found = load_best(tmp_path, METRIC)
    assert found is not None
    assert found.checkpoint.progress.step == 2
    (found.path / "model.safetensors").write_bytes(b"torn")
    again = load_best(tmp_path, METRIC)
    assert again is not None
    assert again.checkpoint.progress.step == 5
    assert load_best(tmp_path, "another") is None


def test_a_piece_holds_every_class_alike_divides_no_group_and_is_the_same_again(
    tmp_path: Path, make_photo: Callable[..., bytes]
) -> None:
    rows = ["file_name,label,group,split"]
    for number in range(60):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{number}.jpg").write_bytes(make_photo(number, width=16, height=16))
        rows.append(f"{number}.jpg,{'ab'[number % 3 == 0]},site{number // 3},{'train' if number < 48 else 'test'}")
    (tmp_path / "in" / "metadata.csv").write_text("\n".join(rows) + "\n")
    ingest.run(ingest.IngestConfig(sources=(str(tmp_path / "in"),), out=str(tmp_path / "corpus")))
    index = read_index(open_corpus(tmp_path / "corpus"), SplitRule())
    splits = assign(index, SplitRule())
    mask = splits.mask("train")
    found = piece(index, splits, mask, 0.25)
    assert not (found & ~mask).any()
    assert found.sum() == 12
    assert index.labels.counts(found).tolist() == [8, 4]  # as in the split: two of three
    assert not set(splits.groups[found]) & set(splits.groups[mask & ~found])
    assert (piece(index, splits, mask, 0.25) == found).all()
    other = SplitRule(seed=1)
    assert (piece(index, assign(index, other), mask, 0.25) != found).any()


def ranked(rank: int, port: int, folder: Path, index: CorpusIndex) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    validation = Validation(index, EvalTransform(SPEC), batch_size=4)
    validation.measure(Answers().eval(), Progress(6, 20, 0, 6), CPU)
    (folder / str(rank)).write_text(repr(validation.value))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")
def test_two_workers_measure_what_one_measures(index: CorpusIndex, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(ranked, (port, tmp_path, index), nprocs=2)
    assert {(tmp_path / str(rank)).read_text() for rank in range(2)} == {repr(share_right(index, Answers().eval()))}
