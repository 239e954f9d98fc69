"""The verbs of releasing: certify, release, export.

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

CHECK_HEADS = ("engine", "version", "size MB", "ms p50", "ms p95", "img/s", "top-1 agrees", "max |dp|", "passes")


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


def release(
    *,
    model: Model = None,
    corpus: Corpus = None,
    out: OutBundle = None,
    distill_to: Annotated[
        str | None, typer.Option("--distill-to", metavar="NAME", help="A timm architecture or a bundle: the student.")
    ] = None,
    prune: Annotated[
        float | None, typer.Option("--prune", metavar="SHARE", help="Of the multiply-adds to take out, e.g. 0.3.")
    ] = None,
    precision: Annotated[str | None, typer.Option("--precision", metavar="NAME", help="fp16 or int8.")] = None,
    target: Annotated[
        str | None, typer.Option("--target", metavar="ENGINE", help="onnx, openvino or tensorrt; default the fastest.")
    ] = None,
    max_drop_points: Annotated[
        float | None, typer.Option("--max-drop-points", metavar="POINTS", help="Of accuracy; more stops it; 0.5.")
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", metavar="NAME", help="Which images judge; default test.")
    ] = None,
    address: Address = None,
    common: Common,
) -> Outcome:
    """Makes a bundle smaller and faster, step by step; each step is measured, and stops where it loses too much.

    What does not pass is not published: exit code 6. The same command again does only what is missing.
    Example: eagleray release --model B --corpus C --out B2 --prune 0.3 --precision int8 --max-drop-points 0.5
    """
    from eagleray.flows.release import ReleaseConfig, run

    config = common.load(
        ReleaseConfig,
        model=model,
        corpus=corpus,
        out=out,
        distill_to=distill_to,
        prune=prune,
        precision=precision,
        target=target,
        max_drop_points=max_drop_points,
        split=split,
        address=address,
    )
    said = run(config)
    return Outcome(said, _released(said))


STEP_HEADS = (
    "step",
    "MB",
    "M params",
    "M MACs",
    "engine",
    "p50 ms",
    "p95 ms",
    "img/s",
    "x parent",
    "accuracy",
    "points",
)


def _released(said: Mapping[str, Any]) -> str:
    """A release's table for a person."""
    rows = []
    for row in said["rows"]:
        counts = [None if row[name] is None else round(row[name] / 1e6, 2) for name in ("parameters", "macs")]
        change = row["change"]["value"] if row["change"] else None
        rows.append(
            [
                *(row["name"], f"{row['model_bytes'] / 1e6:.1f}", *("-" if n is None else f"{n:,.2f}" for n in counts)),
                *(
                    row["engine"],
                    *(f"{row[name]:.1f}" for name in ("latency_ms_p50", "latency_ms_p95", "images_per_s")),
                ),
                *("" if row["speedup"] is None else f"{row['speedup']:.2f}", f"{row['accuracy']['value']:.4f}"),
                "" if change is None else f"{100 * change:+.2f}",
            ]
        )
    lines = {"bundle": said["bundle"], "page": said["report"] or "none", "run": said["run"]}
    parts = [table(rows, heads=STEP_HEADS), fields(lines), *said["notes"]]
    if said["cheapest"]:
        parts.append(f"cheapest that meets the gates: {said['cheapest']}")
    return "\n\n".join(parts)


def export(
    model: Annotated[
        str | None, typer.Argument(metavar="BUNDLE", help="Bundle: a folder that `import` or `finetune` wrote.")
    ] = None,
    *,
    to: Annotated[str | None, typer.Option("--to", metavar="ENGINE", help="onnx, openvino or tensorrt.")] = None,
    out: Annotated[
        str | None, typer.Option("--out", metavar="PATH", help="File for onnx, folder for openvino and tensorrt.")
    ] = None,
    check: Annotated[
        bool | None, typer.Option("--check", help="Measure every engine that is here: size, latency, agreement.")
    ] = None,
    has_preprocessing: Annotated[
        bool | None, typer.Option("--with-preprocessing", help="Normalise in the graph: uint8 N,H,W,3 in.")
    ] = None,
    common: Common,
) -> Outcome:
    """Writes a bundle in an engine's own form, once it answers the bundle's probe set as the model did.

    The same command again does nothing new.
    Example: eagleray export bundles/lite0 --to onnx --out lite0.onnx --check
    """
    from eagleray.flows.export import ExportConfig, run

    config = common.load(ExportConfig, model=model, to=to, out=out, check=check, has_preprocessing=has_preprocessing)
    said = run(config)
    return Outcome(said, _exported(said))


def _exported(said: Mapping[str, Any]) -> str:
    """An export's summary for a person."""
    parity = said["parity"]
    lines = {
        "written" if said["is_new"] else "nothing to do": said["out"],
        "size": f"{said['bytes'] / 1e6:,.2f} MB",
        "probe set": f"top-1 agrees on {parity['top1_agreement']:.0%} of {parity['num_probes']} images, "
        f"max |dp| {parity['max_abs_dp']:.2g} on {parity['engine']} {parity['version']}",
    }
    if "engine" in said:
        engine = said["engine"]
        run = "run here" if engine["is_run"] else "built, not run: no such GPU was asked"
        lines["engine"] = f"{engine['bytes'] / 1e6:,.2f} MB for {engine['for']}, {engine['library']}, {run}"
    parts = [fields(lines)]
    if said["checks"]:
        parts.append(table([_row(check) for check in said["checks"]], heads=CHECK_HEADS))
        parts += [f"{check['engine']}: not run: {check['reason']}" for check in said["checks"] if check["reason"]]
    return "\n\n".join(parts)


def _row(check: Mapping[str, Any]) -> list[Any]:
    def said(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    size = None if check["size_bytes"] is None else check["size_bytes"] / 1e6
    return [
        check["engine"],
        check["version"],
        said(size, ",.2f"),
        said(check["latency_ms_p50"], ",.2f"),
        said(check["latency_ms_p95"], ",.2f"),
        said(check["images_per_s"], ",.1f"),
        said(check["top1_agreement"], ".0%"),
        said(check["max_abs_dp"], ".2g"),
        check["is_passed"],
    ]
