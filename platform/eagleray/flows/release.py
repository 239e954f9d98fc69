"""Release a bundle: distilled, pruned, quantised, for an engine, in this order; measured and gated after each step.

Each step's bundle, its evaluation and its row of the table lie in a folder of the run; what a gate stops stays there to
be looked at, and nothing is published. The same command again does only what is missing.

Refuses: a parent that cannot be trained where a step trains, an engine that is not here, calibration or training images
    that also judge, a folder that holds something else. A gate that does not pass is KpiNotMet.

Example:
    >>> run(ReleaseConfig(model="bundles/trash", corpus="corpora/trash", out="bundles/trash-int8", precision="int8"))
    {'bundle': 'bundles/trash-int8', ...}
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eagleray.assure.release_table import Gate, StepRow
from eagleray.core import storage
from eagleray.core.config import digest_json
from eagleray.core.errors import ConfigError, DataError, EagleError, KpiNotMet
from eagleray.core.progress import Note, notes
from eagleray.flows import release_outputs
from eagleray.flows.release_judgement import Bench
from eagleray.flows.release_plan import ReleaseConfig, Step, steps
from eagleray.flows.release_steps import BUNDLE, STEPS, Ask, check, publish
from eagleray.vision.bootstrap import Estimate
from eagleray.vision.bundle import HEAD, ModelBundle, load_bundle
from eagleray.vision.corpus import open_corpus

if TYPE_CHECKING:
    from eagleray.flows.certify import CertifyConfig
    from eagleray.vision.evidence import Evidence
    from eagleray.vision.prediction import ThresholdPolicy

__all__ = ["ReleaseConfig", "run"]

MADE, ROW = "made.json", "row.json"
PARENT = "0-parent"
SCHEMA = 1  # of what a step leaves: another number makes it anew


@dataclass(frozen=True)
class Made:
    """What has been made so far: rows of the table, and the last bundle."""

    rows: tuple[StepRow, ...]
    bundle: ModelBundle
    notes: tuple[str, ...] = ()


def run(config: ReleaseConfig, *, is_quiet: bool = False, is_live: bool | None = None) -> dict[str, Any]:
    """Releases, or resumes, or finds that there is nothing to do.

    Args:
        config: The release.
        is_quiet: No progress and no notes on stderr.
        is_live: As in the other flows; the steps' own progress follows it.

    Returns:
        ``bundle``, ``digest``, ``run``, ``rows`` (the table), ``notes``, ``cheapest``, ``report``.

    Raises:
        KpiNotMet: A gate did not pass; nothing is published, what was made stays in the run's folder.
        ConfigError: ``out`` or the run's folder holds something else, wrong keys, a parent that cannot be trained.
        DataError: No labels, no such split, a leak, images that train or calibrate and judge.
        CapabilityError: An engine or a package that is not here.
        ArtifactError: A bundle or the corpus does not hold.
        TrainingDiverged, StorageError, ClusterError: As they say; the same command resumes.
    """
    note = notes(is_quiet=is_quiet)
    parent, asked = load_bundle(config.model), steps(config)
    key = _key(config, parent, asked)
    _refuse_occupied(config, key)
    check(config, parent, asked)
    root = storage.make_folder(config.root)
    with storage.only_writer(root / ".lock", what=str(root)):
        done = release_outputs.read_finished(config, key)
        if done is not None:
            note(f"nothing to do: {config.out} is released")
            return done
        made = _work(config, key, parent, asked, note=note, is_quiet=is_quiet)
        if not made.rows[-1].is_passed:
            release_outputs.write(config, key, parent, made.rows, made.notes)
            raise _not_met(config, made.rows[-1])
        made = _decide_again(config, parent, made, note=note, is_quiet=is_quiet)
        published = publish(config, made.bundle, release_outputs.lineage(config, key, parent, asked, made.rows))
        note(f"released {config.out}")
        return release_outputs.write(config, key, parent, made.rows, made.notes, published=published)


def _key(config: ReleaseConfig, parent: ModelBundle, asked: list[Step]) -> str:
    """All that the released bundle depends on."""
    return digest_json([_judge_key(config, parent), *([step.name, _plain(step)] for step in asked)])


def _judge_key(config: ReleaseConfig, parent: ModelBundle) -> str:
    """What every row depends on besides its bundle."""
    names = ("max_drop_points", "max_class_drop_points", "gate_on", "split", "splits", "resamples", "level", "seed")
    more = ("rounds", "turn_s", "threads", "engines", "target", "num_gpus")
    values = config.model_dump(mode="json", include={*names, *more})
    policy = parent.policy.digest if parent.policy else ""
    corpus = open_corpus(config.corpus).digest
    return digest_json([SCHEMA, parent.model_digest, parent.image_spec.digest, policy, corpus, values])


def _plain(step: Step) -> Any:
    return {"settings": dict(step.settings)}


def _work(
    config: ReleaseConfig, key: str, parent: ModelBundle, asked: list[Step], *, note: Note, is_quiet: bool
) -> Made:
    """Makes and judges, step by step, until one does not pass."""
    root, judged_by = config.root, _judge_key(config, parent)
    home = storage.make_folder(root / PARENT)
    bench = Bench(config, parent, home)
    blank = StepRow(
        name="parent", what="as it was given", model_digest=parent.model_digest, architecture=parent.architecture,
        precision="fp32", accuracy=Estimate(None),
    )  # fmt: skip
    rows = [_judged(bench, parent, blank, judged_by, home, None)]
    note(release_outputs.line(rows[0]))
    bundle, chain = parent, digest_json([SCHEMA, parent.model_digest, open_corpus(config.corpus).digest])
    for number, step in enumerate(asked, 1):
        chain = digest_json([chain, step.name, _plain(step)])
        place = root / f"{number}-{step.name}"
        note(f"step {number} of {len(asked)}: {step.what}")
        before = bundle
        try:
            bundle, seconds = _make(Ask(config, step, place, is_quiet), before, chain)
        except KpiNotMet as error:  # the step's own gate: int8 cannot keep the accuracy
            gate = Gate(step.title, False, error.seen, error.expected)
            release_outputs.write(config, key, parent, [*rows[:-1], rows[-1].with_gates(gate)], ())
            raise
        if bundle is before and len(rows) > 1:  # the same model on the same engine: its row holds
            rows.append(replace(rows[-1], name=step.title, what=step.what, seconds=seconds))
            continue
        blank = StepRow(
            name=step.title, what=step.what, model_digest=bundle.model_digest, architecture=bundle.architecture,
            precision="fp32", accuracy=Estimate(None), seconds=seconds,
        )  # fmt: skip
        rows.append(_judged(bench, bundle, blank, digest_json([judged_by, chain]), place, rows[0]))
        note(release_outputs.line(rows[-1]))
        if not rows[-1].is_passed:
            break
    return Made(tuple(rows), bundle)


def _make(ask: Ask, bundle: ModelBundle, key: str) -> tuple[ModelBundle, float]:
    """The step's bundle: made, or found as it was made; and the seconds that making it took."""
    there = _read(ask.home / MADE)
    if there.get("key") == key:
        is_same = there["model_digest"] == bundle.model_digest
        return (bundle if is_same else load_bundle(ask.home / BUNDLE)), float(there["seconds"])
    if there:  # of another parent, corpus or setting
        shutil.rmtree(ask.home)
    storage.make_folder(ask.home)
    started = time.monotonic()
    made = STEPS[ask.step.name](ask, bundle)
    seconds = round(time.monotonic() - started, 3)
    told = {"key": key, "model_digest": made.model_digest, "seconds": seconds}
    storage.write_json(ask.home / MADE, told)
    return made, seconds


