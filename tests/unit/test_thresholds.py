"""Certified thresholds: the promise holds in held-out samples and a naive one breaks; what is tested decides."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from eagleray.assure import binomial
from eagleray.assure.certificate import Certificate, shortfall
from eagleray.assure.certificate_report import About, certificate_report
from eagleray.assure.decision_metrics import METRICS, Cells, Sample, tally
from eagleray.assure.kpi import parse
from eagleray.assure.report import Report
from eagleray.assure.thresholds import Task, certify, judge, path
from eagleray.assure.utility import CostRule, cost_matrix
from eagleray.vision.prediction import Label, ThresholdPolicy, decide, decided
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

DRAWS = 1000
IDS = ("defect", "ok")


def labels(ids: tuple[str, ...]) -> tuple[Label, ...]:
    return tuple(Label(name, name) for name in ids)


def task(text: str, ids: tuple[str, ...] = IDS, **more: object) -> Task:
    return Task(parse(text, labels(ids)).over(ids), ids, present=ids, **more)  # type: ignore[arg-type]


def population(size: int, *, seed: int = 0, ceiling: float = 1.0, classes: int = 2) -> Sample:
    """Images of a model that errs: of its surest answers, a share of ``ceiling`` is right."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 2, (size, classes))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    mixed = ceiling * probabilities + (1 - ceiling) / classes
    targets = (generator.random((size, 1)) > mixed.cumsum(axis=1)).sum(axis=1).clip(max=classes - 1)
    return Sample(probabilities.astype(np.float32), np.eye(classes, dtype=bool)[targets])


def draw(whole: Sample, count: int, generator: np.random.Generator) -> Sample:
    at = generator.integers(0, len(whole), count)  # with replacement: independent draws of the population
    return Sample(whole.probabilities[at], whole.truth[at])


def is_broken(policy: ThresholdPolicy, asked: Task, whole: Sample) -> bool:
    """Whether a policy breaks a constraint on all images that there are: no bound, the truth."""
    said = decided(policy, asked.label_ids, whole.probabilities)
    for constraint in asked.kpi.constraints:
        metric = METRICS[constraint.metric]
        label = None if constraint.label is None else asked.label_ids.index(constraint.label)
        assert metric.count is not None
        successes, trials = metric.count(tally(said, whole.truth, label))
        rate = successes / trials if trials else 0.0
        if rate < constraint.target if metric.op == ">=" else rate > constraint.target:
            return True
    return False


def naive(asked: Task, seen: Sample, *, has_bound: bool) -> ThresholdPolicy | None:
    """The lowest threshold of defect whose share (or uncorrected bound) on all images reaches the target."""
    constraint, scores = asked.kpi.constraints[0], seen.probabilities[:, 0]
    order = np.argsort(-scores)
    hits, trials = np.cumsum(seen.truth[order, 0]), np.arange(1, len(order) + 1)
    needed = binomial.successes_needed(trials, constraint.target, constraint.confidence)
    good = np.flatnonzero(hits >= (needed if has_bound else constraint.target * trials))
    return ThresholdPolicy({"defect": float(scores[order[good[-1]]])}) if len(good) else None


def halves(sample: Sample) -> tuple[Sample, Sample]:
    is_first = np.arange(len(sample)) < len(sample) // 4
    return sample.part(is_first), sample.part(~is_first)


@pytest.mark.parametrize(("ceiling", "least"), [(1.0, 0.5), (0.75, 0.0)])
def test_the_promise_holds_in_held_out_samples_and_the_naive_threshold_breaks_it(ceiling: float, least: float) -> None:
    """1,000 calibrations of 400 images, judged on the whole population; at 0.75 no threshold reaches the target."""
    asked, whole = task("precision(defect)>=0.88@0.9; maximize recall(defect)"), population(40_000, ceiling=ceiling)
    generator = np.random.default_rng(1)
    published = broken = broken_naive = broken_bound = 0
    for _ in range(DRAWS):
        sample = draw(whole, 400, generator)
        first, second = halves(sample)
        policy = certify(asked, selection=first, certification=second).policy
        published += policy is not None
        broken += policy is not None and is_broken(policy, asked, whole)
        by_share, by_bound = (naive(asked, sample, has_bound=has_bound) for has_bound in (False, True))
        broken_naive += by_share is not None and is_broken(by_share, asked, whole)
        broken_bound += by_bound is not None and is_broken(by_bound, asked, whole)
    allowed = stats.binom.ppf(0.999, DRAWS, 0.1)  # what 1,000 draws of a promise that just holds may show
    assert broken <= allowed
    assert published >= least * DRAWS
    assert broken_naive > 3 * allowed
    assert broken_bound > broken
    if ceiling == 0.75:
        assert published == broken  # nothing true could be published


