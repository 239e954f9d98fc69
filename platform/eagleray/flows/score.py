"""Score an archive: every image exactly once, or set aside with a reason; the same command again does what is missing.

The flow freezes the input, resolves the runtime once, gives units to a pool (child processes for a small archive, Ray
Data over actors for the rest), and writes the one manifest that must balance. What a unit is and how it is scored
stands in vision.inputs and infer.scoring; here is only where and when.

Example:
    >>> run(ScoreConfig(source="photos/", model="models/lite0", out="runs/photos"))["scored"]
    2012
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import Field

from eagleray.core import storage
from eagleray.core.commits import Ledger
from eagleray.core.config import digest_json
from eagleray.core.errors import ConfigError
from eagleray.core.progress import Progress, notes
from eagleray.core.tables import find
from eagleray.flows.pool import Pool, cores
from eagleray.flows.scoring_place import ScoringPlace
from eagleray.flows.units import map_units
from eagleray.infer.runtimes import RUNTIMES
from eagleray.infer.scoring import ScoreSettings
from eagleray.vision.bundle import ModelBundle, load_bundle
from eagleray.vision.images import Limits
from eagleray.vision.inputs import FrozenInput, Selection, freeze_corpus, freeze_listing

WORKER = "eagleray.infer.scoring:ShardScorer"
CPU_DECODE_THREADS = 2  # of a worker that owns one core: they read ahead while the engine runs


class ScoreConfig(ScoringPlace):
    """What to score, with what, to where; the rest says how, with the fields of ScoringPlace.

    Attributes:
        source: A corpus, or what `ingest` takes.
        model: A bundle's folder.
        out: The run's folder: new, empty, or of a run over the same source.
        top_k: Labels a row.
        embeddings: Write the embedding column (float16).
        hang_timeout_s: A decode without progress for so long ends its worker.
        memory_mib: Data memory a CPU worker may add; 0 = no limit.
        max_pixels, max_side_px, max_file_mib: Caps on one image.
        has_report: Write report.html.
    """

    source: str
    model: str
    out: str
    top_k: int = Field(5, ge=1, le=1000)
    embeddings: bool = False
    hang_timeout_s: float = Field(20.0, gt=0)
    memory_mib: int = Field(4096, ge=0)
    max_pixels: int = Field(Limits().max_pixels, ge=1)
    max_side_px: int = Field(Limits().max_side_px, ge=1)
    max_file_mib: int = Field(Limits().max_bytes // 2**20, ge=1)
    has_report: bool = True


@dataclass(frozen=True)
class Plan:
    """A run, resolved: what a resume must find again.

    Attributes:
        config: As asked.
        bundle: The model.
        frozen: The input, cut into units.
        runtime: Name and version of the engine, and the device; ``auto`` resolved.
        key_fields: All that changes a result; its digest is the ledger's key.
    """

    config: ScoreConfig
    bundle: ModelBundle
    frozen: FrozenInput
    runtime: Mapping[str, str]
    key_fields: Mapping[str, Any]

    @property
    def key(self) -> str:
        """The ledger's key."""
        return digest_json(dict(self.key_fields))

    @property
    def root(self) -> Path:
        """The run's folder."""
        return Path(self.config.out)