def _judged(bench: Bench, bundle: ModelBundle, blank: StepRow, key: str, home: Path, parent: StepRow | None) -> StepRow:
    """A row of the table: judged, or read as it was judged; ``parent`` is the first of them."""
    there = _read(home / ROW)
    if there.get("key") == key and there["row"]["model_digest"] == bundle.model_digest:
        return StepRow.from_json(there["row"])
    row = bench.judge(bundle, home, blank, parent=parent)
    storage.write_json(home / ROW, {"key": key, "row": row.to_json()})
    return row


def _decide_again(config: ReleaseConfig, parent: ModelBundle, made: Made, *, note: Note, is_quiet: bool) -> Made:
    """The thresholds of the parent hold for its own probabilities: they are certified again, or dropped and told."""
    if parent.policy is None or made.bundle.model_digest == parent.model_digest:
        return made
    bundle, reason = replace(made.bundle, policy=None), ""
    evidence, corpus = parent.policy.evidence, open_corpus(config.corpus).digest
    chose = ((made.bundle.lineage.get("calibration") or {}).get("chosen_by") or {}).get("split")
    if evidence is None:
        reason = "they carry no KPI by which they could be found again"
    elif evidence.corpus != corpus:
        reason = "they were certified on another corpus"
    elif evidence.split in (config.train_split, chose):
        reason = f"the images of {evidence.split!r}, on which they were certified, have made this model"
    else:
        from eagleray.flows.certify import run as certify

        asked = _certifying(config, parent.policy, evidence, made.bundle)
        try:
            certify(asked, is_quiet=is_quiet)
            bundle = load_bundle(asked.out)
        except (KpiNotMet, DataError) as error:
            reason = error.seen
    again = f"certified again, by certify's default settings: {evidence.kpi}" if evidence else ""
    told = f"the parent's thresholds are dropped: {reason}" if reason else again
    note(told)
    return replace(made, bundle=bundle, notes=(*made.notes, told))