def test_the_promise_holds_for_all_constraints_together() -> None:
    """Three labels whose thresholds act on one another, and an error rate of all: 400 draws."""
    ids = ("a", "b", "c")
    asked = task("precision(*)>=0.7@0.8; error_rate<=0.25@0.8; maximize coverage", ids)
    whole = population(30_000, classes=3, ceiling=0.9, seed=2)
    generator = np.random.default_rng(3)
    published = broken = 0
    for _ in range(400):
        policy = certify(asked, selection=draw(whole, 150, generator), certification=draw(whole, 450, generator)).policy
        published += policy is not None
        broken += policy is not None and is_broken(policy, asked, whole)
    assert broken <= stats.binom.ppf(0.999, 400, 0.2)
    assert published > 100


probability = st.floats(0, 1, width=32)


@given(
    rows=st.lists(st.lists(probability, min_size=3, max_size=3), min_size=1, max_size=12),
    thresholds=st.dictionaries(st.sampled_from(["a", "b", "c"]), probability),
    floor=probability,
    temperature=st.sampled_from([1.0, 0.5, 3.0]),
    seed=st.integers(0, 9),
)
def test_claims_count_what_decide_says(
    rows: list[list[float]], thresholds: dict[str, float], floor: float, temperature: float, seed: int
) -> None:
    """Counted again in words, one image at a time, from the decisions that Classifier keeps."""
    ids = ("a", "b", "c")
    truth = np.eye(3, dtype=bool)[np.random.default_rng(seed).integers(0, 3, len(rows))]
    sample = Sample(np.array(rows, np.float32), truth)
    asked = task(
        "precision(a)>=0.5; recall(b)>=0.5; specificity(c)>=0.5; npv(a)>=0.5; error_rate<=0.5; coverage>=0.5", ids
    )
    policy = ThresholdPolicy(thresholds, "human", floor, temperature)
    said = decide(policy, ids, sample.probabilities)
    is_true = [ids[row.argmax()] for row in truth]
    pairs = list(zip(said, is_true, strict=True))
    kept = [(s, t) for s, t in pairs if s != "human"]
    expected = [
        (sum(t == "a" for s, t in pairs if s == "a"), sum(s == "a" for s, _ in pairs)),
        (sum(s == "b" for s, t in pairs if t == "b"), sum(t == "b" for _, t in pairs)),
        (sum(s != "c" for s, t in pairs if t != "c"), sum(t != "c" for _, t in pairs)),
        (sum(t != "a" for s, t in pairs if s != "a"), sum(s != "a" for s, _ in pairs)),
        (sum(s != t for s, t in kept), len(kept)),
        (len(kept), len(pairs)),
    ]
    claims = judge(policy, asked, sample).claims
    assert [(claim.num_successes, claim.num_trials) for claim in claims] == expected


def test_the_path_leads_from_the_surest_towards_the_objective() -> None:
    seen = population(600, seed=4)
    down = path(task("precision(defect)>=0.8; maximize recall(defect)"), seen, scale=3, temperature=1.0)
    assert len(down) > 3
    values = [policy.thresholds["defect"] for policy in down]
    assert values == sorted(values, reverse=True)
    up = path(task("recall(defect)>=0.5; maximize precision(defect)"), seen, scale=3, temperature=1.0)
    values = [policy.thresholds["defect"] for policy in up]
    assert len(up) > 3
    assert values == sorted(values)
    found = certify(
        task("precision(defect)>=0.8; maximize recall(defect)"), selection=seen, certification=population(1800)
    )
    recalls = [step.objective for step in found.steps if step.is_met]
    assert found.step.objective == max(value for value in recalls if value is not None)


def test_every_passing_policy_is_one_that_stands_before_the_first_that_fails() -> None:
    found = certify(
        task("precision(defect)>=0.85; maximize recall(defect)"),
        selection=population(300, seed=5),
        certification=population(900, seed=6),
    )
    assert all(step.is_met for step in found.steps[:-1])
    assert found.policy is not None
    for step in found.steps:
        assert step.is_met == all(claim.bound is not None and claim.bound >= 0.85 for claim in step.claims)


def test_an_abstention_keeps_what_is_sure_and_a_temperature_is_part_of_it() -> None:
    asked = task("error_rate(kept)<=0.1@0.9; maximize coverage", otherwise="human")
    found = certify(asked, selection=population(500, seed=7), certification=population(1500, seed=8), temperature=2.0)
    policy = found.policy
    assert policy is not None
    assert policy.thresholds == {}
    assert (policy.temperature, policy.otherwise) == (2.0, "human")
    assert 0.5 < policy.floor < 1
    claim = found.step.claims[0]
    assert claim.bound == binomial.upper_bound(claim.num_successes or 0, claim.num_trials, 0.9)
    assert claim.bound <= 0.1


def test_labels_that_the_kpi_does_not_name() -> None:
    ids = ("a", "b", "c")
    sample, more = population(400, classes=3, seed=1), population(1200, classes=3, seed=2)
    text = "precision(a)>=0.6; maximize recall(a)"
    only = certify(task(text, ids), selection=sample, certification=more).policy
    assert only is not None
    assert set(only.thresholds) == {"a"}
    free = certify(task(text, ids, others="decide"), selection=sample, certification=more).policy
    assert free is not None
    assert (free.thresholds["b"], free.thresholds["c"]) == (0, 0)
    assert set(decide(free, ids, more.probabilities)) == set(ids)


