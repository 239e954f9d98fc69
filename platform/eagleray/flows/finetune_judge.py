"""What a fine-tuned bundle is worth on a split it was not trained on, for its page: `evaluate`, as anybody runs it.

Example:
    >>> judge(run, config, chosen)["evaluation"]["top1"]
    {'value': 0.896, 'low': 0.856, 'high': 0.932}
"""

from __future__ import annotations

from typing import Any

from eagleray.flows import evaluate
from eagleray.flows.finetune_start import FinetuneConfig, refuse_unjudged
from eagleray.flows.report import EVALUATION
from eagleray.flows.training_data import Chosen
from eagleray.flows.training_run import Run

KEPT = ("top1", "top5", "balanced_accuracy", "f1_macro", "roc_auc", "ece", "map", "n")


def judge(run: Run, config: FinetuneConfig, chosen: Chosen, *, is_quiet: bool = False) -> dict[str, Any]:
    """Evaluates the bundle on the split that is held out; an empty dict when there is none.

    Raises:
        DataError: The split was named and is not there.
    """
    split = refuse_unjudged(config, chosen)
    if not split:
        run.line.note("no split is held out: the result is not judged")
        return {}
    found = evaluate.run(
        evaluate.EvaluateConfig(
            corpus=config.corpus,
            model=config.out,
            out=str(run.folder.root / EVALUATION),
            split=split,
            splits=config.splits,
            task="multi_label" if config.is_multi_label else "single_label",
            seed=config.seed,
            allow_leaks=config.allow_leaks,
            allow_missing=True,
            allow_unknown=True,
            runtime=config.runtime,
            address=config.address,
            num_cpus=config.num_cpus,
            num_gpus=config.num_gpus,
            in_process_below=config.in_process_below if config.is_on_ray else 2**62,
            has_report=False,
        ),
        is_quiet=True,
    )
    top1 = found["top1"]
    interval = f" ({top1['low']:.3f} to {top1['high']:.3f})" if top1["low"] is not None else ""
    run.line.note(f"top-1 {top1['value']:.3f}{interval} on {found['n']:,} images of the split {split!r}")
    return {"evaluation": {"split": split, **{name: found[name] for name in KEPT if name in found}}}
