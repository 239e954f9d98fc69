"""Two workers are one: the same batches, losses, weights, checkpoints and decisions over gloo, here on one machine."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eagleray.core.errors import TrainingDiverged
from eagleray.learn import parallel
from eagleray.learn.checkpoints import Checkpoint, load_latest, save
from eagleray.learn.feeding import Batch
from eagleray.learn.optimization import OptimizerSettings
from eagleray.learn.order import Position
from eagleray.learn.task import Progress
from eagleray.learn.training import Hooks, TrainSettings, train
from torch import multiprocessing, nn

from tests.unit.test_training import Pictures, Student

SETTINGS = TrainSettings(
    max_steps=6, batch_size=8, accumulation=2, optimizer=OptimizerSettings(lr=0.01, base_batch=None)
)


class Slices(Pictures):
    """A rank's contiguous slices of the global batches."""

    def __init__(self, rank: int, world_size: int, spoilt_at: int | None = None) -> None:
        super().__init__(8, spoilt_at)
        self._rank, self._world_size = rank, world_size

    def iterate(self, start: Position) -> Iterator[Batch]:
        for batch in super().iterate(start):
            size = 8 // self._world_size
            part = slice(self._rank * size, (self._rank + 1) * size)
            yield replace(batch, arrays={name: value[part] for name, value in batch.arrays.items()})


class Plain(Student):
    """No dropout, no batch statistics, which depend on how a batch is cut; the backbone thaws in the third step."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.backbone[1], self.backbone[5] = nn.Identity(), nn.Identity()

    def before_step(self, progress: Progress) -> None:
        self.backbone.requires_grad_(progress.step >= 2)


def train_here(folder: Path, rank: int, world_size: int, **given: Any) -> None:
    """One rank's run: its losses and weights go to files; rank 0 keeps checkpoints."""
    losses: list[float] = []
    hooks = {
        "on_report": lambda report: losses.append(report.loss),
        "on_checkpoint": lambda capture, _: save(folder / "checkpoints", capture()) if rank == 0 else None,
        "folder": folder,
        **given.pop("hooks", {}),
    }
    task, spoilt_at = Plain(seed=given.pop("seed", 0)), given.pop("spoilt_at", None)
    settings = SETTINGS.model_copy(update={"report_every_s": 0.0, "accumulation": 2 // world_size})
    try:
        result = train(task, Slices(rank, world_size, spoilt_at), settings, hooks=Hooks(**hooks), **given)
    except TrainingDiverged as error:
        (folder / f"diverged-{rank}").write_text(str(error))
        return
    torch.save({"weights": task.state_dict(), "losses": losses, "step": result.progress.step}, folder / f"rank-{rank}")


def stops_in_turn(rank: int) -> Callable[[], bool]:
    """Only rank 1 is told, after its third step."""
    asked = iter(range(1, 100))
    return lambda: next(asked) == 3 and rank == 1


def worker(rank: int, port: int, home: Path) -> None:
    """One of two ranks: every scenario of this file in turn, as starting a process takes seconds."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    train_here(home / "trains", rank, 2)
    train_here(home / "diverges", rank, 2, spoilt_at=4)
    train_here(home / "stops", rank, 2, hooks={"should_stop": stops_in_turn(rank)})
    torch.distributed.barrier()
    found = load_latest(home / "stops" / "checkpoints")
    assert found is not None
    train_here(home / "resumes", rank, 2, seed=5 + rank, start=found.checkpoint)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two workers left behind, a folder a scenario, and what one left, in ``one``."""
    home = tmp_path_factory.mktemp("parallel")
    for name in ("trains", "diverges", "stops", "resumes", "one", "alone"):
        (home / name).mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(worker, (port, home), nprocs=2)
    train_here(home / "one", 0, 1)
    return home


def read(folder: Path, rank: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / f"rank-{rank}", weights_only=True)
    return found


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for key, value in one.items():
        # sums over a batch in another order, through six Adam steps
        torch.testing.assert_close(value, other[key], rtol=1e-3, atol=1e-4)


def test_two_workers_train_what_one_trains(home: Path) -> None:
    one, first, second = read(home / "one"), read(home / "trains"), read(home / "trains", 1)
    assert first["losses"] == second["losses"]
    np.testing.assert_allclose(first["losses"], one["losses"], rtol=1e-4)
    assert all(torch.equal(first["weights"][key], second["weights"][key]) for key in first["weights"])
    close(one["weights"], first["weights"])


def test_what_one_rank_is_told_all_do(home: Path) -> None:
    assert [read(home / "stops", rank)["step"] for rank in range(2)] == [3, 3]


def test_a_run_goes_on_with_as_many_workers_or_fewer(home: Path) -> None:
    found = load_latest(home / "stops" / "checkpoints")
    assert found is not None
    assert found.checkpoint.position == Position(0, 24)
    train_here(home / "alone", 0, 1, seed=7, start=found.checkpoint)
    whole = read(home / "trains")["weights"]
    resumed = read(home / "resumes")
    assert resumed["step"] == 6
    assert all(torch.equal(whole[key], resumed["weights"][key]) for key in whole)  # bit for bit with as many
    close(whole, read(home / "alone")["weights"])


def test_all_ranks_stop_where_one_diverges(home: Path) -> None:
    folder = home / "diverges"
    assert not (folder / "rank-0").exists()
    assert [path.name for path in folder.glob("diverged-step-*")] == ["diverged-step-00000004-rank-1"]
    assert "nan at step 4" in (folder / "diverged-1").read_text()
    assert "another worker" in (folder / "diverged-0").read_text()


def test_votes_of_one_worker_are_its_own() -> None:
    own = parallel.Votes(loss=2.0, stops=1.0)
    assert parallel.vote(own, torch.device("cpu")) == own


def test_a_checkpoint_says_where_the_data_stands() -> None:
    kept: list[Checkpoint] = []
    train(Plain(), Pictures(), SETTINGS, hooks=Hooks(on_checkpoint=lambda capture, _: kept.append(capture())))
    assert (kept[-1].position, kept[-1].progress.step) == (Position(0, 48), 6)


if not torch.distributed.is_gloo_available():
    pytest.skip("torch was built without gloo", allow_module_level=True)
