"""Training on a real Ray while workers, the controller and checkpoints are taken away: the same weights to the bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from eagleray.core import storage
from eagleray.flows.finetune import FinetuneConfig
from eagleray.flows.run_folder import RunFolder, read_lines

from tests.journeys.conftest import LABELLED, Ray, run, start, wait_for
from tests.unit.test_finetune_validation import measured, share_right

BATCH, EPOCHS = 16, 8
STEPS = LABELLED // BATCH * EPOCHS


@dataclass
class Training:
    """A run of the journey: its command, its folders, what its steps took."""

    ray: Ray
    corpus: Path
    home: Path

    @property
    def out(self) -> Path:
        return self.home / "bundle"

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.home / "bundle.run")

    @property
    def env(self) -> dict[str, str]:
        return {
            **self.ray.env,
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
            "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "4",  # how long two places are waited for where one node is left
        }

    def words(self, *more: str, workers: str = "2") -> list[str]:
        settings = ["checkpoint_every_steps=2", "report_every_s=0", "has_report=false", "window_shards=1", *more]
        line = ["pretrain", "--corpus", str(self.corpus), "--method", "simclr", "--backbone", "test_resnet"]
        line += ["--out", str(self.out), "--size-px", "32", "--batch-size", str(BATCH), "--epochs", str(EPOCHS)]
        line += ["--workers", workers, "--address", self.ray.address]
        return line + [word for setting in settings for word in ("--set", setting)]

    def start(self, *more: str, workers: str = "2", slow_ms: int = 0, **faults: Any) -> subprocess.Popen[bytes]:
        (self.home / "consumed").mkdir(parents=True, exist_ok=True)
        self.ray.go_wrong(slow_step_ms=slow_ms, consumed=str(self.home / "consumed"), **faults)
        return start(self.env, *self.words(*more, workers=workers), log=self.home / "log")

    def log(self) -> str:
        return (self.home / "log").read_text()[-3000:]

    def steps(self) -> list[dict[str, Any]]:
        rows = [row for path in (self.home / "consumed").glob("*.jsonl") for row in read_lines(path)]
        return sorted(rows, key=lambda row: row["at"])

    def checkpoint(self) -> int:
        names = sorted(path.name for path in self.folder.checkpoints.glob("step-*"))
        return int(names[-1].removeprefix("step-")) if names else 0

    def rank(self, number: int) -> psutil.Process:
        return psutil.Process(next(row["pid"] for row in reversed(self.steps()) if row["rank"] == number))

    def weights(self) -> str:
        return storage.sha256_file(self.out / "model.safetensors")

    def epochs(self) -> dict[int, Counter[int]]:
        """What each epoch took of each image: of a step that was done again, the last time counts."""
        last: dict[tuple[int, int], dict[str, Any]] = {}
        worlds: dict[int, tuple[int, float]] = {}
        for row in self.steps():
            worlds[row["step"]] = (row["world"], row["at"])
            last[row["step"], row["rank"]] = row
        taken: dict[int, Counter[int]] = {}
        for (step, rank), row in last.items():
            if rank < worlds[step][0]:
                taken.setdefault(row["epoch"], Counter()).update(row["keys"])
        return taken

    def assert_each_image_once_an_epoch(self) -> None:
        taken = self.epochs()
        assert sorted(taken) == list(range(EPOCHS))
        for epoch, counts in taken.items():
            assert len(counts) == LABELLED, epoch
            assert set(counts.values()) == {1}, epoch

    def assert_done(self, driver: subprocess.Popen[bytes], timeout_s: float = 240) -> None:
        driver.wait(timeout_s)
        assert driver.returncode == 0, self.log()
        assert storage.read_json(self.folder.root / "run.json")["step"] == STEPS
        self.assert_each_image_once_an_epoch()


@pytest.fixture
def training(ray: Ray, corpus: Path, tmp_path: Path) -> Training:
    return Training(ray, corpus, tmp_path)


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: Ray, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    training = Training(ray_cluster, corpus, tmp_path_factory.mktemp("undisturbed"))
    training.assert_done(training.start())
    assert [row["world_size"] for row in read_lines(training.folder.starts)] == [2]
    return training


def controller() -> psutil.Process:
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if line.startswith("ray::") and "TrainController" in line:
            return process
    raise AssertionError("no controller")


def reserved(training: Training) -> list[str]:
    """For whom Ray's AutoscalingCoordinator has reserved what the cluster has."""
    script = """
import json, ray, sys
ray.init(sys.argv[1], logging_level="ERROR", log_to_driver=False)
coordinator = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
print(json.dumps(ray.get(coordinator.__ray_call__.remote(lambda self: sorted(self._ongoing_reqs)))))
"""
    words = [sys.executable, "-c", script, training.ray.address]
    done = subprocess.run(words, env=training.env, capture_output=True, text=True, check=True)
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