def test_costs_choose_and_their_bound_is_of_other_images() -> None:
    costs = cost_matrix(CostRule(wrong=1, abstain=0.3, pairs={"defect": {"ok": 20}}), IDS)
    asked = task("cost<=1@0.9; minimize cost", costs=costs)
    found = certify(asked, selection=population(500, seed=1), certification=population(1500, seed=2))
    claim = found.step.claims[0]
    assert found.policy is not None
    assert claim.num_successes is None
    assert claim.value is not None
    assert claim.bound is not None
    assert claim.value < claim.bound <= 1
    said = decided(found.policy, IDS, population(5000, seed=3).probabilities)
    truth = population(5000, seed=3).truth
    plain = decided(ThresholdPolicy(), IDS, population(5000, seed=3).probabilities)
    assert costs.losses(said, truth).mean() < 0.7 * costs.losses(plain, truth).mean()
    alone = certify(
        task("minimize cost", costs=costs), selection=population(500, seed=1), certification=population(900)
    )
    assert alone.policy is not None
    assert alone.step.claims == ()


def test_what_is_missing_is_said_with_a_number_or_with_its_absence() -> None:
    claim = judge(
        ThresholdPolicy({"defect": 0.0}),
        task("precision(defect)>=0.95@0.95"),
        Sample(np.float32([[0.9, 0.1]] * 40), np.array([[1, 0]] * 39 + [[0, 1]], bool)),
    ).claims[0]
    sentence, needed = shortfall(claim, num_images=80)
    assert "39 of 40 (0.975)" in sentence
    assert needed is not None
    trials = needed * 40 // 80
    assert binomial.lower_bound(int(0.975 * trials), trials, 0.95) >= 0.95 - 0.01
    worse, none = shortfall(replace(claim, num_successes=30, value=0.75, bound=0.6), num_images=80)
    assert none is None
    assert "more labels alone will not do" in worse


def test_the_report_goes_through_json_and_says_whether_it_holds() -> None:
    asked = task("precision(defect)>=0.8; maximize recall(defect)")
    first, second = population(300, seed=1), population(900, seed=2)
    made = Certificate(asked, certify(asked, selection=first, certification=second), first, second)
    report = certificate_report(
        made, About("Certificate", "2026-01-31T12:00:00Z", training="It was trained elsewhere.")
    )
    assert Report.from_json(report.to_json()) == report
    assert report.verdict is not None
    assert report.verdict.is_good
    claim = made.claims[0]
    assert f"lower bound {claim.bound:.3f} on {claim.num_trials:,} decisions" in report.verdict.text
    document = made.to_json()
    recall = document["labels"]["defect"]["recall"]
    cells = made.cells("defect")
    assert recall["value"] == cells.hits / cells.true
    assert (recall["low"], recall["high"]) == binomial.interval(cells.hits, cells.true, 0.95)
    at = [cells for threshold, cells in made.sweep("defect") if threshold == made.policy.thresholds["defect"]]
    assert at == [cells]
    hard = task("precision(defect)>=0.999; maximize recall(defect)")
    failed = Certificate(hard, certify(hard, selection=first, certification=second), first, second)
    assert not failed.is_met
    assert not certificate_report(failed, About("C", "2026-01-31T12:00:00Z")).verdict.is_good  # type: ignore[union-attr]


def test_every_rate_is_a_count_among_trials() -> None:
    cells = Cells(hits=3, decided=5, true=4, total=10)
    for name, metric in METRICS.items():
        if metric.count is not None:
            successes, trials = metric.count(cells)
            assert 0 <= successes <= trials <= 10, name


def test_several_labels_an_image_are_right_when_the_decided_one_is_among_them() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 2, (2000, 3))
    probabilities = (1 / (1 + np.exp(-logits))).astype(np.float32)
    truth = generator.random((2000, 3)) < probabilities
    truth[~truth.any(axis=1), 0] = True  # what has no label is left out of a corpus' images
    sample, ids = Sample(probabilities, truth), ("a", "b", "c")
    asked = task("precision(a)>=0.8; error_rate<=0.2; maximize coverage", ids, scaling="sigmoid")
    first, second = sample.part(np.arange(2000) < 500), sample.part(np.arange(2000) >= 500)
    found = certify(asked, selection=first, certification=second, temperature=1.3)
    assert found.policy is not None
    assert found.policy.scaling == "sigmoid"
    said = decide(found.policy, ids, second.probabilities)
    kept = [(name, row) for name, row in zip(said, second.truth, strict=True) if name in ids]
    wrong = sum(not row[ids.index(name)] for name, row in kept if name is not None)
    by_name = {claim.kpi.partition("<")[0]: claim for claim in found.step.claims}
    assert (by_name["error_rate"].num_successes, by_name["error_rate"].num_trials) == (wrong, len(kept))
    made = Certificate(asked, found, first, second, is_multi_label=True)
    assert made.sets is None
    report = certificate_report(made, About("Certificate", "2026-01-31T12:00:00Z"))
    assert Report.from_json(report.to_json()) == report