def run(
    config: ScoreConfig, *, selection: Selection | None = None, is_quiet: bool = False, is_live: bool | None = None
) -> dict[str, Any]:
    """Scores, or resumes, or finds that there is nothing to do.

    Args:
        config: The run.
        selection: Only these images of the corpus that ``config.source`` is.
        is_quiet: No progress and no notes on stderr.
        is_live: A live line (True), log lines (False), or by whether stderr is a terminal.

    Returns:
        The summary: totals, paths, what was done now (as run.json has it).

    Raises:
        ConfigError: ``out`` holds something else, or a wrong setting.
        DataError: The source is missing, empty or no archive.
        ArtifactError: The bundle or the corpus does not hold.
        CapabilityError: The runtime is not here.
        StorageError: No space or no permission; what was committed stays.
        RunIncomplete: The totals do not balance.
    """
    from eagleray.flows import score_outputs

    note = notes(is_quiet=is_quiet)
    bundle = load_bundle(config.model)
    _refuse_foreign(Path(config.out))
    root = storage.make_folder(config.out)
    with storage.only_writer(root / ".lock", what=str(root)):
        previous = score_outputs.read_run(root)
        frozen = _freeze(config, root, selection, note)
        plan = _plan(config, bundle, frozen, previous, note)
        _say_what_changed(plan, previous, note)
        ledger = Ledger(root, plan.key).open()
        done = ledger.committed()
        units = list(_todo(plan, done))
        if not units and score_outputs.is_finished(plan, previous):
            note(f"nothing to do: {frozen.images_in:,} images are scored in {root}")
            return score_outputs.summary(previous or {}, done_now=0)
        started = datetime.now(UTC)
        score_outputs.write_running(plan, started)
        already = _rows(plan, done)
        show = Progress(total=frozen.images_in, what="score", already=already, is_live=is_live, is_quiet=is_quiet)
        with show as progress:
            where, answers = _work(plan, units, progress)
        return score_outputs.finish(plan, ledger, where, answers, progress.history, started)


def _refuse_foreign(root: Path) -> None:
    """A folder that holds something else is not written into."""
    if not root.is_dir() or (root / "input").is_dir() or (root / "run.json").exists():
        return
    found = sorted(path.name for path in root.iterdir() if path.name not in (".lock",))
    if found:
        raise ConfigError(
            f"{root} is not empty and holds no run of `eagleray score`: {', '.join(found[:5])}",
            expected="a new or empty folder, or the folder of the run to resume",
            fix="give another --out",
        )


def _freeze(config: ScoreConfig, root: Path, selection: Selection | None, note: Any) -> FrozenInput:
    """Freezes the input: a corpus as it is, what can be read in place by a listing, the rest by an ingest first."""
    from eagleray.vision import sources
    from eagleray.vision.corpus import is_corpus, open_corpus

    home = root / "input"
    if is_corpus(config.source):
        return freeze_corpus(open_corpus(config.source), home, selection)
    if sources.is_random_access(config.source):
        return freeze_listing(sources.absolute(config.source), sources.list_items(config.source), home)
    from eagleray.flows import ingest

    note(f"{config.source} cannot be read in place: it is ingested into {home / 'corpus'} first")
    corpus = ingest.run(ingest.IngestConfig(sources=(config.source,), out=str(home / "corpus"), address=config.address))
    return freeze_corpus(corpus, home)


def _plan(
    config: ScoreConfig, bundle: ModelBundle, frozen: FrozenInput, previous: Mapping[str, Any] | None, note: Any
) -> Plan:
    device = "cuda" if config.num_gpus > 0 else "cpu"
    runtime = _resolve_runtime(config, bundle, device, previous, note)
    key_fields = {
        "model_digest": bundle.model_digest,
        "image_spec_digest": bundle.image_spec.digest,
        "policy_digest": bundle.policy.digest if bundle.policy else "",
        "runtime": runtime["name"],
        "runtime_version": runtime["version"],
        "device": device,
        "precision": runtime["precision"],
        "columns": {"top_k": config.top_k, "embeddings": config.embeddings},
        "limits": [config.max_pixels, config.max_side_px, config.max_file_mib],
    }
    return Plan(config, bundle, frozen, runtime, key_fields)


