"""Fine-tune the last layer alone: features once, through the scoring path, then a head on them.

The features are a scoring run of the frozen backbone under ``RUN/features``, resumable as any: a run that is stopped
has its finished units, and another head on the same backbone (another C, balance or loss) makes no features anew.

Example:
    >>> run_head(FinetuneConfig(corpus="corpora/trash", parent="lite0", out="bundles/trash", mode="head"))
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eagleray.core.config import digest_json
from eagleray.flows import finetune_start, score, training_outputs
from eagleray.flows.finetune_judge import judge
from eagleray.flows.finetune_start import FinetuneConfig
from eagleray.flows.pool import cores
from eagleray.flows.run_folder import append_line
from eagleray.flows.train import already_done, refuse_other
from eagleray.flows.training_config import feed_settings, train_settings
from eagleray.flows.training_data import Chosen, counts_in_words
from eagleray.flows.training_run import Run, opened
from eagleray.vision.bundle import ModelBundle, load_bundle
from eagleray.vision.inputs import Selection

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from eagleray.learn.head import Head
    from eagleray.learn.starting_point import StartingPoint

FLOW = "eagleray.flows.finetune"
FEATURES, BACKBONE = "features", "backbone"
# Numbers up to which one thread fits the head: 311 evaluations on 863 x 1,280 took 5 s with one, 76 s with two on a
# machine that had other work (each waits for the other at every product)
ONE_THREAD_UP_TO = 20_000_000


def run_head(config: FinetuneConfig, *, is_quiet: bool = False, is_live: bool | None = None) -> dict[str, Any]:
    """Fits a head; see ``finetune.run``."""
    with opened(FLOW, config, is_quiet=is_quiet, is_live=is_live) as run:
        chosen, notes = finetune_start.select(config)
        point = finetune_start.start(config, chosen.index.labels)
        key = finetune_start.work_key(config, chosen, point)
        done = already_done(run, key)
        if done is not None:
            return done
        refuse_other(run, key)
        for note in (counts_in_words(chosen), *notes, *point.notes):
            run.line.note(note)
        about = {"images": len(chosen.index), "corpus_digest": chosen.corpus.digest}
        head_of_run = {**training_outputs.head(run, key), **about}
        training_outputs.write_state(run, {**head_of_run, "state": "running"})
        like = _backbone(run, config, chosen, point)
        features = make_features(run, config, chosen, like.path, is_quiet=is_quiet, is_live=is_live)
        head, figures = fit(run, config, chosen, features)
        from eagleray.learn.head import put_head

        put_head(point.model, head)
        made = finetune_start.made_of(config, chosen, point)
        bundle = training_outputs.write_bundle(run, key, chosen.index, made, like=like)
        ended = {"state": "finished", "step": figures.pop("step", 0), "fit": figures, "where": dict(run.where)}
        return training_outputs.close(
            run, key, bundle, {**head_of_run, **ended, **judge(run, config, chosen, is_quiet=is_quiet)}
        )


def make_features(
    run: Run, config: FinetuneConfig, chosen: Chosen, backbone: Path, *, is_quiet: bool, is_live: bool | None
) -> NDArray[np.float32]:
    """float32 (N, D): the embedding of each chosen image."""
    from eagleray.learn.features import read_features

    asked = finetune_start.score_config(run, config, model=str(backbone), folder=FEATURES, top_k=1, embeddings=True)
    said = score.run(asked, selection=Selection(_mask(config, chosen)), is_quiet=is_quiet, is_live=is_live)
    run.where.update(said["where"])
    append_line(run.folder.starts, {"attempt": 0, "step": 0, "world_size": 1, "at": round(time.time(), 3)})
    return read_features(run.folder.root / FEATURES, chosen.index)


def _backbone(run: Run, config: FinetuneConfig, chosen: Chosen, point: StartingPoint) -> ModelBundle:
    """The bundle that gives the features: the parent itself, or the model before its first step."""
    is_same = "bundle" in point.parent and config.size_px is None and config.head != "new"
    return load_bundle(config.parent) if is_same else _save_backbone(run, config, chosen, point)


def _mask(config: FinetuneConfig, chosen: Chosen) -> NDArray[np.bool_]:
    """bool over the whole corpus: the images of the split."""
    return chosen.splits.mask(chosen.split)


def _save_backbone(run: Run, config: FinetuneConfig, chosen: Chosen, point: StartingPoint) -> ModelBundle:
    """The model before its first step as a bundle, which the scoring path takes."""
    made = finetune_start.made_of(config, chosen, point)
    has_onnx = config.runtime != "torch"
    parts = {"parent": dict(point.parent), "labels": chosen.index.labels, "size_px": point.spec.height}
    name = digest_json({**parts, "seed": config.seed, "has_onnx": has_onnx})[:12]
    path = run.folder.root / f"{BACKBONE}-{name}"
    lineage = {**made.lineage, "mode": "frozen backbone"}
    return training_outputs.save_made(path, made, lineage, has_onnx=has_onnx)


def fit(run: Run, config: FinetuneConfig, chosen: Chosen, features: NDArray[np.float32]) -> tuple[Head, dict[str, Any]]:
    """A head on features: solved (``head``) or stepped to (``linear``).

    Returns:
        The head, and what to tell of the fit.
    """
    import torch

    torch.set_num_threads(config.threads or (cores() if features.size > ONE_THREAD_UP_TO else 1))
    started = time.monotonic()
    if config.mode == "linear":
        head, told = _step_to(run, config, chosen, features)
    else:
        head, told = _solve(run, config, chosen, features)
    told = {**told, "features": list(features.shape), "fit_s": round(time.monotonic() - started, 3)}
    run.line.note(f"a head on {features.shape[0]:,} x {features.shape[1]:,} features in {told['fit_s']:.1f} s")
    return head, told


def _solve(
    run: Run, config: FinetuneConfig, chosen: Chosen, features: NDArray[np.float32]
) -> tuple[Head, dict[str, Any]]:
    from eagleray.learn.head import HeadSettings, fit_head

    index = chosen.index
    settings = HeadSettings(
        c_values=config.c_values, is_balanced=config.balance in ("weights", "sampler"), seed=config.seed
    )
    groups = None
    if chosen.splits.group_column:
        kept = chosen.splits.groups[chosen.splits.mask(chosen.split)]
        groups = [str(group) for group in kept] if len(kept) == len(index) else None
    head = fit_head(features, _targets(config, chosen), settings, num_classes=len(index.labels), groups=groups)
    if head.scores and head.c is not None:
        what = "mean log-likelihood" if config.is_multi_label else "accuracy"
        run.line.note(f"C {head.c:g} of {len(head.scores)} by cross-validated {what} {head.scores[head.c]:.4f}")
    return head, {"c": head.c, "cross_validated": {f"{c:g}": score for c, score in head.scores.items()}}


def _step_to(
    run: Run, config: FinetuneConfig, chosen: Chosen, features: NDArray[np.float32]
) -> tuple[Head, dict[str, Any]]:
    from eagleray.learn.balance import BalancedSampler
    from eagleray.learn.classification import HeadTask
    from eagleray.learn.features import ArrayBatches
    from eagleray.learn.training import Hooks, train

    index = chosen.index
    task = HeadTask(features, finetune_start.classification(config), class_counts=index.class_counts, seed=config.seed)
    repeats = BalancedSampler(index.first_targets, seed=config.seed)(0) if config.balance == "sampler" else None
    targets = _targets(config, chosen)
    arrays = {"features": features, "labels" if config.is_multi_label else "target": targets}
    batches = ArrayBatches(arrays, feed_settings(config, keeps_last=True), repeats=repeats)

    def report(report: Any) -> None:
        append_line(
            run.folder.metrics,
            {
                **report.to_json(),
                "figures": {},
                "line": report.line(),
                "world_size": 1,
                "attempt": 0,
                "at": time.time(),
            },
        )
        run.line.show(report.line())

    result = train(task, batches, train_settings(config), hooks=Hooks(on_report=report, folder=run.folder.root))
    return task.head(), {"step": result.progress.step, "loss": result.report.loss}


def _targets(config: FinetuneConfig, chosen: Chosen) -> NDArray[Any]:
    """int64 (N,), or uint8 (N, C) where an image may have several labels."""
    import numpy as np

    index = chosen.index
    if not config.is_multi_label:
        return index.first_targets
    targets = np.zeros((len(index), len(index.labels)), np.uint8)
    targets[np.repeat(np.arange(len(index)), index.num_targets), index.classes] = 1
    return targets
