"""Laws of the loop: a run that was stopped and went on is the run that was not, bit for bit."""

from __future__ import annotations

import platform
import resource
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from eagleray.core.errors import CapabilityError, ConfigError, TrainingDiverged
from eagleray.learn import memory
from eagleray.learn.checkpoints import Checkpoint, load_latest, save
from eagleray.learn.divergence import replay
from eagleray.learn.feeding import Batch
from eagleray.learn.optimization import OptimizerSettings
from eagleray.learn.order import Position
from eagleray.learn.reports import StepReport
from eagleray.learn.task import Progress, StepOutput
from eagleray.learn.training import Hooks, TrainResult, TrainSettings, train
from torch import nn

from tests.unit.test_checkpoints import same

NUM, SIDE = 48, 8


class Pictures:
    """Seeded pictures of two classes: a BatchSource without files."""

    def __init__(self, batch_size: int = 8, spoilt_at: int | None = None) -> None:
        self.steps_per_epoch, self._size, self._spoilt_at = NUM // batch_size, batch_size, spoilt_at
        generator = np.random.default_rng(0)
        self._target = generator.integers(0, 2, NUM)
        shift = self._target[:, None, None, None] * 1.0
        self._image = (generator.normal(size=(NUM, 3, SIDE, SIDE)) + shift).astype(np.float32)

    def iterate(self, start: Position) -> Iterator[Batch]:
        epoch, consumed = start.epoch, start.consumed
        while True:
            order = np.random.default_rng(epoch).permutation(NUM)
            for first in range(consumed, NUM, self._size):
                chosen = order[first : first + self._size]
                image = self._image[chosen].copy()
                if self._spoilt_at == epoch * self.steps_per_epoch + first // self._size:
                    image[-1, 0, 0, 0] = np.nan
                arrays = {"image": image, "target": self._target[chosen], "key": chosen.astype(np.uint64)}
                yield Batch(arrays, Position(epoch, first + self._size), epoch, self._size)
            epoch, consumed = epoch + 1, 0


