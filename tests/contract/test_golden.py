"""Bundles of earlier releases load, pass their own gate and answer as they did, for ever."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from eagleray.infer.classifier import Classifier
from eagleray.infer.parity import check_parity
from eagleray.infer.runtimes.measure import candidates
from eagleray.vision.bundle import load_bundle

ROOT = Path(__file__).resolve().parents[1] / "golden"
RELEASES = sorted(path.name for path in ROOT.iterdir() if (path / "answers.json").is_file())
TOLERANCE = 1e-4  # FP32 engines differ by rounding only; another release may bring another version of one


def test_there_is_one() -> None:
    assert "0.1.0" in RELEASES


@pytest.mark.parametrize("release", RELEASES)
def test_it_is_small(release: str) -> None:
    assert sum(path.stat().st_size for path in (ROOT / release).rglob("*") if path.is_file()) < 200_000


@pytest.mark.parametrize("release", RELEASES)
def test_it_loads_and_is_the_same_model(release: str) -> None:
    told = json.loads((ROOT / release / "answers.json").read_text(encoding="utf-8"))
    assert load_bundle(ROOT / release / "bundle").model_digest == told["model_digest"]


@pytest.mark.parametrize("release", RELEASES)
def test_every_engine_passes_its_gate(release: str) -> None:
    bundle = load_bundle(ROOT / release / "bundle")
    for runtime in candidates(bundle):
        parity = check_parity(bundle, runtime)
        assert parity.is_passed, parity


@pytest.mark.parametrize("release", RELEASES)
def test_pictures_are_answered_as_they_were(release: str) -> None:
    """From encoded bytes: decoding, preprocessing, model, policy and embedding."""
    home = ROOT / release
    told = json.loads((home / "answers.json").read_text(encoding="utf-8"))
    bundle = load_bundle(home / "bundle")
    images = [(home / name).read_bytes() for name in told["pictures"]]
    for runtime in candidates(bundle):
        before = told["answers"].get(runtime) or next(iter(told["answers"].values()))
        for was, now in zip(before, Classifier(bundle, runtime, wants_embedding=True).predict(images), strict=True):
            found = now.to_json()
            same = ("status", "label", "label_name", "decision", "model_digest", "reason")
            assert {name: found[name] for name in same} == {name: was[name] for name in same}
            assert [label for label, _ in found["topk"]] == [label for label, _ in was["topk"]]
            for (_, score), (_, earlier) in zip(found["topk"], was["topk"], strict=True):
                assert score == pytest.approx(earlier, abs=TOLERANCE)
            assert found["embedding"] == pytest.approx(was["embedding"], abs=2e-3)  # kept in float16
