"""Who runs side by side: `eagleray score` and the peers, each as a process of its own, under the same meter.

Every contestant takes a model and an archive and gives back an Outcome; the peers first try their settings on a few
images, print what each gave, and keep the best. Peers that need other packages than Eagleray's run in a venv made here.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
from checkout import EAGLERAY, environment
from model_maker import Model
from peers.yardstick import Meter, digest, read_top1

HERE = Path(__file__).resolve().parent
PEER_PACKAGES = (
    "daft==0.7.26",
    "numpy==2.4.6",
    "onnxruntime==1.32.0",
    "pillow==13.0.0",
    "psutil==7.2.2",
    "simplejpeg==1.9.0",
)
TIMEOUT_S = 1_800


@dataclass(frozen=True)
class Cost:
    """What one process and its descendants took, from outside."""

    seconds: float
    cpu_s: float
    peak_rss_mib: float
    driver_peak_mib: float


@dataclass(frozen=True)
class Outcome:
    """One run of one contestant; steady = wall time from workers ready to the last result written."""

    images: int
    seconds_steady: float
    engine: str
    cost: Cost
    top1: Mapping[str, int] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """The figures, and the digest of the answers instead of the answers."""
        figures = {"images": self.images, "engine": self.engine, "seconds_steady": self.seconds_steady}
        return {**figures, **vars(self.cost), "top1": digest(dict(self.top1))}


@contextmanager
def running(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A contestant as a process in a session of its own, its stderr in a file; never outlives the block."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as errors:
        process = subprocess.Popen(
            list(command), stdout=subprocess.PIPE, stderr=errors, env=environment(), start_new_session=True
        )
        try:
            yield process
        finally:
            end_all(process.pid)


def end_all(pid: int) -> None:
    """Ends a process and its descendants, and waits for them to be gone."""
    try:
        root = psutil.Process(pid)
        tree = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in tree:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(tree, timeout=30)


def metered(command: Sequence[str], log: Path) -> tuple[str, Cost]:
    """Runs a command to its end; its stdout and its cost.

    Raises:
        SystemExit: It failed; the message holds the end of its stderr.
    """
    before = _reaped_cpu_s()
    begin = time.perf_counter()
    with running(command, log) as process, Meter(process.pid) as meter:
        out, _ = process.communicate(timeout=TIMEOUT_S)
        seconds = time.perf_counter() - begin
        reaped = _reaped_cpu_s() - before  # exact, but blind to workers that were not waited for; the meter is not
    if process.returncode != 0:
        tail = log.read_text(errors="replace")[-3_000:]
        raise SystemExit(f"{' '.join(command)}\nended with {process.returncode}:\n{tail}")
    cost = Cost(seconds, max(meter.cpu_s, reaped), meter.peak_rss_mib, meter.root_peak_rss_mib)
    return out.decode(), cost


def _reaped_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@dataclass
class Ours:
    """`eagleray score FOLDER --model BUNDLE --out DIR`, from outside."""

    work: Path
    runtime: str = "onnx"
    name: str = "eagleray"
    settings: dict[str, Any] = field(default_factory=dict)

    def command(self, model: Model, archive: Path, out: Path) -> list[str]:
        """The command as an operator would type it."""
        run = ["score", str(archive), "--model", str(model.bundle), "--out", str(out), "--runtime", self.runtime]
        extra = [part for key, value in self.settings.items() for part in ("--set", f"{key}={value}")]
        return [*EAGLERAY, *run, "--plain", "--json", *extra]

    def tune(self, model: Model, archive: Path, images: int) -> None:
        """Nothing is tuned: the defaults are what is judged. `auto` measures its engines here, once a bundle."""
        if self.runtime == "auto":
            first = next(archive.rglob("*.jpg"))
            command = [*EAGLERAY, "predict", str(first), "--model", str(model.bundle), "--runtime", "auto", "--json"]
            metered(command, self.work / "auto.log")

    def run(self, model: Model, archive: Path) -> Outcome:
        """One fresh run."""
        out = self.work / f"{self.name.replace(' ', '-')}-{model.name}-{archive.name}"
        shutil.rmtree(out, ignore_errors=True)
        _, cost = metered(self.command(model, archive, out), out.with_suffix(".log"))
        told = json.loads((out / "run.json").read_bytes())
        return Outcome(
            images=told["images_in"],
            seconds_steady=told["seconds_steady"],
            engine=told["runtime"]["name"],
            cost=cost,
            top1=scored_top1(out, model.labels),
        )


def scored_top1(out: Path, labels: Sequence[str]) -> dict[str, int]:
    """Top-1 index by file name, from the parts that the run's manifest lists."""
    position = {label: index for index, label in enumerate(labels)}
    found = {}
    for part in json.loads((out / "_manifest.json").read_bytes())["parts"]:
        table = pq.read_table(out / part["path"], columns=["uri", "label"])
        for uri, label in zip(table["uri"].to_pylist(), table["label"].to_pylist(), strict=True):
            found[uri.rpartition("/")[2]] = position.get(label, -1)
    return found