class Student(nn.Module):
    """A task with dropout, batch statistics and a teacher that moves after each step."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3)
        )
        self.head = nn.Linear(8, 2)
        self.teacher = nn.Linear(8, 2).requires_grad_(False)

    def training_step(self, batch: Mapping[str, torch.Tensor], progress: Progress) -> StepOutput:
        features = self.backbone(batch["image"])
        loss = nn.functional.cross_entropy(self.head(features), batch["target"])
        loss = loss + 0.1 * nn.functional.mse_loss(self.head(features), self.teacher(features))
        return StepOutput(loss, {"twice": 2 * loss.detach()}, features.detach())

    def after_step(self, progress: Progress) -> None:
        with torch.no_grad():
            for moving, fixed in zip(self.teacher.parameters(), self.head.parameters(), strict=True):
                moving.lerp_(fixed, 0.1)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": self.backbone.parameters()}, {"params": self.head.parameters(), "lr_scale": 2.0}]


SETTINGS = TrainSettings(
    max_steps=10,
    batch_size=8,
    accumulation=2,
    clip_norm=1.0,
    ema_decay=0.9,
    optimizer=OptimizerSettings(lr=0.01, base_batch=None, warmup_epochs=0.5),
)


def run(
    settings: TrainSettings = SETTINGS, *, task: nn.Module | None = None, source: Pictures | None = None, **given: Any
) -> tuple[TrainResult, Checkpoint]:
    """Trains; the result and the last checkpoint."""
    kept: list[Checkpoint] = []
    hooks = Hooks(on_checkpoint=lambda capture, _: kept.append(capture()), **given.pop("hooks", {}))
    result = train(task or Student(), source or Pictures(), settings, hooks=hooks, **given)
    return result, kept[-1]


def stop_after(num_steps: int) -> Callable[[], bool]:
    asked = iter(range(1, 1000))
    return lambda: next(asked) == num_steps


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_stopped_and_resumed_run_is_the_run_that_was_not_stopped(tmp_path: Path, name: str, precision: str) -> None:
    optimizer = SETTINGS.optimizer.model_copy(update={"name": name})
    settings = SETTINGS.model_copy(update={"precision": precision, "optimizer": optimizer})
    straight, whole = run(settings)
    first, half = run(settings, hooks={"should_stop": stop_after(5)})
    assert (first.is_finished, straight.is_finished) == (False, True)
    save(tmp_path, half)
    found = load_latest(tmp_path)
    assert found is not None
    assert found.checkpoint.progress.step == 5
    second, resumed = run(settings, task=Student(seed=9), start=found.checkpoint)
    assert (second.progress, second.position) == (straight.progress, straight.position)
    for part in ("model", "optimizer", "ema", "scaler"):
        assert same(dict(whole.state[part]), dict(resumed.state[part])), part


def test_a_run_leaves_torchs_generator_alone() -> None:
    task = Student()
    before = torch.get_rng_state()
    run(task=task)
    assert torch.equal(before, torch.get_rng_state())


def test_what_is_random_in_a_step_depends_on_the_seed() -> None:
    states = [run(SETTINGS.model_copy(update={"seed": seed}))[1].state["model"] for seed in (0, 0, 1)]
    assert same(dict(states[0]), dict(states[1]))
    assert not same(dict(states[0]), dict(states[2]))


def test_accumulated_parts_are_the_whole_batch() -> None:
    """Without dropout and batch statistics the gradient of a batch is the mean over its parts."""

    def plain(accumulation: int) -> dict[str, torch.Tensor]:
        task = Student()
        task.backbone[1], task.backbone[5] = nn.Identity(), nn.Identity()
        return dict(run(SETTINGS.model_copy(update={"accumulation": accumulation}), task=task)[1].state["model"])

    one, four = plain(1), plain(4)
    for key, value in one.items():
        torch.testing.assert_close(value, four[key], rtol=1e-4, atol=1e-5)  # sums in another order, ten Adam steps


def test_the_loss_falls_and_reports_add_up() -> None:
    reports: list[StepReport] = []
    settings = SETTINGS.model_copy(update={"max_steps": None, "epochs": 8, "report_every_s": 0.0})
    result, _ = run(settings, hooks={"on_report": reports.append})
    assert result.progress.step == 48
    assert [report.step for report in reports] == list(range(1, 49))
    assert np.mean([r.loss for r in reports[-6:]]) < 0.7 * np.mean([r.loss for r in reports[:6]])
    last = reports[-1]
    assert last == result.report
    assert last.images_per_s > 0
    assert 0 <= last.data_wait_percent <= 100
    assert last.peak_memory_gib > 0.01
    assert last.logs["twice"] > 0
    assert "step 48/48  epoch 7  loss " in last.line()
    assert "ETA" in reports[0].line()
    assert reports[0].to_json()["num_steps"] == 48


def test_checkpoints_come_by_steps_and_at_the_end() -> None:
    seen: list[int] = []
    settings = SETTINGS.model_copy(update={"checkpoint_every_steps": 4})
    train(Student(), Pictures(), settings, hooks=Hooks(on_checkpoint=lambda _, progress: seen.append(progress.step)))
    assert seen == [4, 8, 10]


def test_the_teacher_moves_and_takes_no_gradient() -> None:
    task = Student()
    start = task.teacher.weight.clone()
    run(task=task)
    assert task.teacher.weight.grad is None
    assert not torch.equal(start, task.teacher.weight)


def test_the_average_is_that_of_the_weights() -> None:
    seen: list[torch.Tensor] = []
    task = Student()
    start = task.head.weight.detach().clone()
    result, _ = run(task=task, hooks={"on_step": lambda *_: seen.append(task.head.weight.detach().clone())})
    expected = start
    for number, weight in enumerate(seen):
        decay = min(0.9, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * weight
    assert result.average is not None
    torch.testing.assert_close(result.average["head.weight"], expected, rtol=1e-5, atol=1e-6)


# What a run refuses


def test_a_loss_that_is_no_number_stops_the_run_and_can_be_run_again(tmp_path: Path) -> None:
    task = Student()
    with pytest.raises(TrainingDiverged, match=r"nan at step 7 \(epoch 1\)") as caught:
        run(task=task, source=Pictures(spoilt_at=7), hooks={"folder": tmp_path})
    (folder,) = tmp_path.iterdir()
    assert str(folder) in caught.value.fix
    assert all(value.isfinite().all() for value in task.head.parameters())  # the step was not taken
    assert replay(folder, Student(seed=5)).isnan()


class Hungry(Student):
    """A task that keeps 4 MB an image for its backward pass."""

    def training_step(self, batch: Mapping[str, torch.Tensor], progress: Progress) -> StepOutput:
        kept = torch.ones(len(batch["target"]), 2**20, requires_grad=True)
        return StepOutput(super().training_step(batch, progress).loss + (kept**2).mean() * 0)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_memory_that_a_step_has_freed_is_used_again_and_given_back_at_the_end() -> None:
    """Counted, not timed: pages of 4 KiB that the system had to hand out for 128 MiB, and what stays resident."""

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(2**25).fill_(1.0)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    process, cpu, usual = psutil.Process(), torch.device("cpu"), min(faults() for _ in range(8))
    with memory.kept_for_reuse(cpu):
        kept = min(faults() for _ in range(8))  # a block comes to a place that fits after a few
        held = process.memory_info().rss
    assert usual > 8 * kept
    assert (
        process.memory_info().rss < held - 96 * 2**20
    )  # not counted again: a hole in the heap may serve what comes after


def test_a_batch_too_large_for_the_memory_is_refused_with_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda _: 12 * 2**20)
    task = Hungry()
    before = {key: value.clone() for key, value in task.state_dict().items()}
    with pytest.raises(CapabilityError, match=r"4 images needs about 0.0 GiB; 0.0 GiB are free") as caught:
        run(task=task)
    assert "accumulation=4" in caught.value.fix
    assert same(before, dict(task.state_dict()))
    run(SETTINGS.model_copy(update={"accumulation": 4}), task=Hungry())


def test_the_estimate_counts_what_the_backward_pass_keeps() -> None:
    batch = {name: torch.from_numpy(value) for name, value in next(Pictures().iterate(Position())).arrays.items()}
    task = Hungry()
    estimate = memory.estimate_bytes(task, lambda twin, few: twin.training_step(few, Progress(0, 1, 0, 1)).loss, batch)
    assert 8 * 4 * 2**20 <= estimate <= 8 * 4 * 2**20 * 1.01


def test_batches_of_another_size_than_the_learning_rate_is_for_are_refused() -> None:
    with pytest.raises(ConfigError, match="batches of 4 images, batch_size=8"):
        run(source=Pictures(batch_size=4))


def test_what_is_compiled_is_the_backbone_and_its_names_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []
    monkeypatch.setattr(torch, "compile", lambda function, *_, **__: compiled.append(function) or function)
    whole = run()[1].state["model"]
    other = run(SETTINGS.model_copy(update={"compiles": True}))[1].state["model"]
    assert len(compiled) == 1
    assert same(dict(whole), dict(other))


def test_fp16_without_a_gpu_and_parts_that_do_not_divide_are_refused() -> None:
    with pytest.raises(CapabilityError, match="fp16 on cpu"):
        run(SETTINGS.model_copy(update={"precision": "fp16"}))
    with pytest.raises(ConfigError, match="3 accumulations"):
        run(SETTINGS.model_copy(update={"accumulation": 3}))