def _resolve_runtime(
    config: ScoreConfig, bundle: ModelBundle, device: str, previous: Mapping[str, Any] | None, note: Any
) -> dict[str, str]:
    """The engine of this run: as asked, as the run began with, or the fastest of those measured here."""
    name = config.runtime
    if name == "auto" and previous and previous["model"]["digest"] == bundle.model_digest:
        name = previous["runtime"]["name"]  # resolved once a run, kept by a resume
    if name == "auto":
        from eagleray.infer.runtimes.measure import choose_runtime

        choice = choose_runtime(bundle, threads=config.threads, device=device)
        measured = ", ".join(f"{key} {rate:,.0f} img/s" for key, rate in choice.measured.items())
        note(f"runtime auto: {choice.name}" + (f" ({measured}, one worker)" if measured else ""))
        name = choice.name
    entry = find(RUNTIMES, name, what="runtime")
    return {"name": name, "version": entry.version, "device": device, "precision": bundle.precision}


def _say_what_changed(plan: Plan, previous: Mapping[str, Any] | None, note: Any) -> None:
    """Says what is stale and what the source has gained or lost since the run before; never in silence."""
    changes = plan.frozen.changes
    if any(changes.values()):
        parts = [f"{count:,} {kind}" for kind, count in changes.items() if count]
        note(f"the source has changed since the last run: {', '.join(parts)}")
    if not previous or previous.get("ledger_key") in (None, plan.key):
        return
    before = previous.get("key_fields", {})
    stale = [name for name, value in plan.key_fields.items() if before.get(name) != value]
    note(f"stale: the scores in {plan.root} were made with another {', '.join(stale)}; every image is scored again")


def _todo(plan: Plan, done: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The anti-join: units that no attempt has committed; one that is the rest of a committed unit takes its rows."""
    for unit in plan.frozen.units:
        if unit["unit"] not in done:
            ancestor = done.get(unit["derived_from"] or "")
            yield {**unit, "reuse": ancestor["path"]} if ancestor else unit


def _rows(plan: Plan, done: Mapping[str, Any]) -> int:
    return sum(done[unit["unit"]]["rows"] for unit in plan.frozen.units if unit["unit"] in done)


def _work(plan: Plan, units: list[dict[str, Any]], progress: Progress) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Gives the units to a pool; returns where they ran and what each worker answered."""
    config = plan.config
    is_local = config.address is None and sum(unit["images"] for unit in units) < config.in_process_below
    answers = []
    place: AbstractContextManager[dict[str, Any]]
    if is_local or not units:
        place = nullcontext({"mode": "in process", "nodes": [os.uname().nodename], "cpus": cores(), "gpus": 0})
    else:
        from eagleray.flows import runtime

        place = runtime.cluster(config.address)
    with place as where:
        pool = Pool(config.workers, config.num_cpus, config.num_gpus, is_local=is_local)
        if not is_local and units:
            pool = dataclasses.replace(pool, workers=runtime.pool_size(pool, where, len(units)))
        for answer in map_units(units, WORKER, dataclasses.asdict(_settings(plan)), pool):
            answers.append(answer)
            progress.update(done=answer["rows"], quarantined=answer["quarantined"])
        workers = len({(a["node"], a["pid"]) for a in answers})
        return {**where, "workers": workers}, answers


def _settings(plan: Plan) -> ScoreSettings:
    config = plan.config
    duplicates = Path(plan.frozen.source) / "duplicates.parquet" if plan.frozen.kind == "corpus" else ""
    return ScoreSettings(
        root=str(plan.root.resolve()),
        key=plan.key,
        bundle=str(plan.bundle.path.resolve()),
        model_digest=plan.bundle.model_digest,
        runtime=plan.runtime["name"],
        device=plan.runtime["device"],
        top_k=config.top_k,
        has_embeddings=config.embeddings,
        threads=config.threads,
        decode_threads=_decode_threads(config),
        batch_size=config.batch_size,
        hang_timeout_s=config.hang_timeout_s,
        memory_mib=config.memory_mib,
        duplicates=str(duplicates),
        max_pixels=config.max_pixels,
        max_side_px=config.max_side_px,
        max_bytes=config.max_file_mib * 2**20,
    )


def _decode_threads(config: ScoreConfig) -> int:
    if config.decode_threads is not None:
        return config.decode_threads
    return cores() if config.num_gpus else CPU_DECODE_THREADS