def _certifying(
    config: ReleaseConfig, policy: ThresholdPolicy, evidence: Evidence, bundle: ModelBundle
) -> CertifyConfig:
    """The certification of a released model by its parent's KPI, where and how the release runs; a folder a model."""
    from eagleray.flows.certify import CertifyConfig

    same = ("corpus", "splits", "address", "workers", "num_cpus", "num_gpus", "threads", "batch_size")
    return CertifyConfig(
        model=str(bundle.path),
        kpi=evidence.kpi,
        out=str(config.root / f"certified-{bundle.model_digest[:12]}"),
        split=evidence.split,
        otherwise=policy.otherwise,
        runtime=config.runtime_for(bundle),
        in_process_below=config.in_process_below,
        **{name: getattr(config, name) for name in same},
    )


def _not_met(config: ReleaseConfig, row: StepRow) -> KpiNotMet:
    failed = [gate for gate in row.gates if not gate.is_passed]
    return KpiNotMet(
        f"{row.name} does not pass: " + "; ".join(f"{gate.name}: {gate.seen}" for gate in failed),
        expected="; ".join(gate.allowed for gate in failed),
        fix=f"look at {config.root}; ask for less, give it a longer training, or allow a larger loss; nothing was "
        "published",
    )


def _refuse_occupied(config: ReleaseConfig, key: str) -> None:
    """``out`` is free or of this very release; the run's folder is free or of a release."""
    out, root = Path(config.out), config.root
    if "://" in config.out:
        raise ConfigError(f"the output {config.out} is a remote URI", expected="a folder", fix="mount it")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        own = ""
        if (out / HEAD).is_file():
            own = str((load_bundle(out).lineage.get("release") or {}).get("key", ""))
        if own != key:
            raise ConfigError(
                f"{out} holds something that this command did not make",
                expected="a new folder, or the bundle of this very release",
                fix="give another --out",
            )
    found = sorted(path.name for path in root.iterdir() if path.name != ".lock") if root.is_dir() else []
    if found and not (root / PARENT).is_dir():
        raise ConfigError(
            f"{root} is not empty and holds no release: {', '.join(found[:5])}",
            expected="a new folder, or that of the release to resume",
            fix="give another --out, or run_dir",
        )


def _read(path: Path) -> dict[str, Any]:
    """A small file of a step; empty where it is not there or torn."""
    try:
        found = storage.read_json(path)
    except (FileNotFoundError, ValueError, EagleError):
        return {}
    return found if isinstance(found, dict) else {}