def kill(training: Training, target: str) -> None:
    """Takes one thing away, as it goes on to happen in a cluster: at any moment, without a word."""
    process = controller() if target == "controller" else training.rank(int(target))
    process.send_signal(signal.SIGKILL)


def tear(training: Training) -> None:
    """Cuts the newest checkpoint's weights short, as a disk that was full and lied would."""
    newest = training.folder.checkpoints / f"step-{training.checkpoint():08d}"
    file = newest / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def disturb(training: Training, driver: subprocess.Popen[bytes], targets: list[str]) -> None:
    for target in targets:
        at = training.checkpoint()
        far = max(at + 2, 4 if target == "torn" else 0)  # where there is one before it that is whole
        wait_for(lambda: training.checkpoint() >= far or driver.poll() is not None)  # noqa: B023
        assert driver.poll() is None, training.log()
        if target == "torn":
            tear(training)
            target = "1"  # noqa: PLW2901  nobody looks at it until something else goes wrong
        kill(training, target)
        begun = len(read_lines(training.folder.starts))
        wait_for(lambda: len(read_lines(training.folder.starts)) > begun or driver.poll() is not None, 120)  # noqa: B023


def test_all_that_dies_in_one_run_changes_no_bit_of_the_weights(training: Training, undisturbed: Training) -> None:
    driver = training.start(slow_ms=150)
    disturb(training, driver, ["1", "0", "torn", "controller"])
    training.ray.go_wrong(consumed=str(training.home / "consumed"))
    training.assert_done(driver)
    starts = [(row["attempt"], row["step"]) for row in read_lines(training.folder.starts)]
    print(f"\nstarts (entry, step): {starts}")
    assert len(starts) == 5
    assert starts[-1][0] == 2  # the controller's death is answered by a second entry
    assert training.weights() == undisturbed.weights()
    assert reserved(training) == []  # Ray keeps a dead controller's CPUs from elastic runs for three minutes


@pytest.mark.full
@pytest.mark.parametrize("target", ["0", "1", "controller", "torn"])
def test_each_death_alone_changes_no_bit_of_the_weights(training: Training, undisturbed: Training, target: str) -> None:
    driver = training.start(slow_ms=150)
    disturb(training, driver, [target])
    training.assert_done(driver)
    assert training.weights() == undisturbed.weights()


def test_ctrl_c_checkpoints_says_how_to_resume_and_the_resume_changes_no_bit(
    training: Training, undisturbed: Training
) -> None:
    driver = training.start(slow_ms=150)
    wait_for(lambda: training.checkpoint() >= 4 or driver.poll() is not None)
    os.killpg(driver.pid, signal.SIGINT)
    driver.wait(90)
    assert driver.returncode == 130, training.log()
    assert "resume: eagleray pretrain" in training.log()
    assert storage.read_json(training.folder.root / "run.json")["state"] == "stopped"
    training.assert_done(training.start())
    assert training.weights() == undisturbed.weights()


def test_a_driver_killed_before_its_bundle_or_while_it_leaves_ray_loses_nothing(
    training: Training, undisturbed: Training
) -> None:
    driver = training.start(die_before="bundle")
    driver.wait(240)
    assert (driver.returncode, training.checkpoint()) == (-signal.SIGKILL, STEPS), training.log()
    assert not training.out.exists()
    again = training.start(die_before="disconnect")  # as Ray's own core was seen to die there
    again.wait(240)
    assert again.returncode == -signal.SIGKILL, training.log()
    assert [row["step"] for row in read_lines(training.folder.starts)] == [0, STEPS]
    assert set(Counter((row["step"], row["rank"]) for row in training.steps()).values()) == {1}
    assert training.weights() == undisturbed.weights()
    assert (training.folder.root / "record.json").exists()
    training.assert_done(training.start())
    assert "nothing to do" in training.log()


def test_two_workers_become_one_and_two_again(training: Training, undisturbed: Training) -> None:
    driver = training.start("num_cpus=2", "resize_check_s=1", workers="1,2", slow_ms=1000)

    def has_begun() -> bool:
        return training.checkpoint() >= 2 and any(row["rank"] == 1 for row in training.steps())

    wait_for(lambda: has_begun() or driver.poll() is not None, 120)
    assert driver.poll() is None, training.log()
    raylet = training.rank(1).parent()
    assert raylet is not None
    raylet.kill()  # its node with all of its workers
    worlds = lambda: [row["world_size"] for row in read_lines(training.folder.starts)]  # noqa: E731
    wait_for(lambda: worlds()[-1] == 1 or driver.poll() is not None, 120)
    training.ray.add_node()
    wait_for(lambda: worlds()[-1] == 2 or driver.poll() is not None, 120)
    training.ray.go_wrong(consumed=str(training.home / "consumed"))
    training.assert_done(driver)
    print(f"\nworkers: {worlds()}")
    assert [world for at, world in enumerate(worlds()) if at == 0 or world != worlds()[at - 1]] == [2, 1, 2]
    mine, theirs = (read_lines(one.folder.metrics)[-1]["loss"] for one in (training, undisturbed))
    assert mine == pytest.approx(theirs, rel=1e-3)  # the same global batches; sums in another order


