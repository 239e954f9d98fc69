"""Predictions and threshold policies: what is decided, what is refused, there and back through JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest
from eagleray.core.config import digest_json
from eagleray.core.errors import ArtifactError, ConfigError
from eagleray.vision.evidence import Claim, Evidence
from eagleray.vision.prediction import Prediction, ThresholdPolicy, decide, decided, temper
from hypothesis import given
from hypothesis import strategies as st

LABELS = ("crack", "ok", "stain")


def oracle(policy: ThresholdPolicy, row: list[float]) -> str:
    """The policy in words, one image at a time."""
    passing = [
        (score, -index)
        for index, (label, score) in enumerate(zip(LABELS, row, strict=True))
        if (not policy.thresholds or label in policy.thresholds)
        and np.float32(score) >= np.float32(max(policy.thresholds.get(label, 0.0), policy.floor))
    ]
    return LABELS[-max(passing)[1]] if passing else policy.otherwise


probability = st.floats(0, 1, width=32)


@given(
    thresholds=st.dictionaries(st.sampled_from(LABELS), probability),
    rows=st.lists(st.lists(probability, min_size=3, max_size=3), max_size=6),
    floor=st.sampled_from([0.0, 0.25, 0.9]),
    temperature=st.sampled_from([1.0, 0.5, 2.0]),
)
def test_decide_does_what_the_words_say(
    thresholds: dict[str, float], rows: list[list[float]], floor: float, temperature: float
) -> None:
    policy = ThresholdPolicy(thresholds, "inspect", floor, temperature)
    batch = np.array(rows, np.float32).reshape(-1, 3)
    said = decide(policy, LABELS, batch)
    assert said == [oracle(policy, row) for row in temper(batch, temperature).tolist()]
    assert [LABELS[at] if at >= 0 else "inspect" for at in decided(policy, LABELS, batch).tolist()] == said


def test_a_label_that_passes_wins_over_a_likelier_one_that_does_not() -> None:
    policy = ThresholdPolicy({"crack": 0.3, "ok": 0.9})
    assert decide(policy, LABELS, np.float32([[0.4, 0.6, 0.0]])) == ["crack"]


def test_a_score_equal_to_its_threshold_passes() -> None:
    """Scores are kept as float32: float32(0.7) is below 0.7 in double precision."""
    assert decide(ThresholdPolicy({"ok": 0.7}), LABELS, np.float32([[0.1, 0.7, 0.2]])) == ["ok"]


def test_no_policy_decides_nothing() -> None:
    assert decide(None, LABELS, np.zeros((2, 3), np.float32)) == [None, None]


def test_without_any_threshold_the_likeliest_is_decided() -> None:
    assert decide(ThresholdPolicy(), LABELS, np.float32([[0.1, 0.2, 0.7]])) == ["stain"]


def test_a_foreign_label_is_refused() -> None:
    with pytest.raises(ArtifactError, match="rust"):
        decide(ThresholdPolicy({"rust": 0.5}), LABELS, np.zeros((1, 3), np.float32))


@pytest.mark.parametrize("value", [1.5, -0.1, float("nan"), float("inf"), "0.5", True, None])
def test_a_threshold_that_is_no_probability_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="ok"):
        ThresholdPolicy({"ok": value})  # type: ignore[dict-item]


def test_policies_go_through_json_and_keep_their_digest() -> None:
    policy = ThresholdPolicy({"ok": 0.1, "crack": 1}, otherwise="look")
    back = ThresholdPolicy.from_json(json.loads(json.dumps(policy.to_json())))
    assert back == policy
    assert back.digest == policy.digest == ThresholdPolicy({"crack": 1.0, "ok": 0.1}, otherwise="look").digest
    assert policy.digest != ThresholdPolicy({"ok": 0.1, "crack": 1}).digest


EVIDENCE = Evidence(
    kpi="precision(ok)>=0.9@0.95",
    claims=(
        Claim(
            kpi="precision(ok)>=0.9@0.95",
            target=0.9,
            confidence=0.95,
            num_trials=60,
            num_successes=60,
            value=1.0,
            bound=0.951,
            is_met=True,
        ),
    ),
    method="a test",
    corpus="ab",
    split="calibration",
    split_digest="cd",
    num_selection=30,
    num_certification=90,
    model="ef",
    certified_at="2026-01-31T12:00:00Z",
)


def test_a_policy_of_the_first_release_keeps_its_json_and_its_digest() -> None:
    """Scores are keyed by this digest: another one would score every archive anew."""
    policy = ThresholdPolicy({"crack": 0.25, "ok": 0.5}, otherwise="look")
    first = {"schema": 1, "thresholds": {"crack": 0.25, "ok": 0.5}, "otherwise": "look"}
    assert policy.to_json() == first
    assert policy.digest == digest_json(first)
    assert ThresholdPolicy.from_json(first) == policy


def test_evidence_travels_and_decides_nothing() -> None:
    plain = ThresholdPolicy({"ok": 0.1})
    proved = ThresholdPolicy({"ok": 0.1}, evidence=EVIDENCE)
    back = ThresholdPolicy.from_json(json.loads(json.dumps(proved.to_json())))
    assert back == proved
    assert back.evidence == EVIDENCE
    assert proved.digest == plain.digest
    assert proved != plain
    assert proved.to_json()["schema"] == 1  # an older version decides the same
    with pytest.raises(ArtifactError):
        ThresholdPolicy.from_json({**proved.to_json(), "evidence": {"kpi": "x"}})


@pytest.mark.parametrize("more", [{"floor": 0.5}, {"temperature": 2.0}, {"temperature": 0.5, "scaling": "sigmoid"}])
def test_what_decides_is_in_the_digest_and_an_older_version_refuses_it(more: dict[str, object]) -> None:
    policy = ThresholdPolicy({"ok": 0.1}, **more)  # type: ignore[arg-type]
    assert policy.to_json()["schema"] == 2
    assert policy.digest != ThresholdPolicy({"ok": 0.1}).digest
    assert ThresholdPolicy.from_json(json.loads(json.dumps(policy.to_json()))) == policy


@pytest.mark.parametrize(
    "more",
    [{"floor": 1.5}, {"floor": True}, {"temperature": 0}, {"temperature": float("nan")}, {"scaling": "linear"}],
)
def test_what_is_no_floor_or_temperature_is_refused(more: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        ThresholdPolicy({"ok": 0.1}, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong", [{"schema": 3}, {"schema": 2}, {}, [], {"schema": 1}, {"schema": True}, {"schema": 1, "thresholds": 3}]
)
def test_what_is_no_policy_is_refused(wrong: object) -> None:
    with pytest.raises(ArtifactError):
        ThresholdPolicy.from_json(wrong)  # type: ignore[arg-type]


def test_predictions_go_through_json() -> None:
    scored = Prediction(
        status="scored",
        label="n1",
        label_name="one",
        score=0.75,
        topk=(("n1", 0.75), ("n2", 0.25)),
        decision="n1",
        embedding=np.float16([0.5, -2]),
        model_digest="ab",
    )
    refused = Prediction(status="quarantined", reason="empty", detail="0 bytes", model_digest="ab")
    for prediction in (scored, refused):
        back = Prediction.from_json(json.loads(json.dumps(prediction.to_json())))
        assert back == prediction
        assert (back.embedding is None) == (prediction.embedding is None)
    assert Prediction.from_json(scored.to_json()).embedding.tolist() == [0.5, -2]  # type: ignore[union-attr]


@pytest.mark.parametrize("change", [{"schema": 9}, {"extra": 1}, {"topk": 5}])
def test_what_is_no_prediction_is_refused(change: dict[str, object]) -> None:
    value = Prediction(status="scored").to_json() | change
    with pytest.raises(ArtifactError):
        Prediction.from_json(value)
