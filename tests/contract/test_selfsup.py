"""One law over every method: it learns from real pictures, its teacher is an average, and it repeats to the bit."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from eagleray.core.errors import ConfigError, TrainingDiverged
from eagleray.core.tables import installed, resolve
from eagleray.learn.selfsup import METHODS
from eagleray.learn.selfsup.collapse import CollapseConfig, CollapseDetector, CollapseReport
from eagleray.learn.selfsup.configs import BYOLConfig, DINOConfig, SimCLRConfig
from eagleray.learn.selfsup.synchronization import SyncedBatchNorm
from eagleray.learn.selfsup.upstream import NegativeCosineSimilarity, NTXentLoss
from eagleray.learn.task import Progress, StepOutput
from eagleray.vision.backbones import Backbone, create_headless
from safetensors.torch import load_file, save_file
from torch import nn

from tests import two_workers
from tests.real_views import photo_crops, view_batch

STEPS, EPOCH = 40, 3
WITH_TEACHER = ("byol", "dino")
# DINO: a head for the few pictures of a test, and a centre that settles within it (0.9 takes 30 steps to).
CONFIGS: dict[str, Any] = {
    "simclr": SimCLRConfig(),
    "byol": BYOLConfig(),
    "dino": DINOConfig(output_dim=256, center_momentum=0.5),
}
SUBJECTS = [("simclr", "test_resnet"), ("byol", "test_efficientnet"), ("dino", "test_resnet"), ("dino", "test_vit")]


def make(name: str, backbone: str = "test_resnet", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    module, width = create_headless(Backbone(name=backbone), size_px=32)
    return resolve(METHODS, name, what="method")(module, width, CONFIGS[name]).train()


def progress_at(step: int) -> Progress:
    return Progress(step=step, num_steps=STEPS, epoch=step // EPOCH, steps_per_epoch=EPOCH)


@lru_cache
def batches(num_local: int) -> list[dict[str, list[torch.Tensor]]]:
    """The batches of a run, the same for every method: 48 of 192 pictures each."""
    images, generator = photo_crops(192), torch.Generator().manual_seed(1)
    chosen = [torch.randperm(len(images), generator=generator)[:48] for _ in range(STEPS)]
    return [view_batch(images[rows], num_local=num_local, generator=generator) for rows in chosen]


class Run:
    """A short training of one method, as the loop of learn.training does it, but slow and obvious."""

    def __init__(self, method: Any, *, learning_rate: float = 1e-3) -> None:
        self.method = method
        self.optimizer = torch.optim.AdamW(method.parameter_groups(), lr=learning_rate, weight_decay=1e-4)
        self.step = 0

    def batch(self, step: int) -> dict[str, list[torch.Tensor]]:
        return batches(2 if isinstance(self.method.config, DINOConfig) else 0)[step]

    def advance(self, steps: int = 1) -> StepOutput:
        for _ in range(steps):
            progress = progress_at(self.step)
            getattr(self.method, "before_step", lambda progress: None)(progress)
            output = self.method.training_step(self.batch(self.step), progress)
            self.optimizer.zero_grad()
            output.loss.backward()
            self.optimizer.step()
            self.method.after_step(progress)
            self.step += 1
        return output


def teacher_of(method: Any) -> dict[str, torch.Tensor]:
    parts = {"backbone": method.teacher_backbone, "projector": method.teacher_projector}
    return {f"{part}.{key}": value for part, module in parts.items() for key, value in module.named_parameters()}


def test_every_method_is_installed_here() -> None:
    assert installed(METHODS) == ("simclr", "byol", "dino")  # else the laws below would pass for want of subjects
    assert set(METHODS) == {name for name, _ in SUBJECTS}


@pytest.mark.parametrize(("name", "backbone"), SUBJECTS)
def test_the_loss_falls_on_real_pictures_and_nothing_collapses(name: str, backbone: str) -> None:
    run = Run(make(name, backbone))
    num_outputs = getattr(run.method.config, "output_dim", None) if name == "dino" else None
    detector = CollapseDetector(CollapseConfig(every_steps=1, grace_steps=0), num_outputs=num_outputs)
    losses, outputs = [], []
    for _ in range(STEPS):
        outputs.append(run.advance())
        losses.append(outputs[-1].loss.item())
    assert all(math.isfinite(loss) for loss in losses)
    start = 5 if name == "dino" else 0  # until the centre has found its place
    early, middle, late = (statistics.mean(losses[at : at + 8]) for at in (start, start + 14, STEPS - 8))
    assert late < middle < early
    report = detector.measure(outputs[-1], step=STEPS)
    assert report.findings == ()
    assert report.spread > 3 * detector.config.min_spread
    assert outputs[-1].embedding is not None
    assert outputs[-1].embedding.shape[0] == 48
    assert not outputs[-1].embedding.requires_grad


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_no_gradient_reaches_the_teacher(name: str) -> None:
    run = Run(make(name))
    run.advance(EPOCH + 1)  # DINO's last layer has thawed
    teacher = set(map(id, teacher_of(run.method).values()))
    assert teacher
    assert all(p.grad is None and not p.requires_grad for p in teacher_of(run.method).values())
    trained = [p for group in run.method.parameter_groups() for p in group["params"]]
    assert not teacher & set(map(id, trained))
    assert all(p.grad is not None for p in trained), "every other parameter learns"


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_the_teacher_is_the_average_that_the_schedule_says(name: str) -> None:
    run = Run(make(name))
    base, expected = run.method.config.momentum_start, None
    for step in range(5):
        before = {key: value.clone() for key, value in teacher_of(run.method).items()}
        run.advance()
        momentum = 1 - (1 - base) * (math.cos(math.pi * step / STEPS) + 1) / 2  # BYOL, section 3.3
        student = {"backbone": run.method.backbone, "projector": run.method.projector}
        own = {f"{part}.{key}": p.detach() for part, module in student.items() for key, p in module.named_parameters()}
        expected = {key: before[key].double() * momentum + own[key].double() * (1 - momentum) for key in own}
        for key, value in teacher_of(run.method).items():  # two float32 roundings: of the product and of the sum
            torch.testing.assert_close(value.double(), expected[key], rtol=2e-7, atol=1e-9)
    assert expected
    end = Progress(step=STEPS, num_steps=STEPS, epoch=0, steps_per_epoch=EPOCH)
    before = {key: value.clone() for key, value in teacher_of(run.method).items()}
    run.method.after_step(end)
    assert all(torch.equal(before[key], value) for key, value in teacher_of(run.method).items()), "at 1 nothing moves"


@pytest.mark.parametrize(("name", "backbone"), SUBJECTS)
def test_a_saved_method_goes_on_to_the_bit(name: str, backbone: str, tmp_path: Path) -> None:
    run = Run(make(name, backbone))
    run.advance(3)
    save_file(run.method.state_dict(), tmp_path / "method.safetensors")
    other = make(name, backbone, seed=99)
    other.load_state_dict(load_file(tmp_path / "method.safetensors"))
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in run.method.state_dict().items())
    outputs = []
    for method in (run.method, other):
        again = Run(method)  # a new optimizer for both: its state is the loop's to keep, not the method's
        again.step = 3
        outputs.append([again.advance().loss.detach() for _ in range(2)])
    assert all(torch.equal(one, two) for one, two in zip(*outputs, strict=True)), "two more steps, the same losses"
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in run.method.state_dict().items())


def example_loss(method: Any, views: list[torch.Tensor]) -> torch.Tensor:
    """The loss as lightly's example of the method writes it, on the method's own modules."""
    projected = [method.projector(method.backbone(view)) for view in views]
    if method.config.name == "simclr":
        return NTXentLoss(temperature=method.config.temperature)(*projected)
    told = [method.predictor(one) for one in projected]
    seen = [method.teacher_projector(method.teacher_backbone(view)).detach() for view in views]
    criterion = NegativeCosineSimilarity()
    return 0.5 * (criterion(told[0], seen[1]) + criterion(told[1], seen[0]))


@pytest.mark.parametrize("name", ["simclr", "byol"])  # DINO's groups of views are its authors', not lightly's
def test_a_step_is_that_of_lightlys_example(name: str) -> None:
    """Loss, gradients and running averages, which take in one view after the other.

    SimCLR's took both as one batch, half as often: with one seed kNN was 2 to 4 points lower after 20 steps than so.
    """
    run = Run(make(name))
    method, twin, views = run.method, copy.deepcopy(run.method), run.batch(0)["views"]
    loss, expected = method.training_step({"views": views}, progress_at(0)).loss, example_loss(twin, views)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for key, value in twin.state_dict().items():
        torch.testing.assert_close(method.state_dict()[key], value, msg=key)
    for (key, one), other in zip(method.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=key)


@pytest.mark.parametrize("name", METHODS)
def test_a_loss_asked_for_twice_is_the_same_twice(name: str) -> None:
    run = Run(make(name))
    run.advance()
    batch = run.batch(1)
    first, second = (run.method.training_step(batch, progress_at(1)).loss for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_can_be_copied(name: str) -> None:
    """An average of all weights, and a trial step, copy the task; lightly's own DINO head cannot be."""
    run = Run(make(name))
    run.advance()
    batch = run.batch(1)
    twin = copy.deepcopy(run.method)
    assert torch.equal(
        twin.training_step(batch, progress_at(1)).loss, run.method.training_step(batch, progress_at(1)).loss
    )