@dataclass
class Peer:
    """A script of peers/, run by the interpreter that has its packages."""

    work: Path
    name: str
    script: str
    python: Path
    settings: dict[str, Any] | None = None
    flags: tuple[str, ...] = ()

    def _command(self, model: Model, archive: Path, out: Path) -> list[str]:
        mean, std = (",".join(str(value) for value in values) for values in (model.mean, model.std))
        command = [str(self.python), str(HERE / "peers" / self.script), "--folder", str(archive), "--out", str(out)]
        return [*command, "--onnx", str(model.onnx), f"--mean={mean}", f"--std={std}", *self.flags]

    def tune(self, model: Model, archive: Path, images: int) -> None:
        """Tries the peer's settings on the first `images` images, prints each rate, keeps the best."""
        out = self.work / "sweep"
        shutil.rmtree(out, ignore_errors=True)
        command = [*self._command(model, archive, out), "--sweep", str(images)]
        text, _ = metered(command, self.work / f"{self.script}{''.join(self.flags)}-sweep.log")
        tried = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        for row in tried:
            print(f"#   {self.name:<20} {row['images_per_s']:8.1f} img/s  {json.dumps(row['settings'])}", flush=True)
        self.settings = max(tried, key=lambda row: row["images_per_s"])["settings"]

    def run(self, model: Model, archive: Path) -> Outcome:
        """One fresh run at the best settings."""
        out = self.work / f"{self.script}-{model.name}-{archive.name}"
        shutil.rmtree(out, ignore_errors=True)
        command = [*self._command(model, archive, out), "--no-meter"]
        if self.settings is not None:
            command += ["--settings", json.dumps(self.settings)]
        text, cost = metered(command, out.with_suffix(".log"))
        told = json.loads(text.splitlines()[-1])
        return Outcome(
            images=told["images"],
            seconds_steady=told["seconds_steady"],
            engine="onnx",
            cost=cost,
            top1=read_top1(out),
        )


def peers_python(cache_folder: Path) -> Path:
    """The interpreter of the peers' venv, made when its list of packages has changed."""
    home = cache_folder / "peers-venv"
    python, stamp = home / "bin" / "python", home / "packages.txt"
    wanted = "\n".join(PEER_PACKAGES)
    if not stamp.is_file() or stamp.read_text() != wanted:
        print(f"# making {home}: {', '.join(PEER_PACKAGES)}", flush=True)
        shutil.rmtree(home, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--quiet", *PEER_PACKAGES], check=True)
        stamp.write_text(wanted)
    return python


def contestants(work: Path, cache_folder: Path, names: Sequence[str]) -> dict[str, Ours | Peer]:
    """Those asked for, by short name; `ours` always."""
    found: dict[str, Ours | Peer] = {"ours": Ours(work)}
    if "ray" in names:
        found["ray"] = Peer(work, "Ray Data, canonical", "ray_data_canonical.py", Path(sys.executable))
    if "tuned" in names:
        python = Path(sys.executable)
        found["tuned"] = Peer(work, "Ray Data, hand-tuned", "ray_data_canonical.py", python, flags=("--tuned",))
    if "loop" in names:
        found["loop"] = Peer(work, "two-process loop", "two_process_loop.py", peers_python(cache_folder))
    if "daft" in names:
        found["daft"] = Peer(work, "daft", "daft_pipeline.py", peers_python(cache_folder))
    if "auto" in names:
        found["auto"] = Ours(work, runtime="auto", name="eagleray auto")
    return found
