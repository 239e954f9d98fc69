"""The verbs of learning: evaluate.

Each parses, builds its Config and calls one function. An option is named as its Config field and is None when it was
not given, so that the default stands in one place only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from eagleray.cli.archive import Address, Model, Out, Runtime
from eagleray.cli.options import Common, Outcome, fields, table

Corpus = Annotated[
    str | None, typer.Option("--corpus", metavar="CORPUS", help="Corpus: a folder that `ingest` wrote, with labels.")
]

SHOWN = ("top1", "top5", "balanced_accuracy", "f1_macro", "map", "roc_auc", "ece")


def evaluate(
    *,
    corpus: Corpus = None,
    model: Model = None,
    out: Out = None,
    split: Annotated[
        str | None, typer.Option("--split", metavar="NAME", help="Which images: a split's name, or all; default test.")
    ] = None,
    runtime: Runtime = None,
    address: Address = None,
    common: Common,
) -> Outcome:
    """Judges a model against the labels of a corpus: accuracy, F1, ROC-AUC, calibration, each with its interval.

    A corpus with a split column uses it, another gets a hashed split. The same command again does nothing new.
    Example: eagleray evaluate --corpus corpora/photos --model bundles/lite0 --out runs/photos-eval
    """
    from eagleray.flows.evaluate import EvaluateConfig, run

    config = common.load(
        EvaluateConfig, corpus=corpus, model=model, out=out, split=split, runtime=runtime, address=address
    )
    said = run(config)
    return Outcome(said, _figures(said))


def _figures(said: Mapping[str, Any]) -> str:
    """An evaluation's summary for a person."""
    rows = [[name, said[name]["value"], said[name]["low"], said[name]["high"]] for name in SHOWN]
    lines = {
        "images": said["n"],
        "split": f"{said['split']['name']}, by {said['split']['how']}",
        "classes": said["num_classes"],
        "left out": sum(said["left_out"].values()),
        "page": said["report"] or "none",
        "figures": f"{said['out']}/metrics.json",
    }
    return f"{table(rows, heads=('metric', 'value', 'low', 'high'))}\n\n{fields(lines)}"