@pytest.mark.full
def test_what_a_finetuning_measures_is_the_same_in_any_number_of_workers(
    ray: Ray, corpus: Path, tmp_path: Path
) -> None:
    told = {}
    for workers in (0, 1, 2):
        out = tmp_path / f"workers{workers}"
        fixed = {"parent": "test_resnet", "is_pretrained": False, "size_px": 32, "batch_size": 12, "epochs": 3}
        fixed |= {"validate_share": 0.25, "threads": 1, "judge": "", "splits": {"stratify": True}, "has_report": False}
        config = FinetuneConfig.model_validate({"corpus": str(corpus), "out": str(out), "workers": workers, **fixed})
        words = ["finetune", "--corpus", str(corpus), "--from", "test_resnet", "--out", str(out)]
        words += ["--workers", str(workers), "--address", ray.address]
        for name, value in fixed.items():
            words += [] if name == "parent" else ["--set", f"{name}={json.dumps(value)}"]
        done = run(ray.env, *words)
        assert done.returncode == 0, done.stderr
        told[workers] = measured(out)
        assert told[workers][-1][1] == share_right(config)  # what its bundle says of them, one at a time
    print(f"\nmeasured: {told}")
    assert [step for step, _ in told[0]] == [3, 6, 9]
    assert told[0] == told[1] == told[2]
    assert storage.sha256_file(tmp_path / "workers0/model.safetensors") == storage.sha256_file(
        tmp_path / "workers1/model.safetensors"
    )


@pytest.mark.full
def test_a_preemption_notice_makes_a_checkpoint_at_once_and_no_step_is_done_twice(
    training: Training, undisturbed: Training
) -> None:
    driver = training.start("checkpoint_every_steps=1000", slow_ms=300)
    wait_for(lambda: len({row["step"] for row in training.steps()}) >= 4 or driver.poll() is not None)
    raylet = training.rank(0).parent()
    assert raylet is not None
    (socket,) = (word.partition("=")[2] for word in raylet.cmdline() if word.startswith("--raylet_socket_name="))
    script = "import ray, sys; ray.init(sys.argv[1]); print([n['NodeID'] for n in ray.nodes() if n['RayletSocketName'] == sys.argv[2]][0])"  # noqa: E501
    found = subprocess.run(
        [sys.executable, "-c", script, training.ray.address, socket],
        env=training.env,
        capture_output=True,
        text=True,
        check=True,
    )
    node = found.stdout.split()[-1]
    words = ["drain-node", "--address", training.ray.address, "--node-id", node, "--reason-message", "spot"]
    words += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--deadline-remaining-seconds", "60"]
    subprocess.run([str(Path(sys.executable).parent / "ray"), *words], env=training.env, check=True)
    try:
        training.assert_done(driver)
    finally:
        training.ray.add_node()
    starts = [row["step"] for row in read_lines(training.folder.starts)]
    print(f"\nstarts: {starts}")
    assert len(starts) == 2
    done = Counter((row["step"], row["rank"]) for row in training.steps())
    assert set(done.values()) == {1}
    assert training.weights() == undisturbed.weights()


def test_both_forms_of_the_feed_give_the_same_pixels(ray: Ray, corpus: Path, tmp_path: Path) -> None:
    """In its own process: it connects to the cluster as a worker's process would."""
    script = """
import json, sys
import numpy as np
from eagleray.flows import pretrain, runtime
from eagleray.flows.ray_feed import RayBatches
from eagleray.flows.train_worker import Seat
from eagleray.learn.order import Position

config = pretrain.PretrainConfig(corpus=sys.argv[1], method="byol", backbone="test_resnet", out="nowhere",
                                 size_px=32, batch_size=20, epochs=2, seed=3, workers=2)
work = pretrain.make_work(config)
seen = 0
with runtime.cluster(sys.argv[2]):
    for rank in range(2):
        seat = Seat(rank, 2)
        ours = work.batches(rank=rank, world_size=2).iterate(Position(0, 20))
        for made in RayBatches(work, seat).iterate(Position(0, 20)):
            wanted = next(ours)
            assert (made.epoch, made.position, made.num_images) == (wanted.epoch, wanted.position, wanted.num_images)
            assert sorted(made.arrays) == sorted(wanted.arrays) == ["key", "target", "view_0", "view_1"]
            for name, array in wanted.arrays.items():
                assert array.dtype == made.arrays[name].dtype, name
                assert np.array_equal(array, made.arrays[name]), name
            seen += 1
print(json.dumps({"steps": seen}))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(corpus), ray.address],
        env=ray.env, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"steps": 2 * 3}