@pytest.mark.parametrize("name", METHODS)
def test_views_that_do_not_fit_are_refused(name: str) -> None:
    method, view = make(name), torch.zeros(4, 3, 32, 32)
    for views in ([view], [], [view, view[:3]], *([[view] * 3] if name != "dino" else [])):
        with pytest.raises(ConfigError, match="a batch has"):
            method.training_step({"views": views}, progress_at(0))


@pytest.mark.parametrize("name", METHODS)
def test_biases_norms_and_tokens_are_not_decayed(name: str) -> None:
    method = make(name, "test_vit")
    decayed, plain = method.parameter_groups()
    assert plain["weight_decay"] == 0
    spared = {id(p) for p in plain["params"]}
    assert {id(method.backbone.cls_token), id(method.backbone.pos_embed)} <= spared
    assert all(p.ndim > 1 for p in decayed["params"])
    assert len(decayed["params"]) + len(plain["params"]) == sum(p.requires_grad for p in method.parameters())


@pytest.fixture(scope="module")
def by_workers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, torch.Tensor]]]:
    """What each of two processes saw, by case."""
    folder = tmp_path_factory.mktemp("workers")
    torch.multiprocessing.spawn(two_workers.worker, args=(str(folder),), nprocs=two_workers.WORKERS)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(two_workers.WORKERS)]


