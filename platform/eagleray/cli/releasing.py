"""The verbs of releasing: certify.

Each parses, builds its Config and calls one function. An option is named as its Config field and is None when it was
not given, so that the default stands in one place only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from eagleray.cli.archive import Address, Model, Runtime
from eagleray.cli.learning import Corpus, OutBundle
from eagleray.cli.options import Common, Outcome, fields, table


def certify(
    *,
    corpus: Corpus = None,
    model: Model = None,
    kpi: Annotated[
        str | None,
        typer.Option("--kpi", metavar="TEXT", help="e.g. 'precision(defect)>=0.95@0.95; maximize recall(defect)'."),
    ] = None,
    out: OutBundle = None,
    split: Annotated[
        str | None,
        typer.Option("--split", metavar="NAME", help="Which images; default calibration where there is one, or test."),
    ] = None,
    has_temperature: Annotated[
        bool | None, typer.Option("--temperature/--no-temperature", help="Fit a temperature before the thresholds.")
    ] = None,
    runtime: Runtime = None,
    address: Address = None,
    common: Common,
) -> Outcome:
    """Finds thresholds whose KPI is proved on held-out images, and writes a bundle that decides by them.

    What these images do not prove is not published: exit code 6. The same command again does nothing new.
    Example: eagleray certify --corpus C --model B --kpi 'precision(crack)>=0.95@0.95' --out B2
    """
    from eagleray.flows.certify import CertifyConfig, run

    config = common.load(
        CertifyConfig,
        corpus=corpus,
        model=model,
        kpi=kpi,
        out=out,
        split=split,
        has_temperature=has_temperature,
        runtime=runtime,
        address=address,
    )
    said = run(config)
    return Outcome(said, _certificate(said))


def _certificate(said: Mapping[str, Any]) -> str:
    """A certificate's summary for a person."""
    parts = []
    if said["claims"]:
        keys = ("kpi", "num_trials", "num_successes", "value", "bound")
        rows = [[claim[key] for key in keys] for claim in said["claims"]]
        parts.append(table(rows, heads=("constraint", "count", "of them", "observed", "bound")))
    thresholds, costs = said["policy"]["thresholds"], []
    for label, figures in said["labels"].items():
        recall = figures["recall"]
        threshold = max(thresholds.get(label, 0.0), said["policy"].get("floor", 0.0))
        costs.append([label, threshold, figures["precision"]["value"], recall["value"], recall["low"], recall["high"]])
    parts.append(table(costs, heads=("label", "threshold", "precision", "recall", "low", "high")))
    lines = {
        "decided": said["all"]["coverage"]["value"],
        "wrong of those": said["all"]["error_rate"]["value"],
        **({} if said["all"]["cost"] is None else {"cost of an image": said["all"]["cost"]}),
        "images": f"{said['num_certification']:,} certify, {said['num_selection']:,} others chose",
        "split": f"{said['split']['name']}, by {said['split']['how']}",
        "bundle": said["bundle"],
        "page": said["report"] or "none",
    }
    return "\n\n".join([*parts, fields(lines)])
