"""Bundles of earlier releases load, pass their own gate and answer as they did, for ever."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from eagleray.infer.classifier import Classifier
from eagleray.infer.parity import check_parity
from eagleray.infer.runtimes.measure import candidates
from eagleray.vision.bundle import load_bundle

ROOT = Path(__file__).resolve().parents[1] / "golden"
RELEASES = sorted(path.name for path in ROOT.iterdir() if (path / "answers.json").is_file())
BUNDLES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("*/bundle*") if path.is_dir())
TOLERANCE = 1e-4  # FP32 engines differ by rounding only; another release may bring another version of one


def _answers(bundle: str) -> dict[str, Any]:
    told = ROOT / f"{bundle.replace('/bundle', '/answers')}.json"
    return json.loads(told.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def test_there_is_one_in_each_precision() -> None:
    assert {f"0.1.0/bundle{form}" for form in ("", "-fp16", "-int8", "-uint8")} <= set(BUNDLES)


@pytest.mark.parametrize("release", RELEASES)
def test_it_is_small(release: str) -> None:
    assert sum(path.stat().st_size for path in (ROOT / release).rglob("*") if path.is_file()) < 500_000


@pytest.mark.parametrize("name", BUNDLES)
def test_it_loads_and_is_the_same_model(name: str) -> None:
    assert load_bundle(ROOT / name).model_digest == _answers(name)["model_digest"]


@pytest.mark.parametrize("name", BUNDLES)
def test_every_engine_passes_its_gate(name: str) -> None:
    bundle = load_bundle(ROOT / name)
    for runtime in candidates(bundle):
        parity = check_parity(bundle, runtime)
        assert parity.is_passed, parity


@pytest.mark.parametrize("name", BUNDLES)
def test_pictures_are_answered_as_they_were(name: str) -> None:
    """From encoded bytes: decoding, preprocessing, model, policy and embedding."""
    told = _answers(name)
    bundle = load_bundle(ROOT / name)
    images = [(ROOT / name).parent.joinpath(picture).read_bytes() for picture in told["pictures"]]
    is_exact = bundle.precision == "fp32"
    # below it engines round at different places, as far from FP32 as the bundle states
    tolerance = TOLERANCE if is_exact else bundle.lineage["tolerance"]["max_abs_dp"]
    for runtime in candidates(bundle):
        before = told["answers"].get(runtime) or next(iter(told["answers"].values()))
        for was, now in zip(before, Classifier(bundle, runtime, wants_embedding=True).predict(images), strict=True):
            found = now.to_json()
            same = ("status", "label", "label_name", "model_digest", "reason", *(["decision"] if is_exact else []))
            assert {key: found[key] for key in same} == {key: was[key] for key in same}
            now_scores, then_scores = dict(found["topk"]), dict(was["topk"])
            assert list(now_scores) == list(then_scores) or not is_exact
            for label, score in then_scores.items():
                assert now_scores[label] == pytest.approx(score, abs=tolerance)
            drift = 0.0
            if not is_exact:
                drift = bundle.lineage["tolerance"]["max_embedding_drift"] * max(1.0, *map(abs, was["embedding"]))
            assert found["embedding"] == pytest.approx(was["embedding"], abs=2e-3 + drift)  # 2e-3: kept in float16
