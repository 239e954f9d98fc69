"""Released bundles beside their parent on two cores: INT8, pruned and INT8, a student; speed in pairs, accuracy beside.

The parent is EfficientNet-Lite0 with its published weights, fine-tuned on trashnet. Every bundle is made by `eagleray
release`, whose gates judge it on images that neither trained nor calibrated it. Speed: in each round every contestant
runs on each of its engines, in turns, in processes of their own; quoted is the median over rounds of the ratio to the
parent in ONNX Runtime FP32 within the round, with its least and most. Made bundles are kept: a second run measures.

Example:
    python tests/benchmarks/bench_release.py                                 # all; the first time it trains for an hour
    python tests/benchmarks/bench_release.py --only int8,imagenet --rounds 5
    python tests/benchmarks/bench_release.py --epochs 1 --most 120 --rounds 2    # a trial of this file
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import learning_data
from bench_score import describe_machine
from checkout import EAGLERAY, environment, make_importable

SPEED = {"int8": 1.6, "pruned": 2.5}  # issue 4: times as fast as the parent in ONNX Runtime FP32
LOSS = {"int8": 0.5, "pruned": 0.5, "imagenet": 1.2}  # issue 4: points
STUDENT = "mobilenetv3_small_050"
NAMES = ("int8", "pruned", "student", "imagenet")
KPI_NOT_MET = 6


@dataclass
class Contestant:
    """A bundle, and its seconds an image by round on each engine."""

    name: str
    bundle: Path
    row: Mapping[str, Any] = field(default_factory=dict)
    rates: dict[str, list[float]] = field(default_factory=dict)

    @property
    def best(self) -> str:
        """The engine that is fastest over the rounds."""
        return max(self.rates, key=lambda engine: statistics.median(self.rates[engine]))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join(NAMES), help=f"any of {', '.join(NAMES)}")
    parser.add_argument("--epochs", type=int, default=8, help="of the parent; the others train in proportion")
    parser.add_argument("--prune", type=float, default=0.4, help="share of the multiply-adds to take out")
    parser.add_argument("--most", type=int, default=None, help="images of trashnet: for a trial")
    parser.add_argument("--cores", type=int, default=2, help="threads of every engine")
    parser.add_argument("--turn-s", type=float, default=1.0, help="seconds a batch size in a round")
    parser.add_argument("--cache", type=Path, default=Path("/tmp/eagleray-bench-release"))
    parser.add_argument(
        "--json", type=Path, default=None, help="where the figures go; default CACHE/bench_release.json"
    )
    args = parser.parse_args(argv)
    args.only = tuple(args.only.split(","))
    unknown = set(args.only) - set(NAMES)
    if unknown:
        parser.error(f"--only: unknown {', '.join(sorted(unknown))}; any of {', '.join(NAMES)}")
    return args


@contextmanager
def told(what: str) -> Iterator[None]:
    """Prints how long a part took."""
    start = time.perf_counter()
    yield
    print(f"# {what}: {time.perf_counter() - start:.0f} s", flush=True)


def eagleray(*words: str, settings: Mapping[str, Any] | None = None, ok: Sequence[int] = (0,)) -> tuple[int, Any]:
    """A command of ours and its JSON answer; its notes go to the terminal."""
    more = [word for key, value in (settings or {}).items() for word in ("--set", f"{key}={json.dumps(value)}")]
    command = [*EAGLERAY, *words, *more, "--json", "--plain"]
    done = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in ok:
        raise SystemExit(f"{' '.join(words)} ended with {done.returncode}")
    return done.returncode, json.loads(done.stdout) if done.stdout.strip() else None


def corpus_of(args: argparse.Namespace, name: str) -> Path:
    """A corpus of a zip of shared/data with its own metadata: labels, groups, splits."""
    corpus = args.cache / "corpora" / (f"{name}-{args.most}" if args.most and name == "trashnet" else name)
    source = learning_data.data_folder() / f"{name}.zip"
    if not (corpus / "manifest.json").is_file():
        words = ["ingest", str(source), "--out", str(corpus)]
        eagleray(*words, settings={"in_process_below": 100_000})
    return corpus


def parent_of(args: argparse.Namespace, corpus: Path) -> Path:
    """Lite0, its head solved on frozen features, then all of it trained."""
    head, whole = args.cache / "bundles" / "head", args.cache / "bundles" / f"parent-{args.epochs}"
    if not (whole / "bundle.json").is_file():
        words = ["finetune", "--corpus", str(corpus)]
        eagleray(*words, "--from", "lite0", "--mode", "head", "--out", str(head), settings={"judge": ""})
        settings = {"epochs": args.epochs, "batch_size": 32, "lr": 2e-4, "base_batch": 32, "judge": "", "head": "keep"}
        if args.most:
            settings["max_steps"] = max(1, args.most // 32)
        eagleray(*words, "--from", str(head), "--out", str(whole), settings=settings)
    return whole


def released(args: argparse.Namespace, corpus: Path, parent: Path, name: str) -> Contestant | None:
    """A bundle by `eagleray release`; where a gate stops it, what was made, and that is said."""
    out = args.cache / "bundles" / f"{name}-{args.epochs}-{args.prune:g}"
    words = ["release", "--model", str(parent), "--corpus", str(corpus), "--out", str(out)]
    training = {"epochs": max(1, args.epochs), "batch_size": 32, "base_batch": 32}
    if args.most:
        training["max_steps"] = max(1, args.most // 32)
    settings: dict[str, Any] = {"rounds": 2, "threads": args.cores, "in_process_below": 100_000}
    if name == "int8":
        words += ["--precision", "int8"]
    elif name == "pruned":
        words += ["--prune", str(args.prune), "--precision", "int8"]
        settings["recovery"] = {**training, "lr": 2e-4}
    else:
        words += ["--distill-to", STUDENT]
        settings |= {"max_drop_points": 100, "max_class_drop_points": 100}  # reported beside: it is no gate
        settings["student"] = {**training, "epochs": 2 * training["epochs"], "lr": 1e-3, "is_pretrained": False}
    code, _ = eagleray(*words, settings=settings, ok=(0, KPI_NOT_MET))
    table = json.loads((Path(f"{out}.run") / "release.json").read_text())
    row = table["rows"][-1]
    if code == KPI_NOT_MET:
        failed = [f"{gate['name']}: {gate['seen']}" for gate in row["gates"] if not gate["is_passed"]]
        print(f"# {name}: stopped at {row['name']}: {'; '.join(failed)}", flush=True)
        places = sorted(Path(f"{out}.run").glob("[1-9]-*/bundle"))
        return Contestant(f"{name} (stopped)", places[-1], row) if places else None
    return Contestant(name, out, row)


def race(args: argparse.Namespace, contestants: Sequence[Contestant]) -> None:
    """Fills in the rates: every contestant on every engine once a round, in turns, the order turned each round."""
    from eagleray.infer.runtimes.measure import candidates
    from eagleray.infer.runtimes.timing import TimingSettings, time_engines
    from eagleray.vision.bundle import load_bundle

    settings = TimingSettings(threads=args.cores, rounds=1, turn_s=args.turn_s)
    bundles = {one.name: load_bundle(one.bundle) for one in contestants}
    subjects = {
        f"{one.name}\0{engine}": (bundles[one.name], engine)
        for one in contestants
        for engine in candidates(bundles[one.name])
        if engine != "torch"
    }
    for number in range(args.rounds):
        order = list(subjects) if number % 2 == 0 else list(subjects)[::-1]
        for key, timing in time_engines({key: subjects[key] for key in order}, settings).items():
            name, _, engine = key.partition("\0")
            if timing.failed:
                print(f"# {name} on {engine}: {timing.failed}", flush=True)
                continue
            one = next(each for each in contestants if each.name == name)
            one.rates.setdefault(engine, []).append(timing.images_per_s)


def imagenet(args: argparse.Namespace) -> dict[str, Any]:
    """Lite0 as published, INT8, on 250 photos of ImageNet, calibrated on photos of rubbish."""
    from eagleray.flows.release_images import draw
    from eagleray.flows.release_plan import ReleaseConfig
    from eagleray.infer.quantization import QuantizationSettings, quantize
    from eagleray.vision.bundle import ONNX, PROBES, load_bundle, save_bundle

    whole, small = args.cache / "bundles" / "lite0", args.cache / "bundles" / "lite0-int8"
    if not (whole / "bundle.json").is_file():
        eagleray("import", "lite0", "--out", str(whole))
    bundle = load_bundle(whole)
    if not (small / "bundle.json").is_file():
        config = ReleaseConfig(model=str(whole), corpus=str(corpus_of(args, "trashnet")), out="x", precision="int8")
        pictures = draw(config, bundle.image_spec, 256, needs_labels=())
        found = quantize(bundle, pictures.batches(32), settings=QuantizationSettings(), evaluate=None)
        from dataclasses import replace

        draft = replace(bundle, precision="int8", files={}, path=Path())
        probes = whole / PROBES if PROBES in bundle.files else None
        save_bundle(small, draft, {ONNX: found.data}, probes=probes)
    out = args.cache / "imagenet-eval"
    words = ["evaluate", "--corpus", str(corpus_of(args, "imagenet250")), "--model", str(whole), "--split", "all"]
    _, said = eagleray(*words, "--compare", str(small), "--out", str(out), settings={"in_process_below": 100_000})
    return {"fp32": said["top1"], "change": said["comparison"]["differences"]["top1"], "n": said["n"]}


def rows_of(contestants: Sequence[Contestant]) -> list[dict[str, Any]]:
    """The table: paired ratios to the parent in ONNX Runtime FP32."""
    parent = contestants[0]
    rows = []
    for one in contestants:
        for engine, rates in one.rates.items():
            ratios = [mine / theirs for mine, theirs in zip(rates, parent.rates["onnx"], strict=True)]
            change = one.row.get("change") or {}
            points = [100 * change[key] for key in ("value", "low", "high")] if change.get("low") is not None else None
            rows.append(
                {
                    "name": one.name,
                    "engine": engine,
                    "mb": one.row.get("model_bytes", (one.bundle / "model.onnx").stat().st_size) / 1e6,
                    "images_per_s": statistics.median(rates),
                    "ratio": statistics.median(ratios),
                    "least": min(ratios),
                    "most": max(ratios),
                    "points": points,
                    "is_best": engine == one.best,
                }
            )
    return rows


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints it as Markdown, goals beside what they are of."""
    print("\n| bundle | engine | MB | images/s | x parent in ORT FP32 (least to most) | points (interval) | goal |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        points = "" if row["points"] is None else "{:+.2f} ({:.2f} to {:.2f})".format(*row["points"])
        goal = SPEED.get(row["name"])
        is_met = goal is not None and row["ratio"] >= goal and (row["points"] or [0])[0] >= -LOSS[row["name"]]
        said = "" if goal is None or not row["is_best"] else f">= {goal} x: {'met' if is_met else 'NOT MET'}"
        print(
            f"| {row['name']} | {row['engine']} | {row['mb']:.1f} | {row['images_per_s']:.1f} | {row['ratio']:.2f} "
            f"({row['least']:.2f} to {row['most']:.2f}) | {points} | {said} |"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs it."""
    args = parse(argv)
    make_importable()
    machine = describe_machine(args)
    found: dict[str, Any] = {"machine": machine, "args": {k: str(v) for k, v in vars(args).items()}}
    contestants: list[Contestant] = []
    if set(args.only) - {"imagenet"}:
        with told("the corpus and the parent"):
            corpus = corpus_of(args, "trashnet")
            contestants.append(Contestant("parent", parent_of(args, corpus)))
        for name in (name for name in args.only if name != "imagenet"):
            with told(f"releasing {name}"):
                made = released(args, corpus, contestants[0].bundle, name)
                contestants += [made] if made else []
        with told(f"the race, {args.rounds} rounds"):
            race(args, contestants)
        found["rows"] = rows_of(contestants)
        show(found["rows"])
    if "imagenet" in args.only:
        with told("Lite0 INT8 on imagenet250"):
            found["imagenet"] = imagenet(args)
        change = found["imagenet"]["change"]
        is_met = 100 * change["value"] >= -LOSS["imagenet"]
        print(
            f"\nLite0 INT8 on {found['imagenet']['n']} photos of ImageNet: {100 * change['value']:+.1f} points "
            f"({100 * change['low']:.1f} to {100 * change['high']:.1f}) of {found['imagenet']['fp32']['value']:.3f}; "
            f"at most {LOSS['imagenet']} lost: {'met' if is_met else 'NOT MET'}"
        )
    target = args.json or args.cache / "bench_release.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