@pytest.mark.parametrize(("name", "backbone", "is_synced"), [case for case in two_workers.cases() if case[2]])
def test_two_workers_are_one(name: str, backbone: str, is_synced: bool, by_workers: list[dict[str, Any]]) -> None:
    """Loss, gradient, batch statistics, teacher and centre: of the union, whoever held which image."""
    alone = two_workers.in_one_process(name, backbone, is_synced=is_synced)
    seen = [worker[f"{name} {backbone} {is_synced}"] for worker in by_workers]
    assert set(alone) == set(seen[0]) == set(seen[1])
    for key, value in alone.items():
        told = torch.stack([one[key].double() for one in seen])
        if not key.startswith(("loss", "log")):
            assert torch.equal(told[0], told[1]), f"{key} differs between the workers"
        if key == "log teacher_marginal_entropy":  # of each worker's own images: no mean of theirs is the union's
            continue
        scale = value.double().abs().max().clamp(min=1e-3).item()  # float64: what is left is rounding
        assert (told.mean(0) - value).abs().max().item() < 1e-9 * scale, key


def test_without_shared_statistics_two_workers_are_not_one(by_workers: list[dict[str, Any]]) -> None:
    """The law above can fail: with batch norms of each worker's own the loss differs by far more than its tolerance."""
    alone = two_workers.in_one_process("simclr", "test_resnet", is_synced=False)["loss"]
    told = torch.stack([worker["simclr test_resnet False"]["loss"] for worker in by_workers]).mean()
    assert (told - alone).abs() > 1e-2


def test_two_workers_measure_as_one(by_workers: list[dict[str, Any]]) -> None:
    """Probes and detector see the union, so that all workers tell the same and stop together."""
    alone = two_workers.measured(slice(None))
    first, second = (worker["measured"] for worker in by_workers)
    for key, value in alone.items():
        assert torch.equal(first[key], second[key]), key
        # float32: this process may sum with other threads and instructions than its children do
        torch.testing.assert_close(first[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_half_precision_stays_out_of_the_loss(name: str) -> None:
    method, batch = make(name), Run(make(name)).batch(0)
    full = method.training_step(batch, progress_at(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = method.training_step(batch, progress_at(0))
    assert half.loss.dtype == torch.float32
    assert half.embedding.dtype == torch.float32
    # bfloat16 has 8 bits: each of some ten layers is off by 1 in 256, and nothing is summed in it
    torch.testing.assert_close(half.loss, full.loss, rtol=0.02, atol=0.02)


class TestDINO:
    def test_the_last_layer_does_not_move_in_the_first_epoch(self) -> None:
        run = Run(make("dino"))
        last = run.method.projector.last_layer
        start = last.weight.detach().clone()
        for _ in range(EPOCH):
            run.advance()
            assert torch.equal(last.weight, start)
        assert not run.optimizer.state[last.parametrizations.weight.original1], "the optimizer has not counted it"
        run.advance()
        assert not torch.equal(last.weight, start)

    def test_rows_of_the_last_layer_keep_length_one(self) -> None:
        run = Run(make("dino"))
        run.advance(EPOCH + 3)
        lengths = run.method.projector.last_layer.weight.norm(dim=1)
        torch.testing.assert_close(lengths, torch.ones_like(lengths))

    def test_the_loss_is_entropy_plus_divergence(self) -> None:
        run = Run(make("dino"))
        run.advance()
        method, views = run.method, run.batch(1)["views"]
        logs = method.training_step({"views": views}, progress_at(1)).logs
        temperature, center = logs["teacher_temperature"], method.criterion.center[0]
        student = method.projector(torch.cat([method.backbone(torch.cat(v)) for v in (views[:2], views[2:])])).chunk(4)
        teacher = method.teacher_projector(method.teacher_backbone(torch.cat(views[:2]))).chunk(2)
        terms, entropies = [], []
        for t, seen in enumerate(teacher):
            p = ((seen - center) / temperature).softmax(-1)
            entropies.append(-(p * p.log()).sum(-1).mean())
            terms += [-(p * (told / 0.1).log_softmax(-1)).sum(-1).mean() for s, told in enumerate(student) if s != t]
        loss, entropy = torch.stack(terms).mean(), torch.stack(entropies).mean()
        torch.testing.assert_close(logs["teacher_entropy"], entropy, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logs["teacher_student_kl"], loss - entropy, rtol=1e-3, atol=1e-4)

    def test_the_center_moves_once_a_step_by_the_mean_of_its_micro_batches(self) -> None:
        run = Run(make("dino"))
        method, center = run.method, run.method.criterion.center.clone()
        two = [run.batch(step) for step in range(2)]
        told = []
        for batch in two:
            method.training_step(batch, progress_at(0))
            assert torch.equal(method.criterion.center, center)
            views = torch.cat(batch["views"][:2])
            told.append(method.teacher_projector(method.teacher_backbone(views)).detach())
        method.after_step(progress_at(0))
        expected = 0.5 * center + 0.5 * torch.cat(told).mean(0)
        torch.testing.assert_close(method.criterion.center, expected, rtol=1e-4, atol=1e-6)

    def test_the_teacher_has_no_stochastic_depth(self) -> None:
        module, width = create_headless(
            Backbone(name="test_vit", model_args={"drop_path_rate": 0.5, "proj_drop_rate": 0.5}), size_px=32
        )
        method = resolve(METHODS, "dino", what="method")(module, width, CONFIGS["dino"]).train()
        x = torch.randn(4, 3, 32, 32)
        assert not torch.equal(method.backbone(x), method.backbone(x))
        assert torch.equal(method.teacher_backbone(x), method.teacher_backbone(x))

    def test_local_views_are_whole_patches(self) -> None:
        assert make("dino", "test_vit").local_px(64) == 32  # 64 * 96 / 224 = 27.4; patches of 16
        assert make("dino", "test_resnet").local_px(224) == 96


@pytest.mark.parametrize("name", METHODS)
def test_the_plan_is_the_papers(name: str) -> None:
    pytest.importorskip("eagleray.learn.selfsup.views")
    plan = make(name).plan(64)
    assert sum(spec.num for spec in plan.views) == (8 if name == "dino" else 2)


def byol_that_collapses() -> Any:
    """Without predictor, and with a teacher that is the student."""
    method = make("byol")
    method.predictor = nn.Identity()
    method.config = BYOLConfig(momentum_start=0, momentum_end=0)
    return method


def dino_that_collapses() -> Any:
    """Without a centre, and with a teacher that follows at once."""
    method = make("dino")
    method.config = CONFIGS["dino"].model_copy(update={"momentum_start": 0.5, "frozen_epochs": 0})
    method.criterion.center_momentum = 1.0
    return method


@pytest.mark.parametrize(
    ("collapsing", "finding"),
    [
        (byol_that_collapses, "projections lie close to one point"),
        (dino_that_collapses, "one output of the teacher takes all"),
    ],
)
def test_a_run_that_collapses_is_stopped(collapsing: Callable[[], Any], finding: str) -> None:
    run = Run(collapsing(), learning_rate=3e-3)
    config = CollapseConfig(action="stop", every_steps=5, grace_steps=10, patience=2)
    detector = CollapseDetector(config, num_outputs=getattr(run.method.config, "output_dim", None))
    seen: list[CollapseReport] = []

    def go_on() -> None:
        while run.step < STEPS:
            report = detector.observe(run.advance(), step=run.step)
            seen.extend([report] if report else [])

    with pytest.raises(TrainingDiverged, match=finding) as stopped:
        go_on()
    assert "do:" in str(stopped.value)
    assert len(seen) >= 2, "it was measured, and warned of, before it was stopped"


def test_one_worker_alone_keeps_its_own_batch_norms() -> None:
    assert not any(isinstance(module, SyncedBatchNorm) for module in make("simclr").modules())
